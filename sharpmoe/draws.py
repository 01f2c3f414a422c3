"""Random numbers of a run, keyed by (seed, purpose, position) and by nothing else.

Each sample draws from its own Philox stream, so a resumed run, another world size or another split of the batch draws
the same noise, times and dropout for the same place in the data order. Made on the host: 4 x 32 x 32 latents take
about 50 microseconds each.
"""

from collections.abc import Callable, Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Purpose(IntEnum):
    """What a stream is for; two purposes never share numbers."""

    NOISE = 1
    TIMES = 2
    CAPTION_DROPOUT = 3
    ROLLOUT_BLOCK = 4
    VALIDATION_NOISE = 5
    SAMPLE_NOISE = 6


def _generator(seed: int, purpose: Purpose, position: int) -> np.random.Generator:
    """Generator of one (seed, purpose, position); counter 2 keeps positions 2**128 draws apart."""
    return np.random.Generator(np.random.Philox(key=[seed, int(purpose)], counter=[0, 0, position, 0]))


def _stack(
    draw: Callable[[np.random.Generator], np.ndarray], seed: int, purpose: Purpose, positions: Sequence[int] | Tensor
) -> Tensor:
    return torch.from_numpy(np.stack([draw(_generator(seed, purpose, int(p))) for p in positions]))


def noise(
    seed: int, positions: Sequence[int] | Tensor, shape: Sequence[int], purpose: Purpose = Purpose.NOISE
) -> Tensor:
    """Standard normal noise (B, *shape) float32, one stream per position (B,)."""
    return _stack(lambda g: g.standard_normal(tuple(shape), dtype=np.float32), seed, purpose, positions)


def fresh_noise(
    seed: int, positions: Sequence[int] | Tensor, steps: int, shape: Sequence[int], purpose: Purpose = Purpose.NOISE
) -> Tensor:
    """Standard normal noise of every step (steps, B, *shape) float32; that of the first step is `noise`'s."""
    return noise(seed, positions, (steps, *shape), purpose).transpose(0, 1).contiguous()


def uniform_times(seed: int, positions: Sequence[int] | Tensor, count: int) -> Tensor:
    """Uniform draws (count, B) float32 in [0, 1)."""
    return _stack(lambda g: g.random(count, dtype=np.float32), seed, Purpose.TIMES, positions).T.contiguous()


def normal_times(seed: int, positions: Sequence[int] | Tensor) -> Tensor:
    """Standard normal draws (1, B) float32, for logit-normal times."""
    return noise(seed, positions, (1,), Purpose.TIMES).T.contiguous()


def drop_caption(seed: int, positions: Sequence[int] | Tensor, probability: float) -> Tensor:
    """Which trajectories lose their caption, (B,) bool; drawn once per trajectory."""
    return _stack(lambda g: g.random(1) < probability, seed, Purpose.CAPTION_DROPOUT, positions)[:, 0]


def rollout_block(seed: int, step: int, num_blocks: int) -> int:
    """Which of the fixed blocks of rollout steps is trained at optimizer step `step`: the same on every rank."""
    return int(_generator(seed, Purpose.ROLLOUT_BLOCK, step).integers(num_blocks))
