"""`sharpmoe gpu-check`: what it refuses, and the whole check at the smallest sizes on the CPU."""

import json
import time
from pathlib import Path

import pytest

from benchmarks.gpu_check.conduct import PARTS
from benchmarks.gpu_check.facts import read_facts
from launcher.gpu_check import main


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "cuda:1"], "--device: got 'cuda:1', allowed: auto, cpu or cuda; of several GPUs CUDA_VISIBLE"),
        (["--parts", "tests", "sampling"], "--parts: invalid choice: 'sampling'"),
        (["--seconds", "0"], "--seconds: got '0', allowed: a finite number > 0"),
        (["--device", "cpu", "--out", "@"], "which exists and is not an empty folder; name another or remove it"),
    ],
)
def test_what_cannot_be_is_one_line(words: list[str], said: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "results.json").touch()
    assert main([str(tmp_path) if word == "@" else word for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.slow
def test_a_part_leaves_facts_and_a_table(tmp_path: Path, capsys) -> None:
    assert main(["--device", "cpu", "--parts", "environment", "--out", str(tmp_path / "out")]) == 0
    facts = {fact["fact"]: fact for fact in read_facts(tmp_path / "out" / "facts" / "environment.jsonl")}
    assert list(facts) == ["software", "device", "start", "small_operation"]
    assert facts["start"]["device"] == "cpu"
    table = (tmp_path / "out" / "table.md").read_text()
    assert "`sharpmoe gpu-check --device cpu --parts environment`." in table
    assert "environment: exit code 0 after" in capsys.readouterr().err


@pytest.mark.sweep
@pytest.mark.timeout(1800)
def test_the_whole_check_on_the_cpu(tmp_path: Path) -> None:
    """Every part runs at the smallest sizes, in less than three minutes of an idle machine."""
    out, began = tmp_path / "out", time.process_time()
    code = main(["--device", "cpu", "--out", str(out), "--seconds", "1500"])
    logs = {path.name: path.read_text()[-2000:] for path in (out / "log").iterdir()}
    steps = read_facts(out / "steps.jsonl")
    assert code == 0, [(step, logs[f"{step['step']}.txt"]) for step in steps if step["code"] != 0]
    assert [part for part in PARTS if any(step["part"] == part for step in steps)] == list(PARTS)
    facts = [fact for file in (out / "facts").glob("*.jsonl") for fact in read_facts(file)]
    assert not [fact for fact in facts if "error" in fact]
    resumes = [fact for fact in facts if fact["fact"] == "resume"]
    assert all(fact["same_bits"] for fact in resumes)
    assert resumes
    for file in (out / "facts").glob("benchmark_*.json"):
        rows = json.loads(file.read_text())
        assert rows, file.name
        assert not [row for row in rows if "error" in row], file.name
    rows = (out / "table.md").read_text().splitlines()
    assert len(rows) > 40
    assert rows[3] == "|---|---|---|"
    assert all(row.count(" | ") == 2 for row in [rows[2], *rows[4:]])
    assert time.process_time() - began < 60  # the check itself does nothing but wait
