"""Captions to token states. An encoder has an identity that travels with the shards."""

import hashlib
import re
from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data_pipeline.identity import Identity, check_identity
from sharpmoe.errors import DataError


class TextStates(NamedTuple):
    """Encoded captions."""

    states: Tensor  # (B, L, D) float32, zero where masked
    mask: Tensor  # (B, L) bool, True where a token is real
    pooled: Tensor  # (B, D_pooled) float32


class TextEncoder(ABC):
    """Captions to token states. `TextEncoder.from_identity` builds the one that a folder of shards was made with."""

    @property
    @abstractmethod
    def identity(self) -> Identity:
        """Equal for two encoders if and only if they give the same states."""

    @abstractmethod
    def encode(self, captions: list[str]) -> TextStates:
        """Encode captions, padded to the longest among them; the empty caption is allowed."""

    @staticmethod
    def from_identity(identity: Identity, device: str = "cpu") -> "TextEncoder":
        """The encoder of that identity; DataError where it is missing here, or has other weights."""
        encoder = build_text_encoder(identity, device)
        check_identity("text encoder", str(identity.get("name", identity["kind"])), encoder.identity, identity)
        return encoder


class HashTextEncoder(TextEncoder):
    """Every word becomes a fixed random vector drawn from its own hash: no download, no meaning.

    For tests and quick trials. It tells captions apart and knows nothing about words it has not seen in training.
    """

    def __init__(self, width: int = 32, max_length: int = 32) -> None:
        """`width` of the states; captions are cut after `max_length` words."""
        self._width, self._max_length = width, max_length

    @property
    def identity(self) -> Identity:
        """Settings alone."""
        return {"kind": "hash", "width": self._width, "max_length": self._max_length}

    def encode(self, captions: list[str]) -> TextStates:
        """One token per word, after a first one that stands for the start of the caption."""
        tokens = [["", *re.findall(r"\w+", caption.lower())][: self._max_length] for caption in captions]
        length = max(len(words) for words in tokens)
        states, mask = torch.zeros(len(tokens), length, self._width), torch.zeros(len(tokens), length, dtype=torch.bool)
        for row, words in enumerate(tokens):
            states[row, : len(words)] = torch.stack([self._vector(word) for word in words])
            mask[row, : len(words)] = True
        return TextStates(states, mask, mean_pool(states, mask))

    def _vector(self, word: str) -> Tensor:
        key = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
        return torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).standard_normal(self._width)).float()


class JoinedTextEncoder(TextEncoder):
    """Several encoders as one, in the given order; pooled states are always joined by their features.

    along `tokens`: the tokens of one encoder follow those of the other, narrower states filled up with zeros (CLIP
    before T5 in Stable Diffusion 3, arXiv 2403.03206). along `features`: states of the same place stand side by side,
    shorter captions filled up with zeros (the two CLIPs of SDXL, arXiv 2307.01952).
    """

    def __init__(self, encoders: list[TextEncoder], along: str = "tokens") -> None:
        """`encoders`: two or more; `along`: tokens or features."""
        if along not in ("tokens", "features"):
            raise DataError(f"text encoders joined along {along!r}: expected tokens or features")
        if len(encoders) < 2:
            raise DataError("text encoders can be joined from two on")
        self._encoders, self._along = encoders, along

    @property
    def identity(self) -> Identity:
        """Those of the parts, and the way they are joined."""
        return {"kind": "joined", "along": self._along, "encoders": [part.identity for part in self._encoders]}

    def encode(self, captions: list[str]) -> TextStates:
        """Encode with every part and join."""
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
    """Real tokens moved to the front of every row: tokenizers differ in the side on which they fill up."""
    order = torch.argsort((~text.mask).int(), dim=1, stable=True)
    states = text.states.gather(1, order[..., None].expand_as(text.states))
    return TextStates(states, text.mask.gather(1, order), text.pooled)


def mean_pool(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens: (B, L, D), (B, L) -> (B, D)."""
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def build_text_encoder(spec: Identity, device: str = "cpu") -> TextEncoder:
    """A text encoder from what the user asked for."""
    from data_pipeline.encode.transformer_texts import TransformerTextEncoder  # noqa: PLC0415  (it builds on this module)

    if spec["kind"] == "hash":
        return HashTextEncoder(spec["width"], spec["max_length"])
    if spec["kind"] == "transformers":
        options = {name: spec[name] for name in ("max_length", "layer", "pooled", "dtype") if name in spec}
        return TransformerTextEncoder(spec["name"], device=device, **options)
    if spec["kind"] == "joined":
        return JoinedTextEncoder([build_text_encoder(part, device) for part in spec["encoders"]], spec["along"])
    raise DataError(f"text encoder {spec['kind']!r}: expected transformers, hash or joined")
