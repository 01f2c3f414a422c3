"""The device of this process: the only module that asks torch and the environment which devices there are.

`DS_ACCELERATOR=cpu`, DeepSpeed's own variable, keeps everything on the host, on a machine with GPUs too. A device index
is local: a process that sees one GPU calls it cuda:0, whatever its number on the machine.
"""

import os
from collections.abc import Mapping

import torch

from sharpmoe.errors import ConfigError

ACCELERATOR = "DS_ACCELERATOR"  # read by DeepSpeed as well, when it is imported
_CUDA = "cuda"


def device_count() -> int:
    """Return how many CUDA devices this process may use; none under DS_ACCELERATOR=cpu. Starts nothing on them."""
    if os.environ.get(ACCELERATOR, _CUDA) != _CUDA:
        return 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def default_device() -> torch.device:
    """Return the device of a process that is alone, or that has chosen its device already: CUDA, else the host."""
    return torch.device(_CUDA if device_count() else "cpu")


def device_of_rank(local_rank: int) -> torch.device:
    """Return the device of a rank by its number on its machine: modulo the devices that it sees, else the host.

    So one visible device per task works, and all devices visible to every task. Raises ConfigError where DeepSpeed is
    asked for an accelerator that is not here.
    """
    count, given = device_count(), os.environ.get(ACCELERATOR, "")
    if not count and given not in ("", "cpu"):
        raise ConfigError(
            f"environment: {ACCELERATOR} is {given!r}, allowed: cpu, or cuda where torch finds a CUDA device (there is "
            "none); unset it, or check nvidia-smi"
        )
    return torch.device(_CUDA, local_rank % count) if count else torch.device("cpu")


def device_identity(device: torch.device) -> str:
    """Return what tells a CUDA device of this machine from all others, whatever its index in this process."""
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.uuid}"


def why_no_cuda(environment: Mapping[str, str] = os.environ) -> str:
    """Return how to let this process use CUDA where a variable keeps it from that, as the end of an error message."""
    given = environment.get(ACCELERATOR, _CUDA)
    return "" if given == _CUDA else f" ({ACCELERATOR}={given} is set; unset it to use CUDA)"
