"""Shards, checkpoints, weights and results written by an old version are read, and lead to the same results.

tests/data/old_run/README.md says what was recorded. Where a result depends on the processor, it is bit-equal on the one
that recorded it and equal to rounding elsewhere (tests/recorded.py).
"""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.prepare.write import prepare_shards
from data_pipeline.read.shards import ShardSet
from data_pipeline.read.stream import stream
from sharpmoe import sampling
from sharpmoe.checkpoint import manifest
from sharpmoe.config import RunConfig, SampleConfig
from sharpmoe.config_io import load_run_config
from sharpmoe.evaluation import allocation
from sharpmoe.log_file import read_log
from sharpmoe.model.weights import load_model
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.report import runs, samples
from sharpmoe.train import loop
from tests.distributed import run_ranks
from tests.fixtures_data import QUIET, ShapesSource, shapes_recipe
from tests.recorded import assert_recorded, is_recorded_here
from tests.train.setting import plan_for

OLD = Path(__file__).parent / "data" / "old_run"
HERE = is_recorded_here(OLD / "recorded_on.json")
ROUNDING = 5e-6  # of the largest value of a tensor; scalar kernels instead of AVX-512 give 1.2e-6
RANKS = {"diffmoe": 1, "ec": 2}  # run -> ranks that wrote it, under ZeRO-3
HALF, WHOLE = 3, 6


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step{step:08d}"


def assert_equal(ours: Tensor, recorded: Tensor, what: str, exact: bool = HERE) -> None:
    if exact:
        assert torch.equal(ours, recorded), what
    else:
        assert_recorded(ours, recorded, ROUNDING, what)


def assert_same_weights(ours: dict[str, Tensor], recorded: dict[str, Tensor], exact: bool) -> None:
    """Assert that two state dicts are equal; biases of keys only if they must be exact.

    Attention does not depend on the bias of its keys: its gradient is rounding alone, which AdamW turns into steps of
    any size up to the learning rate.
    """
    assert list(ours) == list(recorded)
    for key, theirs in recorded.items():
        parts = {"qkv.bias": 3, "kv.bias": 2}.get(key.split("attn.")[-1], 1)
        for number, (part, their_part) in enumerate(zip(ours[key].chunk(parts), theirs.chunk(parts), strict=True)):
            if exact or number != parts - 2:  # q k v, or k v
                assert_equal(part, their_part, key, exact)


# ---- Shards ----


@pytest.fixture(scope="module")
def shards() -> ShardSet:
    return ShardSet.open(OLD / "shards", "train")


@pytest.fixture(scope="module")
def facts() -> dict[str, list]:
    return json.loads((OLD / "shards.json").read_text())


def test_samples_are_read_as_they_were(shards: ShardSet, facts: dict[str, list]) -> None:
    batch = shards.batch(range(shards.num_samples))
    assert (list(batch.keys), list(batch.captions)) == (facts["keys"], facts["captions"])
    for name, recorded in load_file(OLD / "shards.safetensors").items():
        assert torch.equal(torch.nan_to_num(getattr(batch, name), 7.0), torch.nan_to_num(recorded, 7.0)), name


def test_two_epochs_have_their_old_order(shards: ShardSet, facts: dict[str, list]) -> None:
    steps = stream(shards, seed=0, global_batch=4, micro_batch=4, rank=0, world=1)
    keys = [key for loaded in itertools.islice(steps, 10) for batch in loaded.batches for key in batch.keys]
    assert keys == facts["order"]


def test_shards_are_written_as_they_were(tmp_path: Path) -> None:
    recipe = shapes_recipe(text_width=8, shard_samples=12)
    prepare_shards(ShapesSource(captions=2), tmp_path / "shards", recipe, QUIET)
    found, old = (
        {path.name: path for path in folder.iterdir() if path.suffix}
        for folder in (tmp_path / "shards", OLD / "shards")
    )
    assert found.keys() == old.keys()
    for name, path in old.items():
        assert found[name].read_bytes() == path.read_bytes() or not HERE, name  # the codec is fitted, to rounding


# ---- Runs ----


