"""What a real run on gloo ranks holds and moves, counted without the help of sharpmoe.budget."""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed import Work
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._pytree import tree_leaves

from sharpmoe.config import RunConfig
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.parallel.zero.config import resolve_ds_config
from sharpmoe.parallel.zero.ema import ShardEma
from sharpmoe.parallel.zero.engine import Engine
from sharpmoe.train.objective import Objective
from sharpmoe.train.setup import make_plan
from sharpmoe.train.step import train_step
from tests.counting import CollectiveCounter
from tests.parallel.reference import items_of
from tests.train.setting import stirred_model

STEPS = 5  # two until DeepSpeed's recorded orders repeat, one to see what is freed later; the last two are counted


class Case(NamedTuple):
    """One engine run."""

    run: RunConfig
    zero: dict[str, Any]  # section zero_optimization of the DeepSpeed JSON


class Counted(NamedTuple):
    """Bytes on one rank; names as in the plan where it has them."""

    weights: int
    masters: int
    gradients: int
    optimizer: int
    ema: int
    bucket: int  # the contiguous buffer of gradients
    gathered: int  # most whole weights at one time
    kept: int  # what a call of the engine left allocated, beside whole weights: a graph, and sums of gradients
    peak: int  # most that was allocated at one time in a step, beyond what was there before it
    gathers: int  # sent per optimizer step
    reductions: int
    exchanges: int


def count(world: World, cases: dict[str, Case], folder: Path) -> dict[str, Counted]:
    """Run every case."""
    return {name: count_one(world, case, folder / f"{name}-{world.rank}.json") for name, case in cases.items()}


