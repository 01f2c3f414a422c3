"""Published families against figures recorded from their public code (float32, CPU, seeded random weights)."""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import sharpmoe
from sharpmoe.config import LossConfig
from sharpmoe.errors import CheckpointError, ConfigError
from sharpmoe.flow import ddpm_input, ddpm_velocity, interpolate
from sharpmoe.losses import ROUTER_LOSSES, flow_matching
from sharpmoe.model.attach import attach, extend_to_text
from sharpmoe.model.backbone import Backbone, TextCondition
from sharpmoe.model.build import build_model
from sharpmoe.model.published.load import load_pretrained, read_pretrained
from sharpmoe.model.published.names import CONVENTIONS, ROUTERS, to_published
from sharpmoe.model.published.read import read_state
from sharpmoe.model.published.sizes import matching_families
from tests.recorded import assert_recorded
from tests.toys import toy_model

FOLDER = Path(__file__).parents[2] / "data" / "parity"
NAMES = sorted(path.stem for path in FOLDER.glob("published_*.safetensors"))
assert NAMES, f"{FOLDER} holds no published weights"


def load(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], str, str, dict[str, Any]]:
    with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
        tensors, meta = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    return tensors, weights, meta["family"], meta["router"], json.loads(meta["sizes"])


def build(name: str) -> tuple[Backbone, dict[str, Tensor]]:
    tensors, weights, family, router, sizes = load(name)
    return load_pretrained(weights, family, router, **sizes), tensors


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_same_velocity(name: str, training: bool) -> None:
    model, golden = build(name)
    with torch.no_grad():
        v = model.train(training)(golden["x_t"], golden["t"], golden["labels"]).v
    assert_recorded(v, golden["train.v" if training else "eval.v"])


@pytest.mark.parametrize("name", [name for name in NAMES if "sit" not in name])
def test_same_gate_gradients(name: str) -> None:
    model, golden = build(name)
    output = model.train()(golden["x_t"], golden["t"], golden["labels"])
    loss = flow_matching(output.v, golden["x1"] - golden["x0"])
    if "promoe" in name:
        loss = loss + ROUTER_LOSSES["contrastive"].function(output.routing, LossConfig())
    elif "dsmoe" not in name:
        loss = loss + 0.01 * ROUTER_LOSSES["balance"].function(output.routing, LossConfig())
    loss.backward()
    _, _, family, _, _ = load(name)
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    ours = to_published(gradients, model.config, family)
    theirs = {key.removeprefix("grad."): value for key, value in golden.items() if key.startswith("grad.")}
    assert theirs
    for key, gradient in theirs.items():
        assert_recorded(ours[key], gradient, what=key)


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_bit_equal(name: str) -> None:
    model, _ = build(name)
    _, weights, family, router, sizes = load(name)
    published = to_published(model.state_dict(), model.config, family)
    assert published.keys() == weights.keys()
    assert all(torch.equal(published[key], value) for key, value in weights.items())
    again = load_pretrained(published, family, router, **sizes).state_dict()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_candidates_hold_the_family(name: str) -> None:
    _, weights, family, router, _ = load(name)
    assert (family, router) in matching_families(weights)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [name for name in NAMES if "sit" not in name])
def test_attach_changes_nothing(name: str, training: bool) -> None:
    model, golden = build(name)
    inputs = golden["x_t"], golden["t"], golden["labels"]
    before = model.train(training)(*inputs).v
    assert sharpmoe.attach(model) is model
    assert all(layer.saliency_router is not None for layer in model.moe_layers())
    assert torch.equal(before, model(*inputs).v)
    assert torch.equal(before, model(*inputs, golden["x0"]).v)


def test_attach_keeps_trained_routers_and_leaves_a_dense_model(caplog: pytest.LogCaptureFixture) -> None:
    model = toy_model("ec")
    routers = [layer.saliency_router.out.weight.clone() for layer in model.moe_layers()]
    attach(model)
    assert all(
        torch.equal(old, layer.saliency_router.out.weight)
        for old, layer in zip(routers, model.moe_layers(), strict=True)
    )
    dense = toy_model("dense")
    assert attach(dense) is dense
    assert "no MoE layer" in caplog.text


