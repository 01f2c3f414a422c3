"""Rollout schedules: the model calls and backwards that train one micro-batch (docs/design/0003-rollout-schedules.md).

A schedule is described once, here, as a list of passes. `Objective` executes it; FLOPs, the memory planner,
`rollout.schedule: auto` and the warning about repeated gathers read it. To add one: write a function that returns its
passes, give it a row in `SCHEDULES`, and its name and checks in `RolloutConfig`.

L_routing reaches the network only through A, a sum over steps. With w = dL_routing / dA known after a first pass, the
gradient is the sum over steps of that of L(step) / T + sum(w A_step), and steps can be trained one by one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from sharpmoe.config import SCHEDULE_SETTINGS, RolloutConfig, RunConfig
from sharpmoe.errors import ConfigError
from sharpmoe.families import tokens_per_expert
from sharpmoe.train.terms import has_routing_loss


@dataclass(frozen=True, kw_only=True)
class ModelCall:
    """One call of the model, on one rollout step or on several as one batch."""

    steps: range  # 0-based rollout steps
    graph: bool  # leaves a graph, which the backward of its pass uses
    rerun: bool = False  # its steps are run again later: now only x0_hat, the routing and A are needed, no losses
    replayed: bool = False  # its steps were run before: the routing and x0_prev of then are used
    recompute: bool = False  # blocks keep their inputs only and run again in the backward


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Model calls in order, and one backward of all those that leave a graph."""

    calls: tuple[ModelCall, ...]
    whole: bool = False  # the graph of all T steps: L_routing itself is differentiated in it, elsewhere sum(w A_step)

    @property
    def trained(self) -> int:
        """Rollout steps with a graph."""
        return sum(len(call.steps) for call in self.calls if call.graph)

    @property
    def graph_calls(self) -> int:
        """Model calls that leave a graph."""
        return sum(call.graph for call in self.calls)

    @property
    def quiet_calls(self) -> int:
        """Model calls that leave none."""
        return len(self.calls) - self.graph_calls

    @property
    def recompute(self) -> bool:
        """Whether blocks run again in the backward."""
        return any(call.recompute for call in self.calls)


@dataclass(frozen=True, kw_only=True)
class RolloutSchedule:
    """How a micro-batch is trained. All counts are rollout steps of one trajectory unless they say otherwise."""

    name: str
    passes: tuple[Pass, ...]

    @property
    def calls(self) -> Iterator[ModelCall]:
        """All model calls in order."""
        return (call for each in self.passes for call in each.calls)

    @property
    def trained(self) -> int:
        """Steps with a backward: T, or S of a segment."""
        return sum(each.trained for each in self.passes)

    @property
    def forwards(self) -> int:
        """Steps run, each as often as it is; without those recomputed in a backward."""
        return sum(len(call.steps) for call in self.calls)

    @property
    def rerun(self) -> int:
        """Steps run twice: of the first runs, which leave out what only losses need, there are as many."""
        return sum(len(call.steps) for call in self.calls if call.rerun)

    @property
    def recomputed(self) -> int:
        """Steps whose blocks run again in the backward."""
        return sum(len(call.steps) for call in self.calls if call.recompute)

    @property
    def cost(self) -> int:
        """Cost in forwards of one step; a backward counts as two."""
        return self.forwards + 2 * self.trained + self.recomputed

    @property
    def model_uses(self) -> int:
        """Forwards and backwards through the whole model."""
        return sum(1 + call.graph for call in self.calls)


def schedule_of(run: RunConfig, num_steps: int | None = None, segment: int | None = None) -> RolloutSchedule:
    """Describe how the run trains a rollout of `num_steps` steps (default: the run's).

    segment: which of the T / S segments is trained; other schedules ignore it. The last by default: where it lies
    changes nothing but the order of steps. Pretraining has one step, which needs no more than one graph.
    """
    rollout = run.rollout
    assert rollout.schedule != "auto"  # `check_schedule`
    name = rollout.schedule
    if run.stage == "pretrain" and not SCHEDULES[name].single_step:
        name = "plain"
    steps, segments = num_steps or rollout_steps(run), num_segments(run)
    size = steps // segments
    at = segment if segments > 1 and segment is not None else segments - 1
    passes = SCHEDULES[name].passes(run, steps, range(at * size, (at + 1) * size))
    fields = [name] if run.stage == "pretrain" else [name, *_settings(run)]
    return RolloutSchedule(name=", ".join(fields), passes=passes)


