"""Whole weights from the ranks' pieces: what cannot be read again costs the save, and leaves no rank waiting."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sharpmoe.checkpoint import weights
from sharpmoe.checkpoint.weights import whole_tensors
from sharpmoe.errors import CheckpointError
from sharpmoe.model.weights import TensorSpec
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.parallel.zero.partitions import Piece


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), CheckpointError("gone")])
def test_a_frozen_parameter_that_is_gone_is_an_error_after_all_ranks_have_sent(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_BATCH", 1)  # each parameter is exchanged alone
    received: list[int] = []

    def receive(rank: int, count: int) -> torch.Tensor:
        received.append(rank)
        return torch.ones(count)

    def frozen(*_: object) -> torch.Tensor:
        raise error

    specs = {name: TensorSpec(torch.Size([2]), torch.float32) for name in ("first", "frozen", "last")}
    pieces = [Piece(name=name, part=0, start=0, numel=2, place=0) for name in ("first", "last")]
    table = [{}, {piece.name: [piece] for piece in pieces}]
    contents: Any = SimpleNamespace(adapters=None, frozen=frozen)
    peers: Any = SimpleNamespace(world=World(0, 2, 0, torch.device("cpu")), receive=receive)
    found = []
    with pytest.raises(CheckpointError, match="gone"):
        found += [value is None for _, value in whole_tensors(specs, table, [], {}, contents, peers)]
    assert received == [1, 1]
