"""What a text encoder is: captions to token states, with an identity that travels with the shards."""

import hashlib
import re
from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data_pipeline.identity import Identity
from sharpmoe.errors import DataError

TEXT_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}  # of token states in shards


class TextStates(NamedTuple):
    """Encoded captions."""

    states: Tensor  # (B, L, D) float32, zero where masked
    mask: Tensor  # (B, L) bool, True where a token is real
    pooled: Tensor  # (B, D_pooled) float32; D_pooled is 0 where the encoder does not pool


class CaptionLength(NamedTuple):
    """How long a caption is, and how much of it an encoder takes."""

    tokens: int
    kept: int  # tokens at most; 0: not known


class TextEncoder(ABC):
    """Captions to token states. A new one needs a row in `encode.build.ENCODERS`."""

    @property
    @abstractmethod
    def identity(self) -> Identity:
        """Equal for two encoders if and only if they give the same states."""

    @abstractmethod
    def encode(self, captions: list[str]) -> TextStates:
        """Encode captions, padded to the longest among them; the empty caption is allowed."""

    def lengths(self, captions: list[str]) -> list[CaptionLength]:
        """Return the tokens of every caption before it is cut; an encoder that cuts none need not say it."""
        return [CaptionLength(0, 0)] * len(captions)


class HashTextEncoder(TextEncoder):
    """Every word becomes a fixed random vector drawn from its own hash: no download, no meaning.

    For tests and quick trials. It tells captions apart and knows nothing about words it has not seen in training.
    """

    def __init__(self, width: int = 32, max_length: int = 32) -> None:
        """`width` of the states; captions are cut after `max_length` words."""
        self._width, self._max_length = width, max_length

    @property
    def identity(self) -> Identity:
        """Kind and settings."""
        return {"kind": "hash", "width": self._width, "max_length": self._max_length}

    def encode(self, captions: list[str]) -> TextStates:
        """Encode one token per word, after a first one that marks the start of the caption."""
        tokens = [self._tokens(caption)[: self._max_length] for caption in captions]
        length = max(len(words) for words in tokens)
        states, mask = torch.zeros(len(tokens), length, self._width), torch.zeros(len(tokens), length, dtype=torch.bool)
        for row, words in enumerate(tokens):
            states[row, : len(words)] = torch.stack([self._vector(word) for word in words])
            mask[row, : len(words)] = True
        return TextStates(states, mask, mean_pool(states, mask))

    def lengths(self, captions: list[str]) -> list[CaptionLength]:
        return [CaptionLength(len(self._tokens(caption)), self._max_length) for caption in captions]

    @staticmethod
    def _tokens(caption: str) -> list[str]:
        return ["", *re.findall(r"\w+", caption.lower())]

    def _vector(self, word: str) -> Tensor:
        key = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
        return torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).standard_normal(self._width)).float()


class JoinedTextEncoder(TextEncoder):
    """Several encoders as one, in the given order; pooled states are always joined by their features.

    along `tokens`: the tokens of one encoder follow those of the other, narrower states padded with zeros (CLIP
    before T5 in Stable Diffusion 3, arXiv 2403.03206). along `features`: states of the same place stand side by side,
    shorter captions padded with zeros (the two CLIPs of SDXL, arXiv 2307.01952).
    """

    def __init__(self, encoders: list[TextEncoder], along: str = "tokens") -> None:
        """`encoders`: two or more; `along`: tokens or features."""
        if along not in ("tokens", "features"):
            raise DataError(f"text encoders joined along {along!r}: expected tokens or features")
        if len(encoders) < 2:
            raise DataError(f"text encoders: {len(encoders)} given to be joined, expected two or more")
        self._encoders, self._along = encoders, along

    @property
    def identity(self) -> Identity:
        """The identities of the parts, and the way they are joined."""
        return {"kind": "joined", "along": self._along, "encoders": [part.identity for part in self._encoders]}

    def lengths(self, captions: list[str]) -> list[CaptionLength]:
        """Return those of the part that cuts most of each caption."""
        parts = zip(*(part.lengths(captions) for part in self._encoders), strict=True)
        return [max(found, key=lambda length: length.tokens - length.kept) for found in parts]

    def encode(self, captions: list[str]) -> TextStates:
        """Encode with every part, then join."""
        parts = [encoder.encode(captions) for encoder in self._encoders]
        pooled = torch.cat([part.pooled for part in parts], dim=1)
        if self._along == "tokens":
            width = max(part.states.shape[2] for part in parts)
            states = [functional.pad(part.states, (0, width - part.states.shape[2])) for part in parts]
            return TextStates(torch.cat(states, 1), torch.cat([part.mask for part in parts], 1), pooled)
        packed = [_packed(part) for part in parts]
        length = max(part.states.shape[1] for part in packed)
        states = [functional.pad(part.states, (0, 0, 0, length - part.states.shape[1])) for part in packed]
        masks = [functional.pad(part.mask, (0, length - part.mask.shape[1])) for part in packed]
        return TextStates(torch.cat(states, 2), torch.stack(masks).any(0), pooled)


def _packed(text: TextStates) -> TextStates:
    """Move real tokens to the front of every row: tokenizers differ in the side on which they pad."""
    order = torch.argsort((~text.mask).int(), dim=1, stable=True)
    states = text.states.gather(1, order[..., None].expand_as(text.states))
    return TextStates(states, text.mask.gather(1, order), text.pooled)


def mean_pool(states: Tensor, mask: Tensor) -> Tensor:
    """Average over the real tokens: (B, L, D), (B, L) -> (B, D)."""
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