def rollout_steps(run: RunConfig) -> int:
    """Rollout steps of a trajectory: T, or 1 in pretraining."""
    return 1 if run.stage == "pretrain" else run.rollout.num_steps


def num_segments(run: RunConfig) -> int:
    """Fixed segments of T / S steps of which each optimizer step trains one; 1 where all steps are trained."""
    drawn = run.stage == "posttrain" and SCHEDULES[run.rollout.schedule].segmented
    return run.rollout.num_steps // run.rollout.segment_steps if drawn else 1


def with_schedule(run: RunConfig, **fields: Any) -> RunConfig:
    """Return the run with another schedule, given as fields of `RolloutConfig`; settings of its own are reset."""
    unset = {key: RolloutConfig.model_fields[key].default for key in SCHEDULE_SETTINGS}
    return run.model_copy(update={"rollout": run.rollout.model_copy(update=unset | fields)})


def schedule_overrides(name: str) -> list[str]:
    """Return overrides of a run file that select a schedule and reset the settings of others, and merged_steps."""
    reset = [key for key, users in SCHEDULE_SETTINGS.items() if name not in users or key == "merged_steps"]
    defaults = {key: RolloutConfig.model_fields[key].default for key in reset}
    words = [f"--rollout.{key}={'null' if value is None else value}" for key, value in defaults.items()]
    return [f"--rollout.schedule={name}", *words]


def all_schedules(run: RunConfig) -> list[RunConfig]:
    """Return the run under every schedule that it could use, each with typical settings."""
    steps = rollout_steps(run)
    rows = {name: row for name, row in SCHEDULES.items() if row.single_step or steps > 1}
    return [with_schedule(run, schedule=name, **row.typical(steps)) for name, row in rows.items()]


def exact_schedules(run: RunConfig) -> list[RunConfig]:
    """Return the run under every exact schedule worth trying, the cheapest first; of equals, the simpler first."""
    rows = {name: row for name, row in SCHEDULES.items() if row.single_step or run.stage == "posttrain"}
    runs = [with_schedule(run, schedule=name, **fields) for name, row in rows.items() for fields in row.tried(run)]
    return sorted(runs, key=lambda each: schedule_of(each).cost)


def check_schedule(run: RunConfig, micro_batch: int) -> None:
    """Raise ConfigError where the schedule cannot run on micro-batches of so many images; no communication."""
    model, merged = run.model, run.rollout.merged_steps
    if run.rollout.schedule == "auto":
        raise ConfigError("rollout.schedule is auto, which only launcher/train.py resolves; name a schedule here")
    if merged == 1:
        return
    if model.contrasts_calls:
        raise ConfigError(
            f"rollout.merged_steps is {merged}, but {model.router} compares the tokens of a whole call; set it to 1"
        )
    pool = micro_batch * model.num_tokens
    one, together = (tokens_per_expert(n * pool, model.num_experts, model.capacity) for n in (1, merged))
    if model.family.competition == "call" and together != merged * one:
        raise ConfigError(
            f"rollout.merged_steps is {merged}, but {pool} tokens * capacity {model.capacity} do not split evenly over "
            f"{model.num_experts} experts; set it to 1, or change train.micro_batch"
        )


def _one_graph(run: RunConfig, steps: int, trained: range, recompute: bool = False) -> tuple[Pass, ...]:
    """All steps in one graph."""
    calls = tuple(ModelCall(steps=_one(step), graph=True, recompute=recompute) for step in trained)
    return (Pass(calls=calls, whole=True),)


