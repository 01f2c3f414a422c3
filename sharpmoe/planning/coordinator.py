"""An imitation of DeepSpeed's parameter coordinator on numbers: what ZeRO-3 gathers, keeps and releases, by module.

It follows `PartitionedParameterCoordinator` of one version of DeepSpeed, `_IMITATED_VERSION`, decision by decision, so
that a plan counts gathers instead of bounding them; tests/planning/test_counted.py compares it with real runs. Under
any other version `count_gathers` returns an upper bound, and plans say so (`version_notes`): update this file with the
pinned version.
"""

import importlib.metadata
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sharpmoe.parallel.zero.settings import ZeroSettings
from sharpmoe.planning.layout import RankParameter

_IMITATED_VERSION = "0.19.8"
# Modules that hold others and have no parameters of their own: the objective, and the model inside it.
ROOT, MODEL = -2, -1
_INVALID, _RECORDING, _COMPLETE = range(3)


def version_notes() -> tuple[str, ...]:
    """Return a note where the installed DeepSpeed is not the one that is imitated here, nothing where it is."""
    found = importlib.metadata.version("deepspeed").partition("+")[0]
    if found == _IMITATED_VERSION:
        return ()
    return (f"gathers of ZeRO-3 are counted for DeepSpeed {_IMITATED_VERSION}; for {found} they are upper bounds",)


class Used(NamedTuple):
    """A module in a forward."""

    place: int
    module: int
    has_graph: bool  # which keeps everything
    is_late: bool  # a graph is full, or nearly: what is gathered now is in addition to it


class Reached(NamedTuple):
    """A module in a backward."""

    place: int  # of its use in the forward of this backward's graph
    module: int
    releases: bool  # whether its parameters may leave then


