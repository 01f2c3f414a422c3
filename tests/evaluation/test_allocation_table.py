import math
import re
from dataclasses import replace

import pytest

from sharpmoe.evaluation.allocation import ALLOCATION_RANGES, ImageMean, measure_allocation, paired_change
from sharpmoe.evaluation.allocation_table import allocation_table, measured_images, short_allocation_table
from tests.toys import ToySamples, toy_model


def test_the_table_pairs_before_and_after() -> None:
    before = measure_allocation(toy_model(), ToySamples(), images=4)
    after = measure_allocation(toy_model("ec"), ToySamples(), images=4)
    change = paired_change(before, after, "flow", "all t")
    assert change.mean == pytest.approx(after.flow["all t"].mean - before.flow["all t"].mean)
    text = allocation_table({"before": before, "after": after})
    assert "change (paired)" in text
    assert f"{change.mean:+.4f}" in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_short_table_has_rows_of_the_full_one_and_names_it() -> None:
    results = {
        "before": measure_allocation(toy_model(), ToySamples(), images=4),
        "after": measure_allocation(toy_model("ec"), ToySamples(), images=4),
    }
    full = allocation_table(results).splitlines()
    *lines, last = short_allocation_table(results, "run/table.txt").splitlines()
    assert last == "all figures: run/table.txt"
    flips = lines[-4:]
    assert len(lines) == 20
    assert [line for line in lines if line not in full] == ["experts per token by saliency", *flips]
    for name, line in zip(ALLOCATION_RANGES, flips, strict=True):
        shares = [f"{100 * each.strength['all'][name]['flipped']:.2g} %" for each in results.values()]
        assert re.split(" {2,}", line.strip()) == [name, *shares]
    assert any("most salient fifth" in line for line in lines)


def test_saliency_routers_that_decide_little_yet_are_explained() -> None:
    model = toy_model("ec")
    for layer in model.moe_layers():
        layer.saliency_router.out.weight.data.mul_(0.01)
    found = measure_allocation(model, ToySamples(), images=4)
    table, figures = allocation_table({"a": found}), found.strength["all"]["all t"]
    assert 0 < figures["spread"] < 0.1
    assert f"of a change few choices yet ({100 * figures['flipped']:.2g} % of them; spread\n" in table
    assert "usual in a short run" in table
    assert "--optim.lr_scale '{saliency_router: 20}'" in table
    assert f"of a change few choices yet ({100 * figures['flipped']:.2g} % of them" in short_allocation_table(
        {"a": found}, "t"
    )


def test_saliency_routers_that_decide_alone_are_warned_of() -> None:
    model = toy_model("ec")
    for layer in model.moe_layers():
        layer.saliency_router.out.weight.data.mul_(1e3)
    found = measure_allocation(model, ToySamples(), images=4)
    assert "warning: the saliency routers of a decide nearly alone" in allocation_table({"a": found})
    assert "lower their learning rate" in short_allocation_table({"a": found}, "t")


def test_figures_of_few_images_say_of_how_many() -> None:
    found = measure_allocation(toy_model(), ToySamples(), images=4)
    one, two = (ImageMean(0.25, math.nan, 1), ImageMean(0.5, 0.125, 2))
    some = replace(found, foreground={name: one if name == "all t" else two for name in ALLOCATION_RANGES})
    lines = allocation_table({"a": some}).splitlines()
    start = lines.index("Spearman, experts per token with the foreground mask (2 of the images)")
    cells = {line[:34].strip(): line[34:].strip() for line in lines[start + 1 : start + 1 + len(ALLOCATION_RANGES)]}
    assert cells == {name: "0.2500 (1 image)" if name == "all t" else "0.5000 ± 0.1250" for name in ALLOCATION_RANGES}
    assert "nan" not in "".join(cells.values())
    assert "Spearman, experts per token with saliency M" in lines


def test_images_of_the_training_split_are_not_called_held_out() -> None:
    assert measured_images(3, ["unseen:2/2"]) == "3 held-out images of unseen:2/2"
    assert measured_images(3, []) == "3 held-out images"
    assert measured_images(3, ["train:1/2"]) == "3 images of train:1/2 (not held out)"
    assert measured_images(3, ["unseen", "train"]) == "3 images of unseen and train (not held out)"
