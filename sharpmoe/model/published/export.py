"""Write a model in the layout of diffusers, tensor by tensor: that of Nucleus-Image, or one with our own pipeline."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharpmoe.config import ModelConfig
from sharpmoe.durable import write_atomically
from sharpmoe.errors import CheckpointError
from sharpmoe.model.build import build_model
from sharpmoe.model.published.folder import ROUTERS_FILE, WEIGHTS_NAME, PublishedFolder, published_shapes
from sharpmoe.model.published.nucleus import join_parts, place_of, published_parts, write_config
from sharpmoe.model.published.own import CODE_FILES, json_file_text, own_config, own_index
from sharpmoe.model.weights import (
    OTHER_WEIGHTS,
    SafetensorsWriter,
    TensorSpec,
    WeightsFile,
    check_finite,
    weight_specs,
    weights_header,
    weights_writer,
)

_LARGEST_FILE = 10_000_000_000  # bytes, as diffusers cuts


@dataclass(frozen=True, kw_only=True)
class PipelineExtras:
    """What a folder with a pipeline holds beside the weights."""

    card: str  # README.md
    origin: Mapping[str, str]  # codec and text encoder, as `data_pipeline.encode.like.origin_header` makes it
    sample: Mapping[str, Any]  # defaults of drawing, fields of `SampleConfig`


def write_folder(
    folder: Path,
    config: ModelConfig,
    tensor: Callable[[str], Tensor],
    dtype: torch.dtype,
    header: Mapping[str, str],
    largest: int = _LARGEST_FILE,
) -> list[Path]:
    """Write `folder` so that diffusers' `from_pretrained` loads it; return its files.

    tensor: gives a tensor of the model by its name. dtype: of the base; routers are float32, with `header`. largest:
    bytes of a file. Raises CheckpointError where diffusers cannot compute the model, or the folder holds something.
    """
    content = write_config(config)
    _make_folder(folder)
    shapes = {name: spec.shape for name, spec in weight_specs(config).items()}
    parts = published_parts(shapes)
    specs = {key: TensorSpec(shape, dtype) for key, shape in published_shapes(config, shapes).items()}
    written = _write_tensors(
        folder,
        specs,
        {"format": "pt"},
        lambda key: join_parts({name: tensor(name) for name in parts[key]}, config),
        largest,
    )
    routers = {name: TensorSpec(shape, torch.float32) for name, shape in shapes.items() if place_of(name) is None}
    if routers:
        written.append(folder / ROUTERS_FILE)
        with SafetensorsWriter(written[-1], routers, header) as writer:
            for name in routers:
                writer.write(name, tensor(name))
    written.append(folder / "config.json")  # last: without it nothing loads the folder
    write_atomically(written[-1], json_file_text(content))
    return written


def write_pipeline_folder(
    folder: Path,
    weights: WeightsFile,
    dtype: torch.dtype,
    extras: PipelineExtras,
    largest: int = _LARGEST_FILE,
) -> list[Path]:
    """Write `folder` so that diffusers' `DiffusionPipeline` and `sharpmoe.load` read it; return its files.

    The layout is that of `model.published.own`, for a model of any backbone. dtype: of the parameters; buffers are
    float32. largest: bytes of a file of tensors. Raises CheckpointError where the folder holds something, or the
    weights lack a tensor.
    """
    with torch.device("meta"):
        buffers = {name for name, _ in build_model(weights.config).named_buffers()}
    specs = {
        name: spec if name in buffers else TensorSpec(spec.shape, dtype)
        for name, spec in weight_specs(weights.config).items()
    }
    missing = sorted(specs.keys() - weights.names)
    if missing:
        raise CheckpointError(f"{weights.path}: key {missing[0]} is missing ({len(missing)} missing); {OTHER_WEIGHTS}")
    _make_folder(folder)
    inner = folder / "transformer"
    inner.mkdir()
    meta = {**weights.meta, **extras.origin}
    header = weights_header(weights.config, meta)
    written = _write_tensors(inner, specs, header, weights.tensor, largest)
    texts = {
        **CODE_FILES,
        "README.md": extras.card,
        "transformer/config.json": json_file_text(own_config(weights.config, meta)),
        "model_index.json": json_file_text(own_index(extras.sample)),  # last: without it nothing loads the folder
    }
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return [*written, *(folder / name for name in texts)]


def convert_folder(folder: PublishedFolder, out: Path, header: Mapping[str, str]) -> None:
    """Write the weights of a folder as a weights file of this project, in the folder's dtype."""
    with torch.device("meta"):
        buffers = {name for name, _ in build_model(folder.config).named_buffers()}
    specs = {
        name: spec if name in buffers else TensorSpec(spec.shape, folder.dtype)
        for name, spec in weight_specs(folder.config).items()
        if name in folder.names
    }
    with weights_writer(out, specs, folder.config, {**header, "dtype": dtype_name(folder.dtype)}) as writer:
        for name in specs:
            value = folder.tensor(name)
            check_finite(name, value, str(folder.path), OTHER_WEIGHTS)
            writer.write(name, value)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as torch spells it, without its module."""
    return str(dtype).removeprefix("torch.")


def _make_folder(folder: Path) -> None:
    """Create an empty folder. Raises CheckpointError where there is something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists and is not an empty folder; choose another place")
    folder.mkdir(parents=True, exist_ok=True)


def _write_tensors(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    header: Mapping[str, str],
    tensor: Callable[[str], Tensor],
    largest: int,
) -> list[Path]:
    """Write one file of tensors, or several with an index, one tensor at a time; return them."""
    files = _cut(specs, largest)
    for name, keys in files.items():
        with SafetensorsWriter(folder / name, {key: specs[key] for key in keys}, header) as writer:
            for key in keys:
                writer.write(key, tensor(key))
    written = [folder / name for name in files]
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(spec.num_bytes for spec in specs.values())},
            "weight_map": {key: name for name, keys in files.items() for key in keys},
        }
        written.append(folder / f"{WEIGHTS_NAME}.safetensors.index.json")
        write_atomically(written[-1], json_file_text(index))
    return written


def _cut(specs: Mapping[str, TensorSpec], largest: int) -> dict[str, list[str]]:
    """Return the files and their keys, in order."""
    groups: list[list[str]] = [[]]
    size = 0
    for key, spec in specs.items():
        if groups[-1] and size + spec.num_bytes > largest:
            groups.append([])
            size = 0
        groups[-1].append(key)
        size += spec.num_bytes
    if len(groups) == 1:
        return {f"{WEIGHTS_NAME}.safetensors": groups[0]}
    return {
        f"{WEIGHTS_NAME}-{number:05}-of-{len(groups):05}.safetensors": keys for number, keys in enumerate(groups, 1)
    }
