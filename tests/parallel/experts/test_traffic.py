"""What a dispatcher sends, counted; what it keeps; and what it refuses."""

import itertools
from typing import NamedTuple

import pytest
import torch

from sharpmoe.moe.dispatch import Assignment, Dispatcher, RowCounts
from sharpmoe.parallel.experts.groups import ExpertGroups
from sharpmoe.parallel.ranks.launch import World
from tests.counting import Collective, CollectiveCounter
from tests.distributed import run_ranks
from tests.moe.dense import apply_experts
from tests.parallel.dispatching import DISPATCHERS, Case, D, E, local_part, tokens_of


class Traffic(NamedTuple):
    """What one layer sent."""

    forward: list[Collective]
    backward: list[Collective]
    leaving: int  # bytes of rows whose expert is elsewhere
    coming: int  # bytes of others' rows whose expert is here


def traffic(world: World) -> tuple[dict[tuple[str, int | None], Traffic], dict[str, list[str]]]:
    """What each dispatcher sends, and how each refuses."""
    groups = ExpertGroups.of(2, world)
    refused = refusals(groups)
    return {key: traffic_of(groups, world, *key) for key in COLLECTIVES}, refused


def traffic_of(groups: ExpertGroups, world: World, name: str, each: int | None) -> Traffic:
    g = torch.Generator().manual_seed(world.rank)
    draw = torch.rand(512, E, generator=g)
    chosen = draw < 0.3 if each is None else torch.zeros_like(draw).scatter_(0, draw.topk(each, 0).indices, 1).bool()
    x = torch.randn(512, D, generator=g).requires_grad_()
    gates = draw.clone().requires_grad_()
    experts = local_part(groups, Case("", torch.float32))
    dispatcher = DISPATCHERS[name](groups)
    before = held(dispatcher)
    with CollectiveCounter() as counter:
        assignment = Assignment(chosen, gates, RowCounts(per_expert=each))
        loss = apply_experts(dispatcher, experts, x, assignment).square().sum()
        forward = counter.take()
        loss.backward()
        backward = counter.take()
    assert held(dispatcher) == before
    rows = torch.zeros(2, 2, dtype=torch.int64)  # from, to
    rows[groups.ep_rank] = chosen.sum(0).view(2, -1).sum(1)
    torch.distributed.all_reduce(rows, group=groups.ep_group)
    here, there = groups.ep_rank, 1 - groups.ep_rank
    return Traffic(forward, backward, int(rows[here, there]) * D * 4, int(rows[there, here]) * D * 4)


def held(dispatcher: Dispatcher) -> dict[str, int]:
    """What a dispatcher refers to: nothing of a call may stay, or its graph would stay with it."""
    inner = getattr(dispatcher, "_template", dispatcher)
    return {name: id(value) for name, value in vars(inner).items()}


# dispatcher, rows of each expert where fixed -> collectives of one layer: forward, backward
COLLECTIVES = {
    ("native", None): (["all_to_all"] * 3, ["all_to_all"] * 2),  # counts, rows, answers
    ("native", 64): (["all_to_all"] * 2, ["all_to_all"] * 2),
    ("megatron", None): (["all_gather"] + ["all_to_all"] * 3, ["all_to_all"] * 3),  # counts, rows, gates, answers
    ("megatron", 64): (["all_to_all"] * 3, ["all_to_all"] * 3),
}


@pytest.fixture(scope="module")
def on_two_ranks() -> list[tuple[dict[tuple[str, int | None], Traffic], dict[str, list[str]]]]:
    return run_ranks(traffic, 2)


@pytest.mark.dist
@pytest.mark.parametrize(("name", "each"), COLLECTIVES)
def test_a_layer_sends_its_rows_once_each_way_and_little_else(
    name: str, each: int | None, on_two_ranks: list[tuple[dict[tuple[str, int | None], Traffic], object]]
) -> None:
    for rank in (sent[name, each] for sent, _ in on_two_ranks):
        for calls, expected in zip(rank[:2], COLLECTIVES[name, each], strict=True):
            assert [call.name for call in calls] == expected
            assert all(call.group_size == 2 for call in calls)
            sent = sum(call.sent for call in calls)
            there_and_back = rank.leaving + rank.coming  # own rows out, answers to others' rows back
            assert there_and_back <= sent <= 1.05 * there_and_back


def refusals(groups: ExpertGroups) -> dict[str, list[str]]:
    """An uneven map where equal counts are promised: every rank says so before it communicates."""
    x, chosen, gates, _ = tokens_of(0, "varying")
    said: dict[str, list[str]] = {}
    for name, each in itertools.product(DISPATCHERS, (3, 40)):
        with pytest.raises(RuntimeError) as caught:
            DISPATCHERS[name](groups).dispatch(x, Assignment(chosen, gates, RowCounts(per_expert=each)))
        said.setdefault(name, []).append(str(caught.value))
    return said


@pytest.mark.dist
def test_equal_splits_refuse_an_uneven_map(on_two_ranks: list[tuple[object, dict[str, list[str]]]]) -> None:
    for _, refused in on_two_ranks:
        assert refused.keys() == DISPATCHERS.keys()
        for few, many in refused.values():
            assert "not every expert took 3 rows; where counts vary, pass RowCounts()" in few
            assert "not every expert took 40 rows" in many
