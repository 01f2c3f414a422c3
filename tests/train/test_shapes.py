"""Which data a model takes, and how many tokens their images have."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from data_pipeline.index import Bucket
from sharpmoe.config import ModelConfig
from sharpmoe.errors import DataError
from sharpmoe.train.setup import RunPlan
from sharpmoe.train.shapes import shape_mismatch, token_counts
from tests.fixtures_data import make_shards, make_unequal_shards
from tests.toys import POOLED_WIDTH, TEXT_WIDTH, toy_config
from tests.train.setting import ALONE, make_run, plan_for


def test_resolutions_of_unequal_token_counts_fit_if_the_square_of_the_model_is_one_of_them(tmp_path: Path) -> None:
    shards = make_unequal_shards(tmp_path / "shards")

    def plan(**model: int) -> RunPlan:
        return plan_for(make_run(shards, tmp_path, model={"latent_channels": 3} | model), ALONE)

    assert token_counts(plan().data.train.buckets) == (14, 16, 30)
    for model, there in (({"latent_size": 10}, "latent_size 8"), ({"patch_size": 4}, "patch_size 2")):
        with pytest.raises(DataError, match=f"made for model.{there}, the run has"):
            plan(**model)
    # Without a square any size between their sides.
    shards = make_shards(tmp_path / "others", codec={"kind": "pixel"}, buckets="4x14,10x12", sides=((1, 3), (1, 1)))
    for size in (4, 12, 14):
        assert token_counts(plan(latent_size=size).data.train.buckets) == (14, 30)
    with pytest.raises(DataError, match=r"made for model\.latent_size 4 to 14, the run has 16"):
        plan(latent_size=16)


def test_frames_of_a_run_are_those_of_its_data() -> None:
    clip, still = Bucket((8, 8), (4, 5, 8, 8), (5, 4, 4), 1), Bucket((8, 8), (4, 8, 8), (4, 4), 1)
    moving, rope = toy_config(latent_frames=5), toy_config(positions="rope_2d")
    assert (clip.frames, still.frames) == (5, 1)
    assert token_counts({"clip": clip, "still": still}) == (16, 80)

    def mismatch(bucket: Bucket, model: ModelConfig, any_size: bool = False) -> tuple[str, ...] | None:
        data = SimpleNamespace(buckets={"": bucket}, text_width=TEXT_WIDTH, pooled_width=POOLED_WIDTH)
        return shape_mismatch(data, model, any_size=any_size)

    assert mismatch(clip, moving) is None
    assert mismatch(still, moving) == ("latent_frames", "1", "5")
    assert mismatch(clip, toy_config()) == mismatch(clip, rope, any_size=True) == ("latent_frames", "5", "1")
    assert mismatch(clip, toy_config(), any_size=True) is None is mismatch(still, moving, any_size=True)


def test_a_trained_model_takes_images_of_any_size(tmp_path: Path) -> None:
    run = make_run(make_unequal_shards(tmp_path / "shards"), tmp_path, model={"latent_channels": 3})
    data = plan_for(run, ALONE).data.train
    other = run.model.model_copy(update={"latent_size": 20})
    assert shape_mismatch(data, other) is not None
    assert shape_mismatch(data, other, any_size=True) is None
    assert shape_mismatch(data, other.model_copy(update={"pooled_width": 7}), any_size=True) == (
        "pooled_width",
        "32",
        "7",
    )
