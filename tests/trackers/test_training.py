"""Trackers of a training on several ranks: written once, with figures, pictures, the table and the configuration."""

from pathlib import Path

import pytest

from sharpmoe.config import RunConfig
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.trackers import registry
from sharpmoe.train import loop
from tests.distributed import run_ranks
from tests.trackers.readers import read_mlflow
from tests.train.setting import make_run, plan_for


def trained(world: World, *runs: RunConfig) -> None:
    for run in runs:
        loop.train(plan_for(run, world), world)


@pytest.mark.dist
@pytest.mark.sweep
def test_two_ranks_write_one_run_and_a_resumed_one_goes_on_in_it(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    log = {"trackers": ["tensorboard", "mlflow"], "project": "mine", "allocation": True, "allocation_images": 4}
    first = make_run(
        shards,
        tmp_path,
        train={"steps": 2},
        log=log | {"sample_every": 2, "validate_every": 2},
        checkpoint={"resume": "auto"},
    )
    second = first.model_copy(update={"train": first.train.model_copy(update={"steps": 3})})
    run_ranks(trained, 2, first, second)
    run_id = registry.read_ids(tmp_path / "run")["mlflow"]
    found = read_mlflow(tmp_path / "mlruns", run_id)
    runs = [each for each in (tmp_path / "mlruns").glob("*/*") if (each / "meta.yaml").is_file()]
    assert [each.name for each in runs] == [run_id]
    assert found.figures["loss/total"] == [1, 2, 3]
    assert found.figures["validation/flow"] == [1, 2, 3]  # the first, each second and the last
    assert {"routing", "allocation"} <= found.media
    assert found.settings["train.global_batch"] == "8"
    assert (tmp_path / "run" / "tensorboard").is_dir()
