"""docs/tutorials/imagenet.md runs from top to bottom on small stand-ins for what it downloads."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.read.shards import ShardSet
from sharpmoe.config import ModelConfig
from sharpmoe.log_file import read_log
from sharpmoe.model.build import build_model
from sharpmoe.model.published.names import to_published
from sharpmoe.model.weights import read_weights
from tests.contract.tutorials import ROOT, blocks, changed, commands, draw_photos, run_command, workplace
from tests.fixtures_data import tiny_autoencoder

PAGE = ROOT / "docs" / "tutorials" / "imagenet.md"
pytestmark = pytest.mark.slow

CHECKPOINT = "checkpoints/ProMoE/ProMoE-L-Flow.pth"
SMALL = (
    "--train.steps 2 --train.global_batch 4 --train.precision fp32 --rollout.num_steps 2 --log.every 1 "
    "--log.validate_every 0 --log.validation_images 4 --log.allocation_images 4 --data.num_workers 0"
)
RUN = "--config promoe_l_sharp.yaml"
# What is replaced in the commands of the page: places and numbers.
CHANGES = {
    "/data/imagenet": "imagenet",
    "--shards data/imagenet256 --family promoe": "--shards data/imagenet256 --family promoe --images 2",
    "--size 256": "--size 32",
    "--device cuda": "--device cpu",
    f"{RUN} --dry-run": f"{RUN} {SMALL} --dry-run",
    f"{RUN} --train.micro_batch 8": f"{RUN} {SMALL} --train.micro_batch 2",
    "--labels 207 360 387 974 88 979 417 279": "--labels 207 360 --steps 2",
    "--num 50000 --steps 250": "--num 6 --steps 2",
    "--batch-size 64": "--batch-size 3",
}
# What is not run: another project's evaluation, in TensorFlow, on the network.
ELSEWHERE = ("git", "curl", "guided-diffusion/evaluations/evaluator.py")


def write_checkpoint(path: Path) -> None:
    """Write a training checkpoint of a small ProMoE with random weights, as ProMoE's train.py does."""
    torch.manual_seed(0)
    config = ModelConfig(
        width=384, depth=2, num_heads=6, latent_size=16, learn_sigma=True, router="promoe_tc", num_experts=3,
        expert_hidden=64, shared_hidden=64, conditioning="class", num_classes=1000, saliency_router=False,
    )  # fmt: skip
    state = to_published(build_model(config).state_dict(), config, "promoe")
    live = {key: value + 1 for key, value in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"step": 500_000, "model_state_dict": live, "ema_model_state_dict": state, "optimizer_state_dict": {}}
    torch.save(content, path)


def download(words: list[str]) -> None:
    """`hf download REPOSITORY --local-dir FOLDER`, of stand-ins."""
    makers = {
        "weilllllls/ProMoE": lambda folder: write_checkpoint(folder / Path(CHECKPOINT).name),
        "stabilityai/sd-vae-ft-mse": tiny_autoencoder,
    }
    repository, folder = words[words.index("download") + 1], Path(words[words.index("--local-dir") + 1])
    makers[repository](folder)


def draw_imagenet(folder: Path) -> None:
    """Draw train/CLASS/*.jpg and val/CLASS/*.jpg."""
    for split, count in (("train", 4), ("val", 2)):
        for name in ("n01440764", "n01443537", "n01484850"):
            for caption in draw_photos(folder / split / name, count).glob("*.txt"):
                caption.unlink()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Run every command of the page; return what each printed, by the command."""
    folder = workplace(tmp_path_factory.mktemp("imagenet") / "checkout")
    printed = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        draw_imagenet(folder / "imagenet")
        for words in commands(changed("\n".join(blocks(PAGE.read_text(encoding="utf-8"), "bash")), CHANGES)):
            if words[0] == "hf":
                download(words)
            elif not any(word in words for word in ELSEWHERE):
                unlearned = "launcher/identify.py" in words and "--shards" in words
                printed[" ".join(words)] = run_command(words, 1 if unlearned else 0)
    return {"folder": str(folder), **printed}


def output_of(outputs: dict[str, str], *parts: str) -> str:
    found = [text for command, text in outputs.items() if all(part in command for part in parts)]
    assert len(found) == 1, parts
    return found[0]


def test_the_file_is_identified(outputs: dict[str, str]) -> None:
    first = next(text for command, text in outputs.items() if "identify.py" in command)
    assert "averaged (ema) weights" in first
    assert "candidates  promoe/promoe_tc, promoe/promoe_ec" in first
    assert "undecided   router: promoe_tc, promoe_ec have the same tensors" in first
    measured = output_of(outputs, "identify.py", "--shards")
    assert "predicting zero" in measured


def test_labels_and_the_held_out_split_are_those_of_the_folders(outputs: dict[str, str]) -> None:
    place = Path(outputs["folder"]) / "data" / "imagenet256"
    train, unseen = (ShardSet.open(place, split) for split in ("train", "unseen"))
    assert (train.num_samples, unseen.num_samples) == (24, 6)  # every training picture also mirrored
    assert set(train.batch(range(24)).label.tolist()) == {0, 1, 2}


def test_the_run_starts_from_the_averaged_weights_and_ends(outputs: dict[str, str]) -> None:
    folder = Path(outputs["folder"])
    converted = output_of(outputs, "convert.py")
    assert "new         0 parameter tensors" in converted
    assert "million new parameters: saliency routers" in converted
    base, config, meta = read_weights(folder / "checkpoints" / "promoe_l.safetensors")
    assert (config.num_experts, config.expert_hidden, config.num_classes) == (3, 64, 1000)
    assert meta["published"] == "promoe/promoe_tc, ema"
    live, _, _ = read_weights(folder / "runs/promoe_l_sharp/checkpoints/step00000002/live.safetensors")
    key = "blocks.0.attn.qkv.weight"
    assert 0 < (live[key] - base[key]).abs().max() < 0.01  # two steps away from the base, not from the live weights
    assert sorted(read_log(folder / "runs/promoe_l_sharp/log.jsonl")["loss/flow"]) == [1, 2]
    assert "#SBATCH" in output_of(outputs, "submit.py", "--nodes 4")
    assert "ARGUMENTS=(runs/promoe_l_sharp --npz " in output_of(outputs, "submit.py", "--job sample")


def test_batches_for_fid_hold_balanced_images_and_their_protocol(outputs: dict[str, str]) -> None:
    folder = Path(outputs["folder"])
    for name in ("promoe_l_sharp/adm", "promoe_l_base"):
        with np.load(folder / "runs" / f"{name}.npz") as batch:
            assert (batch["arr_0"].shape, batch["arr_0"].dtype) == ((6, 32, 32, 3), np.uint8)
        protocol = json.loads((folder / "runs" / f"{name}.json").read_text(encoding="utf-8"))
        assert (protocol["steps"], protocol["cfg_scale"]) == (2, 1.5)


def test_commands_that_are_not_run_are_those_of_the_evaluator() -> None:
    left = [
        words
        for words in commands("\n".join(blocks(PAGE.read_text(encoding="utf-8"), "bash")))
        if any(word in words for word in ELSEWHERE)
    ]
    assert len(left) == 3
    assert not [words for words in left if any(word.startswith("launcher/") for word in words)]
