"""Estimates of memory and traffic: of a run on a layout, under its own schedule and the others."""

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
from sharpmoe.parallel.zero.settings import ZeroSettings
from sharpmoe.planning.activations import Activations, count_activations
from sharpmoe.planning.gathers import Gathers, count_gathers
from sharpmoe.planning.layout import RankLayout, rank_parameters
from sharpmoe.planning.memory import Memory, StepNeeds, rank_memory
from sharpmoe.planning.traffic import Traffic, traffic
from sharpmoe.train.rollout_schedules import RolloutSchedule, all_schedules, schedule_of

_USUAL_TEXT_TOKENS = 32


class Estimate(NamedTuple):
    """One layout under one schedule."""

    layout: RankLayout
    schedule: RolloutSchedule
    memory: Memory
    traffic: Traffic

    @property
    def title(self) -> str:
        """Layout and schedule in a few words."""
        return f"ZeRO-{self.layout.zero.stage}, ep {self.layout.ep_size}, {self.schedule.name}"


class Budget(NamedTuple):
    """Estimates of a run, under its own schedule first and then under the others."""

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
        tokens = _text_tokens(run)
        self._measured: Callable[[int], Activations] = cache(
            lambda micro_batch: count_activations(run, micro_batch, tokens)
        )

    def under(self, run: RunConfig) -> "Planner":
        """Return a planner of a run that differs in its schedule only; nothing is counted again."""
        other = copy.copy(self)
        other.run = run
        return other

    def layout(self, world: int, ds_config: dict[str, Any]) -> RankLayout:
        """Check and return the layout that the run is configured for on so many ranks. Raises ConfigError."""
        check_ep_size(self.run, world)
        batch = batch_arithmetic(self.run, world)
        ep_size = self.run.parallel.ep_size
        return RankLayout(world, ep_size, ZeroSettings.of(ds_config), batch.micro_batch, batch.accumulation)

    def budget(self, layout: RankLayout) -> Budget:
        """Estimate every schedule of a layout."""
        parts = rank_parameters(self.run, 1, 1)
        experts = sum(part.numel for part in parts if part.is_expert)
        own = schedule_of(self.run)
        others = [schedule_of(run) for run in all_schedules(self.run)]
        schedules = (own, *(schedule for schedule in others if schedule.name != own.name))
        estimates = tuple(self.estimate(layout, schedule) for schedule in schedules)
        return Budget(self.run, sum(part.numel for part in parts), experts, estimates)

    def estimate(self, layout: RankLayout, schedule: RolloutSchedule) -> Estimate:
        """Estimate one layout under one schedule."""
        run, zero = self.run, layout.zero
        parts = rank_parameters(run, layout.world, layout.ep_size)
        gathers = Gathers((0,) * len(parts), 0, 0)
        if zero.stage == 3:
            gathers = count_gathers(run, parts, schedule, layout)
        graphs = self._measured(layout.micro_batch).of(schedule)
        step = StepNeeds(graphs, layout.accumulation, gathers, optimizer_states(run), self._monitored)
        memory, sent = rank_memory(parts, zero, step), traffic(run, layout, parts, schedule, gathers)
        return Estimate(layout=layout, schedule=schedule, memory=memory, traffic=sent)

    @property
    def _monitored(self) -> int:
        """Parameters of the model that the monitor builds (validation, allocation, samples); 0 where nothing is due."""
        log = self.run.log
        is_monitored = log.validate_every or log.sample_every or log.allocation
        return sum(part.numel for part in rank_parameters(self.run, 1, 1)) if is_monitored else 0


def optimizer_states(run: RunConfig) -> int:
    """Return the tensors that the optimizer keeps per parameter."""
    return 2 if run.optim.name == "adamw" else 0


def _text_tokens(run: RunConfig) -> int:
    """Return the tokens per caption: of the prepared data, else the usual limit. Raises DataError."""
    if run.model.conditioning != "text" or not (Path(run.data.first_place) / INDEX_FILE).is_file():
        return _USUAL_TEXT_TOKENS
    return ShardSet.open(run.data.first_place, run.data.train_split).text_length
