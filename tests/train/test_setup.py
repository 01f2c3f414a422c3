"""What is checked before a run starts."""

import json
from pathlib import Path

import pytest
from torch import Tensor

from data_pipeline.encode.like import fitted_header
from data_pipeline.encode.patch_pca import PatchPCA
from data_pipeline.read.mixture import Mixture
from data_pipeline.read.shards import ShardSet
from sharpmoe.config import RunConfig
from sharpmoe.config_io import BatchLayout
from sharpmoe.errors import CheckpointError, ConfigError, DataError
from sharpmoe.evaluation.held_out import Share
from sharpmoe.model.weights import save_weights
from sharpmoe.train.monitor import Monitor, measures
from sharpmoe.train.setup import InitialModel, _origin_notes, _predictor_notes, _small_bucket_notes, initial_model
from tests.fixtures_data import make_shards, make_unequal_shards
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


def test_merged_steps_must_fit_every_resolution(tmp_path: Path) -> None:
    shards = make_unequal_shards(tmp_path / "shards")
    rollout = {"schedule": "two_pass", "merged_steps": 3}
    model = {"latent_channels": 3, "num_experts": 4}
    with pytest.raises(ConfigError, match=r"14 tokens \* capacity 1\.0 do not split evenly over 4 experts"):
        plan_for(make_run(shards, tmp_path, rollout=rollout, model=model, train={"micro_batch": 1}), ALONE)


@pytest.mark.parametrize(
    "log",
    [{"validate_every": 1}, {"allocation": True}, {"sample_every": 1}],
    ids=["validation", "allocation", "samples"],
)
def test_only_a_run_that_measures_needs_held_out_samples(log: dict[str, int], shards: Path, tmp_path: Path) -> None:
    data = {"shards": str(shards), "validation_split": "nothing"}
    silent = make_run(shards, tmp_path, data=data)
    plan = plan_for(silent, ALONE)
    assert plan.data.held_out is None
    monitor = Monitor.open(silent, None, tmp_path, ALONE.device, Share(), None)
    monitor.before_training(pytest.fail)  # builds no model
    monitor.after_step(silent.train.steps, pytest.fail)
    with pytest.raises(DataError, match=r"no samples in split 'nothing'.*set --data.validation_split train, or turn"):
        plan_for(make_run(shards, tmp_path, data=data, log=log), ALONE)
    named = plan_for(make_run(shards, tmp_path, data=data | {"validation_split": "train"}, log=log), ALONE)
    assert named.data.held_out is not None
    assert named.data.held_out.num_samples == 20
    assert any(
        "data.validation_split is train: what is measured is of pictures that are trained" in n for n in named.notes
    )
    assert not any("data.validation_split" in note for note in plan.notes)


def test_a_dense_model_measures_no_allocation(shards: Path, tmp_path: Path) -> None:
    run = make_run(shards, tmp_path, "dense", log={"allocation": True}, stage="pretrain")
    assert not measures(run)


def test_labels_that_the_model_has_no_class_for_are_found_before_the_first_step(shards: Path, tmp_path: Path) -> None:
    model = {"conditioning": "class", "num_classes": 4}  # the labels are 0 to 3
    plan_for(make_run(shards, tmp_path, model=model), ALONE)
    plan_for(make_run(shards, tmp_path, model={"num_classes": 3}), ALONE)  # of captions: reads no label
    message = r"has label 3, model.num_classes is 3 \(labels 0 to 2\); set --model.num_classes 4"
    with pytest.raises(DataError, match=message):
        plan_for(make_run(shards, tmp_path, model=model | {"num_classes": 3}), ALONE)


def values(initial: InitialModel) -> dict[str, Tensor]:
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


