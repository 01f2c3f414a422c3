"""Labels beyond the classes of the model: found in any split, by any rank, or when the batch is drawn."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from data_pipeline.read.damage import Damage
from data_pipeline.read.shards import ShardSet
from sharpmoe.config import ModelConfig
from sharpmoe.errors import DataError
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.train import labels
from sharpmoe.train.labels import check_training_labels
from sharpmoe.train.trajectories import draw_trajectories
from tests.train.setting import make_run

MODEL = ModelConfig(conditioning="class", num_classes=10)


class Labelled:
    """A split of which only labels are read; None: a damaged sample."""

    def __init__(self, found: Sequence[int | None], location: str = "d") -> None:
        self.location, self.num_samples, self._found = location, len(found), found
        self.read: list[int] = []

    def label(self, index: int) -> tuple[str, int] | Damage:
        self.read.append(index)
        label = self._found[index]
        return Damage("t.tar", f"s{index}", "bad") if label is None else (f"s{index}", label)


def rank(number: int, size: int) -> World:
    return World(number, size, 0, torch.device("cpu"))


def check(split: Labelled, world: World) -> None:
    check_training_labels(MODEL, [Labelled([0]), split], world)  # type: ignore[list-item]  # the second is held out


def test_each_rank_reads_its_share() -> None:
    split = Labelled([0, 1, 2, 99, None])
    check(split, rank(0, 2))
    assert split.read == [0, 2, 4]
    with pytest.raises(DataError, match="s3 has label 99"):
        check(split, rank(1, 2))


@pytest.mark.parametrize(("location", "read"), [("d", labels._SOME), ("https://host/d", labels._REMOTE)])
def test_of_a_large_split_some_are_read_to_its_end(location: str, read: int) -> None:
    split = Labelled([0] * 100_000, location)
    check(split, rank(0, 1))
    assert len(split.read) == read
    assert split.read[-1] >= 100_000 - 100_000 // read - 1


def test_a_label_that_was_not_read_is_found_when_its_batch_is_drawn(shards: Path, tmp_path: Path) -> None:
    run = make_run(shards, tmp_path, model={"conditioning": "class", "num_classes": 3})
    split = ShardSet.open(shards, "train")
    found = [split.label(index) for index in range(split.num_samples)]
    assert found == [(key, int(key[-4:]) % 4) for key, _ in found]  # as they were drawn
    row = next(row for row, (_, label) in enumerate(found) if label == 3)
    with pytest.raises(DataError, match=f"sample {found[row][0]} has label 3, model.num_classes is 3"):
        draw_trajectories([split.batch([row])], split.empty_text(), run, torch.device("cpu"))
