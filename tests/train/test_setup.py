"""What is checked before a run starts."""

import json
from pathlib import Path

import pytest
from torch import Tensor

from sharpmoe.errors import CheckpointError, ConfigError, DataError
from sharpmoe.model.weights import save_weights
from sharpmoe.train.setup import Initial, initial_model, origin_notes
from tests.train.setting import ALONE, identical, make_run, plan_for, stirred_model


@pytest.mark.parametrize(
    ("model", "part"),
    [
        ({"latent_channels": 8}, "made for model.latent_channels 4, the run has 8"),
        ({"text_width": 64}, "made for model.text_width 32"),
        ({"latent_size": 16}, "made for model.latent_size 8"),
    ],
)
def test_shards_of_another_codec_or_encoder_are_refused(
    model: dict[str, int], part: str, shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=part):
        plan_for(make_run(shards, tmp_path, model=model), ALONE)


def values(initial: Initial) -> dict[str, Tensor]:
    return {name: initial.weights(name, planned.shape) for name, planned in initial.model.state_dict().items()}


def test_a_run_without_base_starts_from_its_seed(shards: Path, tmp_path: Path) -> None:
    plan = plan_for(make_run(shards, tmp_path), ALONE)
    one, two = (values(initial_model(plan)) for _ in range(2))
    assert identical(one, two)


def test_a_run_starts_from_its_base(shards: Path, tmp_path: Path) -> None:
    base = make_run(shards, tmp_path, model={"saliency_router": False})
    weights = stirred_model(base).state_dict()
    plan = plan_for(make_run(shards, tmp_path, checkpoint={"init": str(tmp_path / "base.safetensors")}), ALONE)
    save_weights(tmp_path / "base.safetensors", weights, base.model, plan.data.origin())
    started = initial_model(plan)
    state = values(started)
    assert started.notes == ()
    assert identical({key: state[key] for key in weights}, dict(weights))
    other = make_run(
        shards, tmp_path, model={"num_experts": 2}, checkpoint={"init": str(tmp_path / "base.safetensors")}
    )
    with pytest.raises(CheckpointError, match=r"model\.num_experts is 4 there, 2 in the run"):
        initial_model(plan_for(other, ALONE))


def test_weights_of_another_codec_are_refused_and_another_fit_is_noted() -> None:
    codec = {"kind": "patch_pca", "channels": 16, "sha256": "a"}
    here = {"codec": json.dumps(codec), "encoder": json.dumps({"kind": "hash"})}
    assert origin_notes({}, here, "w", "s") == ()
    assert origin_notes(here, here, "w", "s") == ()
    (note,) = origin_notes({"codec": json.dumps(codec | {"sha256": "b"})}, here, "w", "s")
    assert "another fit" in note
    with pytest.raises(DataError, match="w: trained with codec channels 8, s has 16"):
        origin_notes({"codec": json.dumps(codec | {"channels": 8})}, here, "w", "s")


def test_a_batch_that_cannot_be_shared_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.micro_batch"):
        plan_for(make_run(shards, tmp_path, train={"micro_batch": 3}), ALONE)


def test_an_output_that_cannot_be_a_folder_is_found_before_the_first_step(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"output: .*file/run cannot be made: .*file is not a folder; set output to"):
        plan_for(make_run(shards, tmp_path / "file"), ALONE)
