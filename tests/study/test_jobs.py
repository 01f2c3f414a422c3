"""Processes of a study: several at a time, in their order, stopped by time and by signals. The commands are quick."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from sharpmoe.study import jobs
from sharpmoe.study.jobs import Job, run_jobs

WRITES = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('x')"
SLEEPS = "import pathlib, sys, time; pathlib.Path(sys.argv[1] + '.began').write_text('x'); time.sleep(60)"
FAILS = "print('error: no'); raise SystemExit(2)"


@pytest.fixture(autouse=True)
def plain_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of these tests are programs, not launchers."""
    real = jobs.subprocess.Popen
    monkeypatch.setattr(jobs.subprocess, "Popen", lambda words, **more: real([sys.executable, *words[3:]], **more))


def job(folder: Path, name: str, program: str = WRITES, after: tuple[str, ...] = ()) -> Job:
    file = folder / name
    words = ("-c", program, str(file))
    return Job(name=name, words=words, log=folder / f"{name}.log", is_done=file.is_file, after=after)


def test_jobs_run_after_what_they_need_and_are_not_repeated(tmp_path: Path) -> None:
    said: list[str] = []
    chain = [job(tmp_path, "b", after=("a",)), job(tmp_path, "a"), job(tmp_path, "c", after=("b",))]
    found = run_jobs(chain, 3, None, said.append)
    assert (sorted(found.done), found.failed, found.left) == (["a", "b", "c"], {}, ())
    assert [line.split(":")[0] for line in said if "starts" in line] == ["a", "b", "c"]
    said.clear()
    assert sorted(run_jobs(chain, 3, None, said.append).done) == ["a", "b", "c"]
    assert said == []


def test_a_failure_stops_what_follows_and_nothing_else(tmp_path: Path) -> None:
    chain = [job(tmp_path, "a", FAILS), job(tmp_path, "b", after=("a",)), job(tmp_path, "c")]
    found = run_jobs(chain, 1, None, lambda line: None)
    assert (found.done, found.failed, found.left) == (("c",), {"a": "error: no"}, ("b",))


def test_the_limit_of_time_stops_what_runs(tmp_path: Path) -> None:
    began = time.monotonic()
    found = run_jobs([job(tmp_path, "a", SLEEPS), job(tmp_path, "b")], 1, 0.5, lambda line: None)
    assert time.monotonic() - began < 30
    assert (found.done, found.failed, found.left, found.stopped_by) == ((), {}, ("a", "b"), None)


def test_a_signal_stops_what_runs(tmp_path: Path) -> None:
    def send() -> None:
        while not (tmp_path / "a.began").is_file():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    found = run_jobs([job(tmp_path, "a", SLEEPS)], 1, 60, lambda line: None)
    sender.join()
    assert (found.left, found.stopped_by) == (("a",), signal.SIGTERM)


def test_a_job_is_a_world_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MASTER_PORT", "1")
    program = "import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(' '.join(sorted(os.environ)))"
    run_jobs([job(tmp_path, "a", program)], 1, None, lambda line: None)
    variables = (tmp_path / "a").read_text().split()
    assert "OMP_NUM_THREADS" in variables
    assert not {"RANK", "MASTER_PORT"}.intersection(variables)
