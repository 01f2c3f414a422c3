"""Count bytes that autograd saves."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class SavedBytes:
    """Bytes of unique storages that graphs keep for backward: the current and the largest number."""

    def __init__(self, without: Iterable[Tensor]) -> None:
        self.now = self.peak = 0
        self._without = {_key(tensor) for tensor in without}
        self._holders: Counter[int] = Counter()

    @contextmanager
    def watch(self) -> Iterator["SavedBytes"]:
        """Count what graphs that are built in this context save."""
        with saved_tensors_hooks(lambda tensor: _Held(tensor, self), lambda held: held.tensor):
            yield self

    def hold(self, tensor: Tensor, holders: int) -> None:
        """Note that `holders` more (or, negative, fewer) places hold a tensor."""
        key, size = _key(tensor), tensor.untyped_storage().nbytes()
        if key in self._without:
            return
        before = self._holders[key]
        self._holders[key] += holders
        self.now += size * (bool(self._holders[key]) - bool(before))
        self.peak = max(self.peak, self.now)


class _Held:
    """A saved tensor; it lives as long as its graph."""

    def __init__(self, tensor: Tensor, count: SavedBytes) -> None:
        self.tensor, self._count = tensor, count
        count.hold(tensor, 1)

    def __del__(self) -> None:
        self._count.hold(self.tensor, -1)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
