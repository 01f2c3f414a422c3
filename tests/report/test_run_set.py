import json
from dataclasses import replace
from pathlib import Path

import pytest

from sharpmoe.evaluation.allocation import paired_change
from sharpmoe.report.run_figures import load_allocation
from sharpmoe.report.run_set import NOT_SET, describe_runs
from tests.report.stored_run import allocation, write_run


def test_only_keys_that_differ_are_listed(tmp_path: Path) -> None:
    extra = {"optim.lr_scale": {}, "version.torch": "3"}
    runs = [write_run(tmp_path / "a", **{"optim.lr": 1e-3}), write_run(tmp_path / "b", **{"optim.lr": 2e-3}, **extra)]
    assert describe_runs(runs)["differences"] == {
        "configuration": {"optim.lr": [1e-3, 2e-3]},
        "environment": {"version.torch": ["2", "3"]},
    }
    third = write_run(tmp_path / "c", **{"optim.lr": 1e-3, "loss.new": 1})
    found = describe_runs([*runs, third])["differences"]["configuration"]
    assert found == {"optim.lr": [1e-3, 2e-3, 1e-3], "loss.new": [NOT_SET, NOT_SET, 1]}


def test_changes_are_paired_by_image_and_by_step(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", shift=0.1), write_run(tmp_path / "b", shift=0.3, wait=0.21)]
    document = describe_runs(runs)
    (comparison,) = document["comparisons"]
    found = comparison["by_image"]["saliency"]["all t"]
    results = [load_allocation(run, "after") for run in document["runs"]]
    expected = paired_change(*results, "saliency", "all t")
    assert found["mean"] == pytest.approx(expected.mean)
    assert found["low"] < found["mean"] - expected.error < found["mean"] + expected.error < found["high"]
    assert (found["images"], found["seeds"]) == (12, 1)
    assert comparison["by_step"]["throughput/data_wait_share"]["mean"] == pytest.approx(0.2)
    assert comparison["by_step"]["validation/flow"]["low"] is None
    assert "loss/balance" not in comparison["by_step"]  # a loss that neither uses


def test_losses_of_other_batches_are_not_paired(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, **{"data.shards": place}) for name, place in (("a", "d"), ("b", "d"), ("c", "e"))
    ]
    same, other = (comparison["by_step"] for comparison in describe_runs(runs)["comparisons"])
    assert any(tag.startswith("loss/") for tag in same)
    assert "throughput/data_wait_share" in other
    assert not any(tag.startswith(("loss/", "optim/")) for tag in other)


def test_allocations_of_other_images_are_not_paired(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in "ab"]
    replace(allocation(0.3), split="other").save(runs[1] / "allocation" / "after.json")
    assert describe_runs(runs)["comparisons"][0]["by_image"] == {}


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / place / "toy") for place in "ab"]
    assert [run["name"] for run in describe_runs(runs)["runs"]] == [str(run) for run in runs]


def test_validation_of_the_same_images_is_paired(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, **{"data.shards": "d"}) for name in "abc"]
    for folder, values in zip(runs, ([0.1, 0.5, 0.9], [0.2, 0.61, 1.0], [0.2]), strict=True):
        with (folder / "log.jsonl").open("a") as log:
            log.write(json.dumps({"event": "validation", "run": "a", "step": 6, "per_image": values}) + "\n")
    same, fewer = (each["by_step"]["validation/flow"] for each in describe_runs(runs)["comparisons"])
    assert same["mean"] == pytest.approx(0.31 / 3)
    assert 0.08 < same["low"] < same["mean"] < same["high"] < 0.13  # the images vary by a hundred times more
    assert same["first"] == pytest.approx(0.5)
    assert fewer["low"] is None
