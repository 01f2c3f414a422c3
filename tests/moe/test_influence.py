"""What the saliency router decides: figures by hand, and in inference the choice that the gate alone would make."""

import pytest
import torch
from torch import Tensor

from sharpmoe.evaluation.held_out import _held_out_batch
from sharpmoe.moe.influence import choice_of_gate, influence, influence_figures
from sharpmoe.moe.routing import CallMode, Routing
from sharpmoe.rollout import StepOutput, rollout
from tests.toys import ToySamples, toy_config, toy_model


def _record(gate: Tensor, steered: Tensor, chosen: Tensor) -> Routing:
    scores = (gate + steered).softmax(-1)
    return Routing(gate, gate + steered, scores, scores * chosen, chosen, scores[:, :1])


def test_figures_by_hand() -> None:
    gate = torch.tensor([[[0.0, 4.0], [2.0, 0.0], [4.0, 2.0]]])  # over tokens: variances 8/3 and 8/3
    steered = torch.tensor([[[1.0, 5.0], [3.0, 5.0], [5.0, 5.0]]])  # 8/3 and 0: a constant steers nothing
    chosen = torch.tensor([[[1, 1], [1, 0], [0, 0]]], dtype=torch.bool)
    by_gate = torch.tensor([[[0, 1], [1, 0], [1, 0]]], dtype=torch.bool)
    sums = influence(_record(gate, steered, chosen), by_gate, torch.tensor([[0.3, 0.2, 0.1]]))
    assert sums.tolist() == [pytest.approx([4 / 3, 8 / 3, 1, 3, 1, 1])]
    figures = influence_figures((sums[0] * 7).tolist())  # sums over any number of calls
    assert figures == pytest.approx({"spread": 0.5**0.5, "flipped": 1 / 3, "agreement": 1.0})


def test_what_is_not_defined_is_left_out() -> None:
    """All tokens equal in experts or in M: such images count for nothing in the agreement."""
    gate, chosen = torch.zeros(2, 3, 2), torch.ones(2, 3, 2, dtype=torch.bool)
    chosen[1, 0, 0] = False
    sums = influence(_record(gate, gate, chosen), chosen, torch.full((2, 3), 0.1))
    assert influence_figures(sums.sum(0).tolist()) == {"flipped": 0.0}


def _last_step(
    router: str, training: bool, zero: bool, cutoff: float | None = None
) -> tuple[StepOutput, list[Tensor | None]]:
    """cutoff: of every expert, of which experts take what reaches it."""
    model = toy_model(router).train(training)
    if zero:
        with torch.no_grad():
            for layer in model.moe_layers():
                layer.saliency_router.out.weight.zero_()
                layer.saliency_router.out.bias.zero_()
    batch = ToySamples().batch([0, 1, 2])
    item = _held_out_batch(batch, [0, 1, 2], (0.999, 0.4), model.config, 0, torch.device("cpu"))
    thresholds = [getattr(layer, "expert_threshold", None) for layer in model.moe_layers()]
    layers = model.moe_layers()
    cutoffs = None if cutoff is None else (torch.full((model.config.num_experts,), cutoff),) * len(layers)
    with torch.no_grad():
        return rollout(model, item, uses_x0_prev=True, mode=CallMode(cutoffs=cutoffs))[-1], thresholds


@pytest.mark.parametrize("router", ["diffmoe", "race"])
def test_a_router_that_adds_nothing_flips_nothing_where_experts_take_what_reaches_their_cutoff(router: str) -> None:
    config = toy_config(router)
    for zero in (True, False):
        output, _ = _last_step(router, training=True, zero=zero, cutoff=0.26)
        flips = 0.0
        for record in output.routing:
            assert torch.equal(record.routing_map, record.scores >= 0.26)
            by_gate = choice_of_gate(record, config, training=True, by_cutoff=True)
            flips += float(influence(record, by_gate, torch.rand(3, 16))[:, 2].sum())
        assert (flips == 0) == zero


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("router", ["tc", "ec", "diffmoe", "race"])
def test_a_router_that_adds_nothing_flips_nothing_in_training_and_inference(router: str, training: bool) -> None:
    config = toy_config(router)
    for zero in (True, False):
        output, thresholds = _last_step(router, training, zero)
        flips = [
            float(
                influence(record, choice_of_gate(record, config, tau, training=training), torch.rand(3, 16))[:, 2].sum()
            )
            for record, tau in zip(output.routing, thresholds, strict=True)
        ]
        assert (sum(flips) == 0) == zero
