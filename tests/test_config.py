from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sharpmoe.config import RolloutConfig, RunConfig
from sharpmoe.config_io import batch_arithmetic, dump_run_config, load_run_config, nearest
from sharpmoe.errors import ConfigError
from sharpmoe.overrides import parse_overrides

PRETRAIN = "stage: pretrain\n"


@pytest.fixture
def run_file(tmp_path: Path):
    def write(text: str = PRETRAIN) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_file_overrides_and_defaults_meet(run_file):
    path = run_file(PRETRAIN + "train:\n  steps: 7\n  global_batch: 8\n")
    run = load_run_config(path, ["--train.steps", "9", "--optim.lr=1e-3", "--sample.captions", "[a red apple, a cat]"])
    assert (run.train.steps, run.train.global_batch, run.optim.lr) == (9, 8, 1e-3)
    assert run.sample.captions == ("a red apple", "a cat")
    assert run.optim.betas == (0.9, 0.999)


def test_override_of_a_nested_key_keeps_its_neighbours(run_file):
    run = load_run_config(run_file(PRETRAIN + "model: {preset: s, num_experts: 2}\n"), ["--model.depth", "2"])
    assert (run.model.width, run.model.depth, run.model.num_experts) == (384, 2, 2)


def test_override_of_a_whole_section_is_merged(run_file):
    run = load_run_config(run_file(PRETRAIN + "train: {steps: 7}\n"), ["--train", "{global_batch: 4}"])
    assert (run.train.steps, run.train.global_batch) == (7, 4)


def test_last_of_two_equal_overrides_wins():
    assert parse_overrides(["--train.steps", "1", "--train.steps=2"]) == {"train.steps": 2}


def test_empty_section_means_defaults(run_file):
    assert load_run_config(run_file(PRETRAIN + "train:\n  # steps: 3\n")).train == RunConfig().train


def test_a_run_file_of_no_bytes_is_not_one_of_defaults(run_file):
    with pytest.raises(ConfigError, match="run file .* is empty, as a broken copy leaves it"):
        load_run_config(run_file(""), ["--stage", "pretrain"])
    assert load_run_config(run_file("# all defaults\n"), ["--stage", "pretrain"]).train == RunConfig().train


@pytest.mark.parametrize("text", ["1", "-0.5", "null", "true", "[1, 2]", "a b", ""])
def test_equals_and_space_parse_alike(text):
    assert parse_overrides([f"--x={text}"]) == parse_overrides(["--x", text])


