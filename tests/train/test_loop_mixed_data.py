"""A run over two shard sets of two resolutions each: it trains, is measured, and goes on where it stopped."""

from pathlib import Path

import pytest

from sharpmoe.checkpoint import manifest
from sharpmoe.config import RunConfig
from sharpmoe.errors import DataError
from sharpmoe.log_file import read_log
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.train import loop
from tests.distributed import run_ranks
from tests.fixtures_data import make_shards
from tests.train.setting import ALONE, make_run, plan_for

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


def test_sources_that_do_not_go_together(sources: list[dict[str, object]], tmp_path: Path) -> None:
    other = make_shards(tmp_path / "other", 24, text_width=16)
    run = make_run(tmp_path, tmp_path, data={"shards": [*sources, {"path": str(other), "weight": 1}]})
    with pytest.raises(DataError, match="wrong codec in .*other"):
        plan_for(run, ALONE)
    missing = make_run(tmp_path, tmp_path, data={"shards": [*sources, {"path": str(tmp_path / "no"), "weight": 1}]})
    with pytest.raises(DataError, match="no: no index.json"):
        plan_for(missing, ALONE)
