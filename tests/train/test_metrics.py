import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sharpmoe.config import ModelConfig
from sharpmoe.evaluation.held_out import _held_out_batch
from sharpmoe.moe.routing import Routing
from sharpmoe.rollout import rollout
from sharpmoe.train.flops import StepFlops
from sharpmoe.train.metrics import Effort, StepStats, due, routing_scalars, routing_sums, rows_taken, strength_warning
from tests.toys import ToySamples, toy_config, toy_model


def stats(step: int, seconds: float = 0.5) -> StepStats:
    return StepStats(
        step=step,
        losses={"total": 1.0 / step, "routing": 0.0},
        grad_norm=0.25,
        lr=1e-4,
        images=32,
        tokens=32 * 64,
        seconds=seconds,
        wait_seconds=0.1,
    )


TIMES, SALIENCY = torch.tensor([[0.999] * 3, [0.4] * 3]), ToySamples().batch([0, 1, 2]).saliency


def sums_of(routing: Sequence[Sequence[Routing]], config: ModelConfig) -> Tensor:
    """At the times of `records`, with the maps of its images."""
    return routing_sums(routing, config, TIMES[: len(routing)], SALIENCY)


def records(router: str, untrained: bool) -> tuple[tuple[Routing, ...], ...]:
    model = toy_model(router).train()
    if untrained:
        with torch.no_grad():
            for layer in model.moe_layers():
                layer.saliency_router.out.weight.zero_()
                layer.saliency_router.out.bias.zero_()
    item = _held_out_batch(ToySamples().batch([0, 1, 2]), [0, 1, 2], (0.999, 0.4), model.config, 0, torch.device("cpu"))
    return tuple(output.routing for output in rollout(model, item, uses_x0_prev=True))


@pytest.mark.parametrize("router", ["tc", "ec", "diffmoe"])
def test_a_saliency_router_that_adds_nothing_flips_nothing(router: str) -> None:
    named = routing_scalars(sums_of(records(router, untrained=True), toy_config(router)))
    assert named["routing_flipped/layer0"] == 0
    assert named["routing_flipped/layer1"] == 0


@pytest.mark.parametrize("router", ["tc", "ec", "diffmoe"])
def test_flips_are_counted_under_the_same_rule_and_pool(router: str) -> None:
    named = routing_scalars(sums_of(records(router, untrained=False), toy_config(router)))
    assert 0 < named["routing_flipped/layer0"] < 1
    assert 0 < named["routing_entropy/layer0"] <= 1
    if router != "tc":
        assert named["routing_load_min/layer0"] == named["routing_load_max/layer0"] == 1  # equal by construction


def test_strength_is_told_by_range_of_time() -> None:
    """Two of the three ranges are in the rollout; the figures of each are of its steps alone."""
    steps, config = records("ec", untrained=False), toy_config("ec")
    named = routing_scalars(sums_of(steps, config))
    assert {tag for tag in named if tag.startswith("saliency_") and tag.endswith("layer1")} == {
        f"saliency_{what}_{name}/layer1"
        for what in ("spread", "flipped", "agreement")
        for name in ("t>0.65", "t0.35-0.65")
    }
    alone = routing_scalars(routing_sums(steps[:1], config, TIMES[:1], SALIENCY))
    assert (
        alone["routing_flipped/layer0"]
        == alone["saliency_flipped_t>0.65/layer0"]
        == named["saliency_flipped_t>0.65/layer0"]
    )
    assert named["saliency_spread_t>0.65/layer0"] > 0


