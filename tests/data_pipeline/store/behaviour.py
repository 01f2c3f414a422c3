"""What every store does, whatever is behind it."""

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.store.store import Store
from sharpmoe.errors import DamageError, DataError

SIZE = 40_000  # bytes of a.tar


def check_reads(store: Store, folder: Path, reads: int = 30) -> None:
    content = (folder / "a.tar").read_bytes()
    generator = np.random.default_rng(1)
    for _ in range(reads):
        start, stop = sorted(int(place) for place in generator.integers(0, SIZE + 1, 2))
        assert store.read("a.tar", start, stop - start) == content[start:stop]
    assert store.size("a.tar") == SIZE
    assert store.small("index.json") == b"{}"


def check_refusals(store: Store) -> None:
    with pytest.raises(DamageError, match="ends 5 bytes before a sample does"):
        store.read("a.tar", SIZE - 5, 10)
    with pytest.raises(DamageError, match="b.tar"):
        store.read("b.tar", 0, 10)
    for name in ("../a.tar", "/etc/passwd", ".lock"):
        for act in (lambda name: store.read(name, 0, 1), store.size, store.small):
            with pytest.raises(DataError, match="expected letters, digits, dot, - and _ only"):
                act(name)