def _recomputed_graph(run: RunConfig, steps: int, trained: range) -> tuple[Pass, ...]:
    """All steps in one graph that holds the inputs of blocks only."""
    return _one_graph(run, steps, trained, recompute=True)


def _one_by_one(trained: range) -> tuple[Pass, ...]:
    """Each step is trained as soon as it is run."""
    return tuple(Pass(calls=(ModelCall(steps=_one(step), graph=True),)) for step in trained)


def _two_pass(run: RunConfig, steps: int, trained: range) -> tuple[Pass, ...]:
    """Run all steps, then train each; without a routing loss nothing is known only at the end: one run is enough."""
    if not has_routing_loss(run) and run.rollout.merged_steps == 1:
        return _one_by_one(trained)
    return _first_and_second(run, steps, trained)


def _first_and_second(run: RunConfig, steps: int, trained: range) -> tuple[Pass, ...]:
    """Run all steps, keeping the graphs of the last of `trained`; then run those of `trained` before them again.

    Of what is run again the first pass needs the routing and x0_hat only: losses and their heads wait for the second.
    """
    kept = trained[len(trained) - run.rollout.steps_kept :]
    again = trained[: len(trained) - len(kept)]
    first = tuple(ModelCall(steps=_one(step), graph=step in kept, rerun=step in again) for step in range(steps))
    size = run.rollout.merged_steps
    second = [ModelCall(steps=again[at : at + size], graph=True, replayed=True) for at in range(0, len(again), size)]
    if kept:
        return (Pass(calls=first), *(Pass(calls=(call,)) for call in second))
    return (Pass(calls=(*first, second[0])), *(Pass(calls=(call,)) for call in second[1:]))


def _one(step: int) -> range:
    return range(step, step + 1)


class ScheduleRow(NamedTuple):
    """A schedule of the table."""

    passes: Callable[[RunConfig, int, range], tuple[Pass, ...]]  # run, T, trained steps
    typical: Callable[[int], dict[str, int]]  # settings with which a plan shows it, given T
    tried: Callable[[RunConfig], list[dict[str, int]]]  # settings with which `auto` tries it, when there are any
    single_step: bool = False  # of use in pretraining, which has one step
    segmented: bool = False  # one of T / S segments is trained: an estimate


def _proper_divisor(steps: int) -> int:
    """Return the largest proper divisor of T: the longest segment."""
    return max(size for size in range(1, steps + 1) if steps % size == 0 and (size < steps or steps == 1))


def _hybrids(run: RunConfig) -> list[dict[str, int]]:
    """Every number of kept steps; one keeps what `two_pass` keeps and saves a forward, so it comes in its place."""
    return [{"kept_steps": kept} for kept in range(1, run.rollout.num_steps)] if has_routing_loss(run) else []


SCHEDULES: dict[str, ScheduleRow] = {
    "plain": ScheduleRow(_one_graph, lambda steps: {}, lambda run: [{}], single_step=True),
    "checkpoint": ScheduleRow(_recomputed_graph, lambda steps: {}, lambda run: [{}], single_step=True),
    # Without a routing loss it costs what `plain` costs.
    "two_pass": ScheduleRow(_two_pass, lambda steps: {}, lambda run: [] if has_routing_loss(run) else [{}]),
    "hybrid": ScheduleRow(_two_pass, lambda steps: {"kept_steps": max(1, steps // 2)}, _hybrids),
    "segments": ScheduleRow(
        _first_and_second, lambda steps: {"segment_steps": _proper_divisor(steps)}, lambda run: [], segmented=True
    ),
}


def _settings(run: RunConfig) -> Iterator[str]:
    """Settings of the run's schedule that are part of its name."""
    rollout = run.rollout
    if SCHEDULES[rollout.schedule].segmented:
        yield f"segment_steps {rollout.segment_steps}"
    if rollout.kept_steps is not None:
        yield f"kept_steps {rollout.kept_steps}"
    if rollout.merged_steps > 1:
        yield f"merged_steps {rollout.merged_steps}"
