import pytest
import torch

from sharpmoe.errors import DataError
from sharpmoe.evaluation.held_out import Observed, Share, _held_out_batch, _runs, chunks_of_rank, observe, spread
from sharpmoe.flow import markov_noise
from sharpmoe.rollout import rollout
from tests.toys import ToySamples, toy_model

TIMES = (0.999, 0.5, 0.1)


def tables_of(seen: Observed) -> list[torch.Tensor]:
    return [seen.flow, seen.influence, *(table for tables in seen.tokens for table in tables)]


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
    for table, *shares in zip(*map(tables_of, (alone, *parts)), strict=True):
        torch.testing.assert_close(table, torch.stack(shares).sum(0), rtol=0, atol=0, equal_nan=True)


def mixed() -> ToySamples:
    return ToySamples(12, sizes=((8, 8), (4, 14), (10, 12)))


@pytest.mark.parametrize("world", [2, 3, 5])
def test_images_of_unequal_token_counts_are_shared_between_ranks(world: int) -> None:
    alone = observe(toy_model(), mixed(), range(12), TIMES, chunk=3)
    assert [tables.experts.shape for tables in alone.tokens] == [(4, 3, 16), (4, 3, 14), (4, 3, 30)]
    exchanged: list[list[torch.Tensor]] = []
    for rank in range(world):
        exchanged.append([])

        def keep(table: torch.Tensor, kept: list[torch.Tensor] = exchanged[-1]) -> torch.Tensor:
            kept.append(table)
            return table

        observe(toy_model(), mixed(), range(12), TIMES, chunk=3, share=Share(rank, world, keep))
    assert [len(kept) for kept in exchanged] == [5] * world  # one exchange per table, whatever the resolutions
    sums = iter([torch.stack(parts).sum(0) for parts in zip(*exchanged, strict=True)])
    for column in zip(*alone.tokens, strict=True):
        whole = torch.cat([table.flatten() for table in column])
        torch.testing.assert_close(whole, next(sums), rtol=0, atol=0, equal_nan=True)
    of_images = torch.cat([alone.flow.flatten(), alone.influence.flatten(), alone.loads.flatten()])
    torch.testing.assert_close(of_images, next(sums), rtol=0, atol=0)


@pytest.mark.parametrize("router", ["ec", "diffmoe"])
def test_clips_are_measured_by_tokens_of_all_frames(router: str) -> None:
    clips, still = ToySamples(4, ((3, 8, 8),)), ToySamples(4, ((8, 8),))
    seen = observe(toy_model(router, latent_frames=3), clips, range(4), TIMES, chunk=2)
    assert seen.tokens[0].experts.shape == (4, 3, 48)
    torch.testing.assert_close(seen.tokens[0].flow.mean(-1), seen.flow, rtol=1e-5, atol=1e-6)
    assert observe(toy_model(router, latent_frames=3), still, range(4), TIMES).tokens[0].experts.shape == (4, 3, 16)


def test_the_flow_loss_of_an_image_is_the_mean_of_its_tokens() -> None:
    seen = observe(toy_model(), mixed(), range(12), TIMES, chunk=3)
    of_tokens = torch.cat([tables.flow.mean(-1) for tables in seen.tokens])
    torch.testing.assert_close(of_tokens, seen.flow, rtol=1e-5, atol=1e-6)


def test_fresh_noise_is_that_of_no_other_step_and_leaves_the_first_as_it_is() -> None:
    item, fixed = (
        _held_out_batch(ToySamples().batch([4, 5]), [4, 5], TIMES, toy_model().config, 0, torch.device("cpu"), noise)
        for noise in ("fresh", "fixed")
    )
    assert torch.equal(item.noise(0), fixed.x1)
    assert len({tuple(item.noise(step).flatten().tolist()) for step in range(len(TIMES))}) == len(TIMES)
    fresh, same = (observe(toy_model("ec"), ToySamples(), [4, 5], TIMES, noise=noise) for noise in ("fresh", "fixed"))
    assert torch.equal(fresh.flow[:, 0], same.flow[:, 0])
    assert (fresh.flow[:, 1:] != same.flow[:, 1:]).all()
    batch = ToySamples().batch([4, 5])
    steps = rollout(toy_model("ec"), item, uses_x0_prev=True)
    for step, output in enumerate(steps):
        torch.testing.assert_close(output.v_target, item.x1[step] - batch.latent)


def test_an_image_is_measured_as_beside_its_own_kind() -> None:
    together = observe(toy_model("ec"), mixed(), [1, 5, 9], TIMES)
    for place, index in enumerate((1, 5, 9)):
        alone = observe(toy_model("ec"), mixed(), [index], TIMES)
        assert torch.equal(together.flow[place : place + 1], alone.flow)
        assert torch.equal(together.tokens[place].experts, alone.tokens[0].experts)


def test_chunks_cover_every_row_once() -> None:
    for world in (1, 2, 3):
        counted = [
            row
            for rank in range(world)
            for chunk in chunks_of_rank(_runs(["64x64"] * 6 + ["32x96"] * 5), 4, Share(rank, world))
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


def test_a_label_that_the_model_has_no_row_for_is_named_before_its_call() -> None:
    samples = ToySamples(labels=4)
    for classes, is_known in [(4, True), (3, False)]:
        model = toy_model("ec", conditioning="class", num_classes=classes, class_dropout=False)
        if is_known:
            observe(model, samples, [3], TIMES)
        else:
            with pytest.raises(DataError, match="sample sample3 has label 3, model.num_classes is 3 .labels 0 to 2"):
                observe(model, samples, [3], TIMES)
    with pytest.raises(DataError, match="sample sample3 has no class label, but the model takes classes: name the sha"):
        observe(model, ToySamples(), [3], TIMES)


def test_a_dense_model_has_losses_and_no_experts() -> None:
    seen = observe(toy_model("dense"), ToySamples(), [1, 2], TIMES)
    assert seen.flow.isfinite().all()
    assert not seen.tokens[0].experts.any()


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="no held-out samples"):
        observe(toy_model(), ToySamples(), [], TIMES)


def test_markov_noise_is_that_of_the_chain_at_the_times_of_the_table() -> None:
    batch = ToySamples().batch([4, 5])
    fresh, markov = (
        _held_out_batch(batch, [4, 5], TIMES, toy_model().config, 0, torch.device("cpu"), noise)
        for noise in ("fresh", "markov")
    )
    assert torch.equal(markov.x1, markov_noise(fresh.x1, fresh.times))
    assert torch.equal(markov.noise(len(TIMES) - 1), fresh.noise(len(TIMES) - 1))  # the least noisy step begins it
    found, other = (observe(toy_model("ec"), ToySamples(), [4, 5], TIMES, noise=name) for name in ("markov", "fresh"))
    assert (found.flow[:, :-1] != other.flow[:, :-1]).all()
