"""log.jsonl as a format: what is written is read, whatever a killed process left."""

from pathlib import Path

from sharpmoe.log_file import LOG_FILE, LogWriter, read_log, read_log_lines


def written(folder: Path, run: str, first_step: int, steps: range) -> Path:
    log = LogWriter(folder, run)
    log.event(first_step - 1, "start", {"settings": {"seed": 1}})
    for step in steps:
        log.figures(step, {"loss/total": float(step), f"only/{run}": 1.0})
    log.close()
    return folder / LOG_FILE


def test_figures_and_events_are_read_back(tmp_path: Path) -> None:
    path = written(tmp_path, "a", 1, range(1, 4))
    assert read_log(path) == {"loss/total": {1: 1.0, 2: 2.0, 3: 3.0}, "only/a": {1: 1.0, 2: 1.0, 3: 1.0}}
    first, *rest = read_log_lines(path)
    assert first == {"event": "start", "run": "a", "step": 0, "settings": {"seed": 1}}
    assert [line["step"] for line in rest] == [1, 2, 3]


def test_figures_of_steps_done_twice_are_those_the_run_continued_from(tmp_path: Path) -> None:
    written(tmp_path, "a", 1, range(1, 6))
    path = written(tmp_path, "b", 3, range(3, 5))  # continues from a checkpoint of step 2
    assert read_log(path)["only/a"] == {1: 1.0, 2: 1.0}
    assert list(read_log(path)["loss/total"]) == [1, 2, 3, 4]


def test_an_incomplete_line_is_ended_and_skipped(tmp_path: Path) -> None:
    path = written(tmp_path, "a", 1, range(1, 2))
    path.write_text(path.read_text() + '{"run": "a", "step": 2, "loss/to')
    before = path.read_bytes()
    written(tmp_path, "b", 2, range(2, 3))
    assert path.read_bytes().startswith(before + b"\n")
    assert read_log(path)["loss/total"] == {1: 1.0, 2: 2.0}
    assert len(read_log_lines(path)) == 4
