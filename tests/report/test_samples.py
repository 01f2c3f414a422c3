from pathlib import Path

import pytest

from data_pipeline.read.shards import ShardSet
from sharpmoe.config import SampleConfig
from sharpmoe.errors import ConfigError, DataError
from sharpmoe.evaluation.captions import read_captions
from sharpmoe.report.runs import find_saved_model
from sharpmoe.report.samples import Prompts, check_shards, check_weak_origin, encode_prompts, override_sampling
from tests.report.run_folder import make_run_folder
from tests.toys import toy_config, toy_model


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run_folder(tmp_path_factory.mktemp("work"))


def test_models_of_other_shards_and_prompts_of_another_kind(run_folder: Path, tmp_path: Path) -> None:
    shards = ShardSet.open(find_saved_model(run_folder).run.data.shards, "train")
    with pytest.raises(DataError, match=r"model\.text_width 32, the model has 6; name the shards"):
        check_shards(toy_model(), shards)
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
