"""The contact sheet of prepared samples."""

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.read.shards import ShardSet
from sharpmoe.report.contact import SampleCard, _overlay, contact_sheet, sample_cards
from tests.fixtures_data import make_shards


def card(caption: str = "a circle", frames: int = 1) -> SampleCard:
    saliency = np.zeros((frames, 2, 2))
    saliency[:, 0, 1] = 0.5
    return SampleCard([np.full((8, 8, 3), 255, np.uint8)] * frames, saliency, caption, "note")


def test_cards_hold_what_the_shards_hold(tmp_path: Path) -> None:
    shards = ShardSet.open(make_shards(tmp_path / "shards"), "train")
    found = sample_cards(shards, 3)
    batch = shards.batch([0])
    assert len(found) == 3
    assert found[0].caption == batch.captions[0]
    assert [frame.shape for frame in found[0].frames] == [(32, 32, 3)]
    assert found[0].saliency.reshape(-1) == pytest.approx(batch.saliency[0].numpy())
    assert batch.keys[0] in found[0].note


def test_the_largest_saliency_is_drawn_brightest() -> None:
    pixels = _overlay(card().frames[0], card().saliency[0])
    levels = pixels.astype(int).sum(-1)
    assert levels[0, 7] == levels.max()
    assert levels[0, 7] > levels[7, 0]


def test_a_clip_shows_its_frames_with_the_saliency_of_each_below() -> None:
    moving = card("a clip", frames=5)
    frames = [np.full((8, 8, 3), 40 * at, np.uint8) for at in range(5)]
    sheet = contact_sheet([moving._replace(frames=frames)], "title")
    still = contact_sheet([card()], "title", columns=1)
    assert sheet.shape[1] > 2 * still.shape[1]
    assert sheet.shape[0] == still.shape[0] + 136
    row, columns = 40 + 66, [10 + 66 + 136 * at for at in range(5)]
    assert [int(sheet[row, column, 0]) for column in columns] == [0, 40, 80, 120, 160]


def test_a_sheet_has_a_place_for_every_sample_and_takes_any_caption() -> None:
    few, many = (contact_sheet([card()] * count, "title", columns=2) for count in (2, 6))
    assert few.shape[1] == many.shape[1]
    assert many.shape[0] > 2 * few.shape[0]
    assert contact_sheet([card(""), card("line\nbreak\u200b " * 40)], "long title " * 40).shape[2] == 3
