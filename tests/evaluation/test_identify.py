"""A wrong time convention is caught on a model of ours that was trained, and exported, under a foreign one."""

from pathlib import Path

import pytest
import torch

from data_pipeline.read.shards import ShardSet
from sharpmoe import draws
from sharpmoe.config import ModelConfig
from sharpmoe.evaluation.identify import identify
from sharpmoe.flow import interpolate, velocity_target
from sharpmoe.losses import flow_matching
from sharpmoe.model.backbone import Backbone
from sharpmoe.model.build import build_model
from sharpmoe.model.published.names import CONVENTIONS, to_published
from tests.fixtures_data import make_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"), num_images=48)


def trained(shards: ShardSet, family: str, router: str = "ec", steps: int = 150) -> Backbone:
    """A toy that learned, in a second or two, to tell noise from shapes, fed its time as `family` feeds it."""
    torch.manual_seed(0)
    convention = CONVENTIONS[family]
    model = build_model(
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


@pytest.mark.slow
@pytest.mark.parametrize("family", ["promoe", "kwai"])
def test_a_wrong_time_convention_is_caught(family: str, folder: Path) -> None:
    model = trained(ShardSet.open(folder, "train"), family)
    published = to_published(model.state_dict(), model.config, family)
    found = identify(published, ShardSet.open(folder, "unseen"), sizes={"num_heads": 2})
    assert found.candidates[:3] == (("promoe", "ec"), ("kwai", "ec"), ("dsmoe", "ec"))
    assert family in found.losses[0].families
    assert found.problem() is None
    assert found.problem(family) is None
    wrong = "kwai" if family == "promoe" else "promoe"
    assert f"not that of family {wrong}" in (found.problem(wrong) or "")
    printed = str(found)
    assert "promoe/ec, kwai/ec, dsmoe/ec" in printed
    assert family in printed.partition("flow loss")[2].splitlines()[1]  # lowest loss first


def test_an_untrained_checkpoint_and_a_foreign_name_are_said(folder: Path) -> None:
    shards = ShardSet.open(folder, "unseen")
    model = trained(shards, "promoe", router="dense", steps=0)
    found = identify(to_published(model.state_dict(), model.config, "promoe"), shards, 4, {"num_heads": 2})
    assert "predicting zero" in (found.problem() or "")
    assert "does not have the key names" in (found.problem("dit_moe") or "")