@pytest.mark.parametrize("kind", ["pth", "safetensors", "folder", "training checkpoint"])
def test_sources(kind: str, tmp_path: Path) -> None:
    tensors, weights, family, router, sizes = load("published_dit_moe")
    path, options = tmp_path / "weights.pth", {}
    if kind == "pth":
        torch.save({f"module.{key}": value for key, value in weights.items()}, path)
    elif kind == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(weights, path)
    elif kind == "folder":
        path = tmp_path
        for number, keys in enumerate((list(weights)[:9], list(weights)[9:])):
            save_file({key: weights[key] for key in keys}, tmp_path / f"part-{number}.safetensors")
    else:
        zeros = {key: torch.zeros_like(value) for key, value in weights.items()}
        held = {"model_state_dict": weights, "ema_model_state_dict": zeros, "args": argparse.Namespace(lr=1), "step": 3}
        torch.save(held, path)
        options = {"weights": "model"}
        assert not load_pretrained(path, family, router, **sizes)(
            tensors["x_t"], tensors["t"], tensors["labels"]
        ).v.any()
    model = load_pretrained(path, family, router, **sizes, **options)
    assert_recorded(model(tensors["x_t"], tensors["t"], tensors["labels"]).v, tensors["eval.v"])


def test_the_report_says_what_was_assumed(caplog: pytest.LogCaptureFixture) -> None:
    _, weights, family, router, sizes = load("published_dsmoe")
    _, report = read_pretrained(weights, family, router, **{**sizes, "latent_size": None, "saliency_router": True})
    assert report.assumed == {"num_classes": 10, "class_dropout": True, "positions": "rope_2d", "latent_size": 32}
    assert all("saliency_router" in key for key in report.new)
    assert len(report.new) == 8
    with caplog.at_level(logging.INFO, logger="sharpmoe.model.published.load"):
        load_pretrained(weights, family, router, **sizes)
    assert "0 unmatched" in caplog.text


