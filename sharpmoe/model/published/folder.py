"""Read Nucleus-Image from a folder in the layout of diffusers, tensor by tensor: config.json and sharded safetensors.

A file is opened when a tensor of it is asked for, and of stacked experts only those that a rank holds are read.
"""

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sharpmoe.config import ModelConfig
from sharpmoe.errors import CheckpointError
from sharpmoe.model.build import build_model
from sharpmoe.model.published.nucleus import (
    TRANSFORMER_CLASS,
    join_parts,
    place_of,
    published_parts,
    read_config,
    read_published,
)

WEIGHTS_NAME = "diffusion_pytorch_model"
ROUTERS_FILE = "saliency_routers.safetensors"  # beside the base: under our names
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class PublishedFolder:
    """The weights of a transformer/ folder, or of the pipeline folder around it, under our names.

    No tensor is read before it is asked for.
    """

    def __init__(self, path: str | Path, **changes: Any) -> None:
        """Read config.json and the names and shapes of all tensors. changes: fields of `ModelConfig` that differ.

        Raises CheckpointError where the folder is no such transformer, or keys or shapes are not those of its config.
        """
        self.path = _transformer_folder(Path(path))
        routers = self.path / ROUTERS_FILE
        own = {"saliency_router": routers.is_file(), **changes}
        self.config = read_config(read_json(self.path / "config.json"), str(self.path / "config.json"), **own)
        self._files = files_of(self.path)  # published key -> file
        self._routers = _keys_of(routers) if routers.is_file() else frozenset[str]()
        with torch.device("meta"):
            self._shapes = {name: value.shape for name, value in build_model(self.config).state_dict().items()}
        self.dtype = self._check()
        self.names = frozenset(name for name in self._shapes if place_of(name) is not None or name in self._routers)
        self.meta: Mapping[str, str] = {}

    def tensor(self, name: str, experts: range | None = None) -> Tensor:
        """Return a tensor of ours in its dtype in the file; of stacked experts (E, ...) only those in `experts`."""
        place = place_of(name)
        file = self.path / ROUTERS_FILE if place is None else self._files[place.key]
        with safe_open(file, framework="pt") as opened:
            if place is None:
                found: Tensor = opened.get_tensor(name)
                return found
            return read_published(place, opened.get_slice(place.key), self.config, experts).contiguous()

    def _check(self) -> torch.dtype:
        """Compare keys and shapes with those of the architecture; return the dtype, float32 where there are several."""
        expected = published_shapes(self.config, self._shapes)
        missing, unknown = [[*a.keys() - b.keys()] for a, b in ((expected, self._files), (self._files, expected))]
        if missing or unknown:
            key, what = (min(missing), "is missing") if missing else (min(unknown), "is unknown")
            counts = f"{len(missing)} missing, {len(unknown)} unknown"
            raise CheckpointError(
                f"{self.path}: key {key} {what} ({counts}): another architecture than its config.json"
            )
        dtypes = set()
        with ExitStack() as stack:
            opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in {*self._files.values()}}
            for key, file in self._files.items():
                found = opened[file].get_slice(key)
                if tuple(found.get_shape()) != tuple(expected[key]):
                    shapes = f"{tuple(found.get_shape())}, expected {tuple(expected[key])}"
                    raise CheckpointError(f"{file}: key {key} has shape {shapes}: another architecture")
                if found.get_dtype() not in _DTYPES:
                    kinds = ", ".join(_DTYPES)
                    raise CheckpointError(f"{file}: key {key} has dtype {found.get_dtype()}, expected one of {kinds}")
                dtypes.add(_DTYPES[found.get_dtype()])
        return dtypes.pop() if len(dtypes) == 1 else torch.float32


def published_shapes(config: ModelConfig, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """Return the shapes of the published tensors, in order, from those of ours."""
    return {
        key: join_parts({name: torch.empty(shapes[name], device="meta") for name in names}, config).shape
        for key, names in published_parts(shapes).items()
    }


def local_folder(source: str | Path) -> Path:
    """Return the local folder of a source: the source itself, or the transformer of a repository of the Hub.

    Downloads what is not cached. Raises CheckpointError where there is no such folder and nothing can be downloaded.
    """
    path = Path(source)
    if path.exists() or not _HUB_ID.fullmatch(str(source)):
        return path
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - optional, and slow to import
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(snapshot_download(str(source), allow_patterns=["transformer/*", ROUTERS_FILE, "config.json"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{source}: no such folder here, and the Hub has no such repository or cannot be reached ({reason}); "
            "download it elsewhere and give the folder"
        ) from error


def is_published_folder(path: str | Path) -> bool:
    """Whether a path is a folder with the transformer that is read here."""
    try:
        _transformer_folder(Path(path))
    except CheckpointError:
        return False
    return True


def _transformer_folder(path: Path) -> Path:
    """Return the folder of the transformer: `path`, or transformer/ in it. Raises CheckpointError."""
    for folder in (path, path / "transformer"):
        if (folder / "config.json").is_file():
            kind = read_json(folder / "config.json").get("_class_name")
            if kind == TRANSFORMER_CLASS:
                return folder
            raise CheckpointError(f"{folder}/config.json: _class_name is {kind!r}, expected {TRANSFORMER_CLASS!r}")
    raise CheckpointError(
        f"{path}: no folder with config.json, or with transformer/config.json; give the folder of Nucleus-Image as it "
        "was downloaded"
    )


def files_of(folder: Path) -> dict[str, Path]:
    """Return the file of every tensor of a transformer's folder. Raises CheckpointError."""
    index = folder / f"{WEIGHTS_NAME}.safetensors.index.json"
    single = folder / f"{WEIGHTS_NAME}.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise CheckpointError(f"{folder}: holds neither {index.name} nor {single.name}; download the weights too")
        return dict.fromkeys(_keys_of(single), single)
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict):
        raise CheckpointError(f"{index}: has no weight_map; download it again")
    files = {str(key): folder / str(name) for key, name in listed.items()}
    for file in sorted({*files.values()}):
        if not file.is_file():
            raise CheckpointError(f"{index}: lists {file.name}, which is not beside it; download it too")
        lost = sorted({key for key, place in files.items() if place == file} - _keys_of(file))
        if lost:
            raise CheckpointError(f"{file}: lacks {lost[0]}, which {index.name} lists there; download both again")
    return files


def _keys_of(file: Path) -> frozenset[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return frozenset(opened.keys())
    except SafetensorError as error:
        raise CheckpointError(f"{file}: not a sound safetensors file ({error}); download or copy it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file. Raises CheckpointError."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds no JSON object; download it again")
    return found
