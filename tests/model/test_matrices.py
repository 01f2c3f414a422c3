"""Which parameters are hidden matrices, and of how many each is: written out by hand for both backbones."""

import pytest
import torch
from torch import nn

from sharpmoe.config import RunConfig
from sharpmoe.errors import ConfigError
from sharpmoe.model.matrices import check_matrices, hidden_matrices, optimizer_title
from sharpmoe.model.trainable import planned_model

DIT = {
    "attn.qkv.weight": 3,
    "attn.proj.weight": 1,
    "cross_attn.q.weight": 1,
    "cross_attn.kv.weight": 2,
    "cross_attn.proj.weight": 1,
    "mlp.fc1.weight": 1,
    "mlp.fc2.weight": 1,
    "moe.experts.w1": 1,
    "moe.experts.w2": 1,
}
NUCLEUS = {f"attn.{name}.weight": 1 for name in ("q", "k", "v", "text_k", "text_v", "proj")} | {
    f"{part}.{name}.weight": 1 for part in ("mlp", "moe.shared") for name in ("gate_proj", "up_proj", "down_proj")
}
NUCLEUS |= {f"moe.experts.{name}": 1 for name in ("w1", "w2", "w3")}
SMALL = {"width": 32, "depth": 4, "num_heads": 2, "num_experts": 4}


def _run(model: dict[str, object], **sections: object) -> RunConfig:
    return RunConfig.model_validate({"model": SMALL | model, "optim": {"name": "muon"}, **sections})


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"router": "ec"}, DIT),
        ({"backbone": "nucleus", "router": "nucleus", "num_kv_heads": 1, "latent_channels": 16}, NUCLEUS),
    ],
    ids=["dit", "nucleus"],
)
def test_matrices_are_those_of_attention_feed_forward_networks_and_experts(
    model: dict[str, object], expected: dict[str, int]
) -> None:
    planned = planned_model(_run(model))
    found, used = hidden_matrices(planned), set[str]()
    for name, parameter in planned.named_parameters():
        inside = ".".join(name.split(".")[2:])
        assert (name in found) == (inside in expected and name.startswith("blocks.")), name
        if name in found:
            used.add(inside)
            assert found[name] == (parameter.shape[-2] // expected[inside], parameter.shape[-1])
    assert used == set(expected)


def test_what_is_frozen_or_adapted_is_none() -> None:
    run = _run({"router": "ec"}, train={"trainable": ["moe.experts", "modulation"]})
    model = planned_model(run)
    assert {name.rpartition(".")[2] for name in hidden_matrices(model)} == {"w1", "w2"}
    hidden = sum(p.numel() for n, p in model.named_parameters() if n.endswith(("experts.w1", "experts.w2")))
    assert optimizer_title(model, run).startswith(f"muon on {hidden / 1e6:.3f} M parameters")
    run = _run({"router": "ec"}, train={"trainable": ["saliency_router"]})
    with pytest.raises(ConfigError, match=r"optim.name is muon.*none of these is trained; set optim.name to adamw"):
        check_matrices(planned_model(run), run)
    assert optimizer_title(model, RunConfig()) == ""
    assert hidden_matrices(nn.Sequential(nn.Linear(2, 2, device=torch.device("meta")))) == {}
