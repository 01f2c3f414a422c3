"""The Inception network of FID: the TensorFlow graph of 2015-12-05, as its PyTorch port names and stores it.

Inception-v3 (arXiv 1512.00567) with 1008 classes. It differs from torchvision's: average pools leave the padding out of
the mean, the last block pools by maximum, and images are resized as TensorFlow 1 did. Weights are the user's file (as
pytorch-fid and torch-fidelity distribute it); nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from sharpmoe.errors import ConfigError, DataError, first_line

WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_SIDE = 299  # pixels that the network reads, each way
_SPATIAL_CHANNELS = 7  # of Mixed_6d's 1x1 branch, for sFID


class InceptionFeatures(NamedTuple):
    """What the metrics read of a batch of images."""

    pool: Tensor  # (B, 2048) FID, KID, precision and recall
    spatial: Tensor  # (B, 7 * 17 * 17) sFID
    logits: Tensor  # (B, 1008) without the bias: Inception score


class Inception(nn.Module):
    """Inception-v3 of FID; images (B, 3, H, W) uint8 to features in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Unit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = _Unit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = _Unit(80, 192, 3)
        self.Mixed_5b = _Mixed(_grid_35(192, 32))
        self.Mixed_5c = _Mixed(_grid_35(256, 64))
        self.Mixed_5d = _Mixed(_grid_35(288, 64))
        self.Mixed_6a = _Mixed(_reduce_35(288), pool="max_stride")
        self.Mixed_6b = _Mixed(_grid_17(128))
        self.Mixed_6c = _Mixed(_grid_17(160))
        self.Mixed_6d = _Mixed(_grid_17(160))
        self.Mixed_6e = _Mixed(_grid_17(192))
        self.Mixed_7a = _Mixed(_reduce_17(768), pool="max_stride")
        self.Mixed_7b = _Mixed(_grid_8(1280))
        self.Mixed_7c = _Mixed(_grid_8(2048), pool="max")
        self.fc = nn.Linear(2048, 1008)

    @torch.no_grad()
    def forward(self, images: Tensor) -> InceptionFeatures:
        x = (resize_bilinear_tf1(images.float(), _SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = functional.max_pool2d(x, 3, 2)
        x = functional.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial = self.Mixed_6d.get_submodule("branch1x1")(x)[:, :_SPATIAL_CHANNELS].flatten(1)
        x = self.Mixed_6e(self.Mixed_6d(x))
        pool = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))
        return InceptionFeatures(pool, spatial, pool @ self.fc.weight.T)


