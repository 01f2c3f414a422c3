"""Patterns of parameter names, and what train.trainable and train.frozen make of them."""

from typing import Any

import pytest
import torch

from sharpmoe.config import RunConfig, TrainConfig
from sharpmoe.errors import ConfigError
from sharpmoe.model.trainable import (
    check_patterns,
    check_trained,
    freeze,
    matching_pattern,
    trained_names,
    trained_title,
)

NAMES = (
    "blocks.0.attn.qkv.weight",
    "blocks.1.attn.qkv.weight",
    "blocks.1.moe.gate.weight",
    "blocks.1.moe.saliency_router.out.weight",
    "blocks.1.moe.experts.w1",
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.1.mlp.router.saliency_router.out.weight", "router.saliency_router"),  # of two parts
        ("blocks.1.mlp.router.gate.weight", "router"),
        ("blocks.1.attn.qkv.weight", "blocks.*.attn"),
        ("blocks.2.attn.qkv.weight", "blocks.2.attn"),  # as many parts; the longer text... and no wildcard
        ("final.saliency_routers.weight", None),  # a whole part, not a piece of one
        ("t_embedder.0.weight", "t_*"),
    ],
)
def test_the_most_specific_pattern_counts_in_any_order(name: str, expected: str | None) -> None:
    patterns = ["router", "saliency_router", "router.saliency_router", "blocks.*.attn", "blocks.2.attn", "t_*"]
    for given in (patterns, patterns[::-1]):
        assert matching_pattern(name, given) == expected


def test_a_pattern_without_parameters_names_what_there_is() -> None:
    names = ["blocks.0.attn.qkv.weight", "blocks.0.router.saliency_router.out.weight"]
    check_patterns("optim.lr_scale", names, {"saliency_router": 2.0})
    known = "attn, blocks, out, qkv, router, saliency_router, weight"
    with pytest.raises(ConfigError, match=f"'saliency_route' matches no .*did you mean saliency_router.*{known}"):
        check_patterns("optim.lr_scale", names, ["saliency_route"])


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
    config = TrainConfig.model_validate(train)
    assert trained_names(NAMES, config) == {NAMES[index] for index in expected}
    module = torch.nn.ParameterDict({name.replace(".", "_"): torch.nn.Parameter(torch.zeros(1)) for name in NAMES})
    named = torch.nn.Module()
    named.named_parameters = lambda: zip(NAMES, module.values(), strict=True)  # type: ignore[assignment, method-assign]
    freeze(named, config)
    assert {name for name, each in named.named_parameters() if each.requires_grad} == trained_names(NAMES, config)


def test_a_model_with_frozen_parameters_of_its_own_keeps_them() -> None:
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    freeze(model, TrainConfig())
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
            "optim.lr_scale: 'attn' matches frozen parameters only, which have no learning rate; remove it, or train",
        ),
    ],
)
def test_what_cannot_be_is_one_line(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_trained(NAMES, RunConfig.model_validate(sections))
    assert "\n" not in str(caught.value)


def test_a_pattern_in_both_lists_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'gate' is in train\.trainable and in train\.frozen; remove it from one"):
        TrainConfig.model_validate({"trainable": ["gate"], "frozen": ["gate", "attn"]})


def test_a_title_only_where_something_is_frozen() -> None:
    assert trained_title(TrainConfig(), 5) == ""
    config = TrainConfig(trainable=("moe",), frozen=("gate",))
    assert (
        trained_title(config, 1_500_000) == "1.500 M parameters (trainable: moe; frozen: gate); all others are frozen"
    )
