"""The log of a run that is stopped and goes on: every figure once, every process on record."""

import io
import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sharpmoe.evaluation.validation import Validation
from sharpmoe.log_file import read_log, read_log_lines
from sharpmoe.trackers import tensorboard_events
from sharpmoe.train.flops import StepFlops
from sharpmoe.train.metrics import Effort, StepStats
from sharpmoe.train.runlog import RunLog


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def stats(step: int, loss: float | None = None) -> StepStats:
    losses = {"total": 1.0 / step if loss is None else loss, "routing": 0.0}
    return StepStats(
        step=step,
        losses=losses,
        grad_norm=0.25,
        lr=1e-4,
        images=32,
        tokens=32 * 64,
        seconds=0.5,
        wait_seconds=0.1,
    )


def next_second() -> None:
    """TensorBoard orders the files of a run by the second of their making; processes are further apart than this."""
    time.sleep(1.001 - time.time() % 1)


def steps_of(folder: Path, tag: str = "loss/total") -> list[int]:
    """Steps that TensorBoard shows."""
    return [event.step for event in EventAccumulator(str(folder / "tensorboard")).Reload().Scalars(tag)]


def test_the_log_starts_at_step_one_and_goes_to_tensorboard_and_jsonl(tmp_path: Path) -> None:
    log = RunLog(tmp_path, total_steps=12, every=5, stream=io.StringIO())
    for step in range(1, 13):
        log.step(stats(step), {"routing_flipped/layer0": 0.0})
    log.image(12, "samples", torch.zeros(4, 6, 3, dtype=torch.uint8).numpy())
    log.text(12, "allocation", "a  b\n1  2")
    log.close()
    curve = read_log(tmp_path / "log.jsonl")["loss/total"]
    assert list(curve) == [1, 5, 10, 12]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/total")] == [1, 5, 10, 12]
    assert events.Scalars("routing_flipped/layer0")[0].value == 0
    assert events.Tags()["images"] == ["samples"]


