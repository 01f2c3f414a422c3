"""The results of a check as one Markdown table, as docs/performance.md shows it."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu_check.facts import Fact, read_facts
from sharpmoe.durable import write_atomically

Row = tuple[str, str, str]  # what, result, goal
_SOFTWARE = ("python", "torch", "deepspeed", "megatron-core", "triton", "commit")
_OF_PRODUCT = 0.35  # goal of a rollout step of L with 32 images
_UNITS = ("tflop/s", "gb/s", "peak_gib")  # facts of a benchmark that the table shows
_KERNELS = 5  # of a profile in the table; its facts hold more


def write_table(folder: Path, device: str, command: str, date: str) -> None:
    """Write table.md of a folder of facts, as far as they go."""
    write_atomically(folder / "table.md", "\n".join(_lines(folder, device, command, date)) + "\n")


def _lines(folder: Path, device: str, command: str, date: str) -> Iterator[str]:
    by_fact: dict[str, list[Fact]] = {}
    for file in sorted((folder / "facts").glob("*.jsonl")):
        for fact in read_facts(file):
            by_fact.setdefault(fact["fact"], []).append(fact)
    about, software = (next(iter(by_fact.get(name, [])), {}) for name in ("device", "software"))
    name = about.get("name", device)
    memory = f", {about['gib']:.1f} GiB" if about.get("gib") else ""
    driver = f", driver {about['driver']}" if about.get("driver") else ""
    cuda = f", CUDA {about['cuda']}, NCCL {about['nccl']}" if about.get("cuda") else ""
    versions = ", ".join(f"{key} {software[key]}" for key in _SOFTWARE if software.get(key))
    yield "; ".join(filter(None, [f"{name}{memory}{driver}{cuda}", versions, date, f"`{command}`"])) + "."
    yield ""
    yield "| what | result | goal |"
    yield "|---|---|---|"
    for row in _rows(folder, by_fact):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def _rows(folder: Path, by_fact: Mapping[str, list[Fact]]) -> Iterator[Row]:
    yield from _step_rows(folder)
    for fact in by_fact.get("small_operation", []):
        yield "host time of one small operation", f"{fact['microseconds']:.2f} us", ""
    for kind, text in _TEXTS.items():
        for fact in by_fact.get(kind, []):
            yield from ([(_name(fact), f"error: {fact['error']}", "")] if "error" in fact else text(fact))
    for file in sorted((folder / "facts").glob("benchmark_*.json")):
        yield from _benchmark_rows(file)


def _step_rows(folder: Path) -> Iterator[Row]:
    """What became of every process, and of its tests."""
    for step in read_facts(folder / "steps.jsonl"):
        result = f"{became(step['code'])}, {step['seconds']:.0f} s"
        report = folder / "facts" / f"{Path(step['command'].split()[-1]).stem}.xml"
        if step["part"] == "tests" and report.exists():
            result += f": {counted_tests(report)}"
        yield step["step"].replace("_", " "), result, "exit code 0"


def became(code: int | str | None) -> str:
    """Say how a process ended: its exit code, "limit", or None where it had no time."""
    if code is None:
        return "no time left"
    return "stopped at its limit" if code == "limit" else f"exit code {code}"


def counted_tests(report: Path) -> str:
    """Return how many tests of a JUnit report passed, failed and were skipped."""
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {
        key: sum(int(suite.get(key, "0")) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    }
    failed = counts["failures"] + counts["errors"]
    return f"{counts['tests'] - failed - counts['skipped']} passed, {failed} failed, {counts['skipped']} skipped"


def _run(fact: Fact) -> Iterator[Row]:
    mfu = f", MFU {fact['mfu']:.3f}" if fact.get("mfu") else ""
    waiting = f", waiting for data {fact['data_wait_share']:.1%}" if fact.get("data_wait_share") is not None else ""
    yield f"training, {fact['run']}", f"{fact['seconds_per_step']:.3f} s per step{mfu}{waiting}", ""


def _resume(fact: Fact) -> Iterator[Row]:
    differs = f"largest difference {fact['largest_difference']:.2g}"
    goal = "" if fact["run"] == "default" else "the same bits"
    yield f"resume, {fact['run']}", "the same bits" if fact["same_bits"] else differs, goal


def _step(fact: Fact) -> Iterator[Row]:
    name = _name(fact)
    memory = f", {fact['peak_gib']:.1f} GiB" if fact.get("peak_gib") else ""
    share = f"{fact['kernels']} kernels, idle {fact['idle_share']:.1%}"
    rate = f"{fact['tflops']:.3g} TFLOP/s, {fact['of_gemm']:.3f} of one product"
    goal = f">= {_OF_PRODUCT} of one product" if fact["case"] == "l_32" else ""
    yield name, f"{fact['ms']:.2f} ms, {share}, {rate}{memory}", goal
    for kernel in fact["top"][:_KERNELS]:
        yield (
            f"{name}: `{kernel['kernel'][:60]}`",
            f"{kernel['share']:.1%} of the kernels' time, {kernel['count']} times",
            "",
        )


def _graph(fact: Fact) -> Iterator[Row]:
    if "skipped" not in fact:
        ratio = f"eager is {fact['eager_over_graph']:.2f} times as long"
        yield f"CUDA graph of a step, {fact['case']}", f"{fact['graph_ms']:.2f} ms; {ratio}", ""


def _compiled(fact: Fact) -> Iterator[Row]:
    kind = f"{fact['work']}, {fact['case']}, {fact['backend']}" + ", combo kernels" * fact["combo_kernels"]
    ratio = f"eager is {fact['eager_over_compiled']:.2f} times as long"
    rest = f"compiling took {fact['compiling_seconds']:.0f} s, results differ by {fact['distance']:.1e}"
    yield f"compiled blocks, {kind}", f"{fact['compiled_ms']:.2f} ms; {ratio}; {rest}", ""


def _captured(fact: Fact) -> Iterator[Row]:
    if "skipped" not in fact:
        ratio = f"eager is {fact['eager_over_captured']:.2f} times as long"
        rest = f"{ratio}; results differ by {fact['distance']:.1e}"
        yield f"CUDA graph of a call in sampling, ec, {fact['case']}", f"{fact['captured_ms']:.2f} ms; {rest}", ""


def _waits(fact: Fact) -> Iterator[Row]:
    if fact["count"] is not None:
        yield (
            f"waits of the host in a rollout step, {fact['router']}",
            f"{fact['count']} ({', '.join(fact['places'])})",
            "",
        )


_TEXTS: dict[str, Callable[[Fact], Iterator[Row]]] = {
    "run": _run,
    "resume": _resume,
    "sample": lambda fact: iter([("two pictures from captions", f"{fact['seconds']:.0f} s with the start", "")]),
    "gemm": lambda fact: iter([(f"one product {fact['shape']}, bf16", f"{fact['tflops']:.4g} TFLOP/s", "")]),
    "step": _step,
    "graph": _graph,
    "compiled": _compiled,
    "captured": _captured,
    "waits": _waits,
}


def _name(fact: Fact) -> str:
    rest = [str(fact[key]) for key in ("work", "case", "router", "run") if key in fact]
    products = {"high": "TF32", "highest": "fp32"}.get(fact.get("fp32_products", ""), "")
    kind = "rollout step" if fact["fact"] == "step" else fact["fact"]
    return ", ".join(filter(None, [kind, *rest, products and f"routers in {products}"]))


def _benchmark_rows(file: Path) -> Iterator[Row]:
    """One row per case: time, against the reference, against the bound."""
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    for row in rows:
        if "error" in row:
            yield row["case"], f"error: {row['error'][:120]}", ""
            continue
        shares = {"of the reference's speed": row["ratio"], "of the bound": row["of_limit"]}
        parts = [
            f"{row['ours']:.4g} ms",
            *(f"{value:.3g} {name}" for name, value in shares.items() if value is not None),
        ]
        parts += [
            f"{row['facts'][unit]:.4g} {unit}" for unit in ("tflop/s", "gb/s", "peak_gib") if unit in row["facts"]
        ]
        goals = {"ratio": row["goals"]["ratio"], "bound": row["goals"]["of_limit"]}
        wanted = ", ".join(f"{name} >= {value:.3g}" for name, value in goals.items() if value is not None)
        yield row["case"], ", ".join(parts), wanted and f"{wanted} ({'met' if row['met'] else 'missed'})"
