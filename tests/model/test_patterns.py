"""Patterns of names: which one counts, and what is said where one matches nothing."""

import pytest

from sharpmoe.errors import ConfigError
from sharpmoe.model.patterns import check_patterns, matching_pattern


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