class Coordinator:
    """The state of `PartitionedParameterCoordinator` that decides what is gathered, and counts of it."""

    def __init__(self, parts: Sequence[RankParameter], zero: ZeroSettings) -> None:
        self.modules = _parameters_by_module(parts)
        self.times = [0] * len(parts)
        self.peak = self.arriving = 0
        self._numel = [part.numel for part in parts]
        self._memory = [part.numel if part.ranks > 1 else 0 for part in parts]  # one rank's part is the whole: no copy
        self._size = [sum(self._numel[index] for index in module) for module in self.modules]
        self._resident = {index for index, part in enumerate(parts) if part.numel <= zero.persistence}
        self._experts = {index for index, part in enumerate(parts) if part.is_expert}
        self._zero = zero
        self._since: dict[int, int] = {}  # module -> place of its first use since it was gathered
        self._orphans: dict[int, int] = {}  # place -> elements that its graph alone still holds
        self._gathered = set(self._resident)
        self._ahead: set[int] = set()  # gathered, but not used yet
        self._may_leave: dict[tuple[int, int], set[int]] = {}  # DeepSpeed decides once for (module, step)
        self._mode = _INVALID
        self._order: list[int] = []
        self._queue: deque[tuple[int, int]] = deque()  # (parameter, step of its module) still to be gathered ahead
        self._fetched_for: dict[int, int] = {}
        self._late = False
        self._step = 0
        self._live = 0  # as DeepSpeed counts: from zero at each call, whatever is resident
        self._held = sum(self._memory[index] for index in self._resident)

    def start(self) -> None:
        """Begin an engine call: the modules that it uses are compared with the order of the call before."""
        self._drop_ahead()
        if self._mode == _INVALID:
            self._mode = _RECORDING
        elif self._mode == _RECORDING:
            self._mode = _COMPLETE
        self._queue = deque((index, step) for step, module in enumerate(self._order) for index in self._own(module))
        self._fetched_for = {}
        self._step = self._live = 0

    def forward(self, order: Iterable[Used]) -> None:
        """Fetch, use and release modules in turn."""
        for place, module, has_graph, is_late in order:
            self._late = is_late
            self._fetch(module)
            if has_graph:
                self._since.setdefault(module, place)
            self._keep_views(module, self._release(module))

    def backward(self, order: Iterable[Reached]) -> None:
        """Run a backward through one graph, within the call or after it."""
        for place, module, releases in order:
            self._fetch(module)
            if releases:
                self._release(module)
            self._held -= self._orphans.pop(place, 0)
        self._since.clear()

    def finish(self) -> None:
        """End the last backward: release what no hook has released."""
        self._release_all(self._gathered - self._resident)

    def optimizer_step(self) -> None:
        """Release all parameters, then gather the resident ones with their new values."""
        self._release_all(self._gathered)
        self._late = False
        self._gather(self._resident)
        self._ahead.clear()

    def _keep_views(self, module: int, gone: set[int]) -> None:
        """Views of gathered experts in a graph keep their memory after a release, until the backward of their use."""
        place = self._since.pop(module, None) if gone else None
        if place is None:
            return
        kept = sum(self._memory[index] for index in gone & self._experts)
        self._orphans[place] = self._orphans.get(place, 0) + kept
        self._held += kept
        self.peak = max(self.peak, self._held)

    def _fetch(self, module: int) -> None:
        if self._mode == _COMPLETE and self._order[self._step : self._step + 1] != [module]:
            self._forget()
        if self._mode == _RECORDING:
            self._order.append(module)
        self._gather(index for index in self._own(module) if index not in self._gathered)
        self._ahead.difference_update(self._own(module))
        if self._mode == _COMPLETE:
            self._fetch_ahead(module)
        self._step += 1

    def _own(self, module: int) -> list[int]:
        return self.modules[module] if module >= 0 else []

    def _fetch_ahead(self, module: int) -> None:
        unseen = {i for i in self._own(module) if self._fetched_for.get(i, -1) < self._step}
        while self._queue and unseen:
            index, step = self._queue.popleft()
            self._fetched_for[index] = step
            unseen.discard(index)
        room = min(self._zero.max_live - self._live, self._zero.prefetch_bucket)
        wanted: dict[int, None] = {}
        while self._queue and room > 0:
            index, step = self._queue.popleft()
            self._fetched_for[index] = max(step, self._fetched_for.get(index, -1))
            if index not in self._gathered and index not in wanted:
                wanted[index] = None
                room -= self._numel[index]
        self._gather(wanted)

    def _gather(self, indices: Iterable[int]) -> None:
        arriving = 0
        for index in list(indices):
            self.times[index] += 1
            self._gathered.add(index)
            self._ahead.add(index)
            arriving += self._memory[index]
            self._live += self._numel[index]
        self._held += arriving
        self.peak = max(self.peak, self._held)
        self.arriving = max(self.arriving, arriving if self._late else 0)

    def _release_all(self, indices: Iterable[int]) -> None:
        indices = set(indices)
        self._gathered -= indices
        self._ahead -= indices
        self._held -= sum(self._memory[index] for index in indices)

    def _release(self, module: int) -> set[int]:
        leaving = self._gathered.intersection(self._own(module))
        if self._mode == _COMPLETE:
            key = (module, self._step)
            if key not in self._may_leave:
                self._may_leave[key] = self._not_needed_soon(set(self._own(module)) - self._resident)
            leaving &= self._may_leave[key]
        self._release_all(leaving)
        self._live -= sum(self._numel[index] for index in leaving)
        return leaving

    def _not_needed_soon(self, leaving: set[int]) -> set[int]:
        leaving = {index for index in leaving if self._fetched_for.get(index, -1) <= self._step}
        passed, step = 0, self._step
        while leaving and passed < self._zero.max_reuse and step < len(self._order):
            later = self._order[step]
            if later < 0:  # DeepSpeed takes a module that holds others to need all of them
                return set()
            leaving.difference_update(self.modules[later])
            passed += self._size[later]
            step += 1
        return leaving

    def _forget(self) -> None:
        self._mode, self._order = _INVALID, []
        self._queue.clear()
        self._fetched_for = {}
        self._drop_ahead()

    def _drop_ahead(self) -> None:
        """Release what was gathered ahead and not used."""
        self._release_all(self._ahead)


def _parameters_by_module(parts: Sequence[RankParameter]) -> list[list[int]]:
    """Return the indices of the parameters of each module."""
    modules: list[list[int]] = [[] for _ in range(1 + max(part.module for part in parts))]
    for index, part in enumerate(parts):
        modules[part.module].append(index)
    return modules