def test_a_warning_is_printed_and_kept(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = RunLog(tmp_path, total_steps=12, every=5, stream=stream)
    log.warn(6, "note: inert")
    log.close()
    assert "note: inert" in stream.getvalue()
    assert {"event": "warning", "step": 6, "text": "note: inert"}.items() <= read_log_lines(tmp_path / "log.jsonl")[
        -1
    ].items()
    assert "warnings/text_summary" in EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["tensors"]


def test_a_resumed_log_replaces_what_a_killed_run_left(tmp_path: Path) -> None:
    first = RunLog(tmp_path, 6, every=1, stream=io.StringIO())
    for step in range(1, 5):
        first.step(stats(step))
    first.close()
    path = tmp_path / "log.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "loss/to')  # cut short
    next_second()
    second = RunLog(tmp_path, 6, first_step=3, every=1, stream=io.StringIO())
    for step in range(3, 7):
        second.step(replace(stats(step), losses={"total": 9.0}))
    second.close()
    assert read_log(path)["loss/total"] == {1: 1.0, 2: 0.5, 3: 9.0, 4: 9.0, 5: 9.0, 6: 9.0}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/total")] == [1, 2, 3, 4, 5, 6]


def test_a_file_gets_one_line_per_written_step(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = RunLog(tmp_path, 20, every=10, stream=stream)
    for step in range(1, 21):
        log.step(stats(step))
    log.say("saved")
    log.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert "\r" not in stream.getvalue()
    start = r"step  1/20      \? left   64.0 images/s  total   1.000  grad  0.2500  lr 1.00e-04  data 20%  \d+.\d\d GiB"
    assert re.fullmatch(start, lines[0]), lines[0]
    assert re.match(r"step 10/20   \d:\d\d left ", lines[1])
    assert lines[-1] == "saved"


def test_the_time_left_is_that_of_the_steps_after_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step warms up: it takes half a minute here, each of the others two seconds."""
    now, stream = [100.0], io.StringIO()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    log = RunLog(tmp_path, 14, first_step=5, every=1, stream=stream)
    now[0] += 28
    for step in range(5, 15):
        now[0] += 2
        log.step(stats(step))
    log.close()
    left = [re.match(r"step .{5} +(\S+) left", line) for line in stream.getvalue().splitlines()]
    assert [each and each[1] for each in left] == ["?", *(f"0:{2 * more:02}" for more in range(8, -1, -1))]


def test_the_line_shows_the_utilisation_where_the_peak_is_known(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = RunLog(tmp_path, 2, every=1, stream=stream)
    spent = StepFlops(dense=1e9, routed=0, router=0, wasted=9e9)  # 32 images in half a second: 0.064 TFLOP/s
    log.step(replace(stats(1), effort=Effort(spent, ranks=1, peak_tflops=0.128)))
    log.step(replace(stats(2), effort=Effort(spent, ranks=1)))
    log.close()
    first, second = stream.getvalue().splitlines()
    assert "lr 1.00e-04  mfu 50.0%  data 20%" in first
    assert "lr 1.00e-04  data 20%" in second
    assert read_log(tmp_path / "log.jsonl")["flops/per_image/wasted"] == {1: 9e9, 2: 9e9}


def test_the_line_and_the_log_show_the_learning_rate_of_every_pattern(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = RunLog(tmp_path, 1, every=1, stream=stream)
    log.step(replace(stats(1), lr_scale={"saliency_router": 20.0, "moe.gate": 0.5}))
    log.close()
    assert "lr 1.00e-04 (saliency_router 2.00e-03) (moe.gate 5.00e-05)  data" in stream.getvalue()
    figures = read_log(tmp_path / "log.jsonl")
    assert figures["optim/lr"] == {1: 1e-4}
    assert figures["optim/lr/saliency_router"] == {1: pytest.approx(2e-3)}


def test_a_terminal_gets_one_line_that_moves(tmp_path: Path) -> None:
    stream = Terminal()
    log = RunLog(tmp_path, 3, every=10, stream=stream)
    for step in range(1, 4):
        log.step(stats(step))
    log.say("saved")
    log.close()
    assert stream.getvalue().count("\n") == 2  # after what was said, and at the end
    assert stream.getvalue().count("\r\x1b[K") == 4


def test_every_line_of_the_log_is_json_of_finite_figures(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 2, settings={"seed": 1}, stream=io.StringIO())
    log.step(stats(1, loss=math.nan))
    log.scalars(1, {"validation/flow": 0.5})
    log.event("fault", 1, fault="loss flow is not finite")
    log.close()
    records = [
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ]
    assert [(record["step"], record.get("event")) for record in records] == [
        (0, "start"),
        (1, None),
        (1, None),
        (1, "fault"),
    ]
    assert {record["run"] for record in records} == {log.run}
    assert records[0]["settings"] == {"seed": 1}
    assert "loss/total" not in records[1]
    assert set(read_log(tmp_path / "log.jsonl")) >= {"loss/routing", "validation/flow"}


def test_every_process_leaves_its_lines_and_its_settings(tmp_path: Path) -> None:
    path, written = tmp_path / "log.jsonl", b""
    for first_step, seed in ((1, 7), (4, 8), (4, 9)):  # the second died before its first checkpoint
        log = RunLog(tmp_path, 9, first_step, every=1, settings={"seed": seed}, stream=io.StringIO())
        for step in range(first_step, first_step + 5):
            log.step(stats(step, loss=float(seed)))
        log.close()
        assert path.read_bytes().startswith(written)  # only ever appended to
        written = path.read_bytes()
    starts = [record for record in read_log_lines(path) if record.get("event") == "start"]
    assert [record["settings"]["seed"] for record in starts] == [7, 8, 9]
    assert len({record["run"] for record in starts}) == 3
    assert read_log(path)["loss/total"] == {step: 7.0 if step < 4 else 9.0 for step in range(1, 9)}


def test_points_that_a_dead_process_left_are_not_shown(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 9, every=1, stream=io.StringIO())
    for step in range(1, 8):
        log.step(stats(step))  # killed: never closed
    next_second()
    again = RunLog(tmp_path, 9, first_step=4, every=1, stream=io.StringIO())
    again.step(stats(4))
    again.close()
    assert list(read_log(tmp_path / "log.jsonl")["loss/total"]) == steps_of(tmp_path) == [1, 2, 3, 4]
    log.close()


def test_figures_reach_the_files_before_the_log_is_closed(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 9, every=1, stream=io.StringIO())
    log.step(stats(1))
    assert list(read_log(tmp_path / "log.jsonl")["loss/total"]) == steps_of(tmp_path) == [1]
    log.close()
    log.close()


def test_a_full_disk_costs_figures_not_the_run(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = RunLog(tmp_path, 9, every=1, stream=stream)
    log.lines._stream = Path("/dev/full").open("w")  # noqa: SIM115 (the log closes it)
    for step in (1, 2, 3):
        log.step(stats(step))
    log.close()
    assert stream.getvalue().count("figures cannot be written (No space left on device); training goes on") == 1
    assert steps_of(tmp_path) == [1, 2, 3]


def validated(mean: float) -> Validation:
    return Validation({0.5: mean}, mean, 0.01, 4)


def test_the_validation_is_printed_with_the_best_of_all_processes(tmp_path: Path) -> None:
    for first_step, means in ((1, (0.5, 0.4)), (3, (0.45, 0.3))):
        stream = io.StringIO()
        log = RunLog(tmp_path, 4, first_step, every=1, stream=stream)
        for step, mean in enumerate(means, first_step):
            log.validation(step, validated(mean), live=validated(0.2) if step == 4 else None)
        log.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "validation after step 3: flow loss 0.4500 ± 0.0100 (best 0.4000)"
    assert lines[1].startswith("validation after step 4: flow loss 0.3000 ± 0.0100 (best so far); of the live weights")
    curves = read_log(tmp_path / "log.jsonl")
    assert curves["validation/flow"] == {1: 0.5, 2: 0.4, 3: 0.45, 4: 0.3}
    assert curves["validation_live/flow"] == {4: 0.2}


@pytest.mark.parametrize("method", ["__init__", "add_scalar"])
def test_tensorboard_that_fails_is_noted_once_and_costs_nothing_else(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no queue")

    monkeypatch.setattr(tensorboard_events.SummaryWriter, method, refuse)
    stream = io.StringIO()
    log = RunLog(tmp_path, 2, every=1, stream=stream)
    for step in (1, 2):
        log.step(stats(step))
    log.close()
    assert set(read_log(tmp_path / "log.jsonl")["loss/total"]) == {1, 2}
    assert stream.getvalue().count("figures cannot be written (RuntimeError: no queue)") == 1


def test_a_console_on_a_full_disk_costs_lines_and_not_the_run(tmp_path: Path) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    log = RunLog(tmp_path, 2, every=1, stream=Full())
    log.step(stats(1))
    log.say("saved")
    log.close()
    assert read_log(tmp_path / "log.jsonl")["loss/total"] == {1: 1.0}


def test_a_narrow_terminal_gets_a_line_that_does_not_wrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    RunLog(tmp_path, 3, every=10, stream=stream).step(stats(1))
    line = stream.getvalue().removeprefix("\r\x1b[K")
    assert len(line) <= 39
    assert line == "step 1/3      ? left   64.0 images/s"  # figures are whole or left out
    monkeypatch.setenv("COLUMNS", "78")  # the learning rate does not fit any more, the data wait does
    stream = Terminal()
    RunLog(tmp_path, 3, every=10, stream=stream).step(stats(1))
    assert stream.getvalue().endswith("total   1.000  grad  0.2500  data 20%")
    monkeypatch.setenv("COLUMNS", "6")
    stream = Terminal()
    RunLog(tmp_path, 3, every=10, stream=stream).step(stats(1))
    assert stream.getvalue() == "\r\x1b[Kstep "


def test_what_concludes_a_run_is_the_last_thing_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    log = RunLog(tmp_path, 1, stream=stream)
    log.step(stats(1))
    log.conclude("done: folder\nnext:")
    log.close()
    assert stream.getvalue().endswith("GiB\n\r\x1b[Kdone: folder\nnext:\n")


def test_validation_of_one_image_has_no_standard_error(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = RunLog(tmp_path, 2, stream=stream, trackers=())
    log.validation(1, Validation({0.5: 0.25}, 0.25, math.nan, 1, (0.25,)))
    log.close()
    assert "validation after step 1: flow loss 0.2500 (best so far)\n" in stream.getvalue()
    assert "nan" not in stream.getvalue() + (tmp_path / "log.jsonl").read_text()