def test_dump_is_a_round_trip(run_file, tmp_path):
    run = load_run_config(run_file(PRETRAIN + "model: {preset: tiny, router: tc}\nname: größe\n"))
    (tmp_path / "resolved.yaml").write_text(dump_run_config(run), encoding="utf-8")
    assert load_run_config(tmp_path / "resolved.yaml") == run


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modle: {}", ["run.yaml", "modle", "unknown key", "did you mean model?"]),
        ("model: {num_expert: 4}", ["run.yaml", "model.num_expert", "did you mean model.num_experts?"]),
        ("train: {lr: 1}", ["train.lr", "did you mean optim.lr?"]),
        ("zzz: 1", ["zzz", "known here: name, output"]),
        ("train: {precision: fp61}", ["run.yaml: train.precision", "'fp61'", "fp32 | bf16"]),
        ("train: {steps: 0}", ["train.steps", "got 0", "a whole number >= 1"]),
        ("train: {steps: many}", ["train.steps", "'many'", "a whole number"]),
        ("train: {micro_batch: x}", ["train.micro_batch", "a whole number or null"]),
        ("optim: {betas: [0.9]}", ["optim.betas", "a list of 2"]),
        ("sample: {captions: [1]}", ["sample.captions", "a list of text"]),
        ("rollout: {first_time: 1.5}", ["rollout.first_time", "> 0 and <= 1"]),
        ("name: 7", ["name", "text (quote it)"]),
        ("train: 3", ["train", "a section with the keys steps"]),
        ("model: {num_heads: 5}", ["run.yaml: model", "num_heads (5) must divide width (128)"]),
        ("model: {router: tc, top_k: 9}", ["top_k (9)", "at most num_experts (8)"]),
        ("train: {steps: 1, steps: 2}", ["line 2", "'steps' is given twice"]),
        ("train: [", ["not valid YAML", "line "]),
        ("train: {[1]: 2}", ["line 2", "a key must be a word"]),
        ("- 1", ["holds a list", "expected sections"]),
        ("model: {router: tc}\nloss: {routing_weight: 0.1}", ["loss.routing_weight is 0.1", "model.router tc", "to 0"]),
        ("stage: posttrain", ["checkpoint.init is missing", "stage: pretrain"]),
        ("log: {sample_every: 5}", ["sample.captions is empty"]),
    ],
)
def test_a_bad_file_is_one_line_that_names_the_mend(run_file, text, words):
    text = text if "stage" in text or text.startswith("- ") else PRETRAIN + text
    message = refusal(run_file(text))
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--optim.lrr", "1"], ["--optim.lrr", "did you mean optim.lr?"]),
        (["--optim.lr", "-1"], ["--optim.lr", "got -1", "> 0"]),
        (["--optim.lr"], ["--optim.lr has no value"]),
        (["--optim.lr", "--seed", "1"], ["--optim.lr has no value"]),
        (["optim.lr", "1"], ["'optim.lr' is not an override", "--section.key value"]),
        (["--train.steps", "["], ["--train.steps", "got '['", "a whole number >= 1"]),
        (["--optim.betas", "[0.9"], ["--optim.betas", "not valid YAML", "quote it"]),
        (["--train.trainable", "blocks, moe.gate"], ["a list of text", "to '[blocks, moe.gate]'"]),
        (["--train.frozen", "'*.attn'"], ["change train.frozen to \"['*.attn']\""]),
        (["--train.steps.x", "1"], ["--train.steps.x: unknown key", "did you mean train.steps?"]),
    ],
)
def test_a_bad_override_is_named_as_typed(run_file, overrides, words):
    message = refusal(run_file(), *overrides)
    assert [word for word in words if word not in message] == [], message


def test_a_missing_file_lists_its_neighbours(run_file):
    path = run_file()
    assert "holds run.yaml" in refusal(path.with_name("rum.yaml"))


def test_several_mistakes_come_in_one_line(run_file):
    message = refusal(run_file(PRETRAIN + "train: {steps: 0, global_batch: 0}"))
    assert "train.steps" in message
    assert "train.global_batch" in message


@pytest.mark.parametrize("router", ["tc", "dense"])
def test_routers_without_choice_of_compute_train_without_the_routing_loss(run_file, router):
    assert load_run_config(run_file(PRETRAIN + f"model: {{router: {router}}}")).loss.routing_weight == 0
    assert load_run_config(run_file()).loss.routing_weight > 0


@pytest.mark.parametrize("resume", ["runs/x/checkpoints/step00000100"])
def test_posttraining_may_go_on_from_a_named_checkpoint(run_file, resume):
    assert load_run_config(run_file("stage: posttrain"), ["--checkpoint.resume", resume]).checkpoint.init is None


def batch(total: int, micro: int | None) -> RunConfig:
    return RunConfig.model_validate({"train": {"global_batch": total, "micro_batch": micro}})


@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 16))
def test_batch_arithmetic_cuts_evenly(micro, accumulation, world):
    total = micro * accumulation * world
    assert batch_arithmetic(batch(total, micro), world) == (micro, accumulation, total, world)
    assert batch_arithmetic(batch(total, None), world) == (micro * accumulation, 1, total, world)


@pytest.mark.parametrize(
    ("total", "micro", "world", "words"),
    [
        (10, None, 4, ["train.global_batch is 10", "set train.global_batch to 12"]),
        (24, 5, 2, ["train.micro_batch is 5", "divisor of 12: 1, 2, 3, 4, 6, 12"]),
        (8, None, 0, ["world size is 0"]),
    ],
)
def test_batch_arithmetic_names_the_mend(total, micro, world, words):
    with pytest.raises(ConfigError) as caught:
        batch_arithmetic(batch(total, micro), world)
    assert [word for word in words if word not in str(caught.value)] == [], caught.value


