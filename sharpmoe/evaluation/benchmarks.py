"""Figures from what the tools of text-to-image benchmarks write: GenEval's results.jsonl, DPG-bench's results.txt.

A published figure is that of the tool; here it is read, checked for completeness and laid out. GenEval's drifts by
type of GPU, so name it too.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from sharpmoe.errors import ConfigError, DataError, first_line
from sharpmoe.evaluation.metrics import Figure
from sharpmoe.evaluation.sample_metrics import SampleFigures

_GENEVAL_IMAGES = 553 * 4
_SCORE = re.compile(r"DPG-Bench score:\s*([0-9.]+)")
_ROUNDING = 0.05  # between a score and the mean of its prompts, in per cent
_CATEGORY = re.compile(r"\t([^:]+): ([0-9.]+)")


def read_result(benchmark: str, path: Path) -> SampleFigures:
    """Read the result file of a benchmark's tool, by a name of BENCHMARKS. Raises DataError for another file."""
    if benchmark not in BENCHMARKS:
        raise ConfigError(f"--benchmark {benchmark}: expected one of {', '.join(BENCHMARKS)}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)})") from None
    return BENCHMARKS[benchmark](path, text)


def result_names(paths: Sequence[Path]) -> list[str]:
    """Return a column heading for every file: its name, with its folder where several are called alike."""
    stems = [path.stem for path in paths]
    return [path.stem if stems.count(path.stem) == 1 else f"{path.resolve().parent.name}/{path.stem}" for path in paths]


def _geneval(path: Path, text: str) -> SampleFigures:
    """Shares of correct images by task, with standard errors, and their mean over the tasks."""
    by_task: dict[str, list[float]] = {}
    try:
        for line in text.splitlines():
            if line.strip():
                entry = json.loads(line)
                if not isinstance(entry["correct"], bool):
                    raise TypeError(f"correct is {entry['correct']!r}, expected true or false")
                by_task.setdefault(str(entry["tag"]), []).append(float(entry["correct"]))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no result of GenEval's evaluate_images.py ({first_line(error)})") from None
    if not by_task:
        raise DataError(f"{path}: holds no results; expected a line per image from GenEval's evaluate_images.py")
    figures = {tag: _share(hits) for tag, hits in by_task.items()}
    overall = sum(figure.value for figure in figures.values()) / len(figures)
    deviation = math.sqrt(sum(figure.error**2 for figure in figures.values())) / len(figures)
    count = sum(map(len, by_task.values()))
    name = "GenEval" if count == _GENEVAL_IMAGES else f"GenEval of {count} images, not {_GENEVAL_IMAGES}"
    protocol = {"name": f"{name}, mean of {len(figures)} tasks", "images": count, "reference": {}, "result": path.name}
    return SampleFigures(
        samples=path.stem, figures={**figures, "overall": Figure(overall, deviation)}, protocol=protocol
    )


def _share(hits: Sequence[float]) -> Figure:
    mean = sum(hits) / len(hits)
    return Figure(mean, math.sqrt(mean * (1 - mean) / len(hits)))


def _dpg(path: Path, text: str) -> SampleFigures:
    """Scores of the broad categories in per cent, and the mean over prompts."""
    found = _SCORE.search(text)
    if found is None:
        raise DataError(f"{path}: no 'DPG-Bench score'; expected the results.txt of a finished compute_dpg_bench.py")
    broad = text.partition("L1 category scores:")[2].partition("L2 category scores:")[0]
    try:
        score = float(found[1])
        figures = {name.strip(): Figure(float(mean)) for name, mean in _CATEGORY.findall(broad)}
        lines = [line for line in text.partition("Model:")[0].splitlines() if ", " in line]
        scores = [float(line.rsplit(", ", 1)[1]) for line in lines]  # of each prompt, in [0, 1]
    except ValueError as problem:
        raise DataError(f"{path}: no result of DPG-bench's compute_dpg_bench.py ({first_line(problem)})") from None
    mean = sum(scores) / max(len(scores), 1)
    if scores and abs(100 * mean - score) > _ROUNDING:
        raise DataError(
            f"{path}: the mean of its {len(scores)} prompts is {100 * mean:.2f}, its score {found[1]}; score them again"
        )
    error = 100 * statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan
    protocol = {"name": f"DPG-bench, {len(scores)} prompts", "reference": {}, "result": path.name}
    total = Figure(score, error)
    return SampleFigures(samples=path.stem, figures={**figures, "overall": total}, protocol=protocol)


BENCHMARKS: dict[str, Callable[[Path, str], SampleFigures]] = {"geneval": _geneval, "dpg": _dpg}
