from pathlib import Path

import pytest
import torch

from data_pipeline.encode.build import build_text_encoder, restore_text_encoder
from data_pipeline.encode.texts import HashTextEncoder, JoinedTextEncoder, TextEncoder
from data_pipeline.encode.transformer_texts import TransformerTextEncoder
from sharpmoe.errors import DataError


def test_unknown_kinds_of_encoders() -> None:
    with pytest.raises(DataError, match="expected one of hash, transformers, joined"):
        build_text_encoder({"kind": "bag"})


def test_hashed_words() -> None:
    encoder = HashTextEncoder(width=16, max_length=4)
    states, mask, pooled = encoder.encode(["a red fox", "", "a RED fox that is cut here"])
    assert states.shape == (3, 4, 16)
    assert mask.tolist() == [[True] * 4, [True, False, False, False], [True] * 4]
    assert torch.equal(states[0], states[2])
    assert states[1, 1:].abs().max() == 0
    assert torch.allclose(pooled[0], states[0].mean(0))
    assert torch.equal(restore_text_encoder(encoder.identity).encode(["a red fox"]).states[0], states[0])


CAPTIONS = ["a red fox", "", "a blue house in the snow"]


def parts(models_folder: Path, *names: str) -> list[TextEncoder]:
    return [TransformerTextEncoder(str(models_folder / name)) for name in names]


def test_encoders_joined_by_their_tokens(models_folder: Path) -> None:
    clip_part, t5_part = parts(models_folder, "clip", "t5")
    joined = JoinedTextEncoder([clip_part, t5_part])
    states, mask, pooled = joined.encode(CAPTIONS)
    left, right = clip_part.encode(CAPTIONS), t5_part.encode(CAPTIONS)
    assert states.shape == (3, 14, 24)
    assert mask.sum(1).tolist() == [8, 2, 14]
    assert torch.equal(states[:, :7], left.states)
    assert torch.equal(states[:, 7:, :16], right.states)
    assert (states[:, 7:, 16:] == 0).all()
    assert torch.equal(pooled, torch.cat([left.pooled, right.pooled], 1))
    again = restore_text_encoder(joined.identity)
    assert torch.equal(again.encode(CAPTIONS).states, states)


def test_encoders_joined_by_their_features(models_folder: Path) -> None:
    first, second = parts(models_folder, "clip", "qwen")
    states, mask, pooled = JoinedTextEncoder([first, second], "features").encode(CAPTIONS)
    left, right = first.encode(CAPTIONS), second.encode(CAPTIONS)
    assert states.shape == (3, 24, 56)
    assert torch.equal(mask, right.mask)
    assert torch.equal(states[:, :7, :24], left.states)
    assert (states[:, 7:, :24] == 0).all()
    assert torch.equal(states[..., 24:], right.states)
    assert pooled.shape == (3, 56)
    with pytest.raises(DataError, match="expected tokens or features"):
        JoinedTextEncoder([first, second], "rows")
