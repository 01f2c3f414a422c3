"""A run and a layout -> its budget, and those of its neighbours."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.index import INDEX_FILE
from data_pipeline.read.shards import ShardSet
from sharpmoe.config import RunConfig
from sharpmoe.config_io import batch_arithmetic
from sharpmoe.parallel.experts.groups import check_ep_size
from sharpmoe.parallel.zero.settings import zero_settings
from sharpmoe.planning.activations import Activations, measure
from sharpmoe.planning.gathers import Gathers, count_gathers
from sharpmoe.planning.layout import Layout, parts_of
from sharpmoe.planning.memory import Memory, Step, memory
from sharpmoe.planning.traffic import Traffic, traffic
from sharpmoe.train.rollout_schedules import RolloutSchedule, all_schedules, schedule_of

USUAL_TEXT_TOKENS = 32


class Estimate(NamedTuple):
    """One layout under one schedule."""

    layout: Layout
    schedule: RolloutSchedule
    memory: Memory
    traffic: Traffic


class Budget(NamedTuple):
    """What a run needs, under its own schedule first and then under the others."""

    run: RunConfig
    parameters: int  # of the model
    expert_parameters: int
    estimates: tuple[Estimate, ...]

    @property
    def own(self) -> Estimate:
        """The run as it is configured."""
        return self.estimates[0]


class Planner:
    """Estimates for a run; what does not depend on the layout is counted once. No communication, no weights."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        tokens = text_tokens(run)
        self._measured: Callable[[int], Activations] = cache(lambda micro_batch: measure(run, micro_batch, tokens))

    def under(self, run: RunConfig) -> "Planner":
        """The same for a run that differs in its schedule; nothing is counted again."""
        other = copy.copy(self)
        other.run = run
        return other

    def layout(self, world: int, ds_config: dict[str, Any]) -> Layout:
        """Check and complete the layout that the run asks for on so many ranks. Raises ConfigError."""
        check_ep_size(self.run, world)
        batch = batch_arithmetic(self.run, world)
        ep_size = self.run.parallel.ep_size
        return Layout(world, ep_size, zero_settings(ds_config), batch.micro_batch, batch.accumulation)

    def budget(self, layout: Layout) -> Budget:
        """Estimate every schedule of a layout."""
        parts = parts_of(self.run, 1, 1)
        experts = sum(part.numel for part in parts if part.is_expert)
        own = schedule_of(self.run)
        others = [schedule_of(run) for run in all_schedules(self.run)]
        schedules = (own, *(schedule for schedule in others if schedule.name != own.name))
        estimates = tuple(self.estimate(layout, schedule) for schedule in schedules)
        return Budget(self.run, sum(part.numel for part in parts), experts, estimates)

    def estimate(self, layout: Layout, schedule: RolloutSchedule) -> Estimate:
        """One layout under one schedule."""
        run, zero = self.run, layout.zero
        parts = parts_of(run, layout.world, layout.ep_size)
        gathers = Gathers((0,) * len(parts), 0, 0)
        if zero.stage == 3:
            gathers = count_gathers(run, parts, schedule, layout)
        graphs = self._measured(layout.micro_batch).of(schedule)
        states = 2 if run.optim.name == "adamw" else 0
        step = Step(graphs, layout.accumulation, gathers, states, self._looked_at)
        return Estimate(layout, schedule, memory(parts, zero, step), traffic(run, layout, parts, schedule, gathers))

    @property
    def _looked_at(self) -> int:
        """Parameters of the model that validation, allocation tables and samples run; 0 where the run has none."""
        log = self.run.log
        is_looking = log.validate_every or log.sample_every or log.allocation
        return sum(part.numel for part in parts_of(self.run, 1, 1)) if is_looking else 0


def text_tokens(run: RunConfig) -> int:
    """Tokens per caption: those of the prepared data, the usual limit where there are none yet. Raises DataError."""
    if run.model.conditioning != "text" or not (Path(run.data.first_place) / INDEX_FILE).is_file():
        return USUAL_TEXT_TOKENS
    return ShardSet.open(run.data.first_place, run.data.train_split).text_length
