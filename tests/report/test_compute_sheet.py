from dataclasses import replace

import numpy as np
import torch

from sharpmoe.report import compute_sheet
from sharpmoe.report.compute_sheet import draw_compute_sheet
from tests.report.test_routing_sheet import sheet


def test_one_row_per_image_and_one_map_per_model_and_range() -> None:
    one = draw_compute_sheet({"before": sheet(3), "after": sheet(3)}, images=1)
    three = draw_compute_sheet({"before": sheet(3), "after": sheet(3)})
    alone = draw_compute_sheet({"before": sheet(3)})
    assert one.dtype == np.uint8
    assert three.shape[0] > 1.5 * one.shape[0]
    assert three.shape[1] == one.shape[1] > alone.shape[1]


def test_a_map_is_relative_to_an_even_spread_within_the_range() -> None:
    counts = sheet()
    expected = counts.experts[1, 1] / counts.experts[1, 1].mean()
    assert torch.equal(compute_sheet.relative_experts(counts, 1, "t 0.35-0.65"), expected)
    everything = counts.experts[1].mean(0)
    assert torch.allclose(compute_sheet.relative_experts(counts, 1, "all t"), everything / everything.mean())


def test_a_model_that_spends_twice_as_much_everywhere_looks_the_same() -> None:
    counts = sheet()
    doubled = replace(counts, experts=counts.experts * 2)
    assert np.array_equal(draw_compute_sheet({"a": counts}), draw_compute_sheet({"a": doubled}))
    other = replace(counts, experts=counts.experts.flip(2))
    assert not np.array_equal(draw_compute_sheet({"a": counts}), draw_compute_sheet({"a": other}))


def test_unrouted_images_and_odd_names_are_drawn() -> None:
    empty = replace(sheet(), experts=torch.zeros(2, 3, 16), captions=("costs $5^$", "\x07"))
    assert draw_compute_sheet({"run $a^$\n1": empty}, title="$x").shape[2] == 3
