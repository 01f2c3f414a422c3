"""A run over two shard sets of two resolutions each: it trains, is measured, and goes on where it stopped."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from sharpmoe.checkpoint import manifest
from sharpmoe.config import RunConfig
from sharpmoe.errors import DataError
from sharpmoe.evaluation.allocation import Allocation
from sharpmoe.log_file import read_log
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.train import loop
from tests.distributed import run_ranks
from tests.fixtures_data import make_shards, make_unequal_shards
from tests.train.setting import ALONE, identical, make_run, plan_for

BUCKETS = {"buckets": "32x32,16x64", "sides": ((1, 1), (1, 4))}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """The same pictures in other shards: one fit of the codec, one text encoder, and two orders."""
    folder = tmp_path_factory.mktemp("data")
    sizes = {"a": (6, 3), "b": (9, 1)}
    for name, (samples, _) in sizes.items():
        make_shards(folder / name, 48, shard_samples=samples, captions=2, **BUCKETS)  # type: ignore[arg-type]
    return [{"path": str(folder / name), "weight": weight} for name, (_, weight) in sizes.items()]


def of_rank(world: World, run: RunConfig) -> manifest.Progress:
    return manifest.read_manifest(loop.train(plan_for(run, world), world)).progress


@pytest.mark.dist
@pytest.mark.slow
def test_a_run_goes_on_in_every_stream(sources: list[dict[str, object]], tmp_path: Path) -> None:
    sections = {
        "data": {"shards": sources, "validation_split": "unseen"},
        "train": {"steps": 6},
        "log": {"validate_every": 3, "allocation": True, "allocation_images": 6, "validation_images": 6},
        "checkpoint": {"every": 3, "keep": 9},
    }
    whole = make_run(tmp_path, tmp_path / "whole", **sections)
    cut = make_run(tmp_path, tmp_path / "cut", **sections)
    resumed = cut.model_copy(
        update={
            "checkpoint": cut.checkpoint.model_copy(
                update={"resume": str(tmp_path / "whole" / "run" / "checkpoints" / "step00000003")}
            )
        }
    )
    end, *_ = run_ranks(of_rank, 2, whole)
    again, *_ = run_ranks(of_rank, 2, resumed)
    assert again == end
    assert len(end.streams) == 4
    assert (end.samples, sum(end.streams)) == (48, 48)
    logs = [read_log(tmp_path / name / "run" / "log.jsonl") for name in ("whole", "cut")]
    for step in (4, 5, 6):
        assert logs[0]["loss/total"][step] == logs[1]["loss/total"][step]
    assert logs[0]["validation/flow"][6] == logs[1]["validation/flow"][6]


@pytest.mark.dist
@pytest.mark.slow
def test_a_run_over_unequal_token_counts_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Steps on 16, 14 and 30 tokens in turn, experts over two ranks, two micro-batches of one resolution a step."""
    sections = {
        "data": {"shards": str(make_unequal_shards(tmp_path / "shards"))},
        "model": {"latent_channels": 3, "depth": 2},
        "train": {"steps": 7, "micro_batch": 2},
        "parallel": {"ep_size": 2},
        "rollout": {"schedule": "two_pass"},
        "log": {"validate_every": 4, "validation_images": 6, "allocation": True, "allocation_images": 6},
        "checkpoint": {"every": 4, "keep": 9},
    }
    whole = make_run(tmp_path, tmp_path / "whole", **sections)
    stopped_at = str(tmp_path / "whole" / "run" / "checkpoints" / "step00000004")
    resume = {"checkpoint": sections["checkpoint"] | {"resume": stopped_at}}
    run_ranks(of_rank, 2, whole)
    run_ranks(of_rank, 2, make_run(tmp_path, tmp_path / "cut", **(sections | resume)))
    last = [tmp_path / name / "run" / "checkpoints" / "step00000007" for name in ("whole", "cut")]
    for kind in ("live", "ema"):
        assert identical(*(load_file(folder / f"{kind}.safetensors") for folder in last))
    logs = [read_log(tmp_path / name / "run" / "log.jsonl") for name in ("whole", "cut")]
    speed, seconds = (logs[0][f"throughput/{name}"] for name in ("tokens_per_second", "seconds_per_step"))
    tokens = [round(speed[step] * seconds[step] / (8 * 3)) for step in range(1, 8)]  # 8 images, T = 3
    assert set(tokens) == {14, 16, 30}
    flops = logs[0]["flops/per_image/dense"]
    assert len({flops[step] for step in flops}) == 3
    assert all(flops[a] < flops[b] for a in flops for b in flops if tokens[a - 1] < tokens[b - 1])
    for step in (5, 6, 7):
        assert logs[0]["loss/total"][step] == logs[1]["loss/total"][step]
    tables = [Allocation.load(tmp_path / name / "run" / "allocation" / "after.json") for name in ("whole", "cut")]
    assert tables[0].images == 6  # of all sizes
    assert tables[0].per_image == tables[1].per_image


def test_sources_that_do_not_go_together(sources: list[dict[str, object]], tmp_path: Path) -> None:
    other = make_shards(tmp_path / "other", 24, text_width=16)
    run = make_run(tmp_path, tmp_path, data={"shards": [*sources, {"path": str(other), "weight": 1}]})
    with pytest.raises(DataError, match="wrong codec in .*other"):
        plan_for(run, ALONE)
    missing = make_run(tmp_path, tmp_path, data={"shards": [*sources, {"path": str(tmp_path / "no"), "weight": 1}]})
    with pytest.raises(DataError, match="no: no index.json"):
        plan_for(missing, ALONE)
