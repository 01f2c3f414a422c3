"""Class labels of the training data against the classes of the model, before the first step. No communication.

The index holds no labels, so samples are looked at: all of a small split, some of a large one, each rank its share. A
label that this leaves out is found when its batch is drawn (`sharpmoe.evaluation.labels.check_label`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from data_pipeline.read.shards import ShardSet
from data_pipeline.safety import scheme_of
from sharpmoe.config import ModelConfig
from sharpmoe.evaluation.held_out import spread
from sharpmoe.evaluation.labels import check_labels

if TYPE_CHECKING:  # its module imports DeepSpeed, and drawing a batch needs none
    from sharpmoe.parallel.ranks.launch import World

_SMALL = 4096  # samples of a local split that is looked at as a whole
_SOME = 512  # of a larger one: each may be in a shard of its own, whose table is read
_REMOTE = 32  # of a remote one, all ranks together


def check_training_labels(model: ModelConfig, splits: Iterable[ShardSet], world: World) -> None:
    """Check this rank's share of the labels of every split. Raises DataError as `check_labels`."""
    for split in splits:
        check_labels(model, split, _chosen(split)[world.rank :: world.size])


def _chosen(split: ShardSet) -> list[int]:
    if scheme_of(split.location) is not None:
        return spread(split.num_samples, _REMOTE)
    return spread(split.num_samples, split.num_samples if split.num_samples <= _SMALL else _SOME)
