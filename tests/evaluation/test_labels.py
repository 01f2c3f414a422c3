"""Labels beyond the classes of a model: what the line says, to those who train it and to those who measure it."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_pipeline.read.damage import Damage
from sharpmoe.config import ModelConfig, RunConfig
from sharpmoe.errors import DataError
from sharpmoe.evaluation.labels import check_labels, check_labels_of_batch
from sharpmoe.train.trajectories import _check_labels

MODEL = ModelConfig(conditioning="class", num_classes=10)


class Labelled:
    """A split of which only labels are read; None: a damaged sample."""

    location = "d"

    def __init__(self, found: Sequence[int | None]) -> None:
        self._found = found

    def label(self, index: int) -> tuple[str, int] | Damage:
        label = self._found[index]
        return Damage("t.tar", f"s{index}", "bad") if label is None else (f"s{index}", label)


def check(found: Sequence[int | None], model: ModelConfig = MODEL, *, is_trained: bool = False) -> None:
    check_labels(model, Labelled(found), range(len(found)), is_trained=is_trained)  # type: ignore[arg-type]


def test_the_advice_covers_every_label_that_was_read() -> None:
    with pytest.raises(DataError, match=r"d: sample s1 has label 10.*set --model.num_classes 13,"):
        check([0, 10, None, 12])


def test_a_trained_model_needs_other_shards() -> None:
    with pytest.raises(DataError, match=r"d: sample s1 has label 10, model.num_classes is 10 .*; name the shards"):
        check([0, 10], is_trained=True)
    with pytest.raises(DataError, match=r"d: sample s0 has no class label, but the model takes classes: name the shar"):
        check([-1], is_trained=True)


def test_a_sample_without_a_class_is_named() -> None:
    with pytest.raises(DataError, match=r"d: sample s0 has no class label, but model.conditioning is class"):
        check([-1])


def test_known_labels_damaged_samples_and_models_of_text_are_left_alone() -> None:
    check([0, None, 9])
    check([-1, 10], ModelConfig(conditioning="text"))


def test_a_batch_may_hold_the_null_class_where_the_model_has_one() -> None:
    check_labels_of_batch(MODEL, torch.tensor([0, 10]), ("a", "b"))
    without = MODEL.model_copy(update={"class_dropout": False})
    with pytest.raises(DataError, match="sample b has label 10"):
        check_labels_of_batch(without, torch.tensor([0, 10]), ("a", "b"))
    with pytest.raises(DataError, match="sample a has label 11"):
        check_labels_of_batch(MODEL, torch.tensor([11, 0]), ("a", "b"))


class Elsewhere(torch.Tensor):
    """Labels that are on a device: notes what is done with them there. Reading any result of it would be a wait."""

    done: list[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs)
        args[0].done.append(func.__name__)
        return found.as_subclass(torch.Tensor) if func is torch.Tensor.cpu else found


def in_training(labels: torch.Tensor) -> None:
    batch: Any = SimpleNamespace(label=labels, keys=("a", "b"))
    _check_labels(batch, RunConfig(model=MODEL))


def in_evaluation(labels: torch.Tensor) -> None:
    check_labels_of_batch(MODEL, labels, ("a", "b"))


@pytest.mark.parametrize("check_batch", [in_training, in_evaluation])
def test_labels_on_a_device_are_copied_to_the_host_once(check_batch: Callable[[torch.Tensor], None]) -> None:
    labels = torch.tensor([0, 9]).as_subclass(Elsewhere)
    labels.done = []
    check_batch(labels)
    assert labels.done == ["cpu"]
    with pytest.raises(DataError, match="sample b has label 11"):
        check_batch(torch.tensor([0, 11]))
