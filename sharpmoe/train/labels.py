"""Class labels of the data against the classes of the model, before the first step. No communication.

The index holds no labels, so samples are looked at: all of a small split, some of a large one, each rank its share. A
label that this leaves out is found when its batch is drawn (`check_label`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from data_pipeline.read.damage import Damage
from data_pipeline.read.shards import ShardSet
from data_pipeline.safety import scheme_of
from sharpmoe.config import ModelConfig
from sharpmoe.errors import DataError
from sharpmoe.evaluation.held_out import spread

if TYPE_CHECKING:  # its module imports DeepSpeed, and drawing a batch needs none
    from sharpmoe.parallel.ranks.launch import World

_SMALL = 4096  # samples of a local split that is looked at as a whole
_SOME = 512  # of a larger one: each may be in a shard of its own, whose table is read
_REMOTE = 32  # of a remote one, all ranks together


def check_labels(model: ModelConfig, splits: Iterable[ShardSet], world: World) -> None:
    """Raise DataError where a class-conditional model has no class for a label of the data, naming the sample.

    Reads this rank's share of the labels; samples that are damaged are left to the reader.
    """
    if model.conditioning != "class":
        return
    for split in splits:
        found = [_label(split, index) for index in _chosen(split)[world.rank :: world.size]]
        known = [labelled for labelled in found if labelled is not None]
        for key, label in known:
            check_label(model, split.location, key, label, largest=max(label for _, label in known))


def check_label(model: ModelConfig, where: str, key: str, label: int, *, largest: int | None = None) -> None:
    """Raise DataError where a class-conditional model has no class for the label of a sample.

    largest: of all labels that were looked at, for the advice.
    """
    place = f"{where}: " if where else ""
    if label < 0:
        raise DataError(
            f"{place}sample {key} has no class label, but model.conditioning is class: use conditioning text, or "
            "prepare the data with labels"
        )
    if label >= model.num_classes:
        needed = max(label, largest or 0) + 1
        raise DataError(
            f"{place}sample {key} has label {label}, model.num_classes is {model.num_classes} (labels 0 to "
            f"{model.num_classes - 1}); set --model.num_classes {needed}, or prepare the data with fewer classes"
        )


def _chosen(split: ShardSet) -> list[int]:
    if scheme_of(split.location) is not None:
        return spread(split.num_samples, _REMOTE)
    return spread(split.num_samples, split.num_samples if split.num_samples <= _SMALL else _SOME)


def _label(split: ShardSet, index: int) -> tuple[str, int] | None:
    found = split.label(index)
    return None if isinstance(found, Damage) else found
