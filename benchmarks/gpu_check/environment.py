"""The machine and what is installed: python -m benchmarks.gpu_check.environment --device cuda --facts FILE."""

import argparse
import importlib.metadata
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.backends.cuda import cudnn_sdp_enabled, flash_sdp_enabled
from torch.cuda import nccl
from torch.nn import functional

from benchmarks.gpu_check.facts import Facts
from sharpmoe.config_io import PROJECT_ROOT
from sharpmoe.devices import device_count, wait_for
from sharpmoe.parallel.ranks import launch

_PACKAGES = ("deepspeed", "megatron-core", "numpy", "pydantic", "safetensors", "transformers", "triton")
_SMALL_OPS = 10_000


def part_parser(text: str | None) -> argparse.ArgumentParser:
    """Return a parser of what every part of the check is given."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--facts", type=Path, required=True, metavar="FILE", help="JSON lines are appended to it")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    given = part_parser(__doc__).parse_args(argv)
    facts, device = Facts(given.facts), torch.device(given.device)
    facts.tell(fact="software", **software())
    facts.tell(fact="device", **(_cuda() if device.type == "cuda" else _host()))
    began = time.perf_counter()
    world = launch.start()
    total = launch.sum_over_ranks(torch.ones(1, device=world.device), world)
    facts.tell(fact="start", device=str(world.device), seconds=time.perf_counter() - began, ranks=float(total))
    facts.tell(fact="small_operation", microseconds=small_operation(device))
    launch.stop()


def software() -> dict[str, object]:
    """Return versions, and the commit of the checkout where git knows it."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _said("git", "-C", str(PROJECT_ROOT), "rev-parse", "--short", "HEAD"),
        "grouped_mm": hasattr(functional, "grouped_mm"),
        "matmul_precision": torch.get_float32_matmul_precision(),
        **{name: _version(name) for name in _PACKAGES},
    }


def _host() -> dict[str, object]:
    return {"name": platform.processor() or platform.machine(), "gib": None, "driver": None}


def _cuda() -> dict[str, object]:
    properties = torch.cuda.get_device_properties(0)
    driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    return {
        "name": properties.name,
        "gib": properties.total_memory / launch.GIB,
        "driver": driver,
        "count": device_count(),
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "nccl": ".".join(str(number) for number in nccl.version()),
        "flash_attention": flash_sdp_enabled(),
        "cudnn_attention": cudnn_sdp_enabled(),
    }


def small_operation(device: torch.device, count: int = _SMALL_OPS) -> float:
    """Return microseconds of host time of one operation on four numbers: what a launch costs."""
    x = torch.zeros(4, device=device)
    for _ in range(100):
        x + 1
    wait_for(device)
    began = time.perf_counter()
    for _ in range(count):
        x + 1
    wait_for(device)
    return 1e6 * (time.perf_counter() - began) / count


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _said(*words: str) -> str | None:
    """Return what a command prints; None where there is no such command or it fails."""
    if shutil.which(words[0]) is None:
        return None
    ended = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    return ended.stdout.strip() or None if ended.returncode == 0 else None


if __name__ == "__main__":
    main()
