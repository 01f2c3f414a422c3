"""Where a token's FLOPs went: sums equal those of the model, fifths are of the tokens by saliency."""

from dataclasses import replace

import pytest
import torch

from sharpmoe.model.flops import Call, forward_flops, products
from sharpmoe.report.token_flops import TokenFlops, draw_token_flops, flops_by_saliency
from tests.report.test_routing_sheet import sheet
from tests.toys import TEXT_LENGTH, toy_config

TOKENS = 16


@pytest.mark.parametrize("router", ["diffmoe", "ec", "dsmoe", "promoe_ec", "race"])
def test_the_parts_of_all_tokens_are_the_flops_of_a_call(router: str) -> None:
    fields = {"conditioning": "class", "num_classes": 4} if router == "promoe_ec" else {}
    config, rows = toy_config(router, **fields), 40
    text = 0 if fields else TEXT_LENGTH
    found = TokenFlops.of(config, TOKENS, TEXT_LENGTH)
    call = Call(tokens=TOKENS, rows=rows, text_tokens=text, uses_x0_prev=True, training=False)
    whole = forward_flops(products(config, call))
    assert found.shared * TOKENS + found.per_expert * rows == pytest.approx(whole.total)
    assert found.router * TOKENS == pytest.approx(whole.router)


def test_attention_and_mlp_by_hand() -> None:
    """Width D = 24, N = 16 tokens, L = 3 of text, four blocks of which two have a dense MLP of 4 D."""
    found = TokenFlops.of(toy_config("ec"), TOKENS, TEXT_LENGTH)
    d, n, text = 24, TOKENS, TEXT_LENGTH
    projections = 2 * n * d * 3 * d + 2 * n * d * d + 2 * (2 * n * d * d) + 2 * text * d * 2 * d
    products_with_keys = 2 * (2 * n * n * d) + 2 * (2 * n * text * d)
    assert found.attention == pytest.approx(4 * (projections + products_with_keys) / n)
    assert found.mlp == pytest.approx(2 * (2 * (2 * d * 4 * d)))


def test_fifths_are_by_saliency() -> None:
    one = replace(sheet(1), saliency=torch.arange(16.0).flip(0)[None], experts=torch.zeros(1, 3, 16))
    one.experts[0, :, 0] = 3  # the most salient token
    flops = TokenFlops.of(toy_config("ec"), TOKENS, TEXT_LENGTH)
    found = flops_by_saliency(flops, one)
    assert found[:4] == [0, 0, 0, 0]
    assert found[4] == pytest.approx(3 / 3 * flops.per_expert)  # three tokens in the last fifth of 16


def test_a_picture_has_a_row_per_image() -> None:
    flops = TokenFlops.of(toy_config("ec"), TOKENS, TEXT_LENGTH)
    assert draw_token_flops(flops, sheet(4), "toy").shape[0] > draw_token_flops(flops, sheet(1), "toy").shape[0]
