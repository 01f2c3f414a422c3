"""Nucleus-Image's folders: read tensor by tensor, written back bit for bit, loaded by diffusers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import NucleusMoEImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import sharpmoe
from launcher.convert import main as convert
from launcher.export import main as export
from launcher.identify import main as identify
from sharpmoe.errors import CheckpointError
from sharpmoe.model.attach import attach
from sharpmoe.model.build import build_model
from sharpmoe.model.published import folder as folder_module
from sharpmoe.model.published.export import write_folder
from sharpmoe.model.published.folder import ROUTERS_FILE, WEIGHTS_NAME, PublishedFolder, local_folder
from sharpmoe.model.published.nucleus import PublishedPlace, Slices, write_config
from sharpmoe.model.weights import StartingWeights, load_model, save_weights
from tests.model.nucleus_reference import reference, reference_velocity
from tests.model.test_nucleus import inputs


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder as diffusers writes it: bfloat16, several files."""
    path = tmp_path_factory.mktemp("nucleus")
    network = reference(capacity_factors=[4.0, 4.0, 4.0, 1.3, 3.1])
    network.bfloat16().save_pretrained(path / "transformer", max_shard_size="200KB")
    assert len(list((path / "transformer").glob("*.safetensors"))) > 2
    return path


def all_tensors(folder: Path) -> dict[str, Tensor]:
    files = [path for path in folder.glob("*.safetensors") if path.name != ROUTERS_FILE]
    return {key: value for path in files for key, value in load_file(path).items()}


def velocity(folder: Path, seed: int = 1) -> Tensor:
    network = NucleusMoEImageTransformer2DModel.from_pretrained(folder).float()
    with torch.no_grad():
        return reference_velocity(network, *inputs((3, 4), (5, 3), seed))


@torch.no_grad()
def test_a_folder_loads_and_computes_what_diffusers_computes(published: Path) -> None:
    expected = velocity(published / "transformer")
    for path in (published, published / "transformer"):
        model = sharpmoe.load_pretrained(path, family="nucleus")
        assert not model.training
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        torch.testing.assert_close(model(*inputs((3, 4), (5, 3))).v, expected, rtol=0, atol=1e-5)
    half = sharpmoe.load_pretrained(path, family="nucleus", dtype=torch.bfloat16, saliency_router=True)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert sum("saliency_router" in name for name, _ in half.named_parameters()) == 2 * 4


def test_what_a_folder_says_itself_is_no_option(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(published), str(tmp_path / "ours.safetensors"), "--family", "nucleus", "--text-width", "8"]
    assert convert(words) == 2
    assert (
        capsys.readouterr().err
        == "error: --text-width has no effect with --family nucleus, whose models read text already; leave it out\n"
    )
    assert not (tmp_path / "ours.safetensors").exists()


