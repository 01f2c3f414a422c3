"""Rollout schedules: the model calls and backwards that train one micro-batch (docs/design/0003-rollout-schedules.md).

A schedule is described once, here, as a list of passes. `Objective` executes it; FLOPs, the memory planner,
`rollout.schedule: auto` and the warning about repeated gathers read it. To add one: write a function that returns its
passes and add a row to `SCHEDULES`; in `sharpmoe.config`, add its name and checks to `RolloutConfig` and its settings
to `SCHEDULE_SETTINGS`.

The gradient of L_routing reaches the network only through A, which is a sum over steps. Once all steps have been run, A
and w = dL_routing / dA are known. The gradient of the trajectory is then the sum over steps of the gradient of
L(step) / T + sum(w A_step), so each step can be trained by itself.
"""

from collections.abc import Callable, Iterable, Iterator
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
    graph: bool  # builds a graph, which the backward of its pass uses
    first_of_two: bool = False  # its steps are run twice, this is the first run: x0_hat, routing and A, no losses
    second_of_two: bool = False  # its steps are run twice, this is the second run: it reuses routing and x0_prev
    recompute: bool = False  # blocks keep only their inputs and run again in the backward


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Model calls in order, then one backward through the graphs of all of them.

    has_all_steps: the graph contains all T steps, so that the backward differentiates L_routing itself. In other passes
    it differentiates sum(w A_step), with w known from the first run of all steps.
    """

    calls: tuple[ModelCall, ...]
    has_all_steps: bool = False

    @property
    def num_trained(self) -> int:
        """Rollout steps with a graph."""
        return sum(len(call.steps) for call in self.calls if call.graph)

    @property
    def graph_calls(self) -> int:
        """Model calls that build a graph."""
        return sum(call.graph for call in self.calls)

    @property
    def no_graph_calls(self) -> int:
        """Model calls that build no graph."""
        return len(self.calls) - self.graph_calls

    @property
    def recompute(self) -> bool:
        """Whether blocks run again in the backward."""
        return any(call.recompute for call in self.calls)


@dataclass(frozen=True, kw_only=True)
class RolloutSchedule:
    """How a micro-batch is trained. All counts are rollout steps of one trajectory unless stated otherwise."""

    name: str
    passes: tuple[Pass, ...]

    @property
    def calls(self) -> Iterator[ModelCall]:
        """All model calls in order."""
        return (call for each in self.passes for call in each.calls)

    @property
    def num_trained(self) -> int:
        """Steps with a backward: T, or the S steps of a segment."""
        return sum(each.num_trained for each in self.passes)

    @property
    def forwards(self) -> int:
        """Forwards of one step: a step that is run twice counts twice, recomputation in a backward does not count."""
        return sum(len(call.steps) for call in self.calls)

    @property
    def run_twice(self) -> int:
        """Steps that are run twice. The first run of each omits what only losses need."""
        return sum(len(call.steps) for call in self.calls if call.first_of_two)

    @property
    def recomputed(self) -> int:
        """Steps whose blocks run again in the backward."""
        return sum(len(call.steps) for call in self.calls if call.recompute)

    @property
    def cost(self) -> int:
        """Cost in forwards of one step; a backward counts as two."""
        return self.forwards + 2 * self.num_trained + self.recomputed

    @property
    def model_uses(self) -> int:
        """Forwards and backwards through the whole model."""
        return sum(1 + call.graph for call in self.calls)


def schedule_of(run: RunConfig, num_steps: int | None = None, segment: int | None = None) -> RolloutSchedule:
    """Describe how the run trains a rollout of `num_steps` steps (default: the run's).

    segment: which of the T / S segments is trained, by default the last; schedules without segments ignore it. All
    counts are the same for every segment. Pretraining has one step, for which a single graph is enough.
    """
    rollout = run.rollout
    assert rollout.schedule != "auto", "resolve rollout.schedule: auto first; check_schedule reports it to users"
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
    """Return T / S, the number of segments of S steps each; 1 if the schedule trains all steps.

    S is rollout.segment_steps. Each optimizer step trains one segment.
    """
    is_segmented = run.stage == "posttrain" and SCHEDULES[run.rollout.schedule].segmented
    return run.rollout.num_steps // run.rollout.segment_steps if is_segmented else 1


def with_schedule(run: RunConfig, **fields: Any) -> RunConfig:
    """Return the run with another schedule, given as fields of `RolloutConfig`.

    The settings in `SCHEDULE_SETTINGS` that are not given get their defaults.
    """
    unset = {key: RolloutConfig.model_fields[key].default for key in SCHEDULE_SETTINGS}
    return run.model_copy(update={"rollout": run.rollout.model_copy(update=unset | fields)})


def schedule_overrides(name: str) -> list[str]:
    """Return command-line overrides that select a schedule.

    Settings that this schedule does not have get their defaults. So does merged_steps with every schedule: it is
    optional, and not every router and micro-batch allows it (`check_schedule`).
    """
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
    """Return the run under every exact schedule worth trying, in order of cost.

    Of two with equal cost the simpler comes first: the sort is stable and `SCHEDULES` lists the simpler first.
    """
    rows = {name: row for name, row in SCHEDULES.items() if row.single_step or run.stage == "posttrain"}
    runs = [with_schedule(run, schedule=name, **fields) for name, row in rows.items() for fields in row.tried(run)]
    return sorted(runs, key=lambda each: schedule_of(each).cost)


def check_schedule(run: RunConfig, micro_batch: int, token_counts: Iterable[int]) -> None:
    """Raise ConfigError if the schedule cannot run on micro-batches of `micro_batch` images. No communication.

    token_counts: of an image, for every resolution of the data.
    """
    model, merged = run.model, run.rollout.merged_steps
    if run.rollout.schedule == "auto":
        raise ConfigError("rollout.schedule is auto, which only a run resolves; name a schedule here")
    if merged == 1:
        return
    if model.contrasts_calls:
        raise ConfigError(
            f"rollout.merged_steps is {merged}, but {model.router} compares the tokens of a whole call; set it to 1"
        )
    pools = [micro_batch * tokens for tokens in token_counts]
    layers = model.moe_blocks if model.family.competition == "call" else ()
    for pool, capacity in ((pool, capacity) for pool in pools for capacity in {each.capacity for each in layers}):
        one, together = (
            tokens_per_expert(n * pool, model.num_experts, capacity, model.family.rounding) for n in (1, merged)
        )
        if together != merged * one:
            raise ConfigError(
                f"rollout.merged_steps is {merged}, but {pool} tokens * capacity {capacity} do not split evenly "
                f"over {model.num_experts} experts; set it to 1, or change train.micro_batch"
            )


def _one_graph(run: RunConfig, steps: int, trained: range, recompute: bool = False) -> tuple[Pass, ...]:
    """Run all steps in one graph."""
    calls = tuple(ModelCall(steps=_one(step), graph=True, recompute=recompute) for step in trained)
    return (Pass(calls=calls, has_all_steps=True),)


def _recomputed_graph(run: RunConfig, steps: int, trained: range) -> tuple[Pass, ...]:
    """Run all steps in one graph that keeps only the inputs of blocks."""
    return _one_graph(run, steps, trained, recompute=True)


def _one_by_one(trained: range) -> tuple[Pass, ...]:
    """Run each step and take its backward at once."""
    return tuple(Pass(calls=(ModelCall(steps=_one(step), graph=True),)) for step in trained)


def _two_pass(run: RunConfig, steps: int, trained: range) -> tuple[Pass, ...]:
    """Run all steps, then run each again with a graph.

    Without a routing loss no loss depends on later steps, so each step can be trained in its only run. merged_steps
    still needs two runs: steps can share a batch only when their x0_prev are known.
    """
    if not has_routing_loss(run) and run.rollout.merged_steps == 1:
        return _one_by_one(trained)
    return _first_and_second(run, steps, trained)


def _first_and_second(run: RunConfig, steps: int, trained: range) -> tuple[Pass, ...]:
    """Run all steps and keep the graphs of the last `steps_kept` of `trained`; then run the rest of `trained` again.

    The first run of a step that is run twice computes only its routing and x0_hat; the second computes the losses and
    the heads that they need.
    """
    kept = trained[len(trained) - run.rollout.steps_kept :]
    again = trained[: len(trained) - len(kept)]
    first = tuple(ModelCall(steps=_one(step), graph=step in kept, first_of_two=step in again) for step in range(steps))
    size = run.rollout.merged_steps
    second = [
        ModelCall(steps=again[at : at + size], graph=True, second_of_two=True) for at in range(0, len(again), size)
    ]
    if kept:
        return (Pass(calls=first), *(Pass(calls=(call,)) for call in second))
    # Every pass ends with a backward, but no call of the first run has a graph: the first of the second run joins it.
    return (Pass(calls=(*first, second[0])), *(Pass(calls=(call,)) for call in second[1:]))


def _one(step: int) -> range:
    return range(step, step + 1)


class ScheduleRow(NamedTuple):
    """A row of the table of schedules."""

    passes: Callable[[RunConfig, int, range], tuple[Pass, ...]]  # (run, T, steps to train) -> passes
    typical: Callable[[int], dict[str, int]]  # T -> settings with which `launcher/plan.py` shows it
    tried: Callable[[RunConfig], list[dict[str, int]]]  # settings with which `auto` tries it; empty: it does not
    single_step: bool = False  # useful for a rollout of one step, as in pretraining
    segmented: bool = False  # trains one of T / S segments, so that its gradient is an estimate


def _longest_segment(steps: int) -> int:
    """Return the largest proper divisor of T; 1 if T = 1."""
    return max(size for size in range(1, steps + 1) if steps % size == 0 and (size < steps or steps == 1))


def _hybrids(run: RunConfig) -> list[dict[str, int]]:
    """Return all numbers of kept steps below T; none without a routing loss, when `hybrid` runs as `two_pass` does.

    `auto` tries kept_steps 1 instead of `two_pass`: both keep the graph of one step at a time, and a forward is saved.
    """
    return [{"kept_steps": kept} for kept in range(1, run.rollout.num_steps)] if has_routing_loss(run) else []


SCHEDULES: dict[str, ScheduleRow] = {
    "plain": ScheduleRow(_one_graph, lambda steps: {}, lambda run: [{}], single_step=True),
    "checkpoint": ScheduleRow(_recomputed_graph, lambda steps: {}, lambda run: [{}], single_step=True),
    # Tried only without a routing loss: then it costs what `plain` costs. With one, `hybrid` replaces it (`_hybrids`).
    "two_pass": ScheduleRow(_two_pass, lambda steps: {}, lambda run: [] if has_routing_loss(run) else [{}]),
    "hybrid": ScheduleRow(_two_pass, lambda steps: {"kept_steps": max(1, steps // 2)}, _hybrids),
    "segments": ScheduleRow(
        _first_and_second, lambda steps: {"segment_steps": _longest_segment(steps)}, lambda run: [], segmented=True
    ),
}


def _settings(run: RunConfig) -> Iterator[str]:
    """Yield the settings of the run's schedule that are part of its name."""
    rollout = run.rollout
    if SCHEDULES[rollout.schedule].segmented:
        yield f"segment_steps {rollout.segment_steps}"
    if rollout.kept_steps is not None:
        yield f"kept_steps {rollout.kept_steps}"
    if rollout.merged_steps > 1:
        yield f"merged_steps {rollout.merged_steps}"
