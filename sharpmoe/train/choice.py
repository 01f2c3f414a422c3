"""`rollout.schedule: auto`: the exact schedule with the fewest FLOPs among those that fit a memory plan."""

from collections.abc import Callable
from typing import Any

from sharpmoe.config import RunConfig
from sharpmoe.errors import ConfigError
from sharpmoe.train.terms import has_routing_loss

GIB = 2**30


def candidates(run: RunConfig) -> list[RunConfig]:
    """The run under every exact schedule worth trying, the cheapest first; where two cost the same, plain wins.

    `hybrid` of one step keeps what `two_pass` keeps and saves a forward, so that `two_pass` is for runs without a
    routing loss, where it costs what `plain` costs.
    """
    schedules: list[dict[str, Any]] = [{"schedule": "plain"}]
    if run.stage == "posttrain" and has_routing_loss(run):
        schedules += [{"schedule": "hybrid", "kept_steps": kept} for kept in range(1, run.rollout.num_steps)]
    elif run.stage == "posttrain":
        schedules.append({"schedule": "two_pass"})
    schedules.append({"schedule": "checkpoint"})
    runs = [run.model_copy(update={"rollout": run.rollout.model_copy(update=fields)}) for fields in schedules]
    return sorted(runs, key=forwards)


def forwards(run: RunConfig) -> int:
    """Cost of a micro-batch in forwards of the model; a backward counts as two."""
    rollout = run.rollout
    steps = 1 if run.stage == "pretrain" else rollout.num_steps
    if run.stage == "pretrain" or rollout.schedule in ("plain", "checkpoint"):
        return (4 if rollout.schedule == "checkpoint" else 3) * steps
    trained = rollout.segment_steps if rollout.schedule == "segments" else steps
    if rollout.schedule != "segments" and not has_routing_loss(run) and rollout.merged_steps == 1:
        return 3 * steps
    return steps + 3 * trained - rollout.steps_kept


def cheapest(run: RunConfig, peak: Callable[[RunConfig], float], room: float) -> RunConfig:
    """The run itself, or, where its schedule is auto, with the first candidate whose `peak` is at most `room` bytes.

    Raises ConfigError where none fits.
    """
    if run.rollout.schedule != "auto":
        return run
    peaks = []
    for candidate in candidates(run):
        peaks.append(peak(candidate))
        if peaks[-1] <= room:
            return candidate
    raise ConfigError(
        f"rollout.schedule: auto finds no schedule that fits {room / GIB:.1f} GiB, the smallest takes "
        f"{min(peaks) / GIB:.1f}; lower train.micro_batch, or raise parallel.ep_size or the number of ranks"
    )
