"""The device of this process: the only module that asks torch and the environment which devices there are.

`DS_ACCELERATOR=cpu`, DeepSpeed's own variable, keeps everything on the host, on a machine with GPUs too. A device index
is local: a process that sees one GPU calls it cuda:0, whatever its number on the machine.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sharpmoe.errors import ConfigError

ACCELERATOR = "DS_ACCELERATOR"  # read by DeepSpeed as well, when it is imported
_CUDA = "cuda"
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"  # read by cuBLAS at the first product of a process
_WORKSPACES = (":4096:8", ":16:8")  # with which cuBLAS adds in the same order each time


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


def wait_for(device: torch.device) -> None:
    """Wait until a device has computed all that it was given; nothing to wait for on the host."""
    if device.type == _CUDA:
        torch.cuda.synchronize(device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device, through pinned memory: the host does not wait for the copy.

    From pageable memory it would wait until the device has done everything before. A tensor that is there stays.
    """
    if device.type != _CUDA or tensor.is_cuda or not tensor.numel():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def why_no_cuda(environment: Mapping[str, str] = os.environ) -> str:
    """Return how to let this process use CUDA where a variable keeps it from that, as the end of an error message."""
    given = environment.get(ACCELERATOR, _CUDA)
    return "" if given == _CUDA else f" ({ACCELERATOR}={given} is set; unset it to use CUDA)"


@contextmanager
def deterministic_algorithms(strict: bool) -> Iterator[None]:
    """Within the context, where `strict`, torch computes the same bits each time on the same device, or raises.

    Otherwise nothing changes. On CUDA the context must begin before the first matrix product of the process. Raises
    ConfigError where CUBLAS_WORKSPACE_CONFIG is set to something that rules it out.
    """
    if not strict:
        yield
        return
    was_set = _CUBLAS in os.environ
    given = os.environ.setdefault(_CUBLAS, _WORKSPACES[0])
    if given not in _WORKSPACES:
        raise ConfigError(
            f"environment: {_CUBLAS} is {given!r}, but train.deterministic needs {' or '.join(_WORKSPACES)}; unset it"
        )
    cudnn = torch.backends.cudnn
    memory: Any = torch.utils.deterministic  # a module whose attribute is a property
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    kept = cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory that it has not written, so filling it would only cost time.
    cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory = True, False, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory = kept
        if not was_set:
            del os.environ[_CUBLAS]