def run_from(router: str, output: Path, title: str, start: int) -> RunConfig:
    """The old run, to go on from step `start` in a copy of its folder under `output`."""
    folder = output / title
    shutil.copytree(OLD / router, folder, ignore=shutil.ignore_patterns("step*", "latest"))
    if start:
        shutil.copytree(checkpoint(OLD / router, start), checkpoint(folder, start))
        (folder / "checkpoints" / "latest").write_text(checkpoint(folder, start).name)
    run = load_run_config(OLD / router / "config.yaml")
    data = run.data.model_copy(update={"shards": str(OLD / run.data.first_place)})
    init = run.checkpoint.model_copy(update={"init": str(OLD / str(run.checkpoint.init))})
    return run.model_copy(update={"name": title, "output": str(output), "data": data, "checkpoint": init})


def train_each(world: World, plans: list[tuple[RunConfig, int]]) -> None:
    for run, stage in plans:
        loop.train(plan_for(run, world, stage), world)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each run, gone on from its middle and begun again in its old layout, and gone on from its middle in another."""
    output = tmp_path_factory.mktemp("old")
    plans: dict[int, list[tuple[RunConfig, int]]] = {1: [], 2: []}
    for router, ranks in RANKS.items():
        plans[ranks].append((run_from(router, output, f"{router}-resumed", HALF), 3))
        plans[ranks].append((run_from(router, output, f"{router}-begun", 0), 3))
        plans[3 - ranks].append((run_from(router, output, f"{router}-moved", HALF), 2))
    for ranks, runs_of_ranks in plans.items():
        run_ranks(train_each, ranks, runs_of_ranks)
    return output


@pytest.mark.dist
@pytest.mark.parametrize("router", RANKS)
@pytest.mark.parametrize("way", ["resumed", "begun", "moved"])
def test_a_run_reaches_its_old_end(router: str, way: str, output: Path) -> None:
    folder, exact = output / f"{router}-{way}", HERE and way != "moved"
    assert (folder / "checkpoints" / "latest").read_text() == f"step{WHOLE:08d}"
    for kind in ("live", "ema"):
        ours, old = (load_file(checkpoint(run, WHOLE) / f"{kind}.safetensors") for run in (folder, OLD / router))
        assert_same_weights(ours, old, exact)
    ours, old = (read_log(run / "log.jsonl") for run in (folder, OLD / router))
    for tag in ("loss/total", "loss/routing", "optim/grad_norm", "optim/lr"):
        assert list(ours[tag]) == list(range(1, WHOLE + 1))
        assert_equal(*(torch.tensor(list(log[tag].values())) for log in (ours, old)), tag, exact)
    if exact:  # optimizer state and masters too
        ours, old = (manifest.read_manifest(checkpoint(run, WHOLE)) for run in (folder, OLD / router))
        assert ours.progress == old.progress
        states = [name for name in old.files if name.startswith("state_")]
        assert len(states) == RANKS[router]
        assert [ours.files[name] for name in states] == [old.files[name] for name in states]


# ---- Results ----


@pytest.mark.parametrize("router", RANKS)
def test_weights_draw_the_same_samples(router: str, shards: ShardSet) -> None:
    source = runs.find_saved_model(OLD / router)
    assert source.name == f"{router}, step{WHOLE:08d}, ema"
    model, meta = load_model(source.weights)
    assert (meta["step"], meta["weights"]) == (str(WHOLE), "ema")
    wish = samples.Prompts(("a red circle", "a blue square", "a green cross"), ())
    settings = SampleConfig(num_steps=6, method="heun", cfg_scale=2.0)
    request = samples.encode_prompts(model.config, shards, wish)
    latents = sampling.generate(model.eval(), model.config, settings, request, sampling.SamplingOptions(batch_size=2))
    assert_equal(latents, load_file(OLD / router / "samples.safetensors")["latents"], "latents")


@pytest.mark.parametrize("router", RANKS)
def test_an_allocation_is_read_and_measured_again(router: str) -> None:
    old = allocation.Allocation.load(OLD / router / "allocation.json")
    model, _ = load_model(checkpoint(OLD / router, WHOLE) / "ema.safetensors")
    ours = allocation.measure_allocation(model, ShardSet.open(OLD / "shards", "unseen"), images=4)
    assert (ours.images, ours.times, ours.constant) == (old.images, old.times, old.constant)
    for what in ("saliency", "experts", "flow"):
        ours_all, old_all = (
            torch.tensor([list(row) for row in result.per_image[what].values()]).nan_to_num(7.0)
            for result in (ours, old)
        )
        assert_equal(ours_all, old_all, what)
