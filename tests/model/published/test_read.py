"""Which tensors are read from the files that trainers write, and what is said of files that hold no model."""

import argparse
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sharpmoe.errors import CheckpointError
from sharpmoe.model.published.load import build_published, read_pretrained
from sharpmoe.model.published.names import CONVENTIONS, DEFAULTS
from sharpmoe.model.published.read import read_state
from tests.model.published.test_load import load

_, WEIGHTS, FAMILY, ROUTER, SIZES = load("published_promoe_ec")
LIVE = {key: value + 1 if value.is_floating_point() else value for key, value in WEIGHTS.items()}
ZEROS = {"optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}}], "global_step": 3}


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


def wrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of a model whose blocks were compiled one by one, inside DistributedDataParallel."""
    return {f"module.{key.replace('blocks.1.', 'blocks.1._orig_mod.')}": value for key, value in state.items()}


def lit_ema(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """LitEma's buffers: parameters that are trained, under names without dots."""
    trained = {key.replace(".", ""): value for key, value in state.items() if key != "pos_embed"}
    return under("model_ema.", trained) | {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
    }


def ema_pytorch(prefix: str = "") -> dict[str, Tensor]:
    counters = {f"{prefix}initted": torch.tensor([True]), f"{prefix}step": torch.tensor([5])}
    return under(f"{prefix}online_model.", LIVE) | under(f"{prefix}ema_model.", WEIGHTS) | counters


# Content of a file whose averaged weights are WEIGHTS and whose live ones, where it has them, are LIVE.
LAYOUTS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: WEIGHTS,
    "wrapped": lambda: wrapped(WEIGHTS),
    "wrapped parts": lambda: {
        key.replace("blocks.1.", "blocks.1.model.").replace("x_embedder.", "x_embedder.net."): value
        for key, value in WEIGHTS.items()
    },
    "nested prefixes": lambda: under("module.model._orig_mod.net.", WEIGHTS),
    "DiT": lambda: {"model": LIVE, "ema": WEIGHTS, "opt": {"state": {0: {"step": torch.ones(1)}}}},
    "ProMoE": lambda: {"step": 3, "model_state_dict": LIVE, "ema_model_state_dict": WEIGHTS, "optimizer": ZEROS},
    "ema-pytorch": ema_pytorch,
    "ema-pytorch inside": lambda: {"model": under("module.", LIVE), "ema": under("ema_model.", WEIGHTS)},
    "ema-pytorch without the live model": lambda: under("ema_model.module.", WEIGHTS),
    "LitEma": lambda: under("model.", LIVE | {"pos_embed": WEIGHTS["pos_embed"]}) | lit_ema(WEIGHTS),
    "averaged parameters alone": lambda: {
        "model": LIVE | {"pos_embed": WEIGHTS["pos_embed"]},
        "ema": {key: value for key, value in WEIGHTS.items() if key != "pos_embed"},
    },
    "LitEma of latent diffusion": lambda: (
        under("model.diffusion_model.", LIVE | {"pos_embed": WEIGHTS["pos_embed"]})
        | {key.replace("model_ema.", "model_ema.diffusion_model"): value for key, value in lit_ema(WEIGHTS).items()}
    ),
    "Lightning": lambda: {
        "state_dict": under("model.net.", LIVE) | under("ema.module.", WEIGHTS) | {"vae.decoder.weight": torch.ones(2)},
        "pytorch-lightning_version": "2.5",
        **ZEROS,
    },
    "DeepSpeed": lambda: {"module": under("ema_model.", WEIGHTS) | under("model.", LIVE), "buffer_names": ["a"]},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_averaged_weights_are_found_in_every_layout(layout: str, tmp_path: Path) -> None:
    torch.save(LAYOUTS[layout](), tmp_path / "file.pt")
    found = read_state(tmp_path / "file.pt")
    assert found.tensors.keys() == WEIGHTS.keys()
    assert all(torch.equal(found.tensors[key], value) for key, value in WEIGHTS.items())
    single = layout in ("plain", "wrapped", "wrapped parts", "nested prefixes")
    assert found.kind == ("plain" if single else "ema")
    read_pretrained(tmp_path / "file.pt", FAMILY, ROUTER, **SIZES)


@pytest.mark.parametrize("layout", ["DiT", "ProMoE", "ema-pytorch", "LitEma", "Lightning", "DeepSpeed"])
def test_live_weights_are_read_on_request(layout: str) -> None:
    found = read_state(LAYOUTS[layout](), "model")
    assert found.kind == "model"
    key = "blocks.0.attn.qkv.weight"
    assert torch.equal(found.tensors[key], LIVE[key])


def test_the_notes_say_what_was_chosen_and_left_out() -> None:
    text = "; ".join(read_state(under("module.", ema_pytorch("ema."))).notes)
    assert f"averaged (ema) weights: {len(WEIGHTS)} tensors under ema.ema_model" in text
    assert "names of wrappers removed: module" in text
    assert f"left out: {len(LIVE) + 2} under ema" in text
    text = "; ".join(read_state(LAYOUTS["LitEma"]()).notes)
    assert "1 of them, which are not averaged, from the live weights" in text


def test_what_trainers_save_beside_tensors_does_no_harm(tmp_path: Path) -> None:
    beside = {
        "args": argparse.Namespace(lr=1), "best": np.float64(3.5), "step": np.int64(3), "folder": Path("runs"),
        "config": {"model": "DiT", "sizes": [1, 2]}, "when": (1, None),
    }  # fmt: skip
    torch.save({"model": LIVE, "ema": WEIGHTS, **beside}, tmp_path / "file.pt")
    assert read_state(tmp_path / "file.pt").kind == "ema"


def test_live_weights_are_taken_where_nothing_else_is_there_and_said() -> None:
    live = {"model": LIVE, "epoch": 3}
    found = read_state(live)
    assert found.kind == "model"
    assert "live (model) weights" in found.notes[0]
    with pytest.raises(CheckpointError, match=r"no ema weights, it holds model \(model\); choose --weights model"):
        read_state(live, "ema")
    with pytest.raises(CheckpointError, match="no model weights"):
        read_state({"ema": WEIGHTS}, "model")


def test_shards_are_joined_through_their_index(tmp_path: Path) -> None:
    names = list(WEIGHTS)
    parts = {"part-1.safetensors": names[:9], "part-2.safetensors": names[9:]}
    for file, keys in parts.items():
        save_file({key: WEIGHTS[key] for key in keys}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: file for file, keys in parts.items() for key in keys}}))
    for source in (index, tmp_path):
        assert read_state(source).tensors.keys() == WEIGHTS.keys()
    (tmp_path / "part-2.safetensors").unlink()
    for source in (index, tmp_path):
        with pytest.raises(CheckpointError, match=r"1 of its 2 shards are not beside it \(part-2"):
            read_state(source)


