"""What went wrong in a step, in the run folder and the log: numbers that are not finite, and damaged samples."""

import json
import math
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data_pipeline.read.damage import Damage, DamageLedger
from data_pipeline.schema import Batch
from sharpmoe.config import GuardConfig
from sharpmoe.errors import TrainingError
from sharpmoe.parallel.ranks.launch import World, gather_objects, sum_over_ranks
from sharpmoe.rollout import TrajectoryBatch
from sharpmoe.train.runlog import RunLog
from sharpmoe.train.setup import RunPlan
from sharpmoe.train.step import StepResult
from sharpmoe.train.terms import LossTerms

_FAULT_FOLDER = "faults"
_DAMAGE_FILE = "damage.jsonl"  # in the run folder: one object per damaged sample or shard
_LAST_SKIPPED = 2  # steps: a run whose last ones were skipped has not converged; one may have had a bad batch
_PRINTED = 3  # damaged samples that are printed at a time


class Suspects(NamedTuple):
    """What one rank fed to a step."""

    batches: Sequence[Batch]  # micro-batches
    items: Sequence[TrajectoryBatch]  # the same with their draws


def report_fault(
    folder: Path, step: int, result: StepResult, suspects: Suspects, world: World, log: RunLog | None
) -> None:
    """Write faults/step<N>.json (keys, positions, times and losses of every rank's micro-batches) and log it.

    `step` counts from 1. Every rank calls it: one gather of small objects. A folder that cannot be written is a note.
    """
    ranks = gather_objects(_rank_record(result, suspects, world), world)
    if log is None:
        return
    path = folder / _FAULT_FOLDER / f"step{step:08}.json"
    culprits = [rank["rank"] for rank in ranks if not rank["finite"]]
    where = f" on rank {', '.join(map(str, culprits))}" if culprits else ""
    fate = "not taken" if not result.verdict.applied else "taken nevertheless"
    record = {
        "step": step,
        "fault": result.verdict.fault + where,
        "applied": result.verdict.applied,
        "grad_norm": _number(result.grad_norm),
        "losses": {name: _number(value) for name, value in result.losses.items()},
        "ranks": ranks,
    }
    place = _write(path, record)
    log.not_taken += not result.verdict.applied
    log.event("fault", step, fault=record["fault"], applied=result.verdict.applied, skipped=result.watch.skipped)
    log.say(f"step {step}: {record['fault']}; the step is {fate}; its samples: {place}")


def check_skipped(folder: Path, step: int, result: StepResult, guard: GuardConfig, is_last: bool = False) -> None:
    """Raise TrainingError, alike on every rank, where too many steps in a row were skipped: guard.max_skipped.

    is_last: of the run, which does not end well with several steps that were skipped because they are not finite, nor
    where all its steps were. Spikes that guard.skip_spikes skips may be the last steps.
    """
    skipped = result.watch.skipped
    finite = math.isfinite(result.grad_norm) and all(map(math.isfinite, result.losses.values()))
    ends_badly = is_last and not finite and skipped >= min(_LAST_SKIPPED, step)
    if skipped < guard.max_skipped and not ends_badly:
        return
    limit = "the limit is guard.max_skipped" if skipped >= guard.max_skipped else "they are the last of the run"
    raise TrainingError(
        f"step {step}: {skipped} step(s) in a row skipped, the last because {result.verdict.fault}; the weights are "
        f"still those after step {step - skipped}; see the samples in {folder / _FAULT_FOLDER}, lower optim.lr and go "
        f"on from a checkpoint ({limit})"
    )


class DamagedSamples:
    """Damaged samples that a run has met since it was started. Made on every rank; rank 0 writes."""

    def __init__(self, plan: RunPlan, world: World, log: RunLog | None) -> None:
        """log: the run's, on rank 0."""
        self._tolerated = plan.run.data.max_bad_fraction > 0
        self._ledger = DamageLedger(plan.data.train.num_samples, plan.run.data.max_bad_fraction)
        self._world, self._log, self._file = world, log, plan.folder / _DAMAGE_FILE

    def agree(self, met: Sequence[Damage], step: int) -> None:
        """Add what this rank has met while reading optimizer step `step` (from 1) to what all ranks know.

        Communicates where damage is tolerated: one all-reduce of a count and, where it is not zero, the names. Raises
        DamageError on every rank where more than data.max_bad_fraction of the samples are damaged.
        """
        if not self._tolerated:  # then reading has raised an error
            return
        count = sum_over_ranks(torch.tensor([float(len(met))], device=self._world.device), self._world)
        if not count.item():
            return
        fresh = self._ledger.add(damage for part in gather_objects(list(met), self._world) for damage in part)
        if fresh and self._log is not None:
            self._write(self._log, fresh, step)

    def _write(self, log: RunLog, fresh: Sequence[Damage], step: int) -> None:
        try:
            with Path(self._file).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, **damage._asdict()}) + "\n" for damage in fresh)
        except OSError as error:
            log.say(f"note: {self._file}: cannot be written ({error.strerror}); training goes on")
        for damage in fresh[:_PRINTED]:
            log.say(f"step {step}: damaged: {damage}")
        if fresh[_PRINTED:]:
            log.say(f"step {step}: and {len(fresh) - _PRINTED} more, see {self._file}")
        log.scalars(step, {"data/damaged_samples": float(self._ledger.num_bad)})


def _rank_record(result: StepResult, suspects: Suspects, world: World) -> dict[str, Any]:
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
    """JSON has no number that is not finite."""
    return value if math.isfinite(value) else str(value)


def _write(path: Path, record: dict[str, Any]) -> str:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1), encoding="utf-8")
    except OSError as error:
        return f"not written ({error.strerror})"
    return str(path)
