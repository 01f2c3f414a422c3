"""Saliency maps from a segmentation or saliency model in a file: TorchScript, torch.export or ONNX."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from data_pipeline.encode.saliency import (
    EncodedImages,
    MapContext,
    Maps,
    SaliencyChoice,
    SaliencyKind,
    SaliencyOption,
    numbers,
    one_of,
    whole,
)
from sharpmoe.errors import DataError, first_line
from sharpmoe.saliency import token_mask

_Model = Callable[[Tensor], Any]  # (batch, 3, h, w) float32 to a tensor, or a sequence or mapping of tensors
_SLACK = 1e-3  # of values outside [0, 1], which rounding explains

_NORMALISE = {  # mean and standard deviation of colours in [0, 1]
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda output: output,
    "sigmoid": torch.sigmoid,
    "softmax": lambda output: output.softmax(1),
}
_MODEL_OPTIONS = {
    "size": SaliencyOption(whole(8, 4096), "PIXELS"),  # left out: images as they are
    "normalise": SaliencyOption(one_of(*_NORMALISE), "|".join(_NORMALISE), "imagenet"),
    "output": SaliencyOption(whole(0, 1000), "NUMBER", 0),
    "channel": SaliencyOption(whole(0, 100_000), "NUMBER", 0),
    "activation": SaliencyOption(one_of(*_ACTIVATIONS), "|".join(_ACTIVATIONS), "none"),
    "invert": SaliencyOption(one_of("yes", "no"), "yes|no", "no"),
    "batch": SaliencyOption(whole(1, 1024), "IMAGES", 8),
    "std": SaliencyOption(numbers(1e-3, 1e3, range(3, 4)), "R/G/B"),
    "mean": SaliencyOption(numbers(-1e3, 1e3, range(3, 4)), "R/G/B"),
}


def _torchscript(path: str, device: str) -> _Model:
    try:
        model = torch.jit.load(path, map_location=device)
    except (RuntimeError, ValueError, OSError) as error:
        raise _not_a_model(path, error) from None
    return model.eval()


def _exported(path: str, device: str) -> _Model:
    try:
        program = torch.export.load(path)
    except Exception as error:  # noqa: BLE001  (it raises whatever its parts raise)
        raise _not_a_model(path, error) from None
    return program.module().to(device)


def _onnx(path: str, device: str) -> _Model:
    try:
        import onnxruntime  # noqa: PLC0415  (optional)
    except ImportError:
        raise DataError(
            f"--saliency model:path={path}: needs onnxruntime; pip install 'sharpmoe[onnx]', or save the model as "
            "TorchScript"
        ) from None
    wanted = ["CUDAExecutionProvider"] if device.startswith("cuda") else []
    providers = [name for name in [*wanted, "CPUExecutionProvider"] if name in onnxruntime.get_available_providers()]
    try:
        session = onnxruntime.InferenceSession(path, providers=providers)
    except Exception as error:  # noqa: BLE001  (its errors have no common class)
        raise _not_a_model(path, error) from None
    name = session.get_inputs()[0].name
    return lambda images: [torch.from_numpy(one) for one in session.run(None, {name: images.cpu().numpy()})]


_FORMATS: dict[str, Callable[[str, str], _Model]] = {  # by suffix; any other is TorchScript
    ".onnx": _onnx,
    ".pt2": _exported,
}


def _not_a_model(path: str, error: Exception) -> DataError:
    return DataError(
        f"--saliency model:path={path}: cannot be loaded ({first_line(error)}); expected TorchScript "
        "(torch.jit.script or trace, then save), torch.export (.pt2) or ONNX (.onnx)"
    )


class _Segmenter:
    """A model with what its choice says of input and output."""

    def __init__(self, choice: SaliencyChoice, device: str) -> None:
        self._path, self._spec, self._device = choice.path, choice.identity, device
        self._model = _FORMATS.get(Path(choice.path).suffix.lower(), _torchscript)(choice.path, device)
        named = _NORMALISE[self._spec["normalise"]]
        self._mean, self._std = (
            torch.tensor(self._spec.get(name, value))[:, None, None]
            for name, value in zip(("mean", "std"), named, strict=True)
        )

    def __call__(self, batch: EncodedImages) -> Tensor:
        """Return (B, N) float32; raises DataError where the output cannot be used."""
        size, count = self._spec.get("size"), self._spec["batch"]
        levels = (batch.images + 1) / 2
        if size is not None:
            levels = functional.interpolate(levels, (size, size), mode="bilinear", antialias=True)
        inputs = (levels - self._mean) / self._std
        parts = [self._run(some, count) for some in inputs.split(count)]
        maps = functional.interpolate(torch.cat(parts), batch.images.shape[-2:], mode="bilinear", antialias=True)
        return token_mask(maps, batch.grid)

    @torch.no_grad()
    def _run(self, images: Tensor, count: int) -> Tensor:
        """Return (b, 1, h, w) in [0, 1]. Every call is of `count` images, the last one repeated."""
        whole_batch = torch.cat([images, images[-1:].expand(count - len(images), -1, -1, -1)])
        try:
            found = self._model(whole_batch.to(self._device))
        except Exception as error:  # noqa: BLE001  (a model of others may raise anything)
            raise self._refusal(
                f"does not take {tuple(whole_batch.shape)} ({first_line(error)}); set size, and batch=1 where it takes "
                "single images"
            ) from None
        output = self._output(found).float().cpu()[: len(images)]
        channel = self._spec["channel"]
        if output.ndim == 3:
            output = output.unsqueeze(1)
        if output.ndim != 4 or len(output) != len(images) or channel >= output.shape[1]:
            raise self._refusal(
                f"output {self._spec['output']} has shape {tuple(output.shape)} for {len(images)} images; expected "
                f"(B, h, w), or (B, C, h, w) with channel {channel}; set output and channel"
            )
        return self._checked(_ACTIVATIONS[self._spec["activation"]](output)[:, channel, None])

    def _output(self, found: Any) -> Tensor:
        """Return the chosen output of a model that may have several."""
        several = list(found.values()) if isinstance(found, dict) else found
        several = [several] if isinstance(several, Tensor) else list(several)
        number = self._spec["output"]
        if number >= len(several) or not isinstance(several[number], Tensor):
            raise self._refusal(f"has {len(several)} outputs, and output {number} is no tensor of them; set output")
        chosen: Tensor = several[number]
        return chosen

    def _checked(self, maps: Tensor) -> Tensor:
        finite = maps[maps.isfinite()]
        low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 0.0)
        if low < -_SLACK or high > 1 + _SLACK:
            raise self._refusal(
                f"gives values from {low:.3g} to {high:.3g}, expected 0 to 1; set activation=sigmoid, or "
                "activation=softmax where channels are classes"
            )
        maps = maps.where(maps.isfinite(), torch.nan)  # an infinity would be cut to 0 or 1 later
        return 1 - maps if self._spec["invert"] == "yes" else maps

    def _refusal(self, what: str) -> DataError:
        return DataError(f"--saliency model:path={self._path}: {what}")


def _create(choice: SaliencyChoice, context: MapContext) -> Maps:
    return _Segmenter(choice, context.device)


MODEL = SaliencyKind(
    name="model",
    text="a segmentation or saliency model: TorchScript, torch.export (.pt2) or ONNX (.onnx)",
    create=_create,
    options=_MODEL_OPTIONS,
    needs_file=True,
)