def test_weights_of_another_codec_are_refused_unless_accepted(shards: Path, tmp_path: Path) -> None:
    init = str(tmp_path / "w")
    run = make_run(shards, tmp_path, checkpoint={"init": init})
    accepting = make_run(shards, tmp_path, checkpoint={"init": init, "init_other_codec": True})
    data = plan_for(run, ALONE).data.train
    here = plan_for(run, ALONE).data.origin()
    assert _origin_notes({}, data, run) == ()
    assert _origin_notes(here, data, run) == ()
    for what, changes in (("codec", {"sha256": "b"}), ("codec", {"channels": 8}), ("encoder", {"width": 64})):
        meta = {key: value for key, value in here.items() if key != "codec_file"}
        meta[what] = json.dumps(json.loads(here[what]) | changes)
        with pytest.raises(DataError, match=rf"w: trained with {what} .*prepare.py --like .*w`, or accept it"):
            _origin_notes(meta, data, run)
        (note,) = _origin_notes(meta, data, accepting)
        assert "accepted by checkpoint.init_other_codec" in note


def test_the_same_fit_with_other_rounding_is_noted(shards: Path, tmp_path: Path) -> None:
    run = make_run(shards, tmp_path, checkpoint={"init": "w"})
    plan = plan_for(run, ALONE)
    codec = plan.data.train.codec_object()
    assert isinstance(codec, PatchPCA)
    rounded = PatchPCA(codec.patch, codec.whiten, codec.mean, codec.basis, codec.scale * (1 + 1e-6))
    meta = plan.data.origin() | {"codec": json.dumps(rounded.identity)} | fitted_header(rounded)
    (note,) = _origin_notes(meta, plan.data.train, run)
    assert "rounded differently" in note
    other = PatchPCA(codec.patch, codec.whiten, codec.mean, codec.basis, codec.scale * 1.1)
    meta = plan.data.origin() | {"codec": json.dumps(other.identity)} | fitted_header(other)
    with pytest.raises(DataError, match="trained with codec sha256"):
        _origin_notes(meta, plan.data.train, run)


def test_a_batch_that_cannot_be_shared_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.micro_batch"):
        plan_for(make_run(shards, tmp_path, train={"micro_batch": 3}), ALONE)


def test_an_output_that_cannot_be_a_folder_is_found_before_the_first_step(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"output: .*file/run cannot be made: .*file is not a folder; set output to"):
        plan_for(make_run(shards, tmp_path / "file"), ALONE)


def test_a_step_of_more_samples_than_its_bucket_has_is_noted(tmp_path: Path) -> None:
    data = Mixture([ShardSet.open(make_unequal_shards(tmp_path / "mine"), "train")])
    counts = {stream.bucket: stream.num_samples for stream in data.streams}
    assert len(counts) == 3
    least, most = min(counts.values()), max(counts.values())
    assert _small_bucket_notes(data, BatchLayout(least, 1, least, 1)) == ()
    one = Mixture([ShardSet.open(make_shards(tmp_path / "one"), "train")])
    (stream,) = one.streams
    count = stream.num_samples
    assert _small_bucket_notes(one, BatchLayout(count, 1, count, 1)) == ()
    (note,) = _small_bucket_notes(one, BatchLayout(count + 1, 1, count + 1, 1))
    assert f"a step takes {count + 1} samples (train.global_batch), more than the {count} of the training split" in note
    (note,) = _small_bucket_notes(data, BatchLayout(most + 1, 1, most + 1, 1))
    assert f"a step takes {most + 1} samples" in note
    assert all(f"{name} ({count})" in note for name, count in counts.items())


def test_saliency_routers_beside_a_predictor_that_chooses_alone_are_noted(shards: Path, tmp_path: Path) -> None:
    def run(router: str = "diffmoe", **model: object) -> RunConfig:
        return make_run(shards, tmp_path, router, model=model)

    masked = run(capacity_selection="mask")
    (note,) = _predictor_notes(masked)
    assert "saliency routers move gates and no compute" in note
    assert note in plan_for(masked, ALONE).notes  # a start and its rehearsal say it
    for other in (run(), run(capacity_selection="mask", saliency_router=False), run("race"), run("ec")):
        assert _predictor_notes(other) == ()
