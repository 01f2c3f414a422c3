"""What only measures or draws never ends a run: whatever fails on whichever rank is noted, and the run is the same."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from sharpmoe.config import RunConfig
from sharpmoe.log_file import read_log
from sharpmoe.model.backbone import TextCondition
from sharpmoe.parallel.ranks.launch import World, gather_objects
from sharpmoe.train import loop, monitor
from tests.distributed import run_ranks
from tests.train.setting import make_run, plan_for

# What a run calls to measure, draw and write, and how the note about it begins.
MEASURING = {
    "validate": "the validation",
    "draw_images": "the samples",
    "observe_routing": "the routing sheet",
    "measure_allocation": "the allocation",
}
WRITING = {
    "sample_grid": "the picture of samples",
    "draw_routing_sheet": "the picture of routing",
    "allocation_table": "the allocation before training",
    "allocation_curves": "the allocation after training",
}


@pytest.fixture
def run(shards: Path, tmp_path: Path) -> RunConfig:
    return make_run(
        shards,
        tmp_path,
        stage="pretrain",
        train={"steps": 2},
        log={"validate_every": 1, "sample_every": 1, "allocation": True, "allocation_images": 4},
        sample={"captions": ("a red circle", "a blue cross"), "num_steps": 2},
    )


@contextmanager
def replaced(names: Any, function: Callable[..., Any]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(monitor, name, function)
        yield


def fail(*_: Any, **__: Any) -> None:
    raise ZeroDivisionError("no reason")


def call_and_fail(model: Any, *_: Any, **__: Any) -> None:
    """Fail on this rank while the others are between two calls of the model."""
    config = model.config
    x = torch.zeros(1, config.latent_channels, config.latent_size, config.latent_size)
    with torch.no_grad():
        text = (
            torch.zeros(1, 4, config.text_width),
            torch.ones(1, 4, dtype=torch.bool),
            torch.zeros(1, config.pooled_width),
        )
        model(x, torch.ones(1), TextCondition(*text), x if config.saliency_router else None)
    raise ZeroDivisionError("no reason")


def trained(world: World, run: RunConfig, name: str, names: Any, failure: Callable[..., Any]) -> str:
    """What a run prints that meets a failure."""
    said = io.StringIO()
    with redirect_stdout(said), replaced(names, failure):
        loop.train(plan_for(run.model_copy(update={"name": name}), world), world)
    gather_objects(None, world)
    return said.getvalue()


def all_of_them(world: World, run: RunConfig) -> list[str]:
    return [
        trained(world, run, "measuring", MEASURING, fail),
        trained(world, run, "writing", WRITING, fail),
        trained(world, run, "one rank", MEASURING if world.rank == 1 else (), call_and_fail),
    ]


@pytest.mark.dist
def test_what_fails_is_noted_and_the_run_goes_on(run: RunConfig) -> None:
    measuring, writing, one_rank = run_ranks(all_of_them, 2, run)[0]
    for text, names in ((measuring, MEASURING), (writing, WRITING), (one_rank, MEASURING)):
        assert text.count("ZeroDivisionError: no reason; training goes on") >= len(names)
        for what in names.values():
            assert f"note: {what} could not be" in text
    assert "rank 1: ZeroDivisionError" in one_rank
    logs = [read_log(Path(run.output) / name / "log.jsonl") for name in ("measuring", "writing", "one rank")]
    curves = [{tag: curve for tag, curve in found.items() if tag.startswith("loss/")} for found in logs]
    assert curves[0] == curves[1] == curves[2]
    assert set(curves[0]["loss/total"]) == {1, 2}
    assert "validation/flow" in logs[1]
    assert "validation/flow" not in {*logs[0], *logs[2]}