def test_an_inert_and_an_overbearing_router_are_warned_of() -> None:
    config = toy_config("ec")
    inert = strength_warning(sums_of(records("ec", untrained=True), config), 5)
    assert inert.startswith("note: step 5: ")  # nothing is wrong in a short run
    assert "expected" in inert
    assert "optim.lr_scale" in inert
    steps = records("ec", untrained=False)
    known = sums_of(steps, config)
    assert strength_warning(known, 5) == ""
    louder = tuple(
        tuple(layer._replace(logits=layer.gate_logits + 1e3 * (layer.logits - layer.gate_logits)) for layer in step)
        for step in steps
    )
    over = strength_warning(sums_of(louder, config), 5)
    assert over.startswith("warning: step 5: ")
    assert "gates hardly matter; lower" in over
    assert strength_warning(sums_of([()], toy_config("dense")), 5) == ""


def test_sums_are_additive_over_steps_and_micro_batches() -> None:
    config, steps = toy_config("tc"), records("tc", untrained=False)
    parts = [routing_sums([step], config, t[None], SALIENCY) for step, t in zip(steps, TIMES, strict=True)]
    torch.testing.assert_close(sums_of(steps, config), sum(parts))


def test_loads_and_dead_experts_by_hand() -> None:
    scores = torch.tensor([[[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1]]])
    chosen = torch.tensor([[[1, 0, 0], [1, 0, 0], [0, 1, 0]]], dtype=torch.bool)
    record = Routing(scores.log(), scores.log(), scores, scores * chosen, chosen, scores[:, :1], None)
    config = toy_config("tc", num_experts=3, depth=2)  # one MoE layer
    named = routing_scalars(routing_sums([(record,)], config, torch.tensor([[0.5]]), torch.rand(1, 3)))
    assert named["routing_load_max/layer0"] == pytest.approx(2.0)
    assert named["routing_load_min/layer0"] == 0
    assert named["routing_dead_experts/layer0"] == 1
    entropy = -(scores * scores.log()).sum(-1).mean() / math.log(3)
    assert named["routing_entropy/layer0"] == pytest.approx(entropy.item())
    assert named["routing_flipped/layer0"] == 0


def test_a_dense_model_has_no_routing_figures() -> None:
    assert routing_scalars(sums_of([(), ()], toy_config("dense"))) == {}


def test_step_figures_are_grouped_and_per_second() -> None:
    named = stats(2).scalars()
    assert named["loss/total"] == 0.5
    assert named["throughput/images_per_second"] == 64
    assert named["throughput/tokens_per_second"] == 64 * 64
    assert named["throughput/data_wait_share"] == pytest.approx(0.2)
    assert named["memory/peak_mib"] > 10
    assert {tag.split("/")[0] for tag in named} == {"loss", "optim", "throughput", "memory"}


def test_rows_are_those_that_experts_took() -> None:
    steps = records("diffmoe", untrained=False)
    taken = sum(int(layer.routing_map.sum()) for step in steps for layer in step)
    assert rows_taken(sums_of(steps, toy_config())) == taken > 0


def test_speed_counts_model_flops_per_rank() -> None:
    spent = StepFlops(dense=4e12, routed=2e12, router=1e12, wasted=3e12)
    named = replace(stats(2), effort=Effort(spent, ranks=4, peak_tflops=224)).scalars()
    assert named["throughput/tflops_per_rank"] == pytest.approx(32 * 7 / 0.5 / 4)
    assert named["throughput/mfu"] == pytest.approx(0.5)
    assert named["throughput/hfu"] == pytest.approx(0.5 * 10 / 7)
    assert {tag: named[tag] for tag in named if tag.startswith("flops/")} == {
        "flops/per_image/dense": 4e12,
        "flops/per_image/routed": 2e12,
        "flops/per_image/router": 1e12,
        "flops/per_image/wasted": 3e12,
    }


def test_no_utilisation_without_a_peak() -> None:
    named = replace(stats(2), effort=Effort(StepFlops(1e9, 0, 0, 0), ranks=1)).scalars()
    assert "throughput/mfu" not in named
    assert named["throughput/tflops_per_rank"] == pytest.approx(32e-3 / 0.5)


def test_due() -> None:
    assert [step for step in range(1, 12) if due(step, 5)] == [1, 5, 10]
    assert not due(1, 0)