def test_a_folder_of_deepspeed_is_read_without_its_optimizer_states(tmp_path: Path) -> None:
    torch.save({"module": WEIGHTS}, tmp_path / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {"a": torch.ones(1)}}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert read_state(tmp_path).tensors.keys() == WEIGHTS.keys()


class _Harmful:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "hello")


def _tar(path: Path) -> None:
    (path.parent / "inside").write_text("hello")
    with tarfile.open(path, "w") as file:
        file.add(path.parent / "inside")


def _cut(path: Path) -> None:
    torch.save(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:-1000])


def _cut_safetensors(path: Path) -> None:
    save_file(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:-1000])


class _Doubled(torch.nn.Module):
    """A model without a layer that DeepSpeed replaces in this process."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid a\n"), "git lfs pull"),
    "page": (lambda path: path.write_text("\n<!DOCTYPE html><html></html>"), "is a web page"),
    "zip": (_zip, "is a zip archive, not a checkpoint; unpack it"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b\x08rest"), "is an archive, not a checkpoint"),
    "cut": (_cut, "cut off; compare its size"),
    "cut safetensors": (_cut_safetensors, "cut off; compare its size"),
    "tar": (_tar, "is an archive, not a checkpoint"),
    "TorchScript": (
        lambda path: torch.jit.script(_Doubled()).save(str(path)),
        "is a TorchScript archive, not a checkpoint",
    ),
    "bytes": (lambda path: path.write_bytes(bytes(range(9, 200))), "tensors only: not a checkpoint, or cut off"),
    "text": (lambda path: path.write_text("hello"), "not a checkpoint, or cut off"),
    "json": (lambda path: path.write_text('{"a": 1}'), "JSON without a weight_map"),
    "pickle with code": (lambda path: torch.save({"a": _Harmful()}, path), r"holds Python objects \(\w+.mkdir\)"),
    "list": (lambda path: torch.save([torch.ones(1)], path), "holds a list, expected a state dict"),
    "no tensors": (lambda path: torch.save({"epoch": 3, "args": {}}, path), "holds no tensors"),
    "two models": (
        lambda path: torch.save(under("teacher.", WEIGHTS) | under("student.", WEIGHTS), path),
        "expected one model of kind model",
    ),
    "a rank's part": (
        lambda path: torch.save({"module": {key: torch.empty(0) for key in WEIGHTS}}, path),
        "zero_to_fp32.py",
    ),
    "averages alone": (lambda path: torch.save(lit_ema(WEIGHTS), path), "as LitEma writes them"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_file_without_a_model_is_one_line(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = UNREADABLE[kind]
    make(tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        read_state(tmp_path / "file.pt")
    assert str(caught.value).startswith(f"{tmp_path / 'file.pt'}: ")
    assert "\n" not in str(caught.value)
    assert "PyTorch 2.6" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_a_folder_without_a_checkpoint_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no .safetensors, .pth, .pt, .bin file"):
        read_state(tmp_path)
    for step in (1, 2):
        torch.save(WEIGHTS, tmp_path / f"ckpt_step_{step}.pth")
    with pytest.raises(CheckpointError, match="is in two files; .* name one file"):
        read_state(tmp_path)


def test_a_run_folder_of_this_project_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step00000002")
    with pytest.raises(CheckpointError, match="is a run folder of this project"):
        read_state(tmp_path)


def test_averages_without_names_are_said_not_to_be_read() -> None:
    found = read_state({"model": LIVE, "ema": {"decay": 0.99, "shadow_params": [torch.ones(2)] * 3}})
    assert found.kind == "model"
    assert "not read: ema.shadow_params, a list of 3 tensors without names" in found.notes


def test_a_dit_of_diffusers_is_the_same_network(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, activation_fn="gelu-approximate",
    ).eval()  # fmt: skip
    embedders = theirs.transformer_blocks[0].norm1.emb.state_dict()
    for block in theirs.transformer_blocks:  # as the conversion of DiT's weights leaves them
        block.norm1.emb.load_state_dict(embedders)
    pipeline = tmp_path / "pipeline"
    theirs.save_pretrained(pipeline / "transformer")
    (pipeline / "model_index.json").write_text("{}")
    found = read_state(pipeline)
    assert "key names of diffusers translated" in found.notes
    # At t = 0 both read the same features of time; elsewhere diffusers' frequencies are not those of DiT's code.
    ours, _ = build_published(
        found.tensors, CONVENTIONS["dit_moe"], "dense", "DiT", DEFAULTS["dit"], num_heads=2, latent_size=8
    )
    x, t, labels = torch.randn(2, 4, 8, 8), torch.zeros(2), torch.tensor([1, 7])
    with torch.no_grad():
        expected = theirs(x, timestep=t, class_labels=labels).sample[:, :4]
        torch.testing.assert_close(ours(x, t, labels).v, expected, rtol=1e-4, atol=1e-5)
    read_pretrained(pipeline, "dit", "dense", num_heads=2)
    with torch.no_grad():
        theirs.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias.add_(1)
    with pytest.raises(CheckpointError, match="differs from that of the first block"):
        read_state(theirs.state_dict())
