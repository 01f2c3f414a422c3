"""Published models, their weights loaded into ours: the same outputs, gradients, routing and threshold rule.

The figures in tests/data/parity were recorded by running ProMoE's and Kwai's public models (float32, CPU) on seeded
random weights.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sharpmoe.config import LossConfig
from sharpmoe.flow import interpolate
from sharpmoe.losses import HEAD_LOSSES, ROUTER_LOSSES, flow_matching
from sharpmoe.model.backbone import Backbone, ClassCondition, ModelOutput
from sharpmoe.model.published.load import load_pretrained
from sharpmoe.model.published.names import to_published
from sharpmoe.moe.thresholds import threshold_candidates, update_thresholds
from tests.recorded import assert_recorded

FOLDER = Path(__file__).parents[2] / "data" / "parity"
NAMES = ("promoe_dit", "promoe_tc", "promoe_ec", "promoe_diffmoe", "promoe_promoe_tc", "kwai_diffmoe")
TOLERANCE = 1e-5
CONTRASTIVE_TEMPERATURE = 0.07


def load(name: str) -> tuple[Backbone, dict[str, Tensor], dict]:
    family, router = name.split("_", 1)
    record = json.loads((FOLDER / f"{name}.json").read_text())
    sizes = record["config"]
    model = load_pretrained(
        FOLDER / f"{name}.weights.safetensors",
        family,
        "dense" if router == "dit" else router,
        num_heads=sizes["heads"],
        capacity=sizes["capacity"],
    )
    assert (model.config.width, model.config.depth) == (sizes["hidden"], sizes["depth"])
    assert (model.config.latent_size, model.config.num_classes) == (sizes["latent"], sizes["classes"])
    return model, load_file(FOLDER / f"{name}.golden.safetensors"), record


def router_loss(name: str, output: ModelOutput) -> Tensor:
    config = LossConfig(contrastive_temperature=CONTRASTIVE_TEMPERATURE)
    return ROUTER_LOSSES[name].function(output.routing, config)


def sign(name: str) -> int:
    return -1 if name.startswith("kwai") else 1


@pytest.mark.parametrize("name", NAMES)
def test_training_forward_masks_and_gradients(name: str) -> None:
    model, golden, record = load(name)
    model.train()
    output = model(golden["x_t"], golden["t"], ClassCondition(golden["labels"]))
    assert_recorded(golden["x_t"], interpolate(golden["x0"], golden["x1"], golden["t"]))
    assert_recorded(output.v, sign(name) * golden["train.velocity_theirs"])
    blocks = range(1, record["config"]["depth"], 2)
    loss = flow_matching(output.v, golden["x1"] - golden["x0"])
    if "diffmoe" in name:
        for block, routing in zip(blocks, output.routing, strict=True):
            assert torch.equal(routing.routing_map, golden[f"train.routing_map.{block}"].bool())
            assert_recorded(routing.capacity_logits, golden[f"train.capacity_logits.{block}"])
        loss = loss + record["figures"]["capacity_weight_used"] * HEAD_LOSSES["capacity"].function(
            output.routing, golden["x1"], 2
        )
    if (
        name == "promoe_tc"
    ):  # theirs enters in backward only: the recorded loss is without it, the gradients are with it
        loss = loss + 0.01 * (router_loss("balance", output) - router_loss("balance", output).detach())
    if name == "promoe_promoe_tc":
        contrast = router_loss("contrastive", output)
        loss = loss + contrast - contrast.detach()
    assert loss.item() == pytest.approx(record["figures"]["loss"], rel=TOLERANCE)
    loss.backward()
    published = {key.removeprefix("train.grad."): value for key, value in golden.items() if "train.grad." in key}
    assert published
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    # d loss / d W is the same for W and for -W in a negated layer up to that sign, which to_published restores.
    ours = to_published(gradients, model.config, name.split("_", maxsplit=1)[0])
    for key, gradient in published.items():
        assert_recorded(ours[key], gradient, what=key)


@pytest.mark.parametrize("name", NAMES)
def test_published_names_round_trip(name: str) -> None:
    model, _, _ = load(name)
    family = name.split("_", maxsplit=1)[0]
    published = load_file(FOLDER / f"{name}.weights.safetensors")
    returned = to_published(model.state_dict(), model.config, family)
    assert {key for key in published if not key.endswith("ema_decay")} == set(returned)
    for key, value in returned.items():
        assert torch.equal(value, published[key]), key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("conditional", [True, False])
def test_evaluation_forward(name: str, conditional: bool) -> None:
    model, golden, record = load(name)
    model.eval()
    for index, layer in zip(range(1, record["config"]["depth"], 2), model.moe_layers(), strict=False):
        if "diffmoe" in name:
            layer.expert_threshold.copy_(golden[f"eval.threshold.blocks.{index}.mlp"])
    labels = golden["labels"] if conditional else torch.full_like(golden["labels"], record["config"]["classes"])
    expected = golden["eval.velocity_theirs" + ("" if conditional else "_unconditional")]
    with torch.no_grad():
        assert_recorded(model(golden["x_t"], golden["t"], ClassCondition(labels)).v, sign(name) * expected)


@pytest.mark.parametrize("name", ["promoe_diffmoe", "kwai_diffmoe"])
def test_threshold_update(name: str) -> None:
    model, golden, record = load(name)
    before = [layer.expert_threshold.clone() for layer in model.moe_layers()]
    output = model.train()(golden["x_t"], golden["t"], ClassCondition(golden["labels"]))
    thresholds = [layer.expert_threshold for layer in model.moe_layers()]
    for old, new in zip(before, thresholds, strict=True):
        assert torch.equal(old, new), "a forward moved a threshold"
    update_thresholds(thresholds, threshold_candidates(output.routing, model.config), decay=0.95)
    for block, threshold in zip(range(1, record["config"]["depth"], 2), thresholds, strict=True):
        assert_recorded(threshold, golden[f"train.after.blocks.{block}.mlp.expert_threshold"])
