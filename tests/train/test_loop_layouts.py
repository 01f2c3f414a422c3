"""A run goes on in any other layout: ranks, experts per rank, ZeRO stage."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from sharpmoe.checkpoint import manifest
from sharpmoe.config import RunConfig
from sharpmoe.log_file import read_log
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.train import loop
from sharpmoe.train.setup import initial_model
from tests.distributed import run_ranks
from tests.train.setting import identical, make_run, plan_for

HALF, WHOLE = 5, 15
OTHERS = [(4, 4, 3), (2, 2, 3), (2, 1, 3), (1, 1, 3), (3, 1, 3), (2, 2, 2), (1, 1, 2)]  # ranks, ep_size, ZeRO stage


def a_run(shards: Path, output: Path, name: str, steps: int, ep_size: int, **more: Any) -> RunConfig:
    """AdamW, 12 images a step in micro-batches of one (one pool each): any number of ranks up to four.

    The learning rate is small: float32 sums in another order differ by 1e-8, and where weights move fast that soon
    decides which of two tokens, as good as equal, an expert takes.
    """
    run = make_run(
        shards,
        output,
        "ec",
        model={"depth": 2},
        train={"steps": steps, "global_batch": 12, "micro_batch": 1},
        parallel={"ep_size": ep_size},
        optim={"lr": 1e-3},
        checkpoint={"resume": "auto", "every": HALF, "keep": 9},
        **more,
    )
    return run.model_copy(update={"name": name})


def train(world: World, runs: list[RunConfig], stage: int) -> None:
    for run in runs:
        loop.train(plan_for(run, world, stage), world)


def copy_then_train(world: World, run: RunConfig, copy: RunConfig, stage: int) -> None:
    """Load a checkpoint and save it at once under another name, then go on."""
    plan = plan_for(run, world, stage)
    elsewhere = replace(plan, run=copy)
    loop.open_session(elsewhere, world, initial_model(plan)).checkpoints.save(plan.start)
    loop.train(plan_for(run, world, stage), world)


def title(other: tuple[int, int, int]) -> str:
    return "{}x{}-zero{}".format(*other)


def last(output: Path, name: str, step: int) -> Path:
    return output / name / "checkpoints" / f"step{step:08d}"


@pytest.fixture(scope="module")
def output(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at world 4 / ep 2 to its end, and stopped early under the name of every other layout."""
    output = tmp_path_factory.mktemp("layouts")
    run_ranks(train, 4, [a_run(shards, output, "whole", WHOLE, 2), a_run(shards, output, "half", HALF, 2)], 3)
    for other in OTHERS:
        shutil.copytree(output / "half", output / title(other))
    return output


@pytest.mark.dist
@pytest.mark.sweep
@pytest.mark.parametrize("other", OTHERS, ids=title)
def test_a_run_goes_on_in_another_layout(other: tuple[int, int, int], output: Path, shards: Path) -> None:
    ranks, ep_size, stage = other
    name, copy = title(other), f"copy-{title(other)}"
    runs = [a_run(shards, output, one, WHOLE, ep_size) for one in (name, copy)]
    run_ranks(copy_then_train, ranks, *runs, stage)
    for kind in ("live", "ema"):  # moved without a step: equal to the last bit
        files = [last(output, one, HALF) / f"{kind}.safetensors" for one in ("half", copy)]
        assert identical(*(load_file(file) for file in files))
    moved, whole = (read_log(output / one / "log.jsonl")["loss/total"] for one in (name, "whole"))
    assert list(moved) == list(whole) == list(range(1, WHOLE + 1))
    assert max(abs(moved[step] - whole[step]) for step in whole) < 1e-5


@pytest.mark.dist
@pytest.mark.sweep
def test_a_run_shrinks_and_grows_on_its_way(output: Path, shards: Path) -> None:
    """4 ranks, then 2, then 3, then 1: the same samples in the same order, and the losses of the run that stayed."""
    for steps, (ranks, ep_size) in zip((4, 8, 12, WHOLE), ((4, 2), (2, 2), (3, 1), (1, 1)), strict=True):
        run_ranks(train, ranks, [a_run(shards, output, "chain", steps, ep_size)], 3)
    moved, whole = (read_log(output / one / "log.jsonl")["loss/total"] for one in ("chain", "whole"))
    assert list(moved) == list(whole)
    assert max(abs(moved[step] - whole[step]) for step in whole) < 1e-5
    ends = [manifest.read_manifest(last(output, one, WHOLE)).progress for one in ("chain", "whole")]
    assert ends[0][:3] == ends[1][:3]
