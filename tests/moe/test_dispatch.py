"""The one-rank dispatcher against every expert on every token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sharpmoe.moe.dispatch import Assignment, LocalDispatcher, Pairs, RowCounts
from sharpmoe.moe.experts import Experts
from tests.moe.dense import apply_experts, dense_experts, stacked_weights


def experts_of() -> Experts:
    experts = Experts(4, 8, 12).double()
    with torch.no_grad():
        for parameter, value in zip(experts.parameters(), stacked_weights(4, 8, 12), strict=True):
            parameter.copy_(value)
    return experts


def compare(x: Tensor, chosen: Tensor, gates: Tensor, counts: RowCounts) -> None:
    """Values and gradients."""
    weight = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)
    weights = [w.requires_grad_() for w in stacked_weights(4, 8, 12)]
    leaves = [x.clone().requires_grad_(), gates.clone().requires_grad_()]
    expected = dense_experts(leaves[0], leaves[1] * chosen, weights)
    wanted = torch.autograd.grad((expected * weight).sum(), [*leaves, *weights])
    experts = experts_of()
    leaves = [x.clone().requires_grad_(), gates.clone().requires_grad_()]
    y = apply_experts(LocalDispatcher(), experts, leaves[0], Assignment(chosen, leaves[1], counts))
    got = torch.autograd.grad((y * weight).sum(), [*leaves, *experts.parameters()])
    for a, b in zip([y, *got], [expected, *wanted], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.floats(0, 1), st.integers(0, 12))
def test_any_map_equals_every_expert_on_every_token(seed: int, density: float, tokens: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 8, generator=g, dtype=torch.float64)
    gates = torch.rand(tokens, 4, generator=g, dtype=torch.float64)
    compare(x, torch.rand(tokens, 4, generator=g) < density, gates, RowCounts())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.integers(0, 10))
def test_equal_counts_equal_every_expert_on_every_token(seed: int, each: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(10, 8, generator=g, dtype=torch.float64)
    gates = torch.rand(10, 4, generator=g, dtype=torch.float64)
    best = torch.rand(10, 4, generator=g).topk(each, dim=0).indices
    compare(x, torch.zeros(10, 4).scatter_(0, best, 1).bool(), gates, RowCounts(per_expert=each))


def test_a_promise_of_equal_counts_is_checked() -> None:
    chosen = torch.eye(4).bool().repeat(2, 1)
    chosen[0] = False
    with pytest.raises(RuntimeError, match=r"not every expert took 2 rows; where counts vary, pass RowCounts\(\)"):
        LocalDispatcher().dispatch(
            torch.ones(8, 8).double(), Assignment(chosen, torch.ones(8, 4), RowCounts(per_expert=2))
        )


def test_a_promised_total_changes_nothing_and_is_checked() -> None:
    chosen = torch.eye(4).bool()[[0, 0, 0, 2, 3]]
    x, gates = torch.randn(5, 8).double(), torch.rand(5, 4).double()
    told, untold = (
        apply_experts(LocalDispatcher(), experts_of(), x, Assignment(chosen, gates, counts))
        for counts in (RowCounts(total=5), RowCounts())
    )
    assert torch.equal(told, untold)
    with pytest.raises(RuntimeError, match="experts did not take 6 rows together"):
        LocalDispatcher().dispatch(x, Assignment(chosen, gates, RowCounts(total=6)))


def test_pairs_are_sorted_by_expert_then_token() -> None:
    chosen = torch.rand(20, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    pairs = Pairs.find(chosen, int(chosen.sum()))
    assert torch.equal(torch.stack(pairs[:2]), torch.stack(chosen.t().nonzero(as_tuple=True)))
    for token in range(20):
        end = pairs.starts[token + 1] if token < 19 else len(pairs.rows)
        rows = pairs.rows[pairs.starts[token] : end]
        assert torch.equal(pairs.expert[rows], chosen[token].nonzero()[:, 0])
        assert (pairs.token[rows] == token).all()
