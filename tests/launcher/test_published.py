"""Options that convert and identify share: the same words mean the same to both."""

import argparse

import pytest

from launcher.convert import main as convert
from launcher.identify import main as identify
from launcher.published import sizes_of
from sharpmoe.errors import ConfigError

GIVEN = ["--num-heads", "2", "--latent-size", "16", "--num-classes", "5", "--capacity", "1.5", "--weights", "model"]


@pytest.mark.parametrize("command", [convert, identify])
def test_sizes_are_given_or_left_open(command: object) -> None:
    words = ["file.pth"] if command is identify else ["file.pth", "out.safetensors"]
    arguments: argparse.Namespace = command.parse([*words, *GIVEN])
    assert sizes_of(arguments) == {
        "num_heads": 2, "latent_size": 16, "num_classes": 5, "top_k": None, "capacity": 1.5,
    }  # fmt: skip
    assert arguments.weights == "model"
    assert command.parse(words).weights is None
    with pytest.raises(ConfigError, match="num-classes"):
        command.parse([*words, "--num-classes", "0"])
