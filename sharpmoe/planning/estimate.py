"""Estimates of memory and traffic: of a run on a layout, under its own schedule and the others."""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.index import INDEX_FILE
from data_pipeline.read.mixture import open_mixture
from data_pipeline.safety import scheme_of
from sharpmoe.config import RunConfig
from sharpmoe.config_io import batch_arithmetic
from sharpmoe.parallel.experts.groups import check_ep_size
from sharpmoe.parallel.zero.settings import ZeroSettings
from sharpmoe.planning.activations import Activations, SampleTokens, count_activations
from sharpmoe.planning.gathers import Gathers, count_gathers
from sharpmoe.planning.layout import RankLayout, keeps_eight_bits, rank_parameters, trained_parts
from sharpmoe.planning.memory import MASTER_BYTES, Memory, StepNeeds, rank_memory
from sharpmoe.planning.traffic import Traffic, traffic
from sharpmoe.train.looks import look_dtype, looks_by_block
from sharpmoe.train.rollout_schedules import RolloutSchedule, all_schedules, schedule_of
from sharpmoe.train.sample_judge import extractor_bytes
from sharpmoe.train.shapes import shape_mismatch, token_counts

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


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Estimates of a run, under its own schedule first and then under the others."""

    run: RunConfig
    tokens: int  # of an image
    parameters: int  # of the model
    expert_parameters: int
    trained_parameters: int
    estimates: tuple[Estimate, ...]

    @property
    def own(self) -> Estimate:
        """The run as it is configured."""
        return self.estimates[0]


class Planner:
    """Estimates for a run; what does not depend on the layout is counted once. No communication, no weights."""

    def __init__(self, run: RunConfig, tokens: int | None = None, *, read_urls: bool = False) -> None:
        """Plan for images of `tokens` tokens: by default the largest of the prepared data, else the model's square.

        read_urls: read what data at URLs have too; otherwise only folders are. Raises DataError where data that are
        there cannot be read.
        """
        self.run = run
        found = _sample_tokens(run, read_urls)
        self._tokens = found if tokens is None else found._replace(image=tokens)
        self._measured: Callable[[int], Activations] = cache(
            lambda micro_batch: count_activations(run, micro_batch, self._tokens)
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
        return Budget(
            run=self.run,
            tokens=self._tokens.image,
            parameters=sum(part.numel for part in parts),
            expert_parameters=experts,
            trained_parameters=sum(part.numel for part in trained_parts(parts)),
            estimates=estimates,
        )

    def estimate(self, layout: RankLayout, schedule: RolloutSchedule) -> Estimate:
        """Estimate one layout under one schedule."""
        run, zero = self.run, layout.zero
        parts = rank_parameters(run, layout.world, layout.ep_size)
        gathers = Gathers((0,) * len(parts), 0, 0)
        if zero.stage == 3:
            gathers = count_gathers(run, parts, schedule, layout)
        graphs = self._measured(layout.micro_batch).of(schedule)
        step = StepNeeds(graphs, layout.accumulation, gathers, self._monitored, extractor_bytes(run.log))
        memory = rank_memory(parts, zero, step)
        sent = traffic(run, layout, parts, schedule, gathers, self._tokens.image)
        return Estimate(layout=layout, schedule=schedule, memory=memory, traffic=sent)

    @property
    def _monitored(self) -> int:
        """Most bytes of the monitor's model that are whole at a time; 0 where nothing is measured."""
        log = self.run.log
        if not (log.validate_every or log.sample_every or log.metrics_every or log.allocation):
            return 0
        parts = rank_parameters(self.run, 1, 1)
        whole = sum(part.numel for part in parts)
        size = look_dtype(self.run).itemsize
        if not looks_by_block(self.run, whole):
            return whole * (MASTER_BYTES if self.run.lora.rank else size)  # adapters are merged in float32
        of_block = Counter[int]()
        for part in parts:
            if part.block is not None:
                of_block[part.block] += part.numel
        # Of a block its parts and their sum, in float32, and the sum once more where it is rounded.
        rounded = size if size < MASTER_BYTES else 0
        return (whole - of_block.total()) * size + (2 * MASTER_BYTES + rounded) * max(of_block.values())


def optimizer_bytes(run: RunConfig) -> int:
    """Return the bytes of the optimizer's states in a checkpoint of a run."""
    parts = trained_parts(rank_parameters(run, 1, 1))
    if keeps_eight_bits(run):  # stored as float32, with the number of its block (parallel/zero/eight_bits.py)
        return sum(4 * part.numel * 4 for part in parts)
    return sum(part.numel * part.state_bytes for part in parts)


def _sample_tokens(run: RunConfig, read_urls: bool) -> SampleTokens:
    """Return the largest sizes in the prepared data: a step is of one resolution, and one of the largest has to fit.

    Where there are no data yet, or only such as the model does not take, the square of the model and the usual limit of
    captions. Raises DataError.
    """
    places = [(place, weight) for place, weight in run.data.places if _is_there(place, read_urls)]
    if not places:
        return SampleTokens(run.model.num_tokens, _USUAL_TEXT_TOKENS)
    accept_damage = run.data.max_bad_fraction > 0  # as the run opens them
    data = open_mixture(places, run.data.train_split, run.data.remote.options(), accept_damage)
    fits = shape_mismatch(data, run.model) is None
    return SampleTokens(
        image=token_counts(data.buckets)[-1] if fits else run.model.num_tokens,
        text=data.text_length if run.model.conditioning == "text" else _USUAL_TEXT_TOKENS,
    )


def _is_there(place: str, read_urls: bool) -> bool:
    return read_urls if scheme_of(place) else (Path(place) / INDEX_FILE).is_file()