def test_nearest_says_nothing_when_nothing_is_near():
    assert nearest("abc", ["xyz"]) == ""


def test_shards_may_be_a_place_or_a_mixture(run_file):
    assert load_run_config(run_file()).data.places == (("data/fluent64", 1.0),)
    text = PRETRAIN + "data: {shards: [{path: a, weight: 3}, {path: 'https://host/b', weight: 0.5}]}\n"
    run = load_run_config(run_file(text))
    assert run.data.places == (("a", 3.0), ("https://host/b", 0.5))
    assert run.data.first_place == "a"
    path = run_file(dump_run_config(run))
    assert load_run_config(path) == run
    assert load_run_config(path, ["--data.shards", "s3://bucket/c"]).data.places == (("s3://bucket/c", 1.0),)


@pytest.mark.parametrize("shards", ["[]", "", "[{path: '', weight: 1}]", "[{path: a, weight: 0}]", "[a, b]"])
def test_shards_that_are_no_place(run_file, shards):
    message = refusal(run_file(PRETRAIN), "--data.shards", shards)
    assert "data" in message
    assert "{path, weight}" in message


def test_how_shards_in_the_network_are_read(run_file):
    text = "data: {remote: {cache: /tmp/c, cache_gib: 0.5, retries: 2, allow_hosts: [cdn.example.org]}}\n"
    options = load_run_config(run_file(PRETRAIN + text)).data.remote.options()
    assert (options.cache, options.cache_bytes, options.retries) == (Path("/tmp/c"), 2**29, 2)
    assert options.allow_hosts == ("cdn.example.org",)
    assert "data.remote.retry" in refusal(run_file(PRETRAIN + "data: {remote: {retry: 2}}\n"))
    assert "data.max_bad_fraction" in refusal(run_file(PRETRAIN), "--data.max_bad_fraction", "1.5")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "hybrid"}, r"hybrid needs kept_steps from 1 to num_steps \(10\)"),
        ({"schedule": "hybrid", "kept_steps": 11}, r"hybrid needs kept_steps from 1 to num_steps \(10\)"),
        ({"schedule": "segments", "segment_steps": 3}, r"segment_steps \(3\) must divide num_steps \(10\)"),
        ({"schedule": "segments", "segment_steps": 2, "kept_steps": 3}, "must be at most segment_steps"),
        ({"own_steps": 10}, r"own_steps \(10\) must be below num_steps \(10\)"),
        ({"schedule": "plain", "merged_steps": 2}, r"merged_steps needs schedule: two_pass \| hybrid \| segments"),
        ({"schedule": "two_pass", "segment_steps": 2}, "segment_steps needs schedule: segments"),
        ({"schedule": "two_pass", "kept_steps": 2}, r"kept_steps needs schedule: hybrid \| segments"),
    ],
)
def test_rollout_fields_that_do_not_go_together(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RolloutConfig(num_steps=10, **fields)


@pytest.mark.parametrize(
    ("every", "measured", "allowed"),
    [(50, 100, True), (100, 50, True), (0, 50, False), (50, 0, False), (40, 50, False)],
)
def test_the_best_checkpoint_is_one_that_is_measured(every: int, measured: int, allowed: bool) -> None:
    given = {"checkpoint": {"every": every, "keep_best": True}, "log": {"validate_every": measured}}
    if allowed:
        assert RunConfig.model_validate(given).checkpoint.keep_best
    else:
        with pytest.raises(ValueError, match=f"checkpoint.every is {every}, log.validate_every {measured}; make one a"):
            RunConfig.model_validate(given)


def test_a_loss_that_trains_saliency_routers_alone_needs_them(run_file):
    steered = "checkpoint: {init: base.safetensors}\nloss: {routing_gradient: saliency_routers}\n"
    assert load_run_config(run_file(steered)).loss.routing_gradient == "saliency_routers"
    without = refusal(run_file(steered + "model: {saliency_router: false}"))
    assert "model.saliency_router is false: nothing would learn" in without
    scores = refusal(run_file(steered), "--loss.routing_mass", "scores")
    assert "routing_gradient: saliency_routers needs routing_mass: counts" in scores
