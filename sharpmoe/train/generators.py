"""State of the process-wide random generators.

What a step draws is keyed by seed and position (sharpmoe.draws) and needs none of this; libraries may draw without
asking, and then a resumed run is to draw what the uninterrupted one would have.
"""

import random
from typing import Any

import numpy as np
import torch


def state() -> dict[str, Any]:
    """State of Python's, numpy's and torch's generators, as tensors and plain values."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    python = random.getstate()
    return {
        "python": [python[0], list(python[1]), python[2]],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        **cuda,
    }


def restore(saved: dict[str, Any]) -> None:
    """Set the generators to what `state` gave; those of a device that is not there are left alone."""
    version, numbers, rest = saved["python"]
    random.setstate((version, tuple(numbers), rest))
    kind, keys, *others = saved["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *others))
    torch.set_rng_state(saved["torch"])
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])
