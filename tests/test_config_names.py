"""What other trainers call the keys: each name is answered with a key that exists, or with a sentence."""

import re

import pytest

from sharpmoe.config import RunConfig
from sharpmoe.config_io import _dotted_keys, load_run_config
from sharpmoe.config_names import ELSEWHERE, suggestion
from sharpmoe.errors import ConfigError

SECTIONS = "|".join(RunConfig.model_fields)


def test_every_key_that_a_hint_names_exists() -> None:
    known = set(_dotted_keys(RunConfig))
    for name, hint in ELSEWHERE.items():
        named = re.findall(rf"\b(?:{SECTIONS})\.[a-z_]+(?:\.[a-z_]+)*", hint)
        assert [key for key in named if key not in known and not key.endswith((".py", ".jsonl"))] == [], name
        assert name not in known, f"{name} is a key of ours"
        assert " " in hint or hint in known, name


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--learning_rate", "1e-4"], "--learning_rate: unknown key; here it is: optim.lr"),
        (["--learning-rate=1e-4"], "here it is: optim.lr"),
        (["--train.batch_size", "4"], "here it is: train.global_batch (all ranks together)"),
        (["--lr", "1e-4"], "did you mean optim.lr?"),
        (["--bf16"], "--bf16: unknown key; here it is: train.precision bf16"),
        (["--fp16", "--seed", "1"], "here it is: train.precision bf16"),
        (["--use_ema"], "optim.ema_decay"),
        (["--lora_rank", "8"], "here it is: lora.rank"),
        (["--target_modules", "attn"], "here it is: lora.targets"),
        (["--freeze"], "here it is: train.frozen"),
        (["--trainable_modules", "[attn]"], "here it is: train.trainable"),
        (["--train_router_only"], "train.trainable [saliency_router, gate, capacity_predictor]"),
        (["--num_workers", "2"], "did you mean data.num_workers?"),
        (["--model.hidden_size", "8"], "model.width"),
        (["--report_to", "wandb"], "here it is: log.trackers [tensorboard, ...]"),
        (["--use_wandb"], "here it is: log.trackers [tensorboard, wandb]"),
        (["--wandb_project", "faces"], "here it is: log.project"),
    ],
)
def test_a_name_from_elsewhere_is_answered(words: list[str], hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config(None, words)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("learning_rat", "did you mean learning_rate? here it is: optim.lr"),
        ("lerning-rate", "did you mean learning_rate? here it is: optim.lr"),
        ("rollout.steps", "did you mean rollout.num_steps or rollout.kept_steps or rollout.segment_steps?"),
        ("rollout.num_step", "did you mean rollout.num_steps?"),
        ("optim.warmup", "did you mean optim.warmup_steps?"),
        ("sample.cfg", "did you mean sample.cfg_scale or sample.cfg_norm or sample.cfg_interval?"),
        ("train.batch", "did you mean train.global_batch or train.micro_batch?"),
        ("smaple.seed", "did you mean sample.seed?"),
        ("moel.num_expertz", "did you mean model.num_experts?"),
        ("lrr", "did you mean optim.lr?"),
        ("train.steps.x", "did you mean train.steps?"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(key: str, hint: str) -> None:
    assert suggestion(key, _dotted_keys(RunConfig)) == f"; {hint}"


def test_a_name_that_nobody_uses_has_no_suggestion() -> None:
    assert suggestion("qqq", _dotted_keys(RunConfig)) == ""
