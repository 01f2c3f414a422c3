"""Token states in shards: their dtype, decoders that pool nothing, and what a dry run says of their size."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.encode.texts import TextEncoder, TextStates
from data_pipeline.index import parse_index
from data_pipeline.members import all_finite, as_float32
from data_pipeline.prepare import write
from data_pipeline.prepare.estimate import dry_run
from data_pipeline.prepare.recipe import Recipe
from data_pipeline.read.samples import Sample
from data_pipeline.read.shards import ShardSet
from sharpmoe.errors import DataError
from tests.fixtures_data import QUIET, ShapesSource, listing, make_shards

LARGE = 1e5  # beyond float16


class Decoder(TextEncoder):
    """States of a decoder: one token per word and a few of a template, some of them huge, nothing pooled."""

    identity = {"kind": "hash", "width": 6, "max_length": 32}  # noqa: RUF012

    def encode(self, captions: list[str]) -> TextStates:
        counts = [3 + len(caption.split()) for caption in captions]
        mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        states = torch.arange(max(counts) * 6.0).view(1, -1, 6).expand(len(captions), -1, -1) * mask[..., None]
        states = states + 0.37 * torch.tensor([len(caption) for caption in captions])[:, None, None] * mask[..., None]
        states[:, 0, 0] = LARGE
        return TextStates(states, mask, states.new_zeros(len(captions), 0))


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    found = Decoder()
    monkeypatch.setattr(write, "_text_encoder", lambda *_: found)
    return found


def test_states_in_bfloat16_without_a_pooled_state(decoder: Decoder, tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "shards", text_dtype="bfloat16")
    index = parse_index((folder / "index.json").read_bytes(), "index")
    assert (index.text_dtype, index.pooled_width, index.text_width) == ("bfloat16", 0, 6)
    shards = ShardSet.open(folder, "train")
    sample = shards.load(0)
    assert isinstance(sample, Sample)
    expected = decoder.encode([sample.caption]).states[0]
    assert sample.text.dtype == np.uint16
    assert len(sample.text) == len(expected)
    batch = shards.batch([0, 1, 2])
    assert batch.text.dtype == torch.bfloat16
    assert batch.pooled.shape == (3, 0)
    assert torch.equal(batch.text[0, : len(expected)], expected.bfloat16())
    assert not batch.text[0, len(expected) :].any()
    text, mask, pooled = shards.empty_text()
    empty = decoder.encode([""]).states[0]
    assert torch.equal(text[mask], empty.bfloat16().float())
    assert pooled.shape == (0,)
    assert not list(folder.glob("*pooled*"))


def test_states_beyond_float16_are_refused_with_the_remedy(decoder: Decoder, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"its text is not finite in torch.float16; use --text-dtype bfloat16"):
        make_shards(tmp_path / "shards")


def test_bits_that_are_not_finite_are_damage(tmp_path: Path) -> None:
    values = torch.tensor([1.5, -2.25, 1e30, -1e-30, 0.0])
    bits = values.bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert all_finite(bits)
    assert torch.equal(torch.from_numpy(as_float32(bits)), values.bfloat16().float())
    for bad in (float("inf"), float("-inf"), float("nan")):
        wrong = torch.tensor([1.0, bad]).bfloat16().view(torch.int16).numpy().view(np.uint16)
        assert not all_finite(wrong)


def test_a_dry_run_says_what_a_picture_consists_of(decoder: Decoder, tmp_path: Path) -> None:
    recipe = Recipe(image_size=32, codec={"kind": "pixel"}, encoder=Decoder.identity, text_dtype="bfloat16")
    lines = dry_run(ShapesSource(24), recipe, QUIET)
    (parts,) = [line.split("a picture ")[1] for line in lines if line.startswith("estimate: of a picture")]
    numbers = {
        what: float(size) for what, size in (part.removesuffix(" bytes").rsplit(" ", 1) for part in parts.split(", "))
    }
    assert numbers["latents"] == 3 * 32 * 32 * 2 + 128  # of a .npy file's head
    tokens = [3 + len(item.captions[0][0].split()) for item in listing(ShapesSource(24)).items]
    assert numbers["token states"] == pytest.approx(np.mean(tokens) * 6 * 2 + 128, abs=1)
    assert any("tokens in bfloat16" in line and "GB" in line for line in lines)
