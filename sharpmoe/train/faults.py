"""What is left of an optimizer step whose numbers went wrong: a file in the run folder, a line in the log, an end."""

import json
import math
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.schema import Batch
from sharpmoe.config import GuardConfig
from sharpmoe.errors import TrainingError
from sharpmoe.parallel.ranks.launch import World, gather_objects
from sharpmoe.rollout import TrajectoryBatch
from sharpmoe.train.runlog import RunLog
from sharpmoe.train.step import StepResult
from sharpmoe.train.terms import LossTerms

FOLDER = "faults"


class Suspects(NamedTuple):
    """What one rank fed to a step."""

    batches: Sequence[Batch]  # micro-batches
    items: Sequence[TrajectoryBatch]  # the same with their draws


def tell(folder: Path, step: int, result: StepResult, suspects: Suspects, world: World, log: RunLog | None) -> None:
    """Write faults/step<N>.json (keys, positions, times and losses of every rank's micro-batches) and say so.

    `step` counts from 1. Every rank calls it: one gather of small objects. A folder that cannot be written is said.
    """
    ranks = gather_objects(_own(result, suspects, world), world)
    if log is None:
        return
    path = folder / FOLDER / f"step{step:08}.json"
    culprits = [rank["rank"] for rank in ranks if not rank["finite"]]
    where = f" on rank {', '.join(map(str, culprits))}" if culprits else ""
    fate = "not taken" if not result.verdict.applied else "taken all the same"
    record = {
        "step": step,
        "fault": result.verdict.fault + where,
        "applied": result.verdict.applied,
        "grad_norm": _number(result.grad_norm),
        "losses": {name: _number(value) for name, value in result.losses.items()},
        "ranks": ranks,
    }
    place = _write(path, record)
    log.event("fault", step, fault=record["fault"], applied=result.verdict.applied, skipped=result.watch.skipped)
    log.say(f"step {step}: {record['fault']}; the step is {fate}; its samples: {place}")


def check_going_on(folder: Path, step: int, result: StepResult, guard: GuardConfig) -> None:
    """Raise TrainingError, alike on every rank, where guard.max_skipped steps in a row were skipped."""
    skipped = result.watch.skipped
    if skipped < guard.max_skipped:
        return
    raise TrainingError(
        f"step {step}: {skipped} step(s) in a row skipped, the last because {result.verdict.fault}; the weights are "
        f"still those after step {step - skipped}; see the samples in {folder / FOLDER}, lower optim.lr and go on from "
        "a checkpoint (the limit is guard.max_skipped)"
    )


def _own(result: StepResult, suspects: Suspects, world: World) -> dict[str, Any]:
    micro = [
        {
            "losses": {name: _number(v) for name, v in zip(LossTerms._fields, terms, strict=True)},
            "keys": list(batch.keys),
            "positions": batch.position.tolist(),
            "times": item.times.tolist(),  # (T, B)
        }
        for batch, item, terms in zip(suspects.batches, suspects.items, result.terms.tolist(), strict=True)
    ]
    finite = bool(result.terms.isfinite().all())
    return {"rank": world.rank, "host": socket.gethostname(), "finite": finite, "micro_batches": micro}


def _number(value: float) -> float | str:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else str(value)


def _write(path: Path, record: dict[str, Any]) -> str:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1), encoding="utf-8")
    except OSError as error:
        return f"not written ({error.strerror})"
    return str(path)
