"""A replayed call computes what the call computes, whatever came before; the host records here in place of CUDA."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sharpmoe import sampling
from sharpmoe.config import SampleConfig
from sharpmoe.errors import ConfigError
from sharpmoe.model.backbone import Backbone, ClassCondition, ModelOutput, TextCondition
from sharpmoe.model.captured import Recorded, _replace_forward, capture_calls, check_capture
from sharpmoe.moe.routing import CallMode
from tests.model.test_compiled import Call
from tests.toys import toy_model


class HostRecorder:
    """Makes a call again as a graph would: on the tensors of the first time, into the tensors that it returned."""

    def __init__(self) -> None:
        self.recorded, self.replays = 0, 0

    def __call__(self, call: Callable[[], ModelOutput], device: torch.device) -> Recorded:
        assert device.type == "cpu"
        self.recorded += 1
        output = call()

        def replay() -> None:
            self.replays += 1
            for kept, new in zip(tree_leaves(output), tree_leaves(call()), strict=True):
                if isinstance(kept, Tensor):
                    kept.copy_(new)

        return Recorded(output, replay)


def captured(model: Backbone) -> tuple[Backbone, HostRecorder]:
    recorder = HostRecorder()
    return _replace_forward(model, recorder), recorder


def tensors(output: ModelOutput) -> list[Tensor]:
    return [leaf.clone() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


@torch.no_grad()
@pytest.mark.parametrize("router", ["ec", "tc", "dense"])
def test_replayed_calls_give_the_bits_of_calls(router: str) -> None:
    model = toy_model(router)
    calls = [Call.draw(model, seed, side, guided) for seed, side, guided in [(0, 8, True), (1, 8, True), (2, 8, False)]]
    calls += [Call.draw(model, 3, 16), calls[0]]
    modes = [CallMode(), CallMode(pools=2)]
    expected = [tensors(call.run(model, mode)) for call in calls for mode in modes]
    _, recorder = captured(model)
    outputs = [call.run(model, mode) for call in calls for mode in modes]
    for output, wanted in zip(outputs, expected, strict=True):  # after all calls: none has written over another's
        assert all(map(torch.equal, tensors(output), wanted))
    assert recorder.recorded == 6  # three shapes of inputs, in two modes
    assert recorder.replays == len(outputs)


@torch.no_grad()
def test_a_condition_that_changes_in_place_or_is_another_is_read_again() -> None:
    plain, model = toy_model("ec"), toy_model("ec")
    captured(model)
    call, other = Call.draw(model), Call.draw(model, 1)
    for condition in (call.condition, call.condition, other.condition):
        found = model(call.x, call.t, condition, call.x0_prev).v
        assert torch.equal(found, plain(call.x, call.t, condition, call.x0_prev).v)
        assert isinstance(condition, TextCondition)
        condition.tokens.mul_(1.5)
        found = model(call.x, call.t, condition, call.x0_prev).v
        assert torch.equal(found, plain(call.x, call.t, condition, call.x0_prev).v)


def test_inference_mode_has_graphs_of_its_own() -> None:
    plain, model = toy_model("ec"), toy_model("ec")
    _, recorder = captured(model)
    call = Call.draw(model)
    with torch.no_grad():
        expected = call.run(plain).v
        assert torch.equal(call.run(model).v, expected)
    with torch.inference_mode():
        assert torch.equal(call.run(model).v, expected)
        assert torch.equal(Call.draw(model).run(model).v, expected)
    with torch.no_grad():
        assert torch.equal(call.run(model).v, expected)
    assert recorder.recorded == 2


def test_training_gradients_and_replayed_choices_are_not_captured() -> None:
    model, recorder = captured(toy_model("ec"))
    call = Call.draw(model)
    call.run(model).v.sum().backward()
    assert all(parameter.grad is not None for parameter in model.moe_layers()[0].experts.parameters())
    with torch.no_grad():
        call.run(model.train())
        maps = tuple(record.routing_map for record in call.run(model.eval()).routing)
        before = recorder.recorded
        call.run(model, CallMode(routing_maps=maps))
    assert (before, recorder.recorded) == (1, 1)


@torch.no_grad()
def test_weights_may_change_in_place_and_a_cast_model_is_recorded_anew() -> None:
    model, recorder = captured(toy_model("ec"))
    call = Call.draw(model)
    first = call.run(model).v
    for parameter in model.parameters():
        parameter.mul_(1.1)
    assert not torch.equal(call.run(model).v, first)
    assert recorder.recorded == 1
    call.run(model.to(torch.bfloat16))
    assert recorder.recorded == 2


def test_sampling_draws_the_same_images() -> None:
    plain, model = (toy_model("ec", conditioning="class", num_classes=3) for _ in range(2))
    _, recorder = captured(model)
    cond = ClassCondition(torch.tensor([0, 1, 2, 0, 1]))
    request = sampling.Request(cond, sampling.empty_condition(cond, model.config, None), tuple(range(5)))
    for method, calls in (("euler", 6), ("heun", 10)):
        settings, options = SampleConfig(num_steps=3, method=method), sampling.SamplingOptions(batch_size=2)
        expected = sampling.generate(plain, plain.config, settings, request, options)
        recorder.replays = 0
        assert torch.equal(sampling.generate(model, model.config, settings, request, options), expected)
        assert recorder.replays == calls // 2 * 3  # three batches
    assert recorder.recorded == 2  # of two images and of one


def on(device: str, model: Backbone) -> Any:
    """The model as `check_capture` sees it on a device."""
    weight = SimpleNamespace(device=torch.device(device), dtype=next(model.parameters()).dtype)
    return SimpleNamespace(parameters=lambda: iter([weight]), config=model.config, moe_layers=model.moe_layers)


@pytest.mark.parametrize(
    ("router", "dtype", "message"),
    [
        ("diffmoe", torch.float32, "known on the device alone with model.router diffmoe"),
        ("race", torch.bfloat16, "model.router race"),
        ("tc", torch.float32, "with model.router tc they need bfloat16"),
        ("tc", torch.bfloat16, ""),
        ("ec", torch.float32, ""),
        ("dense", torch.float32, ""),
    ],
)
def test_what_cannot_be_replayed_is_one_line(router: str, dtype: torch.dtype, message: str) -> None:
    model = on("cuda", toy_model(router).to(dtype))
    if not message:
        check_capture(model)
        return
    with pytest.raises(ConfigError, match=message):
        check_capture(model)


def test_a_model_on_the_host_and_a_call_that_fails_are_one_line() -> None:
    with pytest.raises(ConfigError, match="the model is on the cpu, expected cuda; leave out"):
        capture_calls(toy_model("ec"))

    def failing(call: Callable[[], ModelOutput], device: torch.device) -> Recorded:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model = _replace_forward(toy_model("ec"), failing)
    with (
        torch.no_grad(),
        pytest.raises(ConfigError, match=r"captured \(operation not permitted when stream is capturing\)"),
    ):
        Call.draw(model).run(model)
