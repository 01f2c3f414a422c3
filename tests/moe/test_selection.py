"""Selection rules: properties over random shapes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sharpmoe.config import ModelConfig
from sharpmoe.families import FAMILIES, tokens_per_expert
from sharpmoe.moe.selection import RULES, RuleInput, lowest_accepted

SHAPES = st.tuples(st.integers(1, 4), st.integers(4, 20), st.integers(1, 6))


def scores_of(shape: tuple[int, int, int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def config_of(router: str, num_experts: int, **fields: float) -> ModelConfig:
    return ModelConfig.model_validate({"router": router, "num_experts": num_experts, "conditioning": "class"} | fields)


def chosen_in_training(router: str, scores: Tensor, **fields: float) -> Tensor:
    return RULES[router].train(RuleInput(scores), config_of(router, scores.shape[-1], **fields))


def test_every_family_with_experts_has_a_rule() -> None:
    assert RULES.keys() == {name for name, family in FAMILIES.items() if family.has_experts}


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 99), st.data())
def test_token_choice_takes_the_best_k(shape: tuple[int, int, int], seed: int, data: st.DataObject) -> None:
    scores = scores_of(shape, seed)
    top_k = data.draw(st.integers(1, shape[2]))
    chosen = chosen_in_training("tc", scores, top_k=top_k)
    assert (chosen.sum(-1) == top_k).all()
    assert (scores.masked_fill(~chosen, 2).amin(-1) >= scores.masked_fill(chosen, -1).amax(-1)).all()


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 99), st.floats(0.5, 1.0))
def test_experts_take_equal_counts_of_their_best(shape: tuple[int, int, int], seed: int, capacity: float) -> None:
    scores = scores_of(shape, seed)
    per_image = chosen_in_training("ec", scores, capacity=capacity)
    assert (per_image.sum(1) == tokens_per_expert(shape[1], shape[2], capacity)).all()
    pooled = chosen_in_training("diffmoe", scores, capacity=capacity)
    assert (pooled.sum((0, 1)) == tokens_per_expert(shape[0] * shape[1], shape[2], capacity)).all()
    for chosen, router in ((per_image, "ec"), (pooled, "diffmoe")):
        cutoff = lowest_accepted(scores, chosen, config_of(router, shape[2]))
        assert (scores.masked_fill(chosen, -1) <= cutoff).all()
        assert (scores.masked_fill(~chosen, 2) >= cutoff).all()


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 99), st.floats(0.5, 1.0))
def test_the_best_pairs_of_a_call_win_the_race(shape: tuple[int, int, int], seed: int, capacity: float) -> None:
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(seed))  # softmax over one expert would tie
    chosen = chosen_in_training("race", scores, capacity=capacity)
    assert chosen.sum() == max(1, int(shape[0] * shape[1] * capacity))
    cutoff = lowest_accepted(scores, chosen, config_of("race", shape[2]))
    assert cutoff.shape == (1, 1, shape[2])
    assert torch.equal(chosen, scores >= cutoff)
    infer = RULES["race"].infer(RuleInput(scores, thresholds=cutoff.flatten()), config_of("race", shape[2]))
    assert torch.equal(chosen, infer)


def test_experts_are_chosen_inside_the_best_groups() -> None:
    scores = torch.tensor([[[0.9, 0.0, 0.6, 0.5, 0.4, 0.3]]])  # groups (0.9, 0.0), (0.6, 0.5), (0.4, 0.3)

    def chosen(top_groups: int) -> Tensor:
        return chosen_in_training("dsmoe", scores, top_k=2, num_groups=3, top_groups=top_groups)

    assert chosen(1).flatten().tolist() == [False, False, True, True, False, False]
    assert chosen(2).flatten().tolist() == [True, False, True, False, False, False]
    assert torch.equal(chosen(3), chosen_in_training("tc", scores, top_k=2))


def test_a_pool_of_one_image_is_expert_choice() -> None:
    scores = scores_of((1, 16, 4), 0)
    assert torch.equal(chosen_in_training("diffmoe", scores), chosen_in_training("ec", scores))


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 99), st.floats(0.1, 0.9))
def test_inference_count_and_mask(shape: tuple[int, int, int], seed: int, level: float) -> None:
    scores = scores_of(shape, seed)
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))
    choice = RuleInput(scores, logits, torch.full((shape[2],), level))
    config = config_of("diffmoe", shape[2])
    by_count = RULES["diffmoe"].infer(choice, config)
    mask = RULES["diffmoe"].infer(choice, config.model_copy(update={"capacity_selection": "mask"}))
    assert torch.equal(mask, logits.sigmoid() > level)
    assert torch.equal(mask.sum((0, 1)), by_count.sum((0, 1)))
    cutoff = lowest_accepted(scores, by_count, config)
    assert (scores.masked_fill(by_count, -1) <= cutoff).all()
    per_image = RULES["diffmoe"].infer(choice._replace(pools=shape[0]), config)
    assert torch.equal(mask.sum(1), per_image.sum(1))