@pytest.mark.parametrize(
    ("change", "names", "message"),
    [
        ({}, ("kwai", "dsmoe"), "family 'kwai' has no router 'dsmoe'"),
        ({"blocks.1.mlp.sinks": torch.zeros(2)}, ("dsmoe", "dsmoe"), "key blocks.1.moe.sinks is unknown"),
        ({"blocks.0.attn.qkv.bias": None}, ("dsmoe", "dsmoe"), "key blocks.0.attn.qkv.bias is missing"),
        ({"blocks.1.mlp.experts.blocks.2.up_proj.weight": None}, ("dsmoe", "dsmoe"), "expert 2 of 8 has no up_proj"),
        ({"x_embedder.proj.weight": None}, ("dsmoe", "dsmoe"), "x_embedder.proj.weight is missing"),
        (
            {},
            ("promoe", "dense"),
            "with router dense: its key blocks.1.mlp.experts.* and the others fit dsmoe/dsmoe; name one",
        ),
    ],
)
def test_what_does_not_match_is_an_error(change: dict, names: tuple[str, str], message: str) -> None:
    _, weights, _, _, sizes = load("published_dsmoe")
    changed = {key: value for key, value in (weights | change).items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(changed, *names, **sizes)


@pytest.mark.parametrize(
    ("family", "positions"), [("sit", "sincos"), ("dit", "sincos"), ("promoe", "sincos"), ("dsmoe", "rope_2d")]
)
def test_a_file_without_positions_has_those_of_its_family(family: str, positions: str) -> None:
    name = next(name for name in NAMES if "sit" in name)
    _, weights, _, router, sizes = load(name)
    without = {key: value for key, value in weights.items() if key != "pos_embed"}
    assert len(without) == len(weights) - 1
    model, report = read_pretrained(without, family, router, **{**sizes, "latent_size": 8})
    assert model.config.positions == report.assumed["positions"] == positions
    assert "pos_embed" not in report.loaded
    if positions == "sincos":
        whole, _ = read_pretrained(weights, family, router, **sizes)
        torch.testing.assert_close(model.state_dict()["pos_embed"], whole.state_dict()["pos_embed"])


@pytest.mark.parametrize("learned", [False, True])
def test_positions_of_another_size_are_made_on_request(learned: bool) -> None:
    name = next(name for name in NAMES if "sit" in name)
    _, weights, family, router, sizes = load(name)
    table = weights["pos_embed"]
    side = round(table.shape[1] ** 0.5)
    if learned:
        table = torch.randn_like(table)
    given = weights | {"pos_embed": table}
    same, report = read_pretrained(given, family, router, **sizes)
    assert same.config.latent_size == 2 * side
    assert report.computed == ()
    model, report = read_pretrained(given, family, router, **sizes, latent_size=4 * side)
    made = model.state_dict()["pos_embed"]
    assert made.shape == (1, 4 * side**2, table.shape[2])
    assert report.computed == ("pos_embed",)
    assert "pos_embed" not in report.loaded
    if learned:  # neighbours of a token of the old grid lie around it
        old = table.reshape(side, side, -1)
        near = made.reshape(side, 2, side, 2, -1).mean((1, 3))
        assert torch.nn.functional.cosine_similarity(old, near, dim=-1).min() > 0.7
    else:  # as the model would have been built
        expected = build_model(model.config).get_buffer("pos_embed")
        assert torch.equal(made, expected)
    with torch.no_grad():
        assert model(torch.randn(1, 4, 4 * side, 4 * side), torch.tensor([0.5]), torch.tensor([0])).v.isfinite().all()


@pytest.mark.parametrize("rows", [1000, 1001])
def test_a_label_table_is_read_with_or_without_a_row_for_no_class(rows: int) -> None:
    _, weights, family, router, sizes = load(next(name for name in NAMES if "sit" in name))
    key = "y_embedder.embedding_table.weight"
    given = weights | {key: torch.randn(rows, weights[key].shape[1])}
    model, report = read_pretrained(given, family, router, **sizes)
    assert (model.config.num_classes, model.config.class_dropout) == (1000, rows == 1001)
    assert "num_classes" not in report.assumed


def test_a_label_table_of_other_data_follows_the_family_or_the_caller() -> None:
    _, weights, family, router, sizes = load(next(name for name in NAMES if "sit" in name))
    rows = len(weights["y_embedder.embedding_table.weight"])
    model, report = read_pretrained(weights, family, router, **sizes)
    assert (model.config.num_classes, model.config.class_dropout) == (rows - 1, True)
    assert report.assumed["num_classes"] == rows - 1
    model, report = read_pretrained(weights, family, router, **sizes, num_classes=rows)
    assert (model.config.num_classes, model.config.class_dropout) == (rows, False)
    assert "num_classes" not in report.assumed
    with pytest.raises(CheckpointError, match=f"has {rows} rows, but num_classes is 3"):
        read_pretrained(weights, family, router, **sizes, num_classes=3)
    with pytest.raises(ConfigError, match="extended to text"):
        read_pretrained(weights, family, router, **sizes, num_classes=rows, conditioning="text")


def test_the_report_counts_what_is_new_unused_and_computed() -> None:
    _, weights, family, router, sizes = load(next(name for name in NAMES if "sit" in name))
    without = {key: value for key, value in weights.items() if key != "pos_embed"}
    model, report = read_pretrained(
        without, family, router, **sizes, latent_size=8, conditioning="text", text_width=7, pooled_width=5
    )
    names = [name for name, _ in model.named_parameters()]
    assert sorted(report.new) == sorted(name for name in names if "cross_attn" in name or "text_embedder" in name)
    assert sorted(report.loaded) == sorted(set(names) - set(report.new))
    assert report.unused == ("y_embedder.table.weight",)
    assert report.computed == ("pos_embed",)
    text = "\n".join(report.lines())
    new = sum(p.numel() for name, p in model.named_parameters() if name in report.new)
    assert f"new         {len(report.new)} parameter tensors ({new / 1e6:.3f} million) with initial values" in text
    assert "unused      1 tensor of the file: y_embedder.table.weight" in text
    assert "computed    1 buffer: pos_embed" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos_embed": torch.zeros(1, 15, 16)}, "N tokens of a square grid"),
        ({"final_layer.linear.weight": torch.zeros(24, 16)}, "gives 24 numbers per patch"),
        ({"x_embedder.proj.weight": torch.zeros(16, 16)}, "^state dict: x_embedder.proj.weight has shape"),
        ({"blocks.x.mlp.fc1.weight": torch.zeros(1)}, "key blocks.x.mlp.fc1.weight is unknown"),
    ],
)
def test_shapes_that_no_family_has_are_one_line(change: dict[str, Tensor], message: str) -> None:
    _, weights, family, router, sizes = load(next(name for name in NAMES if "sit" in name))
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(weights | change, family, router, **sizes)


@pytest.mark.parametrize("name", NAMES)
def test_a_router_that_a_file_cannot_be_is_refused(name: str) -> None:
    _, weights, _, _, _ = load(name)
    fitting = matching_families(weights)
    for other in ROUTERS:
        for wrong in ROUTERS[other]:
            if (other, wrong) not in fitting:
                with pytest.raises(
                    CheckpointError,
                    match=f"cannot be of family {other} with router {wrong}: its key"
                    if other in CONVENTIONS
                    else "read from a folder with config.json",
                ):
                    read_pretrained(weights, other, wrong)


