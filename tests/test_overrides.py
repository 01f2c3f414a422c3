"""Values of overrides: as the shell gives them, by the type of their key."""

from pathlib import Path
from typing import Any

import pytest

from sharpmoe.config_io import dump_run_config, load_run_config
from sharpmoe.errors import ConfigError
from sharpmoe.overrides import parse_overrides


@pytest.mark.parametrize(
    "text", ["runs #2", "~", "1:30", "yes", "null", "007", "1e3", "2024-01-01", "a: b", "[a", "'q'"]
)
@pytest.mark.parametrize("key", ["name", "output", "data.train_split"])
def test_text_is_taken_as_it_is(key: str, text: str, tmp_path: Path) -> None:
    run: Any = load_run_config(None, [f"--{key}", text])
    assert run == load_run_config(None, [f"--{key}={text}"])
    (tmp_path / "run.yaml").write_text(dump_run_config(run), encoding="utf-8")
    assert load_run_config(tmp_path / "run.yaml") == run
    for part in key.split("."):
        run = getattr(run, part)
    assert run == text


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optim.lr", "1e-4", 1e-4),
        ("optim.lr", "+.5", 0.5),
        ("train.steps", "010", 10),
        ("train.steps", "1e3", 1000.0),
        ("train.micro_batch", "null", None),
        ("train.micro_batch", "none", None),
        ("train.micro_batch", "2", 2),
        ("checkpoint.init", "null", None),
        ("checkpoint.init", "~", "~"),
        ("checkpoint.resume", "none", "none"),
        ("model.preset", "none", None),
        ("model.preset", "xl", "xl"),
        ("optim.betas", "[0.9, 0.95]", [0.9, 0.95]),
        ("sample.captions", "[a red apple, yes, 1:30]", ["a red apple", "yes", "1:30"]),
        ("sample.captions", r'["one\ntwo", "a, b"]', ["one\ntwo", "a, b"]),
        ("train", "{steps: 3, micro_batch: null}", {"steps": 3, "micro_batch": None}),
        ("data", "{shards: no, remote: {retries: 2}}", {"shards": "no", "remote": {"retries": 2}}),
        ("data.shards", "my data #2", "my data #2"),
        ("data.shards", "[{path: a #, weight: 2}]", None),
        ("data.shards", "[{path: 'a #', weight: 2}]", [{"path": "a #", "weight": 2}]),
        ("log.allocation", "no", "no"),
    ],
)
def test_values_have_the_type_of_their_key(key: str, text: str, value: Any) -> None:
    if key == "data.shards" and value is None:
        with pytest.raises(ConfigError, match="not valid YAML"):
            parse_overrides([f"--{key}", text])
    else:
        assert parse_overrides([f"--{key}", text]) == {key: value}


@pytest.mark.parametrize(
    ("text", "value"), [("no", False), ("off", False), ("true", True), ("True", True), ("1", True)]
)
def test_a_switch_is_written_in_any_way(text: str, value: bool) -> None:
    assert load_run_config(None, ["--log.allocation", text]).log.allocation is value


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("train.steps", "1:30"),
        ("train.steps", "1.5"),
        ("train.steps", "true"),
        ("train.steps", "null"),
        ("train.steps", ""),
        ("optim.lr", "1,5"),
        ("optim.lr", "yes"),
        ("log.allocation", "maybe"),
        ("sample.captions", "one caption"),
        ("sample.captions", "{a: b}"),
        ("optim.betas", "0.9"),
        ("train", "3"),
        ("model.preset", "null "),
    ],
)
def test_a_value_of_another_type_is_refused(key: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"^--{key}: got ") as caught:
        load_run_config(None, [f"--{key}={text}"])
    assert "\n" not in str(caught.value)


def test_a_file_has_no_hours_octals_or_dates(tmp_path: Path) -> None:
    text = "stage: pretrain\nname: 1:30\noutput: 2024-01-01\ndata: {train_split: no}\ntrain: {steps: 010}\n"
    (tmp_path / "run.yaml").write_text(text)
    run = load_run_config(tmp_path / "run.yaml")
    assert (run.name, run.output, run.data.train_split, run.train.steps) == ("1:30", "2024-01-01", "no", 10)


@pytest.mark.parametrize("name", ["", " ", ".", "..", "../a", "a/../../b", "/a", "a\nb", "a\x07"])
def test_a_name_is_that_of_a_folder(name: str) -> None:
    with pytest.raises(ConfigError, match="expected (the name of a|a) folder") as caught:
        load_run_config(None, [f"--name={name}"])
    assert "\n" not in str(caught.value)


def test_runs_are_written_to_a_local_folder() -> None:
    with pytest.raises(ConfigError, match="output is 's3://bucket/runs', expected a local folder"):
        load_run_config(None, ["--output", "s3://bucket/runs"])


def test_entries_of_a_map_are_given_together_or_one_by_one() -> None:
    assert parse_overrides(["--optim.lr_scale", "{saliency_router: 20, moe.gate: 0.5}"]) == {
        "optim.lr_scale": {"saliency_router": 20, "moe.gate": 0.5}
    }
    one_by_one = ["--optim.lr_scale.saliency_router", "20", "--optim.lr_scale.moe.gate=0.5"]
    run = load_run_config(None, one_by_one)
    assert run.optim.lr_scale == {"saliency_router": 20, "moe.gate": 0.5}
    assert load_run_config(None, ["--optim.lr_scale", "{}"]).optim.lr_scale == {}  # without those of the run file
    for wrong in ("-1", "true", "much"):
        with pytest.raises(ConfigError, match=r"--optim\.lr_scale\.moe\.gate: .*a map of names to a finite number >="):
            load_run_config(None, ["--optim.lr_scale.moe.gate", wrong])
