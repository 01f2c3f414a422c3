"""Class labels of samples against the classes of a model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from data_pipeline.read.damage import Damage
from data_pipeline.read.shards import ShardSet
from sharpmoe.config import ModelConfig
from sharpmoe.errors import DataError

_OTHER_SHARDS = "name the shards the model was trained on (--shards)"


def check_labels(model: ModelConfig, split: ShardSet, indices: Sequence[int], *, is_trained: bool = False) -> None:
    """Raise DataError where a class-conditional model has no class for the label of a sample, naming the sample.

    Reads only labels; samples that are damaged are left to the reader. is_trained: see `check_label`.
    """
    if model.conditioning != "class":
        return
    found = [split.label(index) for index in indices]
    known = [labelled for labelled in found if not isinstance(labelled, Damage)]
    largest = max((label for _, label in known), default=0)
    for key, label in known:
        check_label(model, split.location, key, label, largest=largest, is_trained=is_trained)


def check_label(
    model: ModelConfig, where: str, key: str, label: int, *, largest: int | None = None, is_trained: bool = False
) -> None:
    """Raise DataError where a class-conditional model has no class for the label of a sample.

    largest: of all labels that were looked at, for the advice. is_trained: the model is only measured, so that the
    advice is to take other data, not another model.
    """
    place = f"{where}: " if where else ""
    if label < 0 and is_trained:
        raise DataError(f"{place}sample {key} has no class label, but the model takes classes: {_OTHER_SHARDS}")
    if label < 0:
        raise DataError(
            f"{place}sample {key} has no class label, but model.conditioning is class: use conditioning text, or "
            "prepare the data with labels"
        )
    if label >= model.num_classes:
        needed = max(label, largest or 0) + 1
        fix = f"set --model.num_classes {needed}, or prepare the data with fewer classes"
        raise DataError(
            f"{place}sample {key} has label {label}, model.num_classes is {model.num_classes} (labels 0 to "
            f"{model.num_classes - 1}); {_OTHER_SHARDS if is_trained else fix}"
        )


def check_labels_of_batch(model: ModelConfig, labels: Tensor, keys: Sequence[str]) -> None:
    """Raise DataError where a trained class-conditional model has no row for one of `labels` (B,).

    The null class, where the model has one, is a row; `keys` are those of the samples. Looked at on the host, where a
    reader leaves labels; those of a device are copied there once.
    """
    labels, rows = labels.cpu(), model.num_classes + int(model.class_dropout)
    unknown = ((labels < 0) | (labels >= rows)).nonzero().flatten().tolist()
    if unknown:
        check_label(model, "", keys[unknown[0]], int(labels[unknown[0]]), is_trained=True)
