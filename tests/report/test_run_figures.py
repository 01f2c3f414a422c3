import json
from pathlib import Path

import pytest

from sharpmoe.errors import DataError
from sharpmoe.report.run_figures import describe_run, load_routing, reduced_curves
from tests.report.stored_run import write_run


def test_a_described_run_is_json_with_everything(tmp_path: Path) -> None:
    run = describe_run(write_run(tmp_path / "toy"))
    assert json.loads(json.dumps(run, allow_nan=False))["progress"] == {
        "done": 6,
        "total": 6,
        "starts": [{"time": "T", "step": 0}],
    }
    assert run["flops"] == {"per_image": {"dense": 3e9, "routed": 1e9}, "total": 4e9 * 8 * 6}
    assert list(run["allocation"]["results"]) == ["before", "after"]
    assert run["layers"]["routing_load_max"] == [0.1, 0.2]
    assert [picture["step"] for picture in run["pictures"]["samples"]] == [0, 6]
    assert list(load_routing(run)) == [0, 6]
    assert run["notes"] == []


def test_curves_of_layers_become_mean_least_and_largest() -> None:
    found = reduced_curves({"a/layer0": {1: 0.1, 2: 1.0}, "a/layer1": {1: 0.3}, "loss/flow": {1: 2.0}})
    assert found == {"loss/flow": {1: 2.0}, "a/mean": {1: 0.2}, "a/least": {1: 0.1}, "a/largest": {1: 0.3}}


def test_damaged_files_are_notes_and_the_rest_is_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "toy")
    log = run / "log.jsonl"
    log.write_text(log.read_text() + '12\n"text"\n[1]\n{"run": "a"}\n{"run": "a", "step": 7, "loss/tot')
    (run / "allocation" / "after.json").write_text('{"saliency": 1')
    (run / "routing" / "step00000006.npz").write_bytes(b"PK\x03\x04")
    described = describe_run(run)
    assert list(described["allocation"]["results"]) == ["before"]
    assert list(load_routing(described)) == [0]
    assert len(described["notes"]) == 2
    assert described["progress"]["done"] == 6


def test_long_curves_keep_their_extremes(tmp_path: Path) -> None:
    run = tmp_path / "long"
    run.mkdir()
    lines = [{"run": "a", "step": step, "loss/total": 9.0 if step == 4321 else step % 7} for step in range(1, 10_001)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = describe_run(run)["curves"]["loss/total"]
    assert len(curve["steps"]) <= 302
    assert (curve["steps"][0], curve["steps"][-1]) == (1, 10_000)
    assert (min(curve["values"]), max(curve["values"])) == (0, 9.0)


@pytest.mark.parametrize("old", ["ec", "diffmoe"])
def test_old_runs_are_read(old: str) -> None:
    run = describe_run(Path(__file__).parents[1] / "data" / "old_run" / old)
    assert run["progress"]["done"] == run["progress"]["total"]
    assert run["curves"]["loss/total"]["values"]


def test_settings_come_from_the_run_file_where_the_log_has_none(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"run": "a", "step": 1, "loss/total": 1.0}\n')
    (tmp_path / "config.yaml").write_text("train:\n  steps: 3\nname: x\n")
    assert describe_run(tmp_path)["settings"] == {"train.steps": 3, "name": "x"}
    (tmp_path / "config.yaml").write_text("train: [")
    assert describe_run(tmp_path)["notes"]


def test_a_folder_without_a_log_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no log.jsonl; expected the folder of a run \(runs/<name>\)$"):
        describe_run(tmp_path)
    for number in range(9):
        (tmp_path / f"r{number}").mkdir()
        (tmp_path / f"r{number}" / "log.jsonl").touch()
    with pytest.raises(DataError, match=rf", as {tmp_path / 'r0'}, .*{tmp_path / 'r7'} and 1 more$"):
        describe_run(tmp_path)


def add_validations(folder: Path, by_step: dict[int, list[float]]) -> None:
    with (folder / "log.jsonl").open("a") as log:
        for step, values in by_step.items():
            log.write(json.dumps({"run": "r", "step": step, "validation/flow": sum(values) / len(values)}) + "\n")
            log.write(json.dumps({"event": "validation", "run": "r", "step": step, "per_image": values}) + "\n")


def test_validation_has_errors_over_images_and_a_paired_change(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    add_validations(folder, {90: [0.0, 9.0]})
    with (folder / "log.jsonl").open("a") as log:  # step 90 was done by a process that died
        log.write(json.dumps({"event": "start", "run": "s", "step": 70, "settings": {}}) + "\n")
    add_validations(folder, {80: [0.5, 0.7, 0.9], 90: [0.4, 0.5, 0.6]})
    run = describe_run(folder)
    curve, change = run["curves"]["validation/flow"], run["validation"]
    errors = dict(zip(curve["steps"], curve["errors"], strict=True))
    assert errors[80] == pytest.approx(0.2 / 3**0.5)
    assert errors[90] == pytest.approx(0.1 / 3**0.5)
    assert (change["first"], change["last"], change["per_image"]) == (80, 90, [0.4, 0.5, 0.6])
    assert change["change"]["mean"] == pytest.approx(-0.2)
    assert change["change"]["low"] < -0.2 < change["change"]["high"]


def test_validation_of_one_image_has_no_error(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    add_validations(folder, {90: [0.5]})
    run = describe_run(folder)
    assert "errors" not in run["curves"]["validation/flow"]
    assert "change" not in run["validation"]
    json.dumps(run, allow_nan=False)
