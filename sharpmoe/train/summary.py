"""What a finished run prints: how long it took, what it reached, where everything is, what to run next."""

from __future__ import annotations

import shlex
from pathlib import Path

from sharpmoe.checkpoint.save import Checkpoints
from sharpmoe.config import RunConfig
from sharpmoe.console import clock
from sharpmoe.invocation import spell_command
from sharpmoe.train.monitor import measures
from sharpmoe.train.runlog import RunLog

_SAMPLES = "samples"  # folders and files of a run, as the monitor writes them
_ALLOCATION = "allocation"
_LABELS = 4  # classes that the command for samples draws, at most


def closing_summary(run: RunConfig, folder: Path, checkpoint: Path, log: RunLog) -> str:
    """Return the lines after the last step; commands can be pasted."""
    rows = {"trained": _trained(log), "validation": _validation(log.validations), "weights": _weights(checkpoint)}
    rows["best"] = _best(run, checkpoint)
    places = {"samples": folder / _SAMPLES, "allocation": folder / _ALLOCATION, "curves": folder / "tensorboard"}
    places["report"] = folder / "report.html"
    rows |= {name: str(place) for name, place in places.items() if place.exists()}
    lines = [f"done: {checkpoint}", *(f"  {name:<11}{text}" for name, text in rows.items() if text)]
    return "\n".join([*lines, "next:", *(f"  {command}" for command in _next_commands(run, folder))])


def _trained(log: RunLog) -> str:
    steps = log.total_steps - log.first_step + 1
    if steps < 1 or not log.seconds:
        return ""
    passed, missed = clock(log.passed()), f", {log.not_taken} of them not taken (see faults/)" if log.not_taken else ""
    return f"{steps} step(s) in {passed}, {log.images / log.seconds:.1f} images/s in the steps{missed}"


def _validation(losses: dict[int, float]) -> str:
    if not losses:
        return ""
    last, best = max(losses), min(losses, key=lambda step: losses[step])
    best_text = "the best of the run" if best == last else f"best {losses[best]:.4f} after step {best}"
    return f"flow loss {losses[last]:.4f} after step {last}, {best_text}"


def _weights(checkpoint: Path) -> str:
    return f"{checkpoint / 'ema.safetensors'} (averaged), live.safetensors beside it"


def _best(run: RunConfig, checkpoint: Path) -> str:
    """Return the checkpoint that `checkpoint.keep_best` keeps, "" where it is the last."""
    best = Checkpoints.kept_best(checkpoint.parent) if run.checkpoint.keep_best else None
    return "" if best in (None, checkpoint) else f"{best} had the lowest held-out flow loss of those that are kept"


def _next_commands(run: RunConfig, folder: Path) -> list[str]:
    place = shlex.quote(str(folder))
    commands = [f"{spell_command('sample')} {place}{_what_to_draw(run)}", f"{spell_command('report')} {place}"]
    if run.checkpoint.init is not None and run.model.family.has_experts and measures(run):  # it has held-out data
        commands.insert(1, f"{spell_command('evaluate')} {shlex.quote(run.checkpoint.init)} {place}")
    return [*commands, *([f"tensorboard --logdir {place}"] if "tensorboard" in run.log.trackers else ())]


def _what_to_draw(run: RunConfig) -> str:
    """Return the options of `sample` that this model needs, each after a blank."""
    if run.model.conditioning == "text":
        return "" if run.sample.captions else ' --captions "a red apple"'
    labels = " ".join(map(str, range(min(_LABELS, run.model.num_classes))))
    unguided = not run.model.class_dropout and run.sample.cfg_scale != 1  # nothing to guide away from
    return f" --labels {labels}{' --cfg-scale 1' if unguided else ''}"