def count_one(world: World, case: Case, file: Path) -> Counted:
    """A few optimizer steps; the last one is counted."""
    file.write_text(json.dumps({"zero_optimization": case.zero}))
    plan = make_plan(case.run, resolve_ds_config(file, case.run, world.size), world)
    objective = Objective(stirred_model(case.run), case.run)
    engine = Engine(objective, case.run, plan.ds_config, world)
    ema = ShardEma(engine, 0.9)
    steps = items_of(plan, world, STEPS)

    def train(step: int) -> None:
        train_step(engine, objective, ema, steps[step], step, with_routing=False)

    train(0)
    train(1)
    watch = Watch(engine)
    with threads_first(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(2)
        watch.start()
        train(3)
        watch.mark("step")
        with CollectiveCounter() as counter:
            train(4)
    return watch.result(ema, counter, allocations(profiler))


def allocations(profiler: Any) -> list[int | str]:
    """Bytes allocated and freed in order of time, with the names of marks between them."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]" or e.name()[:2] == "##"]
    events.sort(key=lambda event: event.start_ns())
    return [event.nbytes() if event.name() == "[memory]" else event.name() for event in events]


class Watch:
    """Wraps an engine's forward and step, and notes what there is."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.inner = engine, engine._engine
        self.whole_at: dict[str, int] = {}
        self.gradients = 0

    def start(self) -> None:
        forward, step = self.inner.forward, self.inner.step
        self.inner.forward = lambda *args: self.on_call(forward, *args)
        self.inner.step = lambda: self.on_step(step)
        self.mark("step")

    def mark(self, kind: str) -> None:
        name = f"## {len(self.whole_at):03d} {kind}"
        self.whole_at[name] = self.whole()
        with record_function(name):
            pass

    def on_call(self, forward: Callable[..., Any], *args: Any) -> Any:
        self.mark("before")
        answer = forward(*args)
        self.mark("after")
        return answer

    def on_step(self, step: Callable[[], None]) -> None:
        optimizer = self.engine._zero
        held = [optimizer.grad_partitions_flat_buffer] if self.engine.stage == 3 else optimizer.averaged_gradients
        self.gradients = unique(tree_leaves(held if isinstance(held, list) else list(map(list, held.values()))))
        step()

    def whole(self) -> int:
        """Bytes of weights that are whole, or on their way, beside the parts."""
        if self.engine.stage == 2:
            return 0
        parameters = list(self.engine.module.parameters())
        parts = {p.ds_tensor.untyped_storage().data_ptr() for p in parameters}
        whole = [p for p in parameters if p.numel() and p.untyped_storage().data_ptr() not in parts]
        coming = sum(p.ds_numel * p.element_size() for p in parameters if p.ds_status.name == "INFLIGHT")
        return unique(whole) + coming

    def result(self, ema: ShardEma, counter: CollectiveCounter, events: list[int | str]) -> Counted:
        optimizer, is_three = self.engine._zero, self.engine.stage == 3
        frozen = [parameter for parameter in self.engine.module.parameters() if not parameter.requires_grad]
        weights = [optimizer.lp_param_buffer] if is_three else list(optimizer.bit16_groups_flat)
        weights += [parameter.ds_tensor if is_three else parameter for parameter in frozen]
        states = [state for group in optimizer.optimizer.state.values() for state in group.values()]
        sent = {"all_gather": 0, "reduce": 0, "all_to_all": 0}
        for call in counter.calls:
            kind = {"reduce_scatter": "reduce", "all_reduce": "reduce"}.get(call.name, call.name)
            sent[kind] = sent.get(kind, 0) + call.sent
        kept, peak = self.over_time(events)
        return Counted(
            unique(weights),
            unique([*weights, *self.engine.state.masters()]) - unique(weights),
            self.gradients,
            unique(s for s in states if isinstance(s, Tensor) and s.numel() > 1),
            unique(ema.shards),
            unique(tree_leaves([bucket.buffer for bucket in optimizer.ipg_buckets.values()])),
            max(self.whole_at.values()),
            kept,
            peak,
            sent["all_gather"],
            sent["reduce"],
            sent["all_to_all"],
        )

    def over_time(self, events: list[int | str]) -> tuple[int, int]:
        """What a call left allocated beside whole weights, and the peak of a step; the least of several."""
        now, before, left = 0, 0, list[int]()
        peaks, starts = list[int](), list[int]()
        for event in events:
            if isinstance(event, int):
                now += event
                peaks[-1:] = [max(peaks[-1], now)] if peaks else []
                continue
            kind, beside = event.split()[-1], now - self.whole_at[event]
            if kind == "step":
                starts.append(now)
                peaks.append(now)
            elif kind == "before":
                before = beside
            else:
                left.append(beside - before)
        return min(left), min(peak - start for start, peak in zip(starts, peaks, strict=True))


@contextmanager
def threads_first() -> Iterator[None]:
    """Let every wait for a collective last until the threads that did it have let go of its buffers.

    The profiler notes what this thread frees. What a thread of gloo frees, because it lets go last, is not noted and
    would count as allocated for ever: on a busy machine that is a matter of chance.
    """
    wait = Work.wait

    def wait_longer(work: Work, *args: Any) -> bool:
        done = wait(work, *args)
        wait_for_threads()
        return done

    Work.wait = wait_longer
    try:
        yield
    finally:
        Work.wait = wait


def wait_for_threads(deadline: float = 10.0) -> None:
    """Wait until no other thread of this process runs: one of gloo holds its buffers until it sleeps again."""
    own, quiet, until = threading.get_native_id(), 0, time.monotonic() + deadline
    while quiet < 3 and time.monotonic() < until:
        others = [thread for thread in Path("/proc/self/task").iterdir() if thread.name != str(own)]
        quiet = 0 if any(map(running, others)) else quiet + 1
        time.sleep(0.001)


def running(thread: Path) -> bool:
    """Whether a thread, a folder of /proc, runs or would run."""
    try:
        return (thread / "stat").read_text().rpartition(")")[2].split()[0] == "R"
    except OSError:  # ended
        return False


def unique(tensors: Iterable[Tensor]) -> int:
    """Bytes of unique storages."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
