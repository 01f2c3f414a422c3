"""The check of a device: limits of time, what is left of it when it is interrupted, its table, and what it counts."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import conduct as conducting
from benchmarks.gpu_check import training
from benchmarks.gpu_check.conduct import Asked, Step, conduct
from benchmarks.gpu_check.facts import Facts, read_facts
from benchmarks.gpu_check.step_profile import Span, busy_seconds, spans_of, top_spans
from benchmarks.gpu_check.table import counted_tests, write_table
from sharpmoe.config_io import PROJECT_ROOT

CHILD = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); time.sleep(60)"


def asked(out: Path, seconds: float = 60.0, parts: tuple[str, ...] = ("a", "b")) -> Asked:
    return Asked(out=out, device="cpu", parts=parts, seconds=seconds)


def part(name: str, *steps: tuple[str, float]) -> Callable[[Asked], list[Step]]:
    return lambda _: [
        Step(part=name, name=f"{name}{number}", words=("-c", code), seconds=seconds)
        for number, (code, seconds) in enumerate(steps)
    ]


def test_a_part_that_fails_or_takes_too_long_does_not_stop_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conducting, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(conducting, "_CPU_FACTOR", 1.0)
    parts = {"a": part("a", ("raise SystemExit(3)", 30), (CHILD, 1.0)), "b": part("b", ("print('done')", 30))}
    monkeypatch.setattr(conducting, "PARTS", parts)
    said: list[str] = []
    assert conduct(asked(tmp_path / "out"), said.append) == 1
    steps = read_facts(tmp_path / "out" / "steps.jsonl")
    assert [(step["step"], step["code"]) for step in steps] == [("a0", 3), ("a1", "limit"), ("b0", 0)]
    assert (tmp_path / "out" / "log" / "b0.txt").read_text() == "done\n"
    assert is_gone(int((tmp_path / "out" / "log" / "a1.txt").read_text()))  # what the part had started ended with it
    assert "| a1 | stopped at its limit, 1 s | exit code 0 |" in (tmp_path / "out" / "table.md").read_text()
    assert [line.partition(" after")[0] for line in said[:3]] == [
        "a0: exit code 3",
        "a1: stopped at its limit",
        "b0: exit code 0",
    ]


def test_parts_without_time_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conducting, "PARTS", {"a": part("a", ("pass", 30))})
    assert conduct(asked(tmp_path / "out", seconds=1.0), lambda _: None) == 1
    assert "| a0 | no time left, 0 s |" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.slow
def test_an_interrupted_check_leaves_what_it_had(tmp_path: Path) -> None:
    script = tmp_path / "check.py"
    out = tmp_path / "out"
    script.write_text(
        "from pathlib import Path\n"
        "from benchmarks.gpu_check import conduct as c\n"
        "def steps(_):\n"
        f"    codes = {{'one': 'pass', 'two': {CHILD!r}}}\n"
        "    return [c.Step(part='a', name=n, words=('-c', code), seconds=60) for n, code in codes.items()]\n"
        "c.PARTS = {'a': steps}\n"
        f"c.conduct(c.Asked(out=Path({str(out)!r}), device='cpu', parts=('a',), seconds=100), print)\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], env=os.environ | {"PYTHONPATH": str(PROJECT_ROOT)})
    try:
        log = out / "log" / "two.txt"
        until(lambda: log.exists() and log.read_text().endswith("\n"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) != 0
    finally:
        process.kill()
    assert is_gone(int(log.read_text()))
    assert [step["step"] for step in read_facts(out / "steps.jsonl")] == ["one"]
    assert "| one | exit code 0" in (out / "table.md").read_text()


def until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet has."""
    try:
        until(lambda: not Path(f"/proc/{pid}").exists() or ") Z " in Path(f"/proc/{pid}/stat").read_text(), 10)
    except FileNotFoundError:
        return True
    return True


def test_facts_survive_a_line_cut_in_half(tmp_path: Path, capsys) -> None:
    facts = Facts(tmp_path / "a.jsonl")
    facts.tell(fact="one", value=1)
    facts.tell(fact="two")
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"fact": "thr')
    assert [fact["fact"] for fact in read_facts(tmp_path / "a.jsonl")] == ["one", "two"]
    assert capsys.readouterr().out.splitlines()[0] == '{"fact": "one", "value": 1}'
    assert read_facts(tmp_path / "none.jsonl") == []


