"""Collate samples to a batch: arrays stacked, texts padded."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from data_pipeline.members import BFLOAT16_BITS, as_float32
from data_pipeline.read.samples import Sample
from data_pipeline.schema import Batch

_HALVES = (np.dtype(np.float16), BFLOAT16_BITS)


def collate(samples: Iterable[Sample], positions: Sequence[int], text_length: int) -> Batch:
    """Stack samples of one bucket; every text is padded to `text_length` tokens.

    Each sample is copied and released before the next is taken: with an iterator, the next is read into the memory of
    the last one, which is still in the processor's cache.
    """
    stack = _Stack(len(positions), text_length)
    for sample in samples:
        stack.put(sample)
        del sample
    return stack.batch(positions)


class _Stack:
    """The arrays of a batch, allocated with the shapes of the first sample."""

    def __init__(self, count: int, text_length: int) -> None:
        self._count, self._text_length = count, text_length
        self._arrays: dict[str, np.ndarray] = {}
        self._text = np.empty((0, 0, 0), np.float16)
        self._mask = np.zeros((count, text_length), dtype=bool)
        self._words: list[tuple[str, str, int]] = []  # key, caption, label

    def put(self, sample: Sample) -> None:
        """Copy the sample of the next row."""
        row = len(self._words)
        nothing = np.full(sample.saliency.shape, np.nan, dtype=np.float32)
        self._row("latent", row, sample.latent)
        self._row("pooled", row, sample.pooled)
        self._row("saliency", row, sample.saliency)
        self._row("foreground", row, nothing if sample.foreground is None else sample.foreground)
        self._put_text(row, sample.text)
        self._words.append((sample.key, sample.caption, sample.label))

    def _row(self, name: str, row: int, array: np.ndarray) -> None:
        if row == 0:
            self._arrays[name] = np.empty((self._count, *array.shape), dtype=np.float32)
        if array.shape != self._arrays[name].shape[1:]:
            raise ValueError("samples of different buckets cannot share a batch")
        self._arrays[name][row] = array

    def _put_text(self, row: int, text: np.ndarray) -> None:
        """Copy a text, in half precision where it is stored so: casting costs more than reading."""
        if row == 0:
            shape = (self._count, self._text_length, text.shape[1])
            self._text = np.empty(shape, text.dtype if text.dtype in _HALVES else np.float32)
        elif text.dtype != self._text.dtype and self._text.dtype in _HALVES:
            self._text = as_float32(self._text)
        self._text[row, : len(text)] = text if text.dtype == self._text.dtype else as_float32(text)
        self._text[row, len(text) :] = 0
        self._mask[row, : len(text)] = True

    def batch(self, positions: Sequence[int]) -> Batch:
        """Return the batch. Raises ValueError where samples are missing."""
        if len(self._words) != self._count:
            raise ValueError(f"{len(self._words)} samples, expected {self._count}")
        keys, captions, labels = zip(*self._words, strict=True)
        tensors: dict[str, Tensor] = {name: torch.from_numpy(array) for name, array in self._arrays.items()}
        return Batch(
            **tensors,
            text=torch.from_numpy(self._text) if self._text.dtype != BFLOAT16_BITS else _bfloat16(self._text),
            text_mask=torch.from_numpy(self._mask),
            label=torch.tensor(labels, dtype=torch.int64),
            position=torch.tensor(list(positions), dtype=torch.int64),
            keys=keys,
            captions=captions,
        )


def _bfloat16(bits: np.ndarray) -> Tensor:
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
