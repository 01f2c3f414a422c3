"""Patterns of parameter names, and what train.trainable and train.frozen make of them."""

from typing import Any

import pytest
import torch

from sharpmoe.config import RunConfig, TrainConfig
from sharpmoe.errors import ConfigError
from sharpmoe.families import FAMILIES
from sharpmoe.model.trainable import check_trained, freeze, planned_model, trained_names, trained_title

NAMES = (
    "blocks.0.attn.qkv.weight",
    "blocks.1.attn.qkv.weight",
    "blocks.1.moe.gate.weight",
    "blocks.1.moe.saliency_router.out.weight",
    "blocks.1.moe.experts.w1",
)


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({}, (0, 1, 2, 3, 4)),
        ({"trainable": ["saliency_router"]}, (3,)),
        ({"trainable": ["saliency_router", "gate"]}, (2, 3)),
        ({"trainable": ["moe.experts"]}, (4,)),
        ({"trainable": ["*"]}, (0, 1, 2, 3, 4)),
        ({"frozen": ["attn"]}, (2, 3, 4)),
        ({"frozen": ["*"], "trainable": ["gate"]}, (2,)),  # the more specific one counts, in whichever list it is
        ({"trainable": ["moe"], "frozen": ["moe.experts"]}, (2, 3)),
        ({"trainable": ["blocks.1"], "frozen": ["attn"]}, (1, 2, 3, 4)),
        ({"frozen": ["blocks"], "trainable": ["blocks.*.attn"]}, (0, 1)),
    ],
)
def test_what_is_trained(train: dict[str, Any], expected: tuple[int, ...]) -> None:
    config = RunConfig.model_validate({"train": train})
    assert trained_names(NAMES, config) == {NAMES[index] for index in expected}
    module = torch.nn.ParameterDict({name.replace(".", "_"): torch.nn.Parameter(torch.zeros(1)) for name in NAMES})
    named = torch.nn.Module()
    named.named_parameters = lambda: zip(NAMES, module.values(), strict=True)  # type: ignore[assignment, method-assign]
    freeze(named, config)
    assert {name for name, each in named.named_parameters() if each.requires_grad} == trained_names(NAMES, config)


def test_a_model_with_frozen_parameters_of_its_own_keeps_them() -> None:
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    freeze(model, RunConfig())
    assert (model.weight.requires_grad, model.bias.requires_grad) == (True, False)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"train": {"trainable": ["saliency"]}},
            "train.trainable: 'saliency' matches no parameter; did you mean sal",
        ),
        ({"train": {"frozen": ["expert"]}}, "train.frozen: 'expert' matches no parameter; did you mean experts?"),
        ({"train": {"frozen": ["*"]}}, r"train.frozen: \['\*'\] leaves nothing to train; remove a pattern, or name"),
        (
            {"train": {"trainable": ["gate"]}, "optim": {"lr_scale": {"attn": 2.0}}},
            "optim.lr_scale: 'attn' matches frozen parameters only, which have no learning rate; remove it ",
        ),
    ],
)
def test_what_cannot_be_is_one_line(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_trained(NAMES, RunConfig.model_validate(sections))
    assert "\n" not in str(caught.value)


def test_factors_of_saliency_routers_do_nothing_where_there_are_none() -> None:
    factors = {"saliency_router": 20.0, "moe.saliency_router": 10.0, "gate": 2.0}
    with_routers = RunConfig.model_validate({"optim": {"lr_scale": factors}})
    assert with_routers.learning_rate_factors == factors
    for model in ({"saliency_router": False}, {"router": "dense"}):
        run = RunConfig.model_validate({"model": model, "optim": {"lr_scale": factors}})
        assert run.learning_rate_factors == {"gate": 2.0}
        names = [name for name, _ in planned_model(run).named_parameters()]
        assert not any("saliency_router" in name for name in names)
        if model != {"router": "dense"}:
            check_trained(names, run)


@pytest.mark.parametrize("router", FAMILIES)
def test_factors_of_capacity_predictors_do_nothing_in_families_without(router: str) -> None:
    sections = {
        "model": {"router": router, "unconditional_expert": False},  # which asks for classes
        "optim": {"lr_scale": {"moe.capacity_predictor": 3.0, "attn": 2.0}},
    }
    run = RunConfig.model_validate(sections)
    names = [name for name, _ in planned_model(run).named_parameters()]
    there = any("capacity_predictor" in name for name in names)
    assert run.learning_rate_factors == ({"moe.capacity_predictor": 3.0} if there else {}) | {"attn": 2.0}
    check_trained(names, run)


def test_a_pattern_in_both_lists_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'gate' is in train\.trainable and in train\.frozen; remove it from one"):
        TrainConfig.model_validate({"trainable": ["gate"], "frozen": ["gate", "attn"]})


def test_a_title_only_where_something_is_frozen() -> None:
    assert trained_title(RunConfig(), 5) == ""
    config = RunConfig.model_validate({"train": {"trainable": ["moe"], "frozen": ["gate"]}})
    assert (
        trained_title(config, 1_500_000)
        == "1.500 M parameters (train.trainable: moe; train.frozen: gate); all others are frozen"
    )
