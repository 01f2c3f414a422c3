from pathlib import Path
from typing import Any

import pytest

from sharpmoe.report.run_figures import describe_run
from sharpmoe.report.run_set import describe_runs
from sharpmoe.report.run_verdict import interval_text, verdict_of_change, verdict_of_run
from tests.report.stored_run import allocation, write_run


def said(run: Path | dict[str, Any], rule: str) -> list[tuple[str, str]]:
    described = run if isinstance(run, dict) else describe_run(run)
    return [(each["level"], each["text"]) for each in verdict_of_run(described) if each["rule"] == rule]


def with_after(tmp_path: Path, **after: float) -> Path:
    run = write_run(tmp_path / "toy")
    allocation(**after).save(run / "allocation" / "after.json")
    return run


def test_compute_that_moved_at_equal_loss_is_the_first_sentence(tmp_path: Path) -> None:
    described = describe_run(write_run(tmp_path / "toy", shift=0.1))
    first = verdict_of_run(described)[0]
    assert (first["rule"], first["level"]) == ("allocation", "good")
    assert first["text"].startswith("compute moved to salient tokens: rank correlation +0.1")
    assert "at equal flow loss to 2%" in first["text"]
    interval = described["allocation"]["change"]["saliency"]["all t"]
    assert interval["low"] < 0.1 < interval["high"] or interval["mean"] == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(
    ("after", "level", "words"),
    [
        ({"shift": -0.1}, "warning", "compute moved away from salient tokens: rank correlation -0.1"),
        ({"shift": 0.1, "flow": 0.6}, "warning", ", but flow loss got worse: +0.1"),
        ({"shift": 0.1, "flow": 0.4}, "good", ", flow loss fell: -0.1"),
        ({"shift": 0.1, "flow": 0.505}, "good", "flow loss a little worse, within 2%"),
    ],
)
def test_the_price_of_moving_compute_is_in_its_sentence(
    tmp_path: Path, after: dict[str, float], level: str, words: str
) -> None:
    ((found, text),) = said(with_after(tmp_path, **after), "allocation")
    assert found == level
    assert words in text


def test_without_a_movement_the_loss_has_its_own_sentence(tmp_path: Path) -> None:
    run = describe_run(with_after(tmp_path, flow=0.6))
    run["allocation"]["change"]["saliency"]["all t"] |= {"mean": 0.01, "low": -0.02, "high": 0.04}
    assert (
        "did not measurably move to salient tokens: rank correlation +0.01 [-0.02, 0.04]"
        in said(run, "allocation")[0][1]
    )
    ((level, text),) = said(run, "flow")
    assert level == "bad"
    assert text.startswith("flow loss got worse: +0.1")


def test_a_wide_interval_is_not_called_equal(tmp_path: Path) -> None:
    run = describe_run(write_run(tmp_path / "toy"))
    run["allocation"]["change"]["flow"]["all t"] |= {"mean": 0.0, "low": -0.1, "high": 0.1}
    assert "flow loss not told apart (" in said(run, "allocation")[0][1]


def test_little_measured_is_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "toy")
    (run / "allocation" / "after.json").unlink()
    assert said(run, "allocation")[0][0] == "unknown"
    assert "only allocation/before.json" in said(run, "allocation")[0][1]
    (run / "log.jsonl").write_text("")
    rules = {each["rule"]: each["level"] for each in verdict_of_run(describe_run(run))}
    assert rules == dict.fromkeys(("allocation", "validation", "progress"), "unknown")


@pytest.mark.parametrize(
    ("spread", "words"), [(0.01, "barely change routing"), (5.0, "decide nearly alone"), (0.4, "")]
)
def test_the_strength_of_the_saliency_routers(tmp_path: Path, spread: float, words: str) -> None:
    found = said(with_after(tmp_path, shift=0.1, spread=spread), "strength")
    assert bool(found) == bool(words)
    assert all(words in text for _, text in found)


def test_strength_comes_from_the_log_where_nothing_was_measured(tmp_path: Path) -> None:
    run = describe_run(write_run(tmp_path / "toy"))
    run["allocation"] = {"results": {}, "change": {}}
    assert not said(run, "strength")  # spread 0.15 in the log
    run["curves"]["saliency_spread_t>0.65/mean"]["values"][-1] = 0.001
    assert "barely" in said(run, "strength")[0][1]


def test_waiting_for_data_is_told_with_its_interval(tmp_path: Path) -> None:
    ((level, text),) = said(write_run(tmp_path / "slow", wait=0.4), "data")
    assert level == "warning"
    assert text.startswith(("data-bound: 40% [4", "data-bound: 40% [3"))
    assert not said(write_run(tmp_path / "quick"), "data")
    assert not said(write_run(tmp_path / "short", wait=0.4, steps=3), "data")  # two steps tell nothing


def test_experts_without_tokens_and_overload_and_a_worse_end_are_warned_of(tmp_path: Path) -> None:
    run = describe_run(write_run(tmp_path / "toy", steps=6))
    run["layers"] |= {"routing_dead_experts": [0.0, 2.0], "routing_load_max": [1.0, 6.0]}
    run["curves"]["validation/flow"] = {"steps": [2, 6], "values": [0.4, 0.45]}
    run["progress"]["total"] = 9
    texts = " | ".join(each["text"] for each in verdict_of_run(run))
    assert "dead experts: 2 in 1 layer(s)" in texts
    assert "MoE layer 1 took 6 times the mean load" in texts
    assert "best after step 2 (0.4) and is 0.45 after step 6" in texts
    assert "not finished: step 6 of 9" in texts


@pytest.mark.parametrize("split", ["train", "train:1/2"])
def test_a_measured_training_split_is_not_called_held_out(tmp_path: Path, split: str) -> None:
    run = describe_run(write_run(tmp_path / "toy", steps=6))
    run["curves"]["validation/flow"] = {"steps": [2, 6], "values": [0.4, 0.3]}
    run["settings"] |= {"data.train_split": "train", "data.validation_split": "unseen"}
    assert not said(run, "validation")
    run["settings"]["data.validation_split"] = split
    ((level, text),) = said(run, "validation")
    assert level == "warning"
    assert text.startswith(f"nothing is held out: split {split} is measured, which the run is trained on")


def test_a_base_is_not_compared_with_its_random_start(tmp_path: Path) -> None:
    ((level, text),) = said(write_run(tmp_path / "base", stage="pretrain"), "allocation")
    assert level == "note"
    assert "follow saliency with a rank correlation of 0.3" in text


def test_runs_of_other_images_cannot_be_compared(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, shift=shift) for name, shift in (("a", 0.1), ("b", 0.3))]
    (comparison,) = describe_runs(runs)["comparisons"]
    assert comparison["verdict"][0]["text"].startswith(
        "b against a: compute moved to salient tokens: rank correlation +0.2"
    )
    (told,) = verdict_of_change({}, None, ("b", "a"))
    assert told["level"] == "unknown"
    assert told["text"].startswith("b against a: not enough measured")


def test_an_interval_as_text() -> None:
    assert interval_text({"mean": 0.19, "low": 0.16, "high": 0.22}) == "+0.19 [0.16, 0.22]"
    assert interval_text({"mean": 0.19, "low": None, "high": None}) == "+0.19"
    assert interval_text(None) == "not measured"
