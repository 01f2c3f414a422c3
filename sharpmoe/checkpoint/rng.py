"""States of the process-wide random generators, as JSON.

The draws of a step are keyed by seed and position (sharpmoe.draws) and need none of this. Libraries may draw from the
global generators as well, and then a resumed run must draw what the uninterrupted one would have drawn.
"""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpmoe.devices import default_device
from sharpmoe.errors import CheckpointError, first_line


def generators_file(rank: int) -> str:
    """Return the name of a rank's file."""
    return f"generators_rank{rank:05d}.json"


def generator_states() -> dict[str, Any]:
    """Return the states of Python's, numpy's and torch's generators as JSON values."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    device = default_device()
    cuda = {"cuda": _hex(torch.cuda.get_rng_state(device))} if device.type == "cuda" else {}
    version, numbers, gauss = random.getstate()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [str(kind), np.asarray(keys).tolist(), *rest],
        "torch": _hex(torch.get_rng_state()),
        **cuda,
    }


@contextmanager
def generators_kept() -> Iterator[None]:
    """Put Python's, numpy's and torch's generators back to what they were before the context."""
    device = default_device()
    python, numbers = random.getstate(), np.random.get_state(legacy=True)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


def write_generators(path: Path, states: dict[str, Any]) -> None:
    """Write what `generator_states` returned. Raises OSError."""
    path.write_text(json.dumps(states), encoding="utf-8")


def restore_generators(path: Path) -> None:
    """Set the generators to the states of a file. The state of a device that is absent is skipped.

    Raises CheckpointError where the file cannot be read.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        version, numbers, gauss = saved["python"]
        kind, keys, *rest = saved["numpy"]
        random.setstate((version, tuple(numbers), gauss))
        np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(_tensor(saved["torch"]))
        device = default_device()
        if "cuda" in saved and device.type == "cuda":
            torch.cuda.set_rng_state(_tensor(saved["cuda"]), device)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = first_line(error)
        raise CheckpointError(f"{path}: cannot be read ({reason}); resume from another checkpoint") from error


def _hex(numbers: Tensor) -> str:
    return bytes(numbers.tolist()).hex()


def _tensor(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
