import json
from pathlib import Path

import pytest

from data_pipeline.encode.like import origin_header
from data_pipeline.read.shards import ShardSet
from sharpmoe.config import SampleConfig
from sharpmoe.errors import ConfigError, DataError
from sharpmoe.evaluation.captions import read_captions
from sharpmoe.report.runs import find_saved_model
from sharpmoe.report.samples import (
    Prompts,
    check_shards,
    check_weak_origin,
    encode_prompts,
    other_origin,
    override_sampling,
)
from tests.fixtures_data import make_shards
from tests.report.run_folder import make_run_folder
from tests.toys import toy_config, toy_model


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run_folder(tmp_path_factory.mktemp("work"))


def test_models_of_other_shards_and_prompts_of_another_kind(run_folder: Path, tmp_path: Path) -> None:
    shards = ShardSet.open(find_saved_model(run_folder).run.data.shards, "train")
    with pytest.raises(DataError, match=r"model\.text_width 32, the model has 6; name the shards"):
        check_shards(toy_config(), shards)
    with pytest.raises(ConfigError, match="class-conditional"):
        encode_prompts(toy_config(conditioning="class"), shards, Prompts(("a cat",)))
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    with pytest.raises(DataError, match="holds no captions"):
        read_captions(empty)


def test_a_weak_model_of_another_codec_or_encoder_is_refused() -> None:
    own = {"codec": '{"kind": "pixel"}', "encoder": '{"kind": "hash", "max_length": 32}'}
    check_weak_origin({}, own)
    check_weak_origin(own | {"encoder": '{"kind": "hash", "max_length": 8}'}, own)  # the texts are those of the model
    with pytest.raises(ConfigError, match="weak model: trained with codec kind 'patch_pca', the model with 'pixel'"):
        check_weak_origin({"codec": '{"kind": "patch_pca"}'}, own)
    with pytest.raises(ConfigError, match="weak model: trained with encoder kind 'transformers'"):
        check_weak_origin({"encoder": '{"kind": "transformers"}'}, own)


def test_shards_of_another_codec_or_encoder_are_refused_whatever_their_shapes(run_folder: Path, tmp_path: Path) -> None:
    shards = ShardSet.open(find_saved_model(run_folder).run.data.shards, "train")
    model, own = toy_model("diffmoe", text_width=32, pooled_width=32), origin_header(shards)
    check_shards(model.config, shards, own)
    check_shards(model.config, shards)  # weights that do not say with which ones they were trained
    other = ShardSet.open(
        make_shards(tmp_path / "other", codec={"kind": "patch_pca", "patch": 4, "channels": 4, "whiten": 0.0}), "train"
    )
    check_shards(model.config, other)
    assert other.latent_shape == shards.latent_shape
    with pytest.raises(DataError, match=r"other: made with codec \w+ .*, the model was trained with .*--shards"):
        check_shards(model.config, other, own)
    encoder = json.loads(own["encoder"])
    longer = own | {"encoder": json.dumps(encoder | {"max_length": 77, "name": "elsewhere"})}
    check_shards(model.config, shards, longer)
    with pytest.raises(DataError, match="made with encoder kind 'hash', the model was trained with 'transformers'"):
        check_shards(model.config, shards, own | {"encoder": json.dumps(encoder | {"kind": "transformers"})})


def test_a_codec_is_told_by_its_numbers_not_by_its_place() -> None:
    here = {"codec": '{"kind": "autoencoder_kl", "name": "a/vae", "sha256": "12"}'}
    assert other_origin(here, {"codec": '{"kind": "autoencoder_kl", "name": "/b/vae", "sha256": "12"}'}) is None
    assert other_origin({"codec": '{"kind": "x", "name": "a"}'}, {"codec": '{"kind": "x", "name": "b"}'}) is not None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"shift": {"factor": "much"}}, "sample.shift.factor: got 'much', allowed: a finite number > 0"),
        ({"num_steps": 0}, "sample.num_steps: got 0, allowed: a whole number >= 1; change sample.num_steps"),
        ({"cfg_interval": (0.9, 0.1)}, r"sample: cfg_interval \(0.9, 0.1\) must be two times"),
    ],
)
def test_a_bad_setting_is_told_in_the_words_of_the_run_file(given: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        override_sampling(SampleConfig(), given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("conditioning", "prompts", "words"),
    [
        ("class", Prompts(labels=(0, 3)), "label 3, the model has classes 0 to 2"),
        ("class", Prompts(("a cat",)), "class-conditional: give --labels"),
        ("text", Prompts(labels=(1,)), "text-conditional, got label 1; give captions"),
        ("text", Prompts(), "no captions to draw"),
        ("text", Prompts(("\ud800",)), "caption 1 is .*: not UTF-8 text"),
    ],
)
def test_prompts_that_a_model_does_not_take(conditioning: str, prompts: Prompts, words: str) -> None:
    config = toy_config(conditioning=conditioning, num_classes=3)
    with pytest.raises(ConfigError, match=words):
        prompts.check(config)