def load_inception(path: Path, *, unverified: bool = False) -> Inception:
    """Load the network from the user's file, in eval mode.

    Raises DataError where the file is missing or no state dict of this network, ConfigError where its hash is another
    one than that of the file by which figures are compared, unless `unverified`.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; --inception takes pt_inception-2015-12-05-6726825d.pth of pytorch-fid")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WEIGHTS_SHA256 and not unverified:
        raise ConfigError(
            f"{path}: sha256 {digest[:12]}..., expected {WEIGHTS_SHA256[:12]}... (the file of 2015-12-05); figures of "
            "other weights cannot be compared with published ones; --unverified takes it nevertheless"
        )
    model = Inception().eval()
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(found)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise DataError(f"{path}: no weights of the Inception network of FID ({first_line(error)})") from None
    return model


def resize_bilinear_tf1(images: Tensor, side: int) -> Tensor:
    """Resize (B, C, H, W) float to (B, C, side, side) as TensorFlow 1: pixel i reads place i * H / side."""
    rows, columns = (_weights(size, side).to(images) for size in images.shape[2:])
    return torch.einsum("rh,bchw,sw->bcrs", rows, images, columns)


def _weights(size: int, side: int) -> Tensor:
    """Matrix (side, size) of the linear interpolation of one axis, float32."""
    place = torch.arange(side, dtype=torch.float32) * (size / side)
    lower = place.floor().long().clamp(max=size - 1)
    upper = (lower + 1).clamp(max=size - 1)
    share = (place - lower)[:, None]
    return functional.one_hot(lower, size) * (1 - share) + functional.one_hot(upper, size) * share


class _Unit(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


class _Path(NamedTuple):
    """A path through a block: names of units in turn; those of the last step read the same input and are joined."""

    steps: tuple[str, ...]
    ends: tuple[str, ...] = ()


class _Branches(NamedTuple):
    """Units of a block by name, and the paths whose outputs are joined, in order; `branch_pool` comes last."""

    units: dict[str, _Unit]
    paths: tuple[_Path, ...]


class _Mixed(nn.Module):
    """A block of parallel paths and a pool, joined along the channels."""

    def __init__(self, branches: _Branches, pool: str = "average") -> None:
        super().__init__()
        for name, unit in branches.units.items():
            self.add_module(name, unit)
        self._paths, self._pool = branches.paths, pool

    def forward(self, x: Tensor) -> Tensor:
        found = [out for path in self._paths for out in self._along(path, x)]
        return torch.cat([*found, self._pooled(x)], 1)

    def _along(self, path: _Path, x: Tensor) -> list[Tensor]:
        for name in path.steps:
            x = self.get_submodule(name)(x)
        return [self.get_submodule(name)(x) for name in path.ends] or [x]

    def _pooled(self, x: Tensor) -> Tensor:
        if self._pool == "max_stride":
            return functional.max_pool2d(x, 3, 2)
        if self._pool == "max":
            pooled = functional.max_pool2d(x, 3, 1, 1)
        else:
            pooled = functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        out: Tensor = self.get_submodule("branch_pool")(pooled)
        return out


def _same(inputs: int, outputs: int, height: int, width: int) -> _Unit:
    """Return a unit whose output is as large as its input."""
    return _Unit(inputs, outputs, (height, width), padding=(height // 2, width // 2))


def _grid_35(inputs: int, pooled: int) -> _Branches:
    units = {
        "branch1x1": _Unit(inputs, 64, 1),
        "branch5x5_1": _Unit(inputs, 48, 1),
        "branch5x5_2": _same(48, 64, 5, 5),
        "branch3x3dbl_1": _Unit(inputs, 64, 1),
        "branch3x3dbl_2": _same(64, 96, 3, 3),
        "branch3x3dbl_3": _same(96, 96, 3, 3),
        "branch_pool": _Unit(inputs, pooled, 1),
    }
    return _Branches(units, (_path("branch1x1"), _path("branch5x5", 2), _path("branch3x3dbl", 3)))


def _reduce_35(inputs: int) -> _Branches:
    units = {
        "branch3x3": _Unit(inputs, 384, 3, stride=2),
        "branch3x3dbl_1": _Unit(inputs, 64, 1),
        "branch3x3dbl_2": _same(64, 96, 3, 3),
        "branch3x3dbl_3": _Unit(96, 96, 3, stride=2),
    }
    return _Branches(units, (_path("branch3x3"), _path("branch3x3dbl", 3)))


def _grid_17(inner: int, inputs: int = 768) -> _Branches:
    units = {
        "branch1x1": _Unit(inputs, 192, 1),
        "branch7x7_1": _Unit(inputs, inner, 1),
        "branch7x7_2": _same(inner, inner, 1, 7),
        "branch7x7_3": _same(inner, 192, 7, 1),
        "branch7x7dbl_1": _Unit(inputs, inner, 1),
        "branch7x7dbl_2": _same(inner, inner, 7, 1),
        "branch7x7dbl_3": _same(inner, inner, 1, 7),
        "branch7x7dbl_4": _same(inner, inner, 7, 1),
        "branch7x7dbl_5": _same(inner, 192, 1, 7),
        "branch_pool": _Unit(inputs, 192, 1),
    }
    return _Branches(units, (_path("branch1x1"), _path("branch7x7", 3), _path("branch7x7dbl", 5)))


def _reduce_17(inputs: int) -> _Branches:
    units = {
        "branch3x3_1": _Unit(inputs, 192, 1),
        "branch3x3_2": _Unit(192, 320, 3, stride=2),
        "branch7x7x3_1": _Unit(inputs, 192, 1),
        "branch7x7x3_2": _same(192, 192, 1, 7),
        "branch7x7x3_3": _same(192, 192, 7, 1),
        "branch7x7x3_4": _Unit(192, 192, 3, stride=2),
    }
    return _Branches(units, (_path("branch3x3", 2), _path("branch7x7x3", 4)))


def _grid_8(inputs: int) -> _Branches:
    units = {
        "branch1x1": _Unit(inputs, 320, 1),
        "branch3x3_1": _Unit(inputs, 384, 1),
        "branch3x3_2a": _same(384, 384, 1, 3),
        "branch3x3_2b": _same(384, 384, 3, 1),
        "branch3x3dbl_1": _Unit(inputs, 448, 1),
        "branch3x3dbl_2": _same(448, 384, 3, 3),
        "branch3x3dbl_3a": _same(384, 384, 1, 3),
        "branch3x3dbl_3b": _same(384, 384, 3, 1),
        "branch_pool": _Unit(inputs, 192, 1),
    }
    split = _Path(("branch3x3_1",), ("branch3x3_2a", "branch3x3_2b"))
    double = _Path(("branch3x3dbl_1", "branch3x3dbl_2"), ("branch3x3dbl_3a", "branch3x3dbl_3b"))
    return _Branches(units, (_path("branch1x1"), split, double))


def _path(name: str, steps: int = 0) -> _Path:
    return _Path(tuple(f"{name}_{step}" for step in range(1, steps + 1)) or (name,))
