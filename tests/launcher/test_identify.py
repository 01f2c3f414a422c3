"""Exit codes and messages of identify; tests/evaluation/test_identify.py has what it finds."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launcher.identify import main
from sharpmoe.config import ModelConfig
from sharpmoe.model.build import build_model
from sharpmoe.model.published.names import to_published
from tests.fixtures_data import make_shards


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights under ProMoE's key names, beside shards/."""
    config = ModelConfig(
        width=32, depth=2, num_heads=2, latent_size=8, router="ec", num_experts=2, conditioning="class",
        num_classes=4, saliency_router=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("checkpoint")
    make_shards(folder / "shards")
    path = folder / "published.safetensors"
    save_file(to_published(build_model(config).state_dict(), config, "promoe"), path)
    return path


def test_key_names_alone(untrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(untrained), "--num-heads", "2"]
    assert main(words) == 0
    assert "candidates  promoe/ec" in capsys.readouterr().out
    assert main([*words, "--family", "dit_moe"]) == 1
    assert "does not have the key names of family dit_moe" in capsys.readouterr().err


def test_no_convention_fits_random_weights(untrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--num-heads", "2", "--images", "2", "--shards", str(untrained.parent / "shards")]
    assert main([str(untrained), *words]) == 1
    output = capsys.readouterr()
    assert "flow loss" in output.out
    assert output.err.startswith(f"warning: {untrained}: under no convention")
    assert output.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["/no/such/file.pth"], ["FILE", "--shards", "/no/such/folder"]])
def test_a_mistake_is_one_line(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    assert main([word.replace("FILE", str(path)) for word in arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1
