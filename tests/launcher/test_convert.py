"""Published weights become a file that a run can start from, and back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from launcher.convert import main
from sharpmoe.config import ModelConfig
from sharpmoe.model.build import build_model
from sharpmoe.model.weights import StartingWeights, load_model
from tests.model.published.test_load import FOLDER
from tests.recorded import assert_recorded


def published(name: str, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    save_file(weights, folder / "published.safetensors")
    return folder / "published.safetensors", tensors


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, golden = published("published_promoe_ec", tmp_path)
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    assert main([str(path), str(ours), "--family", "promoe", "--router", "promoe_ec", "--num-heads", "2"]) == 0
    printed = capsys.readouterr().out
    assert "0 unmatched" in printed
    model, _ = load_model(ours)
    total, active = model.count_parameters()
    assert f"parameters  {total / 1e6:.3f} million, {active / 1e6:.3f} million active per token" in printed
    with_routers, _ = build_model(model.config.model_copy(update={"saliency_router": True})).count_parameters()
    assert f"in a run    {(with_routers - total) / 1e6:.3f} million new parameters: saliency routers" in printed
    assert f"{ours}: {ours.stat().st_size / 1e6:.1f} MB" in printed
    model, meta = load_model(ours)
    assert meta["published"] == "promoe/promoe_ec, plain"
    assert_recorded(model(golden["x_t"], golden["t"], golden["labels"]).v, golden["eval.v"])
    assert main([str(ours), str(back), "--to", "promoe"]) == 0
    before, after = load_file(path), load_file(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("name", "router", "share"),
    [("published_promoe_ec", "promoe_ec", {"capacity": 2.0}), ("published_promoe_tc2", "promoe_tc", {"top_k": 2})],
)
def test_a_run_starts_from_a_converted_file(name: str, router: str, share: dict, tmp_path: Path) -> None:
    path, _ = published(name, tmp_path)
    ours = tmp_path / "ours.safetensors"
    main([str(path), str(ours), "--family", "promoe", "--router", router, "--num-heads", "2", "--top-k", "2"])
    written = json.loads(safe_open(ours, framework="pt").metadata()["model"])
    wanted = ModelConfig(
        width=16, depth=4, num_heads=2, latent_size=8, learn_sigma=True, router=router, num_experts=5,
        expert_hidden=24, shared_hidden=20, conditioning="class", num_classes=1000, **share,
    )  # fmt: skip
    assert wanted.saliency_router
    assert not written["saliency_router"]
    weights = StartingWeights(wanted, 0, ours)
    model, _ = load_model(ours)
    assert all(torch.equal(weights(name, value.shape), value) for name, value in model.state_dict().items())
    assert weights("blocks.1.moe.saliency_router.out.weight", (5, 16)).count_nonzero() == 0


def test_a_trunk_is_extended_to_text(tmp_path: Path) -> None:
    path, _ = published("published_sit", tmp_path)
    ours = tmp_path / "ours.safetensors"
    assert main([str(path), str(ours), "--family", "sit", "--num-heads", "2", "--text-width", "12"]) == 0
    model, _ = load_model(ours)
    assert (model.config.conditioning, model.config.text_width) == ("text", 12)


def test_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = published("published_sit", tmp_path)
    assert main([str(path), str(tmp_path / "a.safetensors"), "--family", "sit", "--router", "ec"]) == 2
    assert "no router" in capsys.readouterr().err
    content = path.read_bytes()
    for words in (["--family", "sit"], ["--to", "promoe"]):
        assert main([str(path), str(path), *words]) == 2
        assert path.read_bytes() == content
    assert main([str(path), str(path), "--family", "sit"]) == 2
    assert "is the file that is read, which would be lost" in capsys.readouterr().err
