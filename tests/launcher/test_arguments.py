from pathlib import Path

import pytest

from launcher.arguments import DEFAULT_DS_CONFIG, parse_train_arguments
from sharpmoe.errors import ConfigError

FILE = Path("configs/zero2.json")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], DEFAULT_DS_CONFIG),
        (["--deepspeed"], DEFAULT_DS_CONFIG),
        (["--deepspeed", str(FILE)], FILE),
        ([f"--deepspeed={FILE}"], FILE),
        (["--deepspeed", "--deepspeed_config", str(FILE)], FILE),
        (["--deepspeed_config", str(FILE)], FILE),
        (["--deepspeed", str(FILE), "--deepspeed_config", str(FILE)], FILE),
    ],
)
@pytest.mark.parametrize("rank", [[], ["--local_rank=1"], ["--local-rank", "1"]])
def test_every_way_to_name_the_deepspeed_file(words, expected, rank):
    arguments = parse_train_arguments([*rank, *words])
    assert arguments == (expected, None, (), False)


def test_overrides_keep_their_order_among_the_options():
    words = ["--local_rank=0", "--optim.lr", "-1e-3", "--deepspeed", "--seed=1", "--config", "x.yaml", "--seed", "2"]
    arguments = parse_train_arguments([*words, "--dry-run"])
    assert arguments.overrides == ("--optim.lr", "-1e-3", "--seed=1", "--seed", "2")
    assert (arguments.config, arguments.dry_run) == (Path("x.yaml"), True)


def test_an_override_is_never_taken_for_an_abbreviated_option():
    assert parse_train_arguments(["--dry", "1"]).overrides == ("--dry", "1")


def test_two_different_files_are_refused():
    with pytest.raises(ConfigError, match="give one DeepSpeed file"):
        parse_train_arguments(["--deepspeed", "a.json", "--deepspeed_config", "b.json"])
