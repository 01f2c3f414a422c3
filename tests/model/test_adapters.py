"""Low-rank adapters: attached as an identity, merged as peft merges, written in peft's format."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sharpmoe.config import LoraConfig, RunConfig
from sharpmoe.errors import ConfigError
from sharpmoe.model.adapters import (
    Adapters,
    adapter_value,
    adapters_title,
    attach_adapters,
    is_adapter,
    plain_name,
    save_adapters,
)
from sharpmoe.model.backbone import Backbone, ClassCondition
from sharpmoe.model.build import build_model
from sharpmoe.model.trainable import check_trained, planned_model, trained_names

MODEL = {"width": 24, "depth": 2, "num_heads": 2, "latent_size": 8, "num_experts": 4, "conditioning": "class"}
MODEL |= {"num_classes": 3, "shared": "gelu"}
LORA = {"rank": 2, "alpha": 6.0}

peft = pytest.importorskip("peft", reason="the extra lora is not installed")


def make(**sections: dict[str, object]) -> RunConfig:
    return RunConfig.model_validate({"model": MODEL, "lora": LORA} | sections)


def adapted(run: RunConfig) -> tuple[Backbone, Backbone]:
    """The plain model, and one with adapters and the same weights, at step 0."""
    torch.manual_seed(0)
    plain, model = build_model(run.model).eval(), build_model(run.model).eval()
    attach_adapters(model, run.lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = adapter_value(name, parameter.shape, 0) if is_adapter(name) else None
            parameter.copy_(noisy(plain.get_parameter(plain_name(name))) if value is None else value)
    return plain, model


def noisy(parameter: torch.Tensor) -> torch.Tensor:
    """Move a parameter in place, so that those that are zero at first matter."""
    return parameter.add_(0.1 * torch.randn_like(parameter))


def output(model: Backbone) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([0.1, 0.5, 0.9])
    with torch.no_grad():
        return model(x, t, ClassCondition(torch.arange(3)), x0_prev=x.flip(0)).v


def test_attention_and_shared_experts_are_adapted_and_nothing_else_is_trained() -> None:
    run = make()
    model = planned_model(run)
    adapters = Adapters.of(model, run.lora)
    assert adapters is not None
    layers = ["attn.proj", "attn.qkv"], ["attn.proj", "attn.qkv", "moe.shared.fc1", "moe.shared.fc2"]
    assert sorted(adapters.pairs) == sorted(f"blocks.{i}.{layer}.weight" for i in (0, 1) for layer in layers[i])
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert trained == {name for pair in adapters.pairs.values() for name in pair} == set(adapters.shapes)
    assert adapters.shapes["blocks.0.attn.qkv.lora_A.default.weight"] == (2, 24)
    assert adapters.shapes["blocks.0.attn.qkv.lora_B.default.weight"] == (72, 2)
    beside = make(train={"trainable": ["moe"], "frozen": ["experts", "shared"]})
    more = {name for name, each in planned_model(beside).named_parameters() if each.requires_grad} - trained
    assert more
    assert all(".moe." in name and "shared" not in name and "experts" not in name for name in more)


def test_step_0_is_the_identity_bit_for_bit_and_a_trained_one_is_merged_as_peft_merges(tmp_path: Path) -> None:
    run = make()
    plain, model = adapted(run)
    assert torch.equal(output(plain), output(model))
    adapters = Adapters.of(model, run.lora)
    assert adapters is not None
    with torch.no_grad():
        for _, b in adapters.pairs.values():
            model.get_parameter(b).normal_(generator=torch.Generator().manual_seed(len(b)))
    assert float((output(plain) - output(model)).abs().max()) > 1e-3
    state = {name: value.clone() for name, value in model.state_dict().items()}
    save_adapters(tmp_path, run.lora, {name: state[name] for name in adapters.shapes})
    merged = adapters.merge_state(state)
    loaded = peft.PeftModel.from_pretrained(_copy(plain), str(tmp_path))
    torch.testing.assert_close(output(loaded.get_base_model()), output(model), rtol=0, atol=0)
    ours, theirs = _copy(plain), loaded.merge_and_unload().state_dict()
    assert merged.keys() == theirs.keys()
    assert all(torch.equal(merged[name], theirs[name]) for name in merged)
    ours.load_state_dict(merged)
    torch.testing.assert_close(output(ours), output(model), rtol=1e-4, atol=1e-5)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.blocks.0.attn.qkv.lora_A.weight" in stored


def _copy(model: Backbone) -> Backbone:
    twin = build_model(model.config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"lora": LORA | {"targets": ["experts"]}},
            "lora.targets: 'experts' matches no linear layer.*; names of line",
        ),
        ({"lora": LORA | {"targets": ["atn"]}}, "lora.targets: 'atn' matches no linear layer; did you mean attn?"),
        (
            {"train": {"trainable": ["attn"]}},
            "train.trainable: 'attn' trains blocks.0.attn.proj.bias, which lora.targets adapts; leave it out of one",
        ),
    ],
)
def test_what_cannot_be_adapted_is_one_line(sections: dict[str, dict[str, object]], message: str) -> None:
    run = make(**sections)
    with pytest.raises(ConfigError, match=message) as caught:
        check_trained([name for name, _ in planned_model(run).named_parameters()], run)
    assert "\n" not in str(caught.value)


def test_the_two_matrices_may_have_learning_rates_of_their_own() -> None:
    run = make(optim={"lr_scale": {"lora_B": 16.0}})
    names = [name for name, _ in planned_model(run).named_parameters()]
    check_trained(names, run)
    assert all(is_adapter(name) for name in trained_names(names, run))


def test_without_the_package_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    message = r"lora.rank is 2, which needs the packages peft and accelerate; install them with `pip install"
    with pytest.raises(ConfigError, match=message):
        planned_model(make())
    planned_model(make(lora={"rank": 0}))


def test_titles() -> None:
    assert adapters_title(LoraConfig()) == ""
    assert adapters_title(LoraConfig(rank=8)) == "lora: rank 8, alpha 8 on attention and shared experts"
    assert adapters_title(LoraConfig(rank=8, alpha=16, targets=("attn",))) == "lora: rank 8, alpha 16 on attn"
