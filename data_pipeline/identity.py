"""Identities of sources, codecs and encoders: they are stored with the shards, so that a run never mixes two."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from sharpmoe.errors import DataError

Identity = dict[str, Any]


def check_identity(what: str, where: str, found: Identity, expected: Identity) -> None:
    """Raise a DataError that names the first key in which two identities differ."""
    for key in sorted(found.keys() | expected.keys()):
        if found.get(key) != expected.get(key):
            raise DataError(
                f"wrong {what} in {where}: {key} is {found.get(key)!r}, expected {expected.get(key)!r}; "
                f"use the {what} the shards were made with, or prepare the shards again"
            )


def hash_state(state: dict[str, Tensor]) -> str:
    """Return the sha256 over the names and bytes of a model's tensors."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