def test_tensors_of_other_layouts_are_read_as_their_values() -> None:
    _, weights, family, router, sizes = load("published_dsmoe")
    key = next(key for key, value in weights.items() if value.ndim == 2)
    small = weights[key].to(torch.float8_e4m3fn)
    for given in (small, small.float().to_sparse(), small.float().to_sparse_csr()):
        assert torch.equal(read_state(weights | {key: given}).tensors[key], small.float())
    load_pretrained(weights | {key: small}, family, router, **sizes)


@pytest.mark.parametrize("kind", ["quantised", "complex", "meta"])
def test_tensors_that_are_no_numbers_are_named(kind: str) -> None:
    made = {
        "quantised": lambda: torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8),
        "complex": lambda: torch.ones(2, dtype=torch.complex64),
        "meta": lambda: torch.ones(2, device="meta"),
    }[kind]()
    with pytest.raises(CheckpointError, match="the state dict: a.b is a tensor .*, expected real numbers"):
        read_state({"a.b": made})


def test_sizes_that_contradict_the_tensors_are_an_error() -> None:
    _, weights, family, router, sizes = load("published_dsmoe")
    with pytest.raises(CheckpointError, match="shape"):
        load_pretrained(weights, family, router, **{**sizes, "num_experts": 4, "n_group": 2, "width": 32})
    with pytest.raises(CheckpointError, match="give num_heads"):
        load_pretrained(weights, family, router, latent_size=8)


def test_weights_are_not_written_under_a_foreign_time() -> None:
    model = toy_model("ec", conditioning="class", num_classes=3)
    with pytest.raises(CheckpointError, match="family kwai feeds"):
        to_published(model.state_dict(), model.config, "kwai")


def test_every_family_has_a_convention() -> None:
    assert CONVENTIONS.keys() | {"nucleus"} == ROUTERS.keys()  # the config.json of its folder says it


def test_a_noise_predictor_that_knows_the_data_gives_the_velocity() -> None:
    """A DDPM network that returns the true noise must come out as noise - data at every time of the schedule."""
    g = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, 5, 4, 8, 8, generator=g, dtype=torch.float64)
    t = torch.tensor([0.02, 0.3, 0.5, 0.9, 0.99], dtype=torch.float64)
    scaled, step = ddpm_input(interpolate(x0, x1, t), t)
    assert (step.diff() > 0).all()
    torch.testing.assert_close(ddpm_velocity(scaled, x1, step), x1 - x0)
    torch.testing.assert_close(scaled.var(), torch.tensor(1.0, dtype=torch.float64), rtol=0.1, atol=0)


def test_a_ddpm_mixture_is_asked_for_its_velocity() -> None:
    """DiT-MoE's smaller checkpoints are DDPMs: the same network, asked at the step of equal signal-to-noise ratio."""
    _, weights, _, router, sizes = load("published_dit_moe")
    flow, ddpm = (load_pretrained(weights, family, router, **sizes) for family in ("dit_moe", "dit"))
    x_t, t, labels = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8]), torch.tensor([1, 2])
    scaled, step = ddpm_input(x_t, t)
    with torch.no_grad():
        noise = flow(scaled, step, labels).v
        expected = ddpm_velocity(scaled, noise, step)
        torch.testing.assert_close(ddpm(x_t, t, labels).v, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["published_kwai_tc_shared", "published_dsmoe", "published_sit"])
def test_a_trunk_extended_to_text_is_unchanged(name: str) -> None:
    _, weights, family, router, sizes = load(name)
    trunk, golden = build(name)
    model = load_pretrained(weights, family, router, conditioning="text", text_width=7, pooled_width=5, **sizes)
    text = TextCondition(torch.randn(4, 3, 7), torch.ones(4, 3, dtype=torch.bool), torch.randn(4, 5))
    labels = torch.full((4,), trunk.config.num_classes)
    assert torch.equal(model(golden["x_t"], golden["t"], text).v, trunk(golden["x_t"], golden["t"], labels).v)


def test_an_extended_trunk_keeps_its_codec() -> None:
    name = "published_dsmoe"
    trunk = build(name)[0]
    trunk.origin = {"codec": "{}", "encoder": "{}", "codec_file": "AA=="}
    assert extend_to_text(trunk).origin == {"codec": "{}", "codec_file": "AA=="}


def test_an_unconditional_expert_is_not_extended() -> None:
    with pytest.raises(ConfigError, match="extended to text"):
        extend_to_text(build("published_promoe_ec")[0])
