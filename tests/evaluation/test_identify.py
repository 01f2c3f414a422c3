"""A wrong time convention is caught on a model of ours that was trained, and exported, under a foreign one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data_pipeline.read.shards import ShardSet
from launcher.identify import main
from sharpmoe import draws
from sharpmoe.config import ModelConfig
from sharpmoe.evaluation.identify import identify
from sharpmoe.flow import interpolate, velocity_target
from sharpmoe.losses import flow_matching
from sharpmoe.model.dit import DiT
from sharpmoe.model.published.names import CONVENTIONS, to_published
from tests.fixtures_data import make_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"), num_images=48)


def trained(shards: ShardSet, family: str, router: str = "ec", steps: int = 150) -> DiT:
    """A toy that learned, in a second or two, to tell noise from shapes, fed its time as `family` feeds it."""
    torch.manual_seed(0)
    convention = CONVENTIONS[family]
    model = DiT(
        ModelConfig(
            width=32, depth=2, num_heads=2, latent_size=8, router=router, num_experts=2, conditioning="class",
            num_classes=4, saliency_router=False, time_scale=convention.time_scale, time_shift=convention.time_shift,
        )
    )  # fmt: skip
    batch = shards.batch(range(shards.num_samples))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    positions = torch.arange(len(batch.latent))
    for step in range(steps):
        x1 = draws.noise(step, positions, batch.latent.shape[1:])
        t = torch.rand(len(positions), generator=torch.Generator().manual_seed(step))
        v = model(interpolate(batch.latent, x1, t), t, batch.label).v
        flow_matching(v, velocity_target(batch.latent, x1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("family", ["promoe", "kwai"])
def test_a_wrong_time_convention_is_caught(
    family: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained(ShardSet.open(folder, "train"), family)
    path = tmp_path / "exported.safetensors"
    save_file(to_published(model.state_dict(), model.config, family), path)
    common = [str(path), "--shards", str(folder), "--num-heads", "2"]
    assert main(common) == 0
    printed = capsys.readouterr().out
    assert "promoe/ec, kwai/ec, dsmoe/ec" in printed
    best = printed.partition("flow loss")[2].splitlines()[1]
    assert family in best
    assert main([*common, "--family", family]) == 0
    wrong = "kwai" if family == "promoe" else "promoe"
    assert main([*common, "--family", wrong]) == 1
    assert f"not that of family {wrong}" in capsys.readouterr().err


def test_an_untrained_checkpoint_and_a_foreign_name_are_said(folder: Path) -> None:
    shards = ShardSet.open(folder, "unseen")
    model = trained(shards, "promoe", router="dense", steps=0)
    found = identify(to_published(model.state_dict(), model.config, "promoe"), shards, 4, {"num_heads": 2})
    assert "predicting zero" in (found.problem() or "")
    assert "does not have the key names" in (found.problem("dit_moe") or "")


@pytest.mark.parametrize("arguments", [["/no/such/file.pth"], ["FILE", "--shards", "/no/such/folder"]])
def test_a_mistake_is_one_line(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    assert main([word.replace("FILE", str(path)) for word in arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1
