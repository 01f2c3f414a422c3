"""What a step of sampling costs, counted: model calls, embedded x0_prev, reads back from the device; and that none of
the savings changes what is drawn.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sharpmoe import sampling
from sharpmoe.config import SampleConfig
from sharpmoe.flow import sampling_times
from sharpmoe.model.backbone import Backbone, ClassCondition, Condition, ModelOutput
from sharpmoe.model.compiled import compile_blocks
from sharpmoe.moe.routing import CallMode
from sharpmoe.sampling import CfgSettings, Request, SamplingOptions, generate, make_field
from tests.test_sampling import Recorder, captions, empty_text, request
from tests.toys import toy_config, toy_model

FAMILIES: dict[str, dict[str, Any]] = {
    "dense": {},
    "tc": {},
    "promoe_tc": {"conditioning": "class", "num_classes": 3},
    "dit_moe": {},
    "dsmoe": {"num_groups": 2, "top_groups": 1},
    "ec": {},
    "promoe_ec": {"conditioning": "class", "num_classes": 3},
    "diffmoe": {},
    "diffmoe_mask": {"capacity_selection": "mask"},
    "race": {},
}
READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")  # operators that wait for the device


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func._opname] += 1
        return func(*args, **(kwargs or {}))

    @property
    def reads(self) -> int:
        """Operators that read something back."""
        return sum(self.count[name] for name in READS)


class Split:
    """A model that serves each pool of a call by a call of its own, and prepares nothing."""

    def __init__(self, model: Backbone, parts: int) -> None:
        self.model, self.parts = model, parts

    def __call__(
        self, x_t: Tensor, t: Tensor, condition: Any, x0_prev: Tensor | None = None, mode: CallMode = CallMode()
    ) -> ModelOutput:
        rows = [torch.chunk(part, self.parts) for part in (x_t, t, *condition)]
        x0_prevs: Sequence[Tensor | None] = [None] * self.parts if x0_prev is None else x0_prev.chunk(self.parts)
        outputs = [
            self.model(x, times, type(condition)(*parts), previous)
            for (x, times, *parts), previous in zip(zip(*rows, strict=True), x0_prevs, strict=True)
        ]
        return ModelOutput(torch.cat([output.v for output in outputs]), ())


def family(name: str, **fields: Any) -> Backbone:
    model = toy_model(name.removesuffix("_mask"), **(FAMILIES[name] | fields))
    for layer in model.moe_layers():
        if hasattr(layer, "expert_threshold"):
            layer.expert_threshold.fill_(0.5)
    return model


def branches(model: Backbone, count: int) -> tuple[Condition, Condition]:
    if model.config.conditioning == "class":
        cond: Condition = ClassCondition(torch.arange(count) % 3)
        return cond, sampling.empty_condition(cond, model.config, None)
    cond = captions(count)
    tokens, mask, pooled = empty_text()
    length = cond.mask.shape[1]  # `Split` cuts a joined condition and cannot pad
    return cond, sampling.empty_condition(cond, model.config, (tokens[:length], mask[:length], pooled))


@contextmanager
def counting(*modules: nn.Module) -> Iterator[Counter[nn.Module]]:
    """Count the calls of modules."""
    calls: Counter[nn.Module] = Counter()
    hooks = [module.register_forward_hook(lambda module, *_: calls.update([module])) for module in modules]
    yield calls
    for hook in hooks:
        hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_one_call_draws_what_a_call_per_branch_or_image_would(name: str, per_image: bool) -> None:
    model = family(name).double()
    settings = CfgSettings.of(model.config, SampleConfig(cfg_scale=2.0), pool_per_image=per_image)
    x, times = torch.randn(3, 4, 8, 8, dtype=torch.float64), sampling_times(3).double()
    together = make_field(model, branches(model, 3), settings)
    apart = make_field(Split(model, 6 if per_image else 2), branches(model, 3), settings)
    drawn = sampling._euler(together, x, times, (x, x))
    assert (drawn - sampling._euler(apart, x, times, (x, x))).abs().max() < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("name", ["tc", "promoe_tc"])
def test_a_prepared_condition_changes_nothing(name: str) -> None:
    model = family(name)
    cond, _ = branches(model, 3)
    x, t = torch.randn(3, 4, 8, 8), torch.rand(3)
    assert torch.equal(model(x, t, model.prepare(cond), x).v, model(x, t, cond, x).v)


@pytest.mark.parametrize(("method", "calls"), [("euler", 4), ("heun", 7)])
def test_a_step_is_one_call_and_embeds_x0_prev_once_and_text_never(method: str, calls: int) -> None:
    model = family("diffmoe")
    texts = [model.text_embedder, *(block.cross_attn.kv for block in model.blocks)]
    with counting(model, model.x_embedder, *texts) as count:
        generate(model, model.config, SampleConfig(num_steps=4, method=method, cfg_scale=2.0), request(3))
    assert count[model] == calls
    assert count[model.x_embedder] == 2 * calls  # x_t, and x0_prev, of all layers and both branches
    assert [count[text] for text in texts] == [1] * len(texts)


@torch.no_grad()
def test_x0_prev_costs_one_embedding_and_a_router_in_each_layer() -> None:
    model = family("ec")
    cond, _ = branches(model, 2)
    x, t = torch.randn(2, 4, 8, 8), torch.rand(2)
    flops = []
    for x0_prev in (x, None):
        with FlopCounterMode(display=False) as counter:
            model(x, t, cond, x0_prev)
        flops.append(counter.get_total_flops())
    width, experts, patch = model.config.width, model.config.num_experts, 4 * model.config.patch_size**2
    layers = len(model.moe_layers())
    assert flops[0] - flops[1] == 2 * (2 * 16) * (patch * width + layers * (width + experts) * width)


@torch.no_grad()
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_the_loop_reads_nothing_back(method: str) -> None:
    field = make_field(Recorder(), (captions(2), captions(2)), CfgSettings(cfg_scale=2.0))
    x, times = torch.randn(2, 4, 8, 8), sampling_times(4)
    with Operators() as operators:
        sampling.SAMPLERS[method](field, x, times, (x, x))
    assert operators.reads == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_callback_costs_one_multiplication_a_step_and_none_is_free(name: str) -> None:
    model, settings = family(name), SampleConfig(num_steps=3, cfg_scale=2.0)
    wanted = Request(*branches(model, 2), (0, 1))
    counts = []
    for callback in (None, lambda record: None):
        with Operators() as operators:
            generate(model, model.config, settings, wanted, SamplingOptions(callback=callback))
        counts.append((operators.reads, operators.count.total()))
    (reads, total), (reads_told, total_told) = counts
    assert reads_told == reads
    assert 0 < total_told - total <= 3 * (10 + 10 * len(model.moe_layers()))  # x0_hat, and views of the records


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_reads_back_what_its_expert_layers_do(name: str) -> None:
    model = family(name)
    field = make_field(model, branches(model, 2), CfgSettings(cfg_scale=2.0, pool="image"))
    x, times = torch.randn(2, 4, 8, 8), sampling_times(2)
    with Operators() as operators:
        sampling._euler(field, x, times, (x, x))
    layers = 0
    for layer in model.moe_layers():
        condition = torch.tensor([True, False]) if model.config.unconditional_expert else None
        with Operators() as alone:
            layer(torch.randn(2, 16, 24), torch.randn(2, 16, 24), condition)
        layers += alone.reads
    assert operators.reads == 2 * layers
    assert layers == 0 or name not in ("dense", "ec")  # counts that a rule fixes are never read


@pytest.mark.sweep
def test_compiled_blocks_draw_the_same() -> None:
    settings = SampleConfig(num_steps=3, cfg_scale=2.0)
    expected = generate(family("diffmoe"), toy_config("diffmoe"), settings, request(2))
    model = compile_blocks(family("diffmoe"))
    drawn = generate(model, model.config, settings, request(2))
    assert (drawn - expected).abs().max() < 1e-5 * expected.abs().max()
