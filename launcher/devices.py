"""The options --device and --dtype: where a model computes, and in which precision.

--device is `auto`, or a device that this machine has; anything else ends a launcher with one line.
"""

import argparse
from typing import TypeVar

import torch
from torch import nn

from sharpmoe.devices import default_device, device_count, why_no_cuda

_Model = TypeVar("_Model", bound=nn.Module)

DEVICE_HELP = "auto (cuda where there is one, else cpu), cpu, cuda or cuda:N"


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def placement_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --device and --dtype, which `placed` reads."""
    parser.add_argument("--device", type=device_name, default="auto", help=f"device of the model: {DEVICE_HELP}")
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="float32",
        help="of the parameters, in which the model computes (bfloat16 takes half the memory)",
    )


def placed(model: _Model, arguments: argparse.Namespace) -> _Model:
    """Return a model on the device and in the dtype of the arguments; a backbone keeps its buffers in float32."""
    return model.to(arguments.device, DTYPES[arguments.dtype])


def device_name(text: str) -> str:
    """Return the name of a device, with `auto` resolved. Raises argparse.ArgumentTypeError for one that is not here."""
    if text == "auto":
        return default_device().type
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed: {DEVICE_HELP}") from None
    if not _is_here(device):
        count = device_count()
        here = {0: "cpu only", 1: "cpu and cuda:0"}.get(count, f"cpu and cuda:0 to cuda:{count - 1}")
        raise argparse.ArgumentTypeError(
            f"got {text!r}, but torch finds {here} on this machine{why_no_cuda()}; use --device cpu"
        )
    return text


def _is_here(device: torch.device) -> bool:
    if device.type == "cuda":
        return (device.index or 0) < device_count()
    return device.type == "cpu" or (device.type == "mps" and torch.backends.mps.is_available())
