"""A run over damaged shards: it goes on in step where it may, and stops on all ranks where it may not."""

import json
from pathlib import Path
from typing import Any

import pytest

from sharpmoe.checkpoint import manifest
from sharpmoe.config import RunConfig
from sharpmoe.errors import SharpMoEError
from sharpmoe.log_file import read_log
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.train import loop
from tests.distributed import run_ranks
from tests.fixtures_data import make_shards
from tests.train.setting import make_run, plan_for


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 samples in three shards, two of them with a flipped bit."""
    folder = make_shards(tmp_path_factory.mktemp("data") / "d")
    for shard, row in (("train-00000", 1), ("train-00001", 2)):
        _, places = json.loads((folder / f"{shard}.json").read_text())["samples"][row]
        content = bytearray((folder / f"{shard}.tar").read_bytes())
        content[places["latent.npy"][0] + 300] ^= 4
        (folder / f"{shard}.tar").write_bytes(content)
    return folder


def of_rank(world: World, run: RunConfig) -> tuple[str, Any]:
    try:
        folder = loop.train(plan_for(run, world), world)
    except SharpMoEError as error:
        return f"{type(error).__name__}: {error}", None
    progress = manifest.read_manifest(folder).progress
    return "done", (progress.step, progress.samples, progress.streams)


@pytest.mark.dist
def test_damage_is_tolerated_counted_and_named(damaged: Path, tmp_path: Path) -> None:
    data = {"shards": str(damaged), "max_bad_fraction": 0.1}
    run = make_run(damaged, tmp_path, data=data, train={"steps": 3})
    ends = run_ranks(of_rank, 2, run)
    assert ends == [("done", (3, 24, (24,)))] * 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "damage.jsonl").read_text().splitlines()]
    assert sorted(Path(line["shard"]).name for line in lines) == ["train-00000.tar", "train-00001.tar"]
    assert all(line["key"].startswith("shape-") and "latent.npy: checksum differs" in line["what"] for line in lines)
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert max(log["data/damaged_samples"].values()) == 2
    assert set(log["throughput/data_wait_share"]) == {1, 2, 3}
    assert all(0 <= share <= 1 for share in log["throughput/data_wait_share"].values())


@pytest.mark.dist
@pytest.mark.parametrize(
    ("fraction", "message"),
    [
        (0.0, "checksum differs from the index"),
        (0.05, "2 of 20 samples are damaged, more than data.max_bad_fraction 0.05 allows; the latest: "),
    ],
)
def test_too_much_damage_is_one_error_on_all_ranks(
    damaged: Path, tmp_path: Path, fraction: float, message: str
) -> None:
    data = {"shards": str(damaged), "max_bad_fraction": fraction}
    first, second = run_ranks(of_rank, 2, make_run(damaged, tmp_path, data=data, train={"steps": 3}))
    assert first == second
    assert first[0].startswith("DamageError: ")
    assert message in first[0]
    assert "\n" not in first[0]


@pytest.mark.dist
def test_damage_of_held_out_samples_ends_a_run_before_its_first_step(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "d")
    _, places = json.loads((folder / "unseen-00000.json").read_text())["samples"][3]
    content = bytearray((folder / "unseen-00000.tar").read_bytes())
    content[places["saliency.npy"][0]] ^= 1
    (folder / "unseen-00000.tar").write_bytes(content)
    run = make_run(folder, tmp_path, log={"validate_every": 2, "validation_images": 4})
    first, second = run_ranks(of_rank, 2, run)
    assert first == second
    assert "unseen-00000.tar, key shape-" in first[0]
    assert not list((tmp_path / "run").glob("checkpoints/*"))
