import pytest
import torch

from sharpmoe.evaluation.held_out import Observed, Share, _chunks_of_rank, _held_out_batch, observe, spread
from sharpmoe.rollout import rollout
from tests.toys import ToySamples, toy_model

TIMES = (0.999, 0.5, 0.1)


def observe_on(world: int, images: int = 7) -> tuple[list[Observed], list[int]]:
    """Observe with `world` ranks, one after the other; returns what each filled in, and its number of batches."""
    seen, calls = [], []
    for rank in range(world):
        samples = ToySamples()
        share = Share(rank, world, lambda table: table)
        seen.append(observe(toy_model(), samples, range(images), TIMES, chunk=2, share=share))
        calls.append(len(samples.read))
    return seen, calls


@pytest.mark.parametrize(("world", "calls"), [(2, 2), (3, 2), (5, 1)])
def test_ranks_together_see_what_one_sees_alone_with_equal_calls(world: int, calls: int) -> None:
    alone = observe(toy_model(), ToySamples(), range(7), TIMES, chunk=2)
    parts, counts = observe_on(world)
    assert counts == [calls] * world
    for table, *shares in zip(alone, *parts, strict=True):
        torch.testing.assert_close(table, torch.stack(shares).sum(0), rtol=0, atol=0, equal_nan=True)


def test_chunks_cover_every_row_once() -> None:
    for world in (1, 2, 3):
        counted = [
            row
            for rank in range(world)
            for chunk in _chunks_of_rank(["64x64"] * 11, 4, Share(rank, world))
            if chunk.counted
            for row in chunk.rows
        ]
        assert sorted(counted) == list(range(11))


def test_spread_is_even_and_never_repeats() -> None:
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(3, 8) == [0, 1, 2]


def test_flow_losses_are_those_of_the_rollout() -> None:
    model, samples = toy_model("ec"), ToySamples()
    item = _held_out_batch(samples.batch([0, 3]), [0, 3], TIMES, model.config, 0, torch.device("cpu"))
    with torch.no_grad():
        losses = torch.stack([step.flow for step in rollout(model, item, uses_x0_prev=True)])
    seen = observe(model, samples, [0, 3], TIMES)
    torch.testing.assert_close(seen.flow.mean(0), losses, rtol=1e-4, atol=1e-5)


def test_observing_restores_the_mode_and_keeps_no_graph() -> None:
    model = toy_model().train()
    thresholds = [layer.expert_threshold.clone() for layer in model.moe_layers()]
    seen = observe(model, ToySamples(), [1], TIMES)
    assert model.training
    assert torch.is_grad_enabled()
    assert not seen.flow.requires_grad
    assert all(torch.equal(a, layer.expert_threshold) for a, layer in zip(thresholds, model.moe_layers(), strict=True))


def test_guided_models_are_asked_with_their_own_prediction() -> None:
    guided = observe(toy_model("ec"), ToySamples(), [1, 2], TIMES)
    other_order = observe(toy_model("ec"), ToySamples(), [1, 2], TIMES[1:])
    assert not torch.allclose(guided.flow[:, 1:], other_order.flow)  # the step before matters
    unguided = observe(toy_model("ec", saliency_router=False), ToySamples(), [1, 2], TIMES)
    other_order = observe(toy_model("ec", saliency_router=False), ToySamples(), [1, 2], TIMES[1:])
    torch.testing.assert_close(unguided.flow[:, 1:], other_order.flow)


def test_a_dense_model_has_losses_and_no_experts() -> None:
    seen = observe(toy_model("dense"), ToySamples(), [1, 2], TIMES)
    assert seen.flow.isfinite().all()
    assert not seen.experts.any()


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="no held-out samples"):
        observe(toy_model(), ToySamples(), [], TIMES)
