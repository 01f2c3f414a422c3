"""Damaged samples of a run: all ranks know of the same ones, and stop together where there are too many."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from data_pipeline.read.damage import Damage, DamageLedger
from sharpmoe.parallel.ranks.launch import World, gather_objects, sum_over_ranks
from sharpmoe.train.runlog import RunLog
from sharpmoe.train.setup import Plan

LIST_FILE = "damage.jsonl"  # in the run folder: one object per damaged sample or shard
_SAID = 3  # damaged samples that are printed at a time


class BadSamples:
    """What a run has met since it was started. Made on every rank; rank 0 writes."""

    def __init__(self, plan: Plan, world: World, log: RunLog | None) -> None:
        """`log`: the run's, on rank 0."""
        self._bearing = plan.run.data.max_bad_fraction > 0
        self._ledger = DamageLedger(plan.data.train.num_samples, plan.run.data.max_bad_fraction)
        self._world, self._log, self._file = world, log, plan.folder / LIST_FILE

    def agree(self, met: Sequence[Damage], step: int) -> None:
        """Add what this rank has met while reading optimizer step `step` (from 1) to what all ranks know.

        Communicates where damage is borne: one all-reduce of a count, and where it is not zero the names. Raises
        DamageError on every rank where more than data.max_bad_fraction of the samples are damaged.
        """
        if not self._bearing:  # then reading has raised an error
            return
        count = sum_over_ranks(torch.tensor([float(len(met))], device=self._world.device), self._world)
        if not count.item():
            return
        fresh = self._ledger.add(damage for part in gather_objects(list(met), self._world) for damage in part)
        if fresh and self._log is not None:
            self._tell(self._log, fresh, step)

    def _tell(self, log: RunLog, fresh: Sequence[Damage], step: int) -> None:
        with Path(self._file).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **damage._asdict()}) + "\n" for damage in fresh)
        for damage in fresh[:_SAID]:
            log.say(f"step {step}: damaged: {damage}")
        if fresh[_SAID:]:
            log.say(f"step {step}: and {len(fresh) - _SAID} more, see {self._file}")
        log.scalars(step, {"data/damaged_samples": float(self._ledger.num_bad)})