def test_convert_and_export_give_the_same_bits(published: Path, tmp_path: Path, capsys: Any) -> None:
    ours, out = tmp_path / "ours.safetensors", tmp_path / "out"
    assert convert([str(published), str(ours), "--family", "nucleus"]) == 0
    printed = capsys.readouterr().out
    assert "bfloat16" in printed
    model, meta = load_model(ours)
    assert meta == {"published": "nucleus/nucleus, plain", "dtype": "bfloat16"}
    assert model.config.capacities == (4.0, 4.0, 4.0, 1.3, 3.1)
    assert export([str(ours), str(out), "--to", "diffusers"]) == 0
    before, after = all_tensors(published / "transformer"), all_tensors(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    assert torch.equal(velocity(out), velocity(published / "transformer"))
    assert convert([str(ours), str(tmp_path / "again"), "--to", "nucleus"]) == 0
    assert all(torch.equal(before[key], value) for key, value in all_tensors(tmp_path / "again").items())
    assert export([str(ours), str(out), "--to", "diffusers"]) == 2
    assert "is not an empty folder" in capsys.readouterr().err


@torch.no_grad()
def test_saliency_routers_are_kept_beside_the_base(published: Path, tmp_path: Path) -> None:
    model = attach(sharpmoe.load_pretrained(published, family="nucleus"))
    for layer in model.moe_layers():
        layer.saliency_router.out.weight.normal_(std=0.5)
    ours, out = tmp_path / "ours.safetensors", tmp_path / "out"
    save_weights(ours, model.state_dict(), model.config)
    assert export([str(ours), str(out), "--to", "diffusers", "--dtype", "float32"]) == 0
    again = sharpmoe.load_pretrained(out, "nucleus")
    assert again.config == model.config
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    x_t, t, condition = inputs((3, 4), (5, 3))
    assert torch.equal(again(x_t, t, condition, x_t).v, model(x_t, t, condition, x_t).v)
    torch.testing.assert_close(velocity(out), model(x_t, t, condition).v, rtol=0, atol=1e-5)
    plain = sharpmoe.load_pretrained(out, "nucleus", saliency_router=False)
    assert torch.equal(plain(x_t, t, condition).v, model(x_t, t, condition).v)


def test_identify_names_a_folder_and_what_reads_it(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert identify([str(published)]) == 0
    printed = capsys.readouterr().out
    assert "candidates  nucleus/nucleus" in printed
    assert "capacities  [4.0, 4.0, 4.0, 1.3, 3.1]: model.capacities of a run file" in printed
    assert "convert.py --family nucleus" in printed
    assert identify([str(published), "--family", "dit"]) == 1
    assert "it is of family nucleus, not dit" in capsys.readouterr().err
    assert convert([str(published), str(tmp_path / "out.safetensors"), "--family", "dit"]) == 2
    assert "is Nucleus-Image in the layout of diffusers" in capsys.readouterr().err


def test_large_models_are_cut_into_files_with_an_index(published: Path, tmp_path: Path) -> None:
    source = PublishedFolder(published)
    files = write_folder(tmp_path / "out", source.config, source.tensor, torch.bfloat16, {}, largest=150_000)
    assert sum(file.suffix == ".safetensors" for file in files) > 2
    assert torch.equal(velocity(tmp_path / "out"), velocity(published / "transformer"))
    assert PublishedFolder(tmp_path / "out").dtype == torch.bfloat16


class Counting:
    """Counts the largest read of a tensor in a file, in bytes."""

    def __init__(self, source: Slices, reads: list[int]) -> None:
        self.source, self.reads = source, reads

    def __getitem__(self, place: Any, /) -> Tensor:
        found = self.source[place]
        self.reads.append(found.numel() * found.itemsize)
        return found


def test_a_rank_reads_its_experts_only(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    read_published = folder_module.read_published

    def counted(place: PublishedPlace, source: Slices, *rest: Any) -> Tensor:
        return read_published(place, Counting(source, reads), *rest)

    monkeypatch.setattr(folder_module, "read_published", counted)
    whole = sharpmoe.load_pretrained(published, family="nucleus")
    all_bytes, largest = sum(reads), max(reads)
    experts = {name for name, _ in whole.named_parameters() if ".experts." in name}
    expert_bytes = 2 * sum(whole.state_dict()[name].numel() for name in experts)
    assert all_bytes == 2 * sum(value.numel() for value in whole.state_dict().values())  # each number once, bfloat16
    assert largest < all_bytes / 10
    reads.clear()
    start = StartingWeights(whole.config, 0, published)
    for name, value in whole.state_dict().items():
        mine = range(1, 3) if name in experts else None
        wanted = value[1:3] if name in experts else value
        assert torch.equal(start(name, wanted.shape, mine), wanted)
    assert sum(reads) == all_bytes - expert_bytes // 2


def test_a_run_with_new_routers_starts_from_a_folder(published: Path) -> None:
    base = PublishedFolder(published).config
    config = base.model_copy(update={"saliency_router": True, "latent_size": 64})
    start = StartingWeights(config, 3, published)
    start.check_finite()
    with torch.device("meta"):
        model = build_model(config)
    found = {name: start(name, value.shape) for name, value in model.state_dict().items()}
    assert all(value.isfinite().all() for value in found.values())
    new = [name for name in found if "saliency_router" in name]
    assert new
    assert all(found[name].any() == ("hidden.weight" in name) for name in new)
    other = config.model_copy(update={"capacity": 8.0})  # which nothing reads: every block has its own
    StartingWeights(other, 0, published)
    assert write_config(other) == write_config(config)
    with pytest.raises(CheckpointError, match=r"set model.capacities to \(4.0, 4.0, 4.0, 1.3, 3.1\)"):
        StartingWeights(other.model_copy(update={"capacities": None}), 0, published)
    with pytest.raises(CheckpointError, match=r"model.num_experts is 4 there, 8 in the run"):
        StartingWeights(config.model_copy(update={"num_experts": 8}), 0, published)


def _without(key: str) -> Any:
    def change(folder: Path) -> None:
        tensors = load_file(folder / f"{WEIGHTS_NAME}.safetensors")
        save_file(
            {name: value for name, value in tensors.items() if name != key}, folder / f"{WEIGHTS_NAME}.safetensors"
        )

    return change


def _with_config(**fields: Any) -> Any:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | fields))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("txt_norm.weight"), "key txt_norm.weight is missing"),
        (_with_config(num_layers=6, capacity_factors=2.0), "is missing .* not the architecture|another architecture"),
        (_with_config(moe_intermediate_dim=20), "has shape .* another architecture"),
        (_with_config(depth_scale=2), "config.json: key depth_scale is unknown"),
        (_with_config(dense_moe_strategy="every_second"), "dense_moe_strategy is 'every_second', expected one of"),
        (_with_config(out_channels=8), "in_channels 16 and out_channels 8"),
        (_with_config(_class_name="QwenImageTransformer2DModel"), "_class_name is 'QwenImage"),
        (lambda folder: (folder / "config.json").unlink(), "no folder with config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda folder: (folder / f"{WEIGHTS_NAME}.safetensors").unlink(), "download the weights too"),
        (lambda folder: (folder / f"{WEIGHTS_NAME}.safetensors").write_bytes(b"no"), "not a sound safetensors file"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_line(change: Any, message: str, published: Path, tmp_path: Path) -> None:
    source = PublishedFolder(published)
    write_folder(tmp_path / "f", source.config, source.tensor, torch.bfloat16, {})
    change(tmp_path / "f")
    with pytest.raises(CheckpointError, match=message) as error:
        sharpmoe.load_pretrained(tmp_path / "f", family="nucleus")
    assert "\n" not in str(error.value)


def test_names_that_do_not_load_are_one_line(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="is read from a folder with config.json"):
        sharpmoe.load_pretrained({}, family="nucleus")
    with pytest.raises(CheckpointError, match="has no router 'ec'"):
        sharpmoe.load_pretrained(published, family="nucleus", router="ec")
    with pytest.raises(CheckpointError, match="name one"):
        sharpmoe.load_pretrained(published, family="promoe")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="Hub"):
        local_folder("nobody-at-all/no-such-model")


def test_what_diffusers_cannot_compute_is_not_exported(tmp_path: Path, published: Path) -> None:
    source = PublishedFolder(published)
    config = source.config.model_copy(update={"gate_input": "modulated"})
    with pytest.raises(CheckpointError, match="cannot compute model.gate_input 'modulated'"):
        write_folder(tmp_path / "out", config, source.tensor, torch.float32, {})
    assert not (tmp_path / "out").exists()


def test_settings_that_the_network_does_not_read_do_not_hinder_an_export(tmp_path: Path, published: Path) -> None:
    source = PublishedFolder(published)
    unread = {"latent_size": 64, "pooled_width": 7, "num_classes": 10, "class_dropout": False}
    config = source.config.model_copy(update=unread)
    write_folder(tmp_path / "out", config, source.tensor, torch.float32, {})
    assert PublishedFolder(tmp_path / "out").names == source.names
