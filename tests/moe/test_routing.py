"""Selection rules and the layer: properties over random shapes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharpmoe.config import ModelConfig
from sharpmoe.moe.capacity import threshold_candidates
from sharpmoe.moe.layer import MoELayer
from sharpmoe.moe.routing import (
    batch_pool,
    expert_choice,
    group_limited,
    lowest_accepted,
    predicted_count,
    predicted_mask,
    race,
    token_choice,
    tokens_per_expert,
)

SHAPES = st.tuples(st.integers(1, 4), st.integers(4, 20), st.integers(1, 6))


def scores_of(shape: tuple[int, int, int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 99), st.data())
def test_token_choice_takes_the_best_k(shape: tuple[int, int, int], seed: int, data: st.DataObject) -> None:
    scores = scores_of(shape, seed)
    top_k = data.draw(st.integers(1, shape[2]))
    chosen = token_choice(scores, top_k)
    assert (chosen.sum(-1) == top_k).all()
    assert (scores.masked_fill(~chosen, 2).amin(-1) >= scores.masked_fill(chosen, -1).amax(-1)).all()


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 99), st.floats(0.5, 1.0))
def test_experts_take_equal_counts_of_their_best(shape: tuple[int, int, int], seed: int, capacity: float) -> None:
    scores = scores_of(shape, seed)
    per_image = expert_choice(scores, capacity)
    assert (per_image.sum(1) == tokens_per_expert(shape[1], shape[2], capacity)).all()
    pooled = batch_pool(scores, capacity)
    assert (pooled.sum((0, 1)) == tokens_per_expert(shape[0] * shape[1], shape[2], capacity)).all()
    for chosen, pool in ((per_image, "image"), (pooled, "call")):
        cutoff = lowest_accepted(scores, chosen, pool)
        assert (scores.masked_fill(chosen, -1) <= cutoff).all()
        assert (scores.masked_fill(~chosen, 2) >= cutoff).all()


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 99), st.floats(0.5, 1.0))
def test_the_best_pairs_of_a_call_win_the_race(shape: tuple[int, int, int], seed: int, capacity: float) -> None:
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(seed))  # softmax over one expert would tie
    chosen = race(scores, capacity)
    assert chosen.sum() == max(1, int(shape[0] * shape[1] * capacity))
    cutoff = lowest_accepted(scores, chosen, "all")
    assert cutoff.shape == (1, 1, shape[2])
    assert torch.equal(chosen, scores >= cutoff)


def test_experts_are_chosen_inside_the_best_groups() -> None:
    scores = torch.tensor([[[0.9, 0.0, 0.6, 0.5, 0.4, 0.3]]])  # groups (0.9, 0.0), (0.6, 0.5), (0.4, 0.3)
    assert group_limited(scores, 2, 3, 1).flatten().tolist() == [False, False, True, True, False, False]
    assert group_limited(scores, 2, 3, 2).flatten().tolist() == [True, False, True, False, False, False]
    assert torch.equal(group_limited(scores, 2, 3, 3), token_choice(scores, 2))


def test_a_pool_of_one_image_is_expert_choice() -> None:
    scores = scores_of((1, 16, 4), 0)
    assert torch.equal(batch_pool(scores, 1.0), expert_choice(scores, 1.0))


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 99), st.floats(0.1, 0.9))
def test_inference_count_and_mask(shape: tuple[int, int, int], seed: int, level: float) -> None:
    scores = scores_of(shape, seed)
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))
    threshold = torch.full((shape[2],), level)
    mask, by_count = predicted_mask(logits, threshold), predicted_count(scores, logits, threshold)
    assert torch.equal(mask.sum((0, 1)), by_count.sum((0, 1)))
    cutoff = lowest_accepted(scores, by_count, "call")
    assert (scores.masked_fill(by_count, -1) <= cutoff).all()


def test_diffmoe_infers_from_thresholds_and_trains_from_the_pool() -> None:
    torch.manual_seed(0)
    layer = MoELayer(ModelConfig(width=16, num_heads=2, num_experts=4, router="diffmoe"))
    h = torch.randn(2, 8, 16)
    for parameter in layer.experts.parameters():
        torch.nn.init.normal_(parameter)
    _, trained = layer.train()(h)
    assert (trained.routing_map.sum((0, 1)) == 4).all()
    layer.eval().expert_threshold.fill_(1.1)  # no probability is above it: nobody takes anything
    y, inferred = layer(h)
    assert not inferred.routing_map.any()
    assert (y == 0).all()
    layer.expert_threshold.fill_(-0.1)
    assert layer(h)[1].routing_map.all()


def test_capacity_predictor_does_not_teach_the_trunk() -> None:
    layer = MoELayer(ModelConfig(width=16, num_heads=2, num_experts=4, router="diffmoe"))
    h = torch.randn(2, 8, 16, requires_grad=True)
    layer.capacity_predictor(h).sum().backward()
    assert h.grad is None


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 99), st.floats(0.5, 1.0))
def test_threshold_candidates_are_the_lowest_probability_of_the_best(
    shape: tuple[int, int, int], seed: int, capacity: float
) -> None:
    layers = torch.randn((3, *shape), generator=torch.Generator().manual_seed(seed)).unbind()
    count = tokens_per_expert(shape[0] * shape[1], shape[2], capacity)
    expected = [logits.flatten(0, 1).topk(count, dim=0).values[-1].sigmoid() for logits in layers]
    assert torch.equal(threshold_candidates(layers, capacity), torch.stack(expected))
