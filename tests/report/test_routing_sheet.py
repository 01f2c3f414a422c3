from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sharpmoe.errors import DataError
from sharpmoe.evaluation.held_out import observe
from sharpmoe.report.routing_sheet import RoutingSheet, _by_frame, draw_difference_sheet, draw_routing_sheet
from tests.toys import ToySamples, toy_model


def sheet(images: int = 2, most: int = 5) -> RoutingSheet:
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(images, 16, generator=g)
    mask[0] = torch.nan
    return RoutingSheet(
        images=torch.rand(images, 3, 8, 8, generator=g) * 2 - 1,
        saliency=torch.rand(images, 16, generator=g),
        foreground=mask,
        experts=torch.randint(0, most, (images, 3, 16), generator=g).float(),
        times=(0.999, 0.5, 0.05),
        captions=tuple(f"caption {i}" for i in range(images)),
    )


def test_a_sheet_has_one_row_per_image_and_ignores_missing_masks() -> None:
    two, four = (draw_routing_sheet(sheet(n)) for n in (2, 4))  # the first image has no mask
    assert two.dtype == np.uint8
    assert two.shape[1] == four.shape[1]
    assert four.shape[0] > 1.4 * two.shape[0]


def test_without_any_mask_there_is_no_column_for_them() -> None:
    some = sheet()
    none = replace(some, foreground=torch.full_like(some.foreground, torch.nan))
    assert draw_routing_sheet(none).shape[1] < draw_routing_sheet(some).shape[1]


def test_sheets_on_one_scale_can_be_compared() -> None:
    counts = sheet()
    doubled = replace(counts, experts=counts.experts * 2)
    assert np.array_equal(draw_routing_sheet(counts, most=8), draw_routing_sheet(counts, most=8))
    assert not np.array_equal(draw_routing_sheet(counts, most=8), draw_routing_sheet(doubled, most=8))


def test_a_difference_is_signed_and_no_difference_is_white() -> None:
    counts = sheet()
    more = replace(counts, experts=counts.experts + 1)
    up, down = draw_difference_sheet(counts, more, most=2), draw_difference_sheet(more, counts, most=2)
    red, _, blue = ((up.astype(int) - down)[..., channel].sum() for channel in range(3))
    assert red > 0 > blue  # red: more experts than before
    same = draw_difference_sheet(counts, counts)
    assert np.array_equal(same, draw_difference_sheet(more, more))


def test_images_of_another_aspect_are_drawn() -> None:
    wide = replace(sheet(), images=torch.zeros(2, 3, 4, 16))
    assert draw_routing_sheet(wide).shape[2] == 3


def test_captions_and_titles_are_no_formulas() -> None:
    odd = replace(sheet(), captions=("costs $5^$ and\n$x", "\x07\udcff"))
    assert draw_routing_sheet(odd, "run $a^$\n1").shape == draw_routing_sheet(sheet(), "run a").shape


def test_the_content_of_a_sheet_is_kept(tmp_path: Path) -> None:
    kept = replace(sheet(), captions=("zwölf <b>", ""))
    path = kept.save(tmp_path / "routing" / "step1.npz")
    found = RoutingSheet.load(path)
    assert (found.times, found.captions) == (kept.times, kept.captions)
    torch.testing.assert_close(found.experts, kept.experts)  # whole numbers are exact
    torch.testing.assert_close(found.foreground, kept.foreground, rtol=1e-3, atol=0, equal_nan=True)
    torch.testing.assert_close(found.images, kept.images, rtol=0, atol=1 / 127)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04"])
def test_a_damaged_sheet_is_an_error_of_the_data(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.npz: not the content of a routing sheet"):
        RoutingSheet.load(path)


def test_sheets_of_single_layers_add_up_to_that_of_all() -> None:
    model, samples, times = toy_model(), ToySamples(), (0.9, 0.5)
    whole, first, second = (
        observe(model, samples, [1, 2], times, layers=layers).tokens[0].experts
        for layers in (slice(None), slice(0, 1), slice(1, 2))
    )
    assert not torch.equal(first, second)
    assert torch.equal(first + second, whole)


def test_a_sheet_of_clips_has_a_row_per_frame() -> None:
    clips, frames, steps, tokens = 2, 3, 2, 4
    images = torch.arange(clips * frames, dtype=torch.float32).view(clips, 1, frames, 1, 1).expand(-1, 3, -1, 8, 8) / 10
    maps = torch.arange(clips * frames * tokens, dtype=torch.float32).view(clips, frames * tokens)
    experts = torch.stack([maps, maps + 100], dim=1)
    whole = RoutingSheet(
        images=images,
        saliency=maps,
        foreground=torch.full_like(maps, torch.nan),
        experts=experts,
        times=(0.9, 0.1),
        captions=("a", "b"),
    )
    sheet = _by_frame(whole, frames, [0, 2])
    assert sheet.captions == ("1/3: a", "3/3: a", "1/3: b", "3/3: b")
    assert sheet.images[:, 0, 0, 0].tolist() == pytest.approx([0.0, 0.2, 0.3, 0.5])
    assert sheet.saliency.tolist() == [[4.0 * at + token for token in range(tokens)] for at in (0, 2, 3, 5)]
    assert sheet.experts.shape == (4, steps, tokens)
    assert torch.equal(sheet.experts[:, 1], sheet.saliency + 100)
    assert draw_routing_sheet(sheet).shape[2] == 3
