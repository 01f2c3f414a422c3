"""Compiled blocks compute what they compute uncompiled, in few graphs, whatever is called in whatever order."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sharpmoe.errors import ConfigError
from sharpmoe.families import FAMILIES
from sharpmoe.model import compiled
from sharpmoe.model.backbone import Backbone, ClassCondition, Condition, ModelOutput, TextCondition
from sharpmoe.model.compiled import check_compiler, compile_blocks
from sharpmoe.moe.routing import CallMode
from tests.selection import sweep
from tests.toys import POOLED_WIDTH, TEXT_LENGTH, TEXT_WIDTH, toy_model

# Families whose experts' row counts follow from the shapes, in training and in inference: their blocks are one graph.
WHOLE = {True: {"dense", "ec", "diffmoe", "nucleus"}, False: {"dense", "ec", "nucleus"}}
FIELDS: dict[str, dict[str, Any]] = {"nucleus": {"dense_first": 2, "latent_channels": 4}} | {
    name: {"conditioning": "class", "num_classes": 3}
    for name, family in FAMILIES.items()
    if family.published.get("unconditional_expert")
}


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@dataclass(frozen=True, kw_only=True)
class Call:
    """Inputs of one call."""

    x: Tensor
    t: Tensor
    condition: Condition
    x0_prev: Tensor | None

    @classmethod
    def draw(cls, model: Backbone, seed: int = 0, side: int = 8, guided: bool = True) -> "Call":
        g = torch.Generator().manual_seed(seed)
        dtype = next(model.parameters()).dtype

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

        x, x0_prev = normal(2, 4, side, 8), normal(2, 4, side, 8)
        text = TextCondition(
            normal(2, TEXT_LENGTH, TEXT_WIDTH), torch.ones(2, TEXT_LENGTH, dtype=torch.bool), normal(2, POOLED_WIDTH)
        )
        condition = ClassCondition(torch.tensor([1, 3])) if model.config.conditioning == "class" else text
        return cls(
            x=x, t=torch.tensor([0.3, 0.7], dtype=dtype), condition=condition, x0_prev=x0_prev if guided else None
        )

    def run(self, model: Backbone, mode: CallMode = CallMode()) -> ModelOutput:
        output: ModelOutput = model(self.x, self.t, self.condition, self.x0_prev, mode)
        return output


def outcome(model: Backbone, call: Call, mode: CallMode = CallMode()) -> dict[str, Tensor]:
    """Everything that a call returns and, in training, the gradient of all of it."""
    model.zero_grad()
    with torch.set_grad_enabled(model.training):
        output = call.run(model, mode)
        found = {"v": output.v}
        for index, record in enumerate(output.routing):
            found |= {f"{index}.{name}": x for name, x in record._asdict().items() if x is not None}
        if model.training:
            weight = torch.Generator().manual_seed(5)
            parts = [x for x in found.values() if x.requires_grad]
            drawn = [torch.randn(x.shape, generator=weight, dtype=torch.float64).to(x.dtype) for x in parts]
            torch.autograd.backward(parts, drawn)
    gradients = {f"d {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: x.detach() for name, x in found.items()} | gradients


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        if x.dtype == torch.bool:
            assert torch.equal(found[name], x), name
        else:
            atol = tolerance * max(1.0, float(finite(x).abs().max()))
            torch.testing.assert_close(found[name], x, rtol=0, atol=atol, equal_nan=True)  # of idle experts


def finite(x: Tensor) -> Tensor:
    return x[x.isfinite()] if x.isfinite().any() else torch.zeros(1)


def family(name: str, training: bool) -> Backbone:
    return toy_model(name, **FIELDS.get(name, {})).double().train(training)


CASES = {name: (name, True) for name in ("diffmoe", "tc", "promoe_ec", "nucleus")} | {"sampling": ("diffmoe", False)}


@pytest.mark.slow
@pytest.mark.parametrize("case", sweep(CASES, ["diffmoe", "tc"]))
def test_compiled_equals_eager(case: str) -> None:
    name, training = CASES[case]
    whole = name in WHOLE[training]
    model = family(name, training)
    calls = [Call.draw(model, seed) for seed in (0, 1)]  # of two routings
    expected = [outcome(model, call) for call in calls]
    keys = list(model.state_dict())
    compile_blocks(model, backend="aot_eager", fullgraph=whole)
    assert list(model.state_dict()) == keys
    assert_equal(outcome(model, calls[0]), expected[0], 1e-12)
    first = graphs()
    assert_equal(outcome(model, calls[1]), expected[1], 1e-12)
    assert graphs() == first  # another routing needs no other graph
    assert not whole or first <= 2  # one for dense blocks, one for MoE blocks, whatever the depth


@pytest.mark.sweep
def test_a_graph_for_each_way_of_calling_and_size_and_no_more() -> None:
    model = family("diffmoe", training=True)
    replayed = tuple(record.routing_map for record in Call.draw(model).run(model).routing)
    modes = {
        "first run": CallMode(for_losses=False),
        "losses": CallMode(),
        "replay": CallMode(routing_maps=replayed),
        "recomputed": CallMode(recompute=True),
    }
    expected = {name: outcome(model, Call.draw(model), mode) for name, mode in modes.items()}
    wide = outcome(model, Call.draw(model, side=12))
    compile_blocks(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        for name, mode in modes.items():
            assert_equal(outcome(model, Call.draw(model), mode), expected[name], 1e-12)
        assert_equal(outcome(model, Call.draw(model, side=12)), wide, 1e-12)
    assert graphs() <= 2 * (len(modes) + 1)


@pytest.mark.sweep
@pytest.mark.timeout(900)  # g++ takes most of it
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_code_of_inductor_equals_eager() -> None:
    model = toy_model("diffmoe", depth=2).train()
    call = Call.draw(model)
    expected = outcome(model, call)
    compile_blocks(model)
    assert_equal(outcome(model, call), expected, 2e-5)


@pytest.mark.slow
def test_compiling_is_announced_once_and_its_time_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_BETWEEN_LINES", 0.0)
    model, said = toy_model("dense"), list[str]()
    compile_blocks(model, said.append, backend="aot_eager")
    assert said == []
    with torch.no_grad():
        Call.draw(model).run(model)
        first = list(said)
        Call.draw(model, side=12).run(model)
    assert first[0].startswith("note: compiling blocks: the first calls take a minute or more")
    assert [line.partition(",")[0] for line in said[1:]] == [
        "compiling blocks: graphs so far 1",
        "compiling blocks: graphs so far 2",
    ]


@pytest.mark.parametrize(("kind", "package"), [("cpu", "a C\\+\\+ compiler; install g\\+\\+"), ("cuda", "triton")])
def test_a_device_without_a_compiler_is_named(kind: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda tool: None)
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=package):
        check_compiler(torch.device(kind))