KERNEL = {"kernel": "sm90_gemm", "us": 900.0, "count": 12, "share": 0.6}
FACTS = [
    {"fact": "device", "name": "NVIDIA H100", "gib": 79.6, "driver": "580.1", "cuda": "13.0", "nccl": "2.28.9"},
    {"fact": "software", "python": "3.12.3", "torch": "2.11.0", "deepspeed": "0.19.8", "triton": None},
    {"fact": "gemm", "shape": "8192 x 4096 x 4096", "tflops": 700.0},
    {"fact": "step", "case": "l_32", "fp32_products": "high", "ms": 74.0, "kernels": 3190, "idle_share": 0.25}
    | {"tflops": 240.0, "of_gemm": 0.343, "peak_gib": 17.5, "top": [KERNEL]},
    {"fact": "step", "case": "b_32", "fp32_products": "highest", "error": "CUDA out of memory"},
    {"fact": "graph", "case": "l_32", "eager_ms": 74.0, "graph_ms": 60.0, "eager_over_graph": 1.233},
    {"fact": "waits", "router": "diffmoe", "count": 4, "places": ["train/step.py:9"]},
    {"fact": "run", "run": "default", "seconds_per_step": 0.5, "mfu": 0.31, "data_wait_share": 0.01},
    {"fact": "resume", "run": "default", "same_bits": False, "largest_difference": 3e-7},
    {"fact": "resume", "run": "deterministic", "same_bits": True, "largest_difference": 0.0},
]
CASES = [
    {"case": "moe_layer.diffmoe_l", "ours": 1.5, "ratio": 1.4, "of_limit": 0.9, "met": True, "facts": {"peak_gib": 3.0}}
    | {"goals": {"ratio": 1.3, "of_limit": 0.85, "ms": None}},
    {"case": "train_step.l", "error": "out of memory: CUDA out of memory. Tried", "out_of_memory": True},
]
EXPECTED = """\
NVIDIA H100, 79.6 GiB, driver 580.1, CUDA 13.0, NCCL 2.28.9; python 3.12.3, torch 2.11.0, deepspeed 0.19.8; 2026-12-01; `sharpmoe gpu-check`.

| what | result | goal |
|---|---|---|
| training, default | 0.500 s per step, MFU 0.310, waiting for data 1.0% |  |
| resume, default | largest difference 3e-07 |  |
| resume, deterministic | the same bits | the same bits |
| one product 8192 x 4096 x 4096, bf16 | 700 TFLOP/s |  |
| rollout step, l_32, routers in TF32 | 74.00 ms, 3190 kernels, idle 25.0%, 240 TFLOP/s, 0.343 of one product, 17.5 GiB | >= 0.35 of one product |
| rollout step, l_32, routers in TF32: `sm90_gemm` | 60.0% of the kernels' time, 12 times |  |
| rollout step, b_32, routers in fp32 | error: CUDA out of memory |  |
| CUDA graph of a step, l_32 | 60.00 ms; eager is 1.23 times as long |  |
| waits of the host in a rollout step, diffmoe | 4 (train/step.py:9) |  |
| moe_layer.diffmoe_l | 1.5 ms, 1.4 of the reference's speed, 0.9 of the bound, 3 peak_gib | ratio >= 1.3, bound >= 0.85 (met) |
| train_step.l | error: out of memory: CUDA out of memory. Tried |  |
"""  # noqa: E501


def test_the_table_of_a_device(tmp_path: Path) -> None:
    """Every kind of fact has its rows; errors are rows too."""
    facts = Facts(tmp_path / "facts" / "all.jsonl", quiet=True)
    for fact in FACTS:
        facts.tell(**fact)
    (tmp_path / "facts" / "benchmark_x.json").write_text(json.dumps(CASES))
    write_table(tmp_path, "cuda", "sharpmoe gpu-check", "2026-12-01")
    assert (tmp_path / "table.md").read_text() == EXPECTED


def test_tests_are_counted(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite tests="9" failures="1" errors="1" skipped="3"/><testsuite tests="2"/></testsuites>'
    )
    assert counted_tests(report) == "6 passed, 2 failed, 3 skipped"


def test_kernels_of_two_streams_count_once() -> None:
    spans = [Span("a", 0, 10), Span("b", 5, 20), Span("c", 30, 40), Span("a", 32, 35)]
    assert busy_seconds(spans) == pytest.approx(30e-6)
    assert busy_seconds([]) == 0.0
    assert [(row["kernel"], row["us"], row["count"]) for row in top_spans(spans, 2)] == [("b", 15, 1), ("a", 13, 2)]


def test_operators_of_operators_are_left_out() -> None:
    x = torch.randn(8, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.matmul(x, x)  # linear is DeepSpeed's own once an engine was made in this process
    names = [span.name for span in spans_of(profiler.events() or [], torch.device("cpu"))]
    assert "aten::matmul" in names
    assert "aten::mm" not in names


def test_differing_bits_are_found() -> None:
    one = {"a": torch.zeros(3), "b": torch.ones(2)}
    assert training.distance(one, {name: value.clone() for name, value in one.items()}) == 0.0
    assert training.distance(one, one | {"b": torch.tensor([1.0, 1.5])}) == 0.5
    assert training.distance(one, one | {"a": torch.full((3,), -0.0)}) == 0.0  # as torch.equal sees them
