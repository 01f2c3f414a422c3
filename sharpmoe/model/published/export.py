"""Write a model in the layout of diffusers, tensor by tensor: config.json, sharded safetensors, routers beside."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sharpmoe.config import ModelConfig
from sharpmoe.durable import write_atomically
from sharpmoe.errors import CheckpointError
from sharpmoe.model.build import build_model
from sharpmoe.model.published.folder import ROUTERS_FILE, WEIGHTS_NAME, PublishedFolder, published_shapes
from sharpmoe.model.published.nucleus import join_parts, place_of, published_parts, write_config
from sharpmoe.model.weights import (
    OTHER_WEIGHTS,
    SafetensorsWriter,
    TensorSpec,
    check_finite,
    weight_specs,
    weights_writer,
)

_LARGEST_FILE = 10_000_000_000  # bytes, as diffusers cuts


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
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists and is not an empty folder; choose another place")
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {name: spec.shape for name, spec in weight_specs(config).items()}
    parts = published_parts(shapes)
    specs = {key: TensorSpec(shape, dtype) for key, shape in published_shapes(config, shapes).items()}
    files = _cut(specs, largest)
    written = []
    for name, keys in files.items():
        with SafetensorsWriter(folder / name, {key: specs[key] for key in keys}, {"format": "pt"}) as writer:
            for key in keys:
                writer.write(key, join_parts({name: tensor(name) for name in parts[key]}, config))
        written.append(folder / name)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(spec.num_bytes for spec in specs.values())},
            "weight_map": {key: name for name, keys in files.items() for key in keys},
        }
        written.append(folder / f"{WEIGHTS_NAME}.safetensors.index.json")
        write_atomically(written[-1], json.dumps(index, indent=2) + "\n")
    routers = {name: TensorSpec(shape, torch.float32) for name, shape in shapes.items() if place_of(name) is None}
    if routers:
        written.append(folder / ROUTERS_FILE)
        with SafetensorsWriter(written[-1], routers, header) as writer:
            for name in routers:
                writer.write(name, tensor(name))
    written.append(folder / "config.json")  # last: without it nothing loads the folder
    write_atomically(written[-1], json.dumps(content, indent=2) + "\n")
    return written


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
