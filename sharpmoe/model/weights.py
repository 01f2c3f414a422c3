"""Weights files of this project: a state dict as safetensors, with the architecture in the file's header.

Files are written and read tensor by tensor, so that the model of many ranks need not be complete on any host. The
library's own writer takes all tensors at once. The format is a JSON header of names, types, shapes and byte ranges,
then the bytes (https://github.com/huggingface/safetensors#format); the tests read with the library what is written
here. Published checkpoints of other projects: `sharpmoe.model.published`.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from sharpmoe.config import ModelConfig
from sharpmoe.durable import atomic_draft
from sharpmoe.errors import CheckpointError
from sharpmoe.invocation import spell_command
from sharpmoe.model.adapters import adapter_value, is_adapter, plain_name
from sharpmoe.model.backbone import Backbone
from sharpmoe.model.build import BACKBONES, build_model
from sharpmoe.model.initial import initial_value
from sharpmoe.model.published.folder import PublishedFolder, files_of, is_published_folder
from sharpmoe.model.published.own import own_folder, read_own_config
from sharpmoe.shipped_files import find_shipped

_FORMAT = "sharpmoe-1"
_NEW_ALLOWED = "saliency_router"  # the part that a base checkpoint may lack: it starts as an identity
OTHER_WEIGHTS = "use weights of an earlier checkpoint, or other ones"
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8  # of the first byte after the header


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor that is going to be written."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class SafetensorsWriter:
    """Write a safetensors file one tensor at a time; use it as a context. The file appears when it is complete.

    An exception in the body leaves no file, and an existing file as it was.
    """

    def __init__(self, path: str | Path, specs: Mapping[str, TensorSpec], header: Mapping[str, str]) -> None:
        """Write the header: every tensor's name, shape and dtype, in the order of the file. Raises OSError."""
        assert sys.byteorder == "little"
        self._specs, self._left = specs, list(specs)
        with ExitStack() as stack:
            draft = stack.enter_context(atomic_draft(Path(path)))
            self._file = stack.enter_context(draft.open("wb"))
            self._file.write(_encoded_header(specs, header))
            self._stack = stack.pop_all()

    def write(self, name: str, value: Tensor) -> None:
        """Append the next tensor, converted to its dtype in the file. Raises OSError."""
        assert self._left
        assert name == self._left.pop(0), name
        spec = self._specs[name]
        assert value.shape == spec.shape, name
        whole = value.detach().to("cpu", spec.dtype).contiguous()
        self._file.write(whole.reshape(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert kind is not None or not self._left, f"{self._left[0]} was not written"
        self._stack.__exit__(kind, error, trace)


def _encoded_header(specs: Mapping[str, TensorSpec], header: Mapping[str, str]) -> bytes:
    content: dict[str, object] = {"__metadata__": dict(header)}
    start = 0
    for name, spec in specs.items():
        end = start + spec.num_bytes
        content[name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def save_weights(
    path: str | Path, state: Mapping[str, Tensor], config: ModelConfig, meta: Mapping[str, str] | None = None
) -> None:
    """Write a state dict as safetensors with the architecture and `meta` in its header, atomically.

    Raises OSError, and CheckpointError where a value is not finite.
    """
    specs = {name: TensorSpec(value.shape, value.dtype) for name, value in state.items()}
    for name, value in state.items():
        check_finite(name, value, f"{path}: not written", "use other weights, or a dtype with a larger range")
    with weights_writer(path, specs, config, meta or {}) as writer:
        for name, value in state.items():
            writer.write(name, value)


def check_finite(name: str, value: Tensor, where: str, fix: str) -> None:
    """Raise CheckpointError where a tensor holds NaN or infinity. One pass, and no second tensor of its size."""
    if not value.is_floating_point():
        return
    # In float64 no sum of finite values of a smaller dtype overflows.
    small = value.dtype != torch.float64
    if not (value.sum(dtype=torch.float64).isfinite() if small else value.isfinite().all()):
        raise CheckpointError(f"{where}: {name} holds values that are not finite (NaN or infinity); {fix}")


def weight_specs(config: ModelConfig) -> dict[str, TensorSpec]:
    """Return what a weights file of this architecture holds: parameters, then buffers, float32."""
    with torch.device("meta"):
        model = build_model(config)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: TensorSpec(tensor.shape, torch.float32) for name, tensor in tensors}


def weights_writer(
    path: str | Path, specs: Mapping[str, TensorSpec], config: ModelConfig, meta: Mapping[str, str]
) -> SafetensorsWriter:
    """Open a weights file for the tensors of a model, to be written one at a time, in order. Raises OSError."""
    return SafetensorsWriter(path, specs, weights_header(config, meta))


def weights_header(config: ModelConfig, meta: Mapping[str, str]) -> dict[str, str]:
    """Return the header of a weights file of an architecture."""
    return {"format": _FORMAT, "model": config.model_dump_json(), **meta}


def stored_as(state: Mapping[str, Tensor], model: Backbone, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a state dict with the parameters of `model` in `dtype`, for a smaller file. Buffers stay float32."""
    parameters = {name for name, _ in model.named_parameters()}
    return {key: value.to(dtype) if key in parameters else value for key, value in state.items()}


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], ModelConfig, dict[str, str]]:
    """Read a weights file of this project: tensors, architecture, meta. CheckpointError says what is wrong with it.

    `path` may be a folder that `export.py --to diffusers` has written, of which config.json is the header.
    """
    path = find_shipped(path)
    folder = own_folder(path)
    config, meta = _read_header(path) if folder is None else read_own_config(folder)
    files = [Path(path)] if folder is None else sorted({*files_of(folder).values()})
    try:
        state = {name: value for file in files for name, value in load_file(file).items()}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a sound safetensors file ({error}); copy or export it again") from error
    for name, value in state.items():
        check_finite(name, value, str(path), OTHER_WEIGHTS)
    return state, config, meta


def is_own_weights(path: str | Path) -> bool:
    """Whether a sound safetensors file was written by this project. Raises SafetensorError and OSError."""
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("format") == _FORMAT


def _read_header(path: str | Path) -> tuple[ModelConfig, dict[str, str]]:
    """Read architecture and meta of a weights file without its tensors. Raises CheckpointError as `read_weights`."""
    path = find_shipped(path)
    if is_published_folder(path):
        raise CheckpointError(
            f"{path}: is Nucleus-Image in the layout of diffusers, not a weights file of this project; "
            f"`{spell_command('convert')} {path} OUT.safetensors --family nucleus` writes one"
        )
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file; give the path of a .safetensors written by this project")
    try:
        with safe_open(path, framework="pt") as file:
            meta = dict(file.metadata() or {})
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: not a sound safetensors file ({error}); copy or export it again, or convert published weights "
            f"first (`{spell_command('convert')}`)"
        ) from error
    if meta.get("format") != _FORMAT or "model" not in meta:
        raise CheckpointError(
            f"{path}: format {meta.get('format')!r}, expected {_FORMAT!r}: not written by this project; convert "
            f"published weights first (`{spell_command('convert')}`)"
        )
    try:
        config = ModelConfig(**json.loads(meta["model"]))
    except (ValidationError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path}: its header holds an architecture that cannot be read; export it again"
        ) from error
    return config, {key: value for key, value in meta.items() if key not in ("format", "model")}


class _Source(Protocol):
    """Weights that are read tensor by tensor."""

    config: ModelConfig
    names: frozenset[str]  # of the tensors that it has

    @property
    def meta(self) -> Mapping[str, str]:
        """What is known of its origin."""
        ...

    def tensor(self, name: str, experts: range | None = None) -> Tensor:
        """Return one tensor; of stacked experts (E, ...) only those in `experts`."""
        ...


class WeightsFile:
    """Weights of this project, read tensor by tensor: a file, or a folder of `export.py --to diffusers`."""

    def __init__(self, path: str | Path) -> None:
        """Read the header of `path`. Raises CheckpointError as `read_weights`."""
        self.path = path = find_shipped(path)
        # Files stay open: a checkpoint may be deleted while a run that started from it goes on.
        self._opened: dict[Path, Any] = {}
        folder = own_folder(path)
        self.config, self.meta = _read_header(path) if folder is None else read_own_config(folder)
        self._files, self.shapes = dict[str, Path](), dict[str, torch.Size]()
        for place in [Path(path)] if folder is None else sorted({*files_of(folder).values()}):
            with safe_open(place, framework="pt") as file:
                found = {key: torch.Size(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            self.shapes |= found
            self._files |= dict.fromkeys(found, place)
        self.names = frozenset(self.shapes)

    def tensor(self, name: str, experts: range | None = None) -> Tensor:
        """Return one tensor; of stacked experts (E, ...) only those in `experts`."""
        file = self._files[name]
        if file not in self._opened:
            self._opened[file] = safe_open(file, framework="pt")
        whole = self._opened[file].get_slice(name)
        value: Tensor = whole[:] if experts is None else whole[experts.start : experts.stop]
        return value


def _open_weights(path: str | Path, expected: ModelConfig) -> _Source:
    if not is_published_folder(path):
        file = WeightsFile(path)
        check_architecture(file.config, expected, str(path))
        with torch.device("meta"):
            own = {key: value.shape for key, value in build_model(expected).state_dict().items()}
        _check_keys(own, file.shapes, str(path))
        return file
    free = {key: getattr(expected, key) for key in ("capacity_selection", *expected.architecture.ignores)}
    folder = PublishedFolder(path, **free)
    check_architecture(folder.config, expected, str(path))
    return folder


def read_architecture(path: str | Path) -> ModelConfig:
    """Return the architecture of a file or folder that `load_model` takes, without its tensors. CheckpointError."""
    return PublishedFolder(path).config if is_published_folder(path) else WeightsFile(path).config


class StartingWeights:
    """The values of a model's tensors before the first step: those of a weights file, or drawn where it has none.

    Called once per tensor, so that the model is never complete on one host: the file is read tensor by tensor, and of
    stacked experts only those that a rank holds. A folder of Nucleus-Image is read so too.
    """

    def __init__(self, config: ModelConfig, seed: int, path: str | Path | None = None) -> None:
        """Read the header of `path`. Raises CheckpointError where its architecture differs."""
        self.config, self.seed, self.path = config, seed, path
        self._source = None if path is None else _open_weights(path, config)
        self.meta = {} if self._source is None else dict(self._source.meta)
        self.latent_frames = None if self._source is None else self._source.config.latent_frames  # of the file

    def __call__(self, name: str, shape: Sequence[int], experts: range | None = None) -> Tensor:
        """Return one parameter or buffer, float32 on the host; of stacked experts (E, ...) only those in `experts`.

        The names are those of the model, with adapters, which no file holds and which are drawn, or without.
        """
        if is_adapter(name):
            return adapter_value(name, shape, self.seed)
        name = plain_name(name)
        if self._source is None or name not in self._source.names:
            rules = BACKBONES[self.config.backbone].initial
            return initial_value(name, shape, self.config, self.seed, rules, experts)
        return self._source.tensor(name, experts).float()

    def check_finite(self, rank: int = 0, size: int = 1) -> None:
        """Read this rank's share of the file; CheckpointError where a value is not finite. No communication."""
        names = () if self._source is None else sorted(self._source.names)[rank::size]
        for name in names:
            assert self._source is not None
            check_finite(name, self._source.tensor(name), str(self.path), OTHER_WEIGHTS)


def build_from_folder(
    folder: PublishedFolder, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Backbone:
    """Build the model of a folder tensor by tensor, in eval mode: the host never holds two of them.

    Parameters are in `dtype`, buffers float32; those that the folder lacks are drawn anew. Raises CheckpointError where
    a value is not finite.
    """
    drawn = StartingWeights(folder.config, int(torch.randint(2**62, ())))
    with torch.device("meta"):
        model = build_model(folder.config)
    for name, planned in [*model.named_parameters(), *model.named_buffers()]:
        value = folder.tensor(name) if name in folder.names else drawn(name, planned.shape)
        check_finite(name, value, str(folder.path), OTHER_WEIGHTS)
        owner, last = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if isinstance(planned, nn.Parameter):
            setattr(owner, last, nn.Parameter(value.to(device, dtype)))
        else:
            setattr(owner, last, value.to(device, torch.float32))
    return model.eval()


def load_model(path: str | Path) -> tuple[Backbone, dict[str, str]]:
    """Build the model of a weights file or folder, float32, in eval mode; return it with what is known of its origin.

    `path`: as `read_weights`, or a folder of Nucleus-Image in the layout of diffusers, which says nothing of it. Raises
    CheckpointError.
    """
    if is_published_folder(path):
        return build_from_folder(PublishedFolder(path)), {}
    state, config, meta = read_weights(path)
    model = build_model(config)
    copy_state(model, state, str(path))
    return model.eval(), meta


def check_architecture(found: ModelConfig, expected: ModelConfig, where: str, may_attach: bool = True) -> None:
    """Raise CheckpointError on the first field in which the architecture of `where` differs from the run's.

    may_attach: the run may add saliency routers that the weights lack, or leave theirs out; not on resuming a run,
    whose optimizer state covers every parameter. It may also have another number of frames, on which no tensor depends.
    """
    free = {"preset", "capacity_selection", *expected.architecture.ignores}
    free |= {"saliency_router", "latent_frames"} if may_attach else set()
    if found.capacities is not None or expected.capacities is not None:  # each block has its own
        free.add("capacity")
    resolved = {  # None stands for a computed one
        "expert_hidden": "expert_width",
        "shared_hidden": "shared_width",
        "mlp_hidden": "mlp_width",
        "num_kv_heads": "kv_heads",
        "rope_axes": "head_axes",
    }
    for field in ModelConfig.model_fields:
        have, want = (getattr(config, resolved.get(field, field)) for config in (found, expected))
        if field not in free and have != want:
            other = "use other weights"
            if field == "latent_size":
                other += (
                    f" (`{spell_command('convert')} --latent-size {want}` makes positions of another "
                    "size for a published file)"
                )
            raise CheckpointError(
                f"{where}: model.{field} is {have!r} there, {want!r} in the run; set model.{field} to {have!r}, or "
                + (other if may_attach else "start a new run from its live.safetensors (checkpoint.init)")
            )


def copy_state(model: nn.Module, state: Mapping[str, Tensor], where: str) -> tuple[str, ...]:
    """Copy a state dict into a model in place; return the model's keys that it lacks (new saliency routers).

    Raises CheckpointError on any other difference of keys or shapes.
    """
    own = model.state_dict()
    shapes = {key: value.shape for key, value in state.items()}
    missing = _check_keys({key: value.shape for key, value in own.items()}, shapes, where)
    with torch.no_grad():
        for key, value in state.items():
            if key in own:
                own[key].copy_(value)
    return missing


def _check_keys(own: Mapping[str, torch.Size], found: Mapping[str, torch.Size], where: str) -> tuple[str, ...]:
    """Return the model's keys that `found` lacks and may lack; CheckpointError on any other difference."""
    missing = tuple(key for key in own if key not in found)
    lost = [key for key in missing if _NEW_ALLOWED not in key]
    extra = [key for key in found if key not in own and _NEW_ALLOWED not in key]
    if lost or extra:
        key, what = (lost[0], "is missing") if lost else (extra[0], "is unknown")
        raise CheckpointError(
            f"{where}: key {key} {what} ({len(lost)} missing, {len(extra)} unknown): another architecture"
        )
    for key, shape in found.items():
        if key in own and own[key] != shape:
            shapes = f"{tuple(shape)}, expected {tuple(own[key])}"
            raise CheckpointError(f"{where}: key {key} has shape {shapes}: another architecture")
    return missing
