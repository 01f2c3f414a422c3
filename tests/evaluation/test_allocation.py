import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from scipy.stats import rankdata, spearmanr

from sharpmoe.errors import DataError
from sharpmoe.evaluation.allocation import (
    ALLOCATION_RANGES,
    ALLOCATION_TIMES,
    IMAGE_PARTS,
    Allocation,
    ImageMean,
    _average_ranks,
    _image_mean,
    _spearman,
    _summarise,
    measure_allocation,
    paired_change,
    paired_interval,
)
from sharpmoe.evaluation.allocation_table import allocation_table
from sharpmoe.evaluation.held_out import Observed, TokenTables, observe
from tests.toys import ToySamples, toy_model


def observed(experts: torch.Tensor, saliency: torch.Tensor) -> Observed:
    images, times, _ = experts.shape
    tables = TokenTables(experts, saliency, torch.full_like(saliency, torch.nan), torch.ones_like(experts))
    return Observed(
        torch.ones(images, times), torch.zeros(images, times, 0, 6), torch.zeros(images, times, 0, 4), (tables,)
    )


def test_ranks_and_correlations_equal_those_of_scipy_with_ties() -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randint(0, 4, (6, 30), generator=g).float()
    b = torch.randint(0, 9, (6, 30), generator=g).float()
    assert _average_ranks(a).numpy().tolist() == rankdata(a.numpy(), axis=1).tolist()
    expected = [spearmanr(x, y).statistic for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    torch.testing.assert_close(_spearman(a, b), torch.tensor(expected, dtype=torch.float64))


def test_constant_and_unknown_vectors_have_no_correlation_and_are_counted() -> None:
    rising = torch.arange(4.0)
    a = torch.stack([rising, torch.ones(4), rising, rising])
    b = torch.stack([rising, rising, torch.full((4,), torch.nan), -rising])
    values = _spearman(a, b)
    assert values[0] == pytest.approx(1)
    assert values[1:3].isnan().all()
    assert values[3] == pytest.approx(-1)
    assert _image_mean(values) == ImageMean(pytest.approx(0), pytest.approx(1), 2)
    assert _image_mean(values[1:3]).images == 0


def test_experts_that_follow_saliency_correlate_in_their_range_of_t_only() -> None:
    saliency = torch.rand(3, 20, generator=torch.Generator().manual_seed(1))
    ranks = _average_ranks(saliency).float()
    experts = torch.stack([ranks if t > 0.65 else torch.full_like(ranks, 2.0) for t in ALLOCATION_TIMES], 1)
    result = _summarise(observed(experts, saliency), ALLOCATION_TIMES, num_layers=2)
    assert result.saliency["t > 0.65"].mean == pytest.approx(1)
    assert result.saliency["t < 0.35"].images == 0
    assert result.constant == {"t > 0.65": 0, "t 0.35-0.65": 3, "t < 0.35": 3, "all t": 0}
    assert result.foreground["all t"].images == 0
    assert result.experts["t < 0.35"].mean == pytest.approx(1.0)  # two experts in two layers
    fifths = [e.mean for e in result.experts_by_saliency["t > 0.65"]]
    assert fifths == sorted(fifths)
    assert fifths[0] == pytest.approx((1 + 2 + 3 + 4) / 4 / 2)


def test_images_of_unequal_token_counts_are_averaged_one_by_one() -> None:
    samples = ToySamples(6, sizes=((8, 8), (4, 14), (10, 12)))
    together = measure_allocation(toy_model("ec", capacity=2.0), samples, images=6)
    observed_alone = [observe(toy_model("ec", capacity=2.0), samples, [index], ALLOCATION_TIMES) for index in range(6)]
    alone = [_summarise(seen, ALLOCATION_TIMES, num_layers=2) for seen in observed_alone]
    for what, ranges in together.per_image.items():
        for name, values in ranges.items():
            expected = [result.per_image[what][name][0] for result in alone]
            assert values == pytest.approx(expected, abs=1e-6, nan_ok=True)
    for fifth, mean in enumerate(together.experts_by_saliency["all t"]):
        each = [result.experts_by_saliency["all t"][fifth].mean for result in alone]
        assert mean.mean == pytest.approx(sum(each) / 6)
    assert together.images == 6
    assert "6 held-out images" in allocation_table({"before": together})


def test_tied_saliency_shares_a_fifth() -> None:
    saliency = torch.zeros(1, 10)
    saliency[0, -1] = 1  # nine ties in the middle of ranks 1..9, then one salient token
    experts = torch.arange(10.0).reshape(1, 1, 10)
    result = _summarise(observed(experts, saliency), (0.5,), num_layers=1)
    fifths = result.experts_by_saliency["all t"]
    assert [e.images for e in fifths] == [0, 0, 1, 0, 1]
    assert fifths[2].mean == pytest.approx(4)
    assert fifths[4].mean == pytest.approx(9)


def test_every_time_is_in_one_range() -> None:
    parts = [name for name in ALLOCATION_RANGES if name != "all t"]
    for t in ALLOCATION_TIMES:
        assert sum(ALLOCATION_RANGES[name][0] < t <= ALLOCATION_RANGES[name][1] for name in parts) == 1


@pytest.mark.parametrize("router", ["ec", "diffmoe"])
def test_measuring_a_model_reports_compute_and_survives_a_file(router: str, tmp_path: Path) -> None:
    result = measure_allocation(toy_model(router), ToySamples(), images=6)
    assert result.foreground["all t"].images == 4  # samples 0 and 5 have no mask
    if router == "ec":
        assert result.experts["all t"].mean == pytest.approx(1.0)  # capacity 1
    path = result.save(tmp_path / "deep" / "before.json")
    json.loads(path.read_text(), parse_constant=pytest.fail)  # no NaN in the file
    again = Allocation.load(path)
    assert str(again) == str(result)


def test_token_choice_spends_the_same_everywhere() -> None:
    result = measure_allocation(toy_model("tc"), ToySamples(), images=3)
    assert result.constant["all t"] == 3
    text = allocation_table({"before": result})
    assert "Spearman" not in text
    assert "all tokens equal" in text


def test_scalars_leave_out_what_is_undefined() -> None:
    named = measure_allocation(toy_model("tc"), ToySamples(), images=3).scalars()
    assert "allocation_flow/allt" in named
    assert "allocation_saliency/allt" not in named
    assert not any(math.isnan(value) for value in named.values())


def test_a_foreign_file_is_a_one_line_error(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{}")
    with pytest.raises(DataError, match="not an allocation result"):
        Allocation.load(path)


def test_flow_loss_by_part_of_an_image_by_hand() -> None:
    saliency = torch.arange(10.0).expand(3, 10) / 10
    mask = torch.zeros(3, 10)
    mask[0, 8:], mask[1, 8:] = 1.0, torch.tensor([1.0, 0.5])
    mask[2] = torch.nan
    flow = torch.stack([torch.arange(10.0) * (k + 1) for k in range(len(ALLOCATION_TIMES))]).expand(3, -1, -1)
    tables = TokenTables(torch.ones_like(flow), saliency, mask, flow)
    routers, loads = (torch.zeros(3, len(ALLOCATION_TIMES), 0, size) for size in (6, 4))
    seen = Observed(flow.mean(-1), routers, loads, (tables,))
    result = _summarise(seen, ALLOCATION_TIMES, num_layers=1)
    factor = 5.5  # mean over the ten times
    assert [result.flow_parts[part]["all t"].mean for part in IMAGE_PARTS[:5]] == pytest.approx(
        [factor * each for each in (0.5, 2.5, 4.5, 6.5, 8.5)]
    )
    foreground, background = (result.flow_parts[part]["all t"] for part in IMAGE_PARTS[5:])
    assert foreground.images == background.images == 2
    assert result.per_image["flow, foreground"]["all t"][:2] == pytest.approx(
        [factor * 8.5, factor * (8 + 0.5 * 9) / 1.5]
    )
    assert result.per_image["flow, background"]["all t"][1] == pytest.approx(factor * (28 + 0.5 * 9) / 8.5)
    assert result.flow_parts["foreground"]["t > 0.65"].mean == pytest.approx(foreground.mean / factor * 2.5)
    forty = {"flow, foreground": {"all t": (40.0, 40.0, math.nan)}}
    before = dataclasses.replace(result, per_image=result.per_image | forty)
    change = paired_change(before, result, "flow, foreground", "all t")
    assert (change.mean, change.images) == (pytest.approx(foreground.mean - 40), 2)
    lines = allocation_table({"a": before, "b": result}).splitlines()
    fifths = ("least salient fifth", "2nd fifth", "3rd fifth", "4th fifth", "most salient fifth")
    labels = [line[:34].strip() for line in lines if line.startswith("  all t: ") and "fifth " in line[:34]]
    assert labels == 2 * [f"all t: {fifth}" for fifth in fifths]  # of experts, and of the flow loss


def test_strength_is_told_by_layer_and_range() -> None:
    model = toy_model("ec")
    result = measure_allocation(model, ToySamples(), images=4)
    assert result.strength.keys() == {"layer0", "layer1", "all"}
    for ranges in result.strength.values():
        for figures in ranges.values():
            assert figures["spread"] > 0
            assert 0 < figures["flipped"] < 1
            assert -1 <= figures["agreement"] <= 1
    for layer in model.moe_layers():
        torch.nn.init.zeros_(layer.saliency_router.out.weight)
        torch.nn.init.zeros_(layer.saliency_router.out.bias)
    inert = measure_allocation(model, ToySamples(), images=4)
    assert {(f["spread"], f["flipped"]) for ranges in inert.strength.values() for f in ranges.values()} == {(0.0, 0.0)}
    assert "note:" not in allocation_table({"a": result, "b": inert})  # never trained, as in every base


def test_strength_is_told_only_of_saliency_routers() -> None:
    without = measure_allocation(toy_model("ec", saliency_router=False), ToySamples(), images=4)
    assert without.strength["all"]["all t"].keys() == {"agreement"}
    assert measure_allocation(toy_model("dense"), ToySamples(), images=4).strength["all"]["all t"] == {}


def test_the_flow_loss_under_markov_noise_is_told_apart(tmp_path: Path) -> None:
    plain = measure_allocation(toy_model(), ToySamples(), images=4)
    both = measure_allocation(toy_model(), ToySamples(), images=4, with_markov_noise=True)
    assert plain.flow_markov == {}
    assert both.flow == plain.flow
    assert both.flow_markov["all t"].images == 4
    assert both.flow_markov["all t"] != both.flow["all t"]
    table = allocation_table({"a": both, "b": both})
    assert "flow loss, noise of a Markov chain" in table
    assert "flow loss, noise of a Markov chain" not in allocation_table({"a": plain, "b": plain})
    read = Allocation.load(both.save(tmp_path / "both.json"))
    assert (read.flow_markov, read.flow_parts, read.strength) == (both.flow_markov, both.flow_parts, both.strength)
    assert str(read.per_image["foreground"]) == str(plain.per_image["foreground"])  # correlations, not losses


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """Without parts, strength and Markov noise; beside a new result it has no paired change of these."""
    new = measure_allocation(toy_model(), ToySamples(), images=4, with_markov_noise=True)
    content = json.loads(new.save(tmp_path / "new.json").read_text())
    for key in ("flow_markov", "flow_parts", "strength"):
        del content[key]
    content["per_image"] = {what: content["per_image"][what] for what in ("saliency", "foreground", "experts", "flow")}
    (tmp_path / "old.json").write_text(json.dumps(content))
    old = Allocation.load(tmp_path / "old.json")
    assert (old.flow, old.flow_parts, old.strength) == (new.flow, {}, {})
    assert "undefined" in allocation_table({"old": old, "new": new})


def test_results_of_other_images_or_another_precision_have_no_change() -> None:
    one = measure_allocation(toy_model(), ToySamples(5))
    assert one.dtype == "float32"
    rounded = measure_allocation(toy_model().to(torch.bfloat16), ToySamples(5))
    others = [rounded, dataclasses.replace(one, split="unseen:2/2"), dataclasses.replace(one, images=4)]
    one = dataclasses.replace(one, split="unseen:1/2")
    assert paired_interval(one, one, "flow", "all t").images == 5
    assert "change (paired)" in allocation_table({"a": one, "b": one})
    assert one.is_comparable(dataclasses.replace(one, split=""))
    for other in others:
        assert not paired_interval(one, other, "flow", "all t").images
        assert "change (paired)" not in allocation_table({"a": one, "b": other})
    assert "10 times, in float32 and bfloat16 (mean" in allocation_table({"a": one, "b": rounded})
