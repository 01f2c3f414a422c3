"""What is written where: the shards of a folder, and which rank writes which shard."""

import hashlib
from typing import NamedTuple

import numpy as np

from data_pipeline.prepare.buckets import Resolution
from data_pipeline.prepare.ranks import Rank
from data_pipeline.prepare.survey import Catalog
from data_pipeline.read.shards import check_split_name


class ShardPlan(NamedTuple):
    """One shard to be written."""

    name: str
    split: str
    resolution: Resolution
    rows: np.ndarray  # indices into the catalog
    digest: str  # hash of its images, which decides the rank that writes it


def shard_plans(
    catalog: Catalog, resolutions: list[Resolution], chosen: np.ndarray, shard_samples: int
) -> list[ShardPlan]:
    """Return all shards of all splits and buckets, in the order in which the index lists them.

    Raises DataError for the name of a split that a reader could not ask for.
    """
    for split in catalog.split_names:
        check_split_name(split)
    return [
        ShardPlan(name, split, resolution, rows, _digest(name, catalog, rows))
        for split in sorted(catalog.split_names)
        for number, resolution in enumerate(resolutions)
        for name, rows in _slices(
            split if len(resolutions) == 1 else f"{split}-{resolution.name}",
            np.flatnonzero((catalog.split == catalog.split_names.index(split)) & (chosen == number)),
            shard_samples,
        )
    ]


def _slices(stem: str, rows: np.ndarray, size: int) -> list[tuple[str, np.ndarray]]:
    return [
        (f"{stem}-{number:05d}", rows[start : start + size]) for number, start in enumerate(range(0, len(rows), size))
    ]


def _digest(name: str, catalog: Catalog, rows: np.ndarray) -> str:
    held = catalog.hash[rows].tobytes() + catalog.use[rows].astype(np.int64).tobytes()
    return hashlib.sha256(name.encode() + held).hexdigest()


def plans_of_rank(every: list[ShardPlan], place: Rank) -> list[ShardPlan]:
    """Return one rank's shards, dealt in turn in the order of their hash: every rank gets some of each split."""
    dealt = {plan.name for plan in sorted(every, key=lambda plan: plan.digest)[place.rank :: place.size]}
    return [plan for plan in every if plan.name in dealt]
