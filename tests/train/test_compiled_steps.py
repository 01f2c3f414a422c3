"""Training steps with compiled blocks under the engine: the numbers of uncompiled ones, bit for bit, in few graphs.

The backend is `aot_eager`: torch traces and differentiates blocks as for its compiler and runs the same operators.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from sharpmoe.config import RunConfig
from sharpmoe.model.backbone import Backbone
from sharpmoe.model.compiled import compile_blocks
from sharpmoe.parallel.ranks.launch import World
from tests.distributed import run_ranks
from tests.fixtures_data import make_shards
from tests.parallel.reference import Case, Trace, one_case
from tests.selection import sweep
from tests.train.setting import identical, make_run


class Layout(NamedTuple):
    """How a run is trained, and how many graphs its blocks may need."""

    world: int
    stage: int
    graphs: int
    sections: dict[str, Any]


LAYOUTS = {
    "zero3 plain": Layout(1, 3, 2, {}),
    "zero2 two_pass": Layout(1, 2, 4, {"rollout": {"schedule": "two_pass"}}),
    "zero3 checkpoint": Layout(1, 3, 2, {"rollout": {"schedule": "checkpoint"}}),
    "zero3 two ranks share experts": Layout(2, 3, 12, {"parallel": {"ep_size": 2}}),
    "zero3 megatron": Layout(2, 3, 12, {"parallel": {"ep_size": 2, "dispatcher": "megatron"}}),
    # A first pass, a replay and a kept step; dense blocks do not tell a replay from a kept step.
    "zero2 hybrid": Layout(1, 2, 5, {"rollout": {"schedule": "hybrid", "kept_steps": 1}}),
    "zero3 segments": Layout(1, 3, 4, {"rollout": {"schedule": "segments", "segment_steps": 1}}),
    # The first step has the graphs of plain; with cutoffs a block is cut where experts are served.
    "zero3 trajectory pool": Layout(1, 3, 8, {"rollout": {"pool": "trajectory"}}),
    "zero3 bf16": Layout(1, 3, 2, {"train": {"precision": "bf16"}}),  # each operator rounds as it does uncompiled
}
SMALL = {"model": {"depth": 2}, "rollout": {"num_steps": 2}}


def compiled(model: Backbone) -> Backbone:
    return compile_blocks(model, backend="aot_eager")


def both(world: World, run: RunConfig, stage: int) -> tuple[Trace, Trace, int]:
    """Traces of two steps, uncompiled and compiled, and the graphs of the latter."""
    eager = one_case(world, Case(run, stage, 2))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = one_case(world, Case(run, stage, 2, compiled))
    return eager, found, int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", sweep(LAYOUTS, ["zero3 plain"]))
def test_steps_equal_uncompiled_ones(layout: str, tmp_path: Path) -> None:
    world, stage, graphs, sections = LAYOUTS[layout]
    sections = {name: SMALL.get(name, {}) | sections.get(name, {}) for name in SMALL | sections}
    run = make_run(make_shards(tmp_path / "shapes"), tmp_path / "run", **sections)
    for eager, found, count in run_ranks(both, world, run, stage, timeout=500):
        assert found.losses == eager.losses
        assert found.norms == eager.norms
        assert identical(found.gradients, eager.gradients)
        assert identical(found.weights, eager.weights)
        assert count <= graphs
