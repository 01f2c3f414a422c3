"""Weights files written tensor by tensor, read by the library."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from sharpmoe.errors import CheckpointError
from sharpmoe.model.weights import (
    SafetensorsWriter,
    StartingWeights,
    TensorSpec,
    check_finite,
    load_model,
    save_weights,
    weight_specs,
    weights_writer,
)
from tests.toys import toy_model

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool)


@settings(max_examples=40, deadline=None)
@given(
    tensors=st.dictionaries(
        st.text("abc.é", min_size=1, max_size=6),
        st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(DTYPES)),
        max_size=5,
    ),
    header=st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=3),
)
def test_the_library_reads_what_is_written(
    tensors: dict, header: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("weights") / "file.safetensors"
    values = {name: (torch.randn(shape) * 9).to(dtype) for name, (shape, dtype) in tensors.items()}
    with SafetensorsWriter(path, {k: TensorSpec(v.shape, v.dtype) for k, v in values.items()}, header) as writer:
        for name, value in values.items():
            writer.write(name, value)
    read = load_file(path)
    assert read.keys() == values.keys()
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in values.items())
    with safe_open(path, framework="pt") as file:
        assert (file.metadata() or {}) == header


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_text("before")
    with (
        pytest.raises(OSError, match="disk"),
        SafetensorsWriter(path, {"a": TensorSpec(torch.Size([1]), torch.float32)}, {}),
    ):
        raise OSError("disk full")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_one_by_one_equals_at_once(tmp_path: Path) -> None:
    model = toy_model()
    save_weights(tmp_path / "whole.safetensors", model.state_dict(), model.config, {"step": "3"})
    planned = weight_specs(model.config)
    with weights_writer(tmp_path / "parts.safetensors", planned, model.config, {"step": "3"}) as writer:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            writer.write(name, tensor)
    (one, meta), (two, other) = (load_model(tmp_path / f"{name}.safetensors") for name in ("whole", "parts"))
    assert meta == other == {"step": "3"}
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(value: float, tmp_path: Path) -> None:
    model = toy_model()
    state, path = dict(model.state_dict()), tmp_path / "w.safetensors"
    name = "blocks.1.moe.experts.w1"
    state[name] = state[name].clone()
    state[name][-1, -1, -1] = value
    with pytest.raises(CheckpointError, match=f"w.safetensors: not written: {name} holds values that are not finite"):
        save_weights(path, state, model.config)
    assert not path.exists()
    specs = weight_specs(model.config)
    with weights_writer(path, specs, model.config, {}) as writer:  # as another version may have
        for key in specs:
            writer.write(key, state[key])
    with pytest.raises(CheckpointError, match=f"w.safetensors: {name} holds values that are not finite"):
        load_model(path)
    starting = StartingWeights(model.config, 0, path)
    errors = []
    for rank in range(3):
        try:
            starting.check_finite(rank, 3)
        except CheckpointError as error:
            errors.append(str(error))
    assert len(errors) == 1  # each rank reads its share
    assert name in errors[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_values_are_finite(dtype: torch.dtype) -> None:
    most = torch.full((9,), torch.finfo(dtype).max if dtype.is_floating_point else 1, dtype=dtype)
    check_finite("a", most, "w", "fix")
