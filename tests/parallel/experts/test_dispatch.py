"""Dispatchers over ranks against every expert on every token in one process: both kinds, the same cases."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import get_capacity
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sharpmoe.moe.dispatch import Assignment, Dispatcher, RowCounts
from sharpmoe.parallel.experts.dispatch import _regroup
from sharpmoe.parallel.experts.groups import ExpertGroups
from sharpmoe.parallel.experts.megatron import _fix_counts
from sharpmoe.parallel.ranks import launch
from sharpmoe.parallel.ranks.launch import World
from tests.distributed import run_ranks
from tests.moe.dense import apply_experts
from tests.parallel.dispatching import (
    CASES,
    DISPATCHERS,
    Case,
    E,
    Outcome,
    Tokens,
    chain,
    local_part,
    reference,
    tokens_of,
)
from tests.selection import selected, sweep

LAYOUTS = ((2, 2), (4, 1), (4, 2), (4, 4))  # world, ep_size
ALONE = (1, 1)
Errors = dict[tuple[int, int, str, str], list[float]]  # world, ep_size, dispatcher, case -> y, dx, dgates, dw1 to dw3
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 6e-2}


def dispatched(case: Case, groups: ExpertGroups, dispatcher: Dispatcher, world: World) -> Outcome:
    alike = [tokens_of(world.rank, case.map, call) for call in range(case.calls)]
    drawn = [Tokens(*(tensor.to(world.device) for tensor in tokens)) for tokens in alike]
    experts = local_part(groups, case).to(world.device)
    x = drawn[0].x.to(case.dtype).requires_grad_()
    gates = [d.gates.to(case.dtype).requires_grad_() for d in drawn]

    def layer(call: int, h: Tensor, gate: Tensor) -> Tensor:
        args = (dispatcher, experts, h, Assignment(drawn[call].chosen, gate, RowCounts(per_expert=case.each)))
        return checkpoint(apply_experts, *args, use_reentrant=False) if case.recompute else apply_experts(*args)

    y = chain(x, gates, layer)
    with torch.no_grad():
        assert torch.equal(chain(x, gates, layer), y)
    (y * drawn[0].weight.to(case.dtype)).sum().backward()
    return Outcome(y.detach(), x.grad, torch.stack([g.grad for g in gates]), [p.grad for p in experts.parameters()])


def distance(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    assert got.isfinite().all()
    difference = (got.double().cpu() - expected).abs()
    return float(difference.max() / expected.abs().max().clamp_min(1e-12)) if got.numel() else 0.0


def compare(world: World) -> Errors:
    """This rank's relative errors, for every layout of this world."""
    errors: Errors = {}
    layouts = [ExpertGroups.of(ep, world) for size, ep in (ALONE, *LAYOUTS) if size == world.size]
    # One object for all cases, as the layers of a model share one: what a case leaves behind would spoil the next.
    objects = [(groups, name, make(groups)) for groups in layouts for name, make in DISPATCHERS.items()]
    for case_name, case in CASES.items():
        outcomes = reference(case, world.size)
        for groups, name, dispatcher in objects:
            got, expected = dispatched(case, groups, dispatcher, world), share_of(groups, world, outcomes)
            pairs = [*zip(got[:3], expected[:3], strict=True), *zip(got.dweights, expected.dweights, strict=True)]
            errors[world.size, groups.ep_size, name, case_name] = [distance(*pair) for pair in pairs]
    assert not parallel_state.is_initialized()
    return errors


def share_of(groups: ExpertGroups, world: World, outcomes: list[Outcome]) -> Outcome:
    """What this rank should find: its experts' gradients are sums over the ranks that share the experts."""
    first, each = groups.ep_rank * (E // groups.ep_size), E // groups.ep_size
    sharing = outcomes[world.rank - groups.ep_rank :][: groups.ep_size]
    summed = [
        torch.stack(parts).sum(0)[first : first + each] for parts in zip(*(o.dweights for o in sharing), strict=True)
    ]
    return outcomes[world.rank]._replace(dweights=summed)


@pytest.fixture(scope="module")
def errors(request: pytest.FixtureRequest) -> Errors:
    """The worst rank's."""
    by_rank = {world: run_ranks(compare, world) for world in {world for world, _ in selected(request, "layout")}}
    return {
        key: [max(values) for values in zip(*(rank[key] for rank in ranks), strict=True)]
        for ranks in by_rank.values()
        for key in ranks[0]
    }


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("layout", sweep(LAYOUTS, [(2, 2)]), ids=str)
def test_dispatch_equals_one_process(layout: tuple[int, int], dispatcher: str, case: str, errors: Errors) -> None:
    worst = errors[*layout, dispatcher, case]
    assert max(worst) < TOLERANCE[CASES[case].dtype], f"y, dx, dgates, dw1, dw2, dw3: {worst}"


@pytest.mark.gpu
def test_dispatch_on_one_device_equals_one_process() -> None:
    """Megatron's stock class, and the grouped product in bf16."""
    try:
        for (*_, case), worst in compare(launch.start()).items():
            assert max(worst) < TOLERANCE[CASES[case].dtype], f"{case}: y, dx, dgates, dw1, dw2, dw3: {worst}"
    finally:
        launch.stop()


@given(st.integers(1, 10**6), st.integers(1, 256), st.data())
def test_megatron_computes_the_count_that_it_is_given(tokens: int, num_experts: int, data: st.DataObject) -> None:
    each = data.draw(st.integers(0, tokens))
    config = SimpleNamespace(moe_router_topk=1)
    call = SimpleNamespace(num_experts=num_experts, config=config, drop_and_pad=False, moe_expert_capacity_factor=1.0)
    _fix_counts(call, tokens, each)
    assert call.drop_and_pad
    assert get_capacity(tokens, num_experts, call.moe_expert_capacity_factor) == each


def test_chunks_are_regrouped_like_a_stable_sort() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        counts = torch.randint(0, 4, (3, 5), generator=g)
        total = int(counts.sum())
        order = _regroup(counts, total)
        expert = torch.arange(5).repeat(3).repeat_interleave(counts.flatten())
        assert torch.equal(order.by_expert, expert.argsort(stable=True))
        assert torch.equal(order.by_expert[order.by_rank], torch.arange(total))
