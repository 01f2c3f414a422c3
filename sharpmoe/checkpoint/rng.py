"""State of the process-wide random generators, as JSON.

What a step draws is keyed by seed and position (sharpmoe.draws) and needs none of this; libraries may draw without
asking, and then a resumed run is to draw what the uninterrupted one would have.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpmoe.errors import CheckpointError


def state() -> dict[str, Any]:
    """State of Python's, numpy's and torch's generators, as plain values."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    cuda = {"cuda": _hex(torch.cuda.get_rng_state())} if torch.cuda.is_available() else {}
    version, numbers, gauss = random.getstate()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [str(kind), np.asarray(keys).tolist(), *rest],
        "torch": _hex(torch.get_rng_state()),
        **cuda,
    }


def write(path: Path, found: dict[str, Any]) -> None:
    """Write what `state` gave. Raises OSError."""
    path.write_text(json.dumps(found), encoding="utf-8")


def restore(path: Path) -> None:
    """Set the generators to a file of `write`; those of a device that is not there are left alone.

    Raises CheckpointError where the file is something else.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        version, numbers, gauss = saved["python"]
        kind, keys, *rest = saved["numpy"]
        random.setstate((version, tuple(numbers), gauss))
        np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(_tensor(saved["torch"]))
        if "cuda" in saved and torch.cuda.is_available():
            torch.cuda.set_rng_state(_tensor(saved["cuda"]))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: cannot be read ({reason}); resume from another checkpoint") from error


def _hex(numbers: Tensor) -> str:
    return bytes(numbers.tolist()).hex()


def _tensor(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
