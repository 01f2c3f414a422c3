"""What is measured of a part, and when it is measured again."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.read.shards import ShardSet
from sharpmoe.study.measure import (
    is_measured,
    is_trained,
    judging_files,
    measure_part,
    prepare_judging,
    read_measured,
)
from sharpmoe.study.plan import Study, load_study
from tests.fixtures_data import make_shards
from tests.study.toy import make_study, pretend_trained


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study whose parts have weights, judged and measured on its tuning split."""
    found = load_study(make_study(tmp_path_factory.mktemp("study")))
    pretend_trained(found)
    prepare_judging(found, "tuning", "cpu")
    for part in found.parts[:2]:
        measure_part(found, part, "tuning", "cpu")
    return found


def test_judging_has_the_images_of_its_part_of_the_split(study: Study) -> None:
    assert all(path.is_file() for path in judging_files(study, "tuning"))
    shards = ShardSet.open(study.parts[0].run.data.first_place, "unseen")
    reference = np.load(study.folder / "reference-tuning.npz")["arr_0"]
    images = shards.codec_object().decode(shards.batch([0, 2]).latent)
    assert np.array_equal(reference, (127.5 * images + 128).clamp(0, 255).permute(0, 2, 3, 1).byte().numpy())


def test_figures_are_of_held_out_images_and_of_samples(study: Study) -> None:
    found = read_measured(study, study.parts[0], "tuning")
    assert found is not None
    allocation, figures = found
    assert allocation.images == 2
    assert set(figures) == {"fd, cfg 1", "accuracy, cfg 1"}
    assert allocation.flow_markov["all t"].mean != allocation.flow["all t"].mean
    protocol = json.loads((study.parts[0].folder / "seed0-tuning" / "samples-cfg1.figures.json").read_text())
    assert protocol["protocol"]["name"] == "FD, classifier, 8 images"


def test_other_settings_splits_and_weights_are_measured_again(study: Study) -> None:
    part = study.parts[0]
    assert is_measured(study, part, "tuning")
    assert not is_measured(study, part, "final")
    more = replace(study, evaluate=study.evaluate.model_copy(update={"samples": 12}))
    assert not is_measured(more, part, "tuning")
    weights = part.run_folder / "checkpoints" / "step00000002" / "ema.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(study.parts[2].run_folder.joinpath("checkpoints/step00000002/ema.safetensors").read_bytes())
    assert not is_measured(study, part, "tuning")
    weights.write_bytes(before)
    assert is_measured(study, part, "tuning")


def test_all_arms_are_measured_on_the_data_of_the_control(tmp_path: Path) -> None:
    other = make_shards(tmp_path / "other")
    shutil.copytree(other, tmp_path / "elsewhere")
    arms = [
        {"name": "other", "overrides": {"data": {"shards": str(tmp_path / "elsewhere")}}},
        {"name": "plain", "overrides": {"data": {"shards": str(other)}}},
    ]
    study = load_study(make_study(tmp_path, arms=arms))
    pretend_trained(study)
    shutil.rmtree(tmp_path / "elsewhere")
    prepare_judging(study, "tuning", "cpu")
    for part in study.parts[:2]:
        measure_part(study, part, "tuning", "cpu")
        found = json.loads((part.folder / "seed0-tuning" / "figures.json").read_text())
        assert found["settings"]["shards"] == str(other)


def test_figures_of_before_a_key_was_added_count(study: Study) -> None:
    path = study.parts[0].folder / "seed0-tuning" / "figures.json"
    before = path.read_text()
    content = json.loads(before)
    del content["settings"]["sample"]["cfg_norm"], content["settings"]["sample_batch"]
    content["settings"]["sample_batch"] = 4
    path.write_text(json.dumps(content))
    assert is_measured(study, study.parts[0], "tuning")
    del content["settings"]["sample_batch"]  # the study's is not the default
    path.write_text(json.dumps(content))
    assert not is_measured(study, study.parts[0], "tuning")
    path.write_text(before)


def test_a_part_without_its_last_checkpoint_is_not_trained(study: Study) -> None:
    part = study.parts[3]
    assert is_trained(part)
    (part.run_folder / "checkpoints" / "latest").write_text("step00000001\n")
    assert not is_trained(part)
    (part.run_folder / "checkpoints" / "latest").write_text("step00000002\n")
