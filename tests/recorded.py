"""Compare results with recorded ones. Everything recorded under tests/data is compared by this rule.

On the processor model and torch version that recorded them, results are equal bit for bit. Another processor sums in
another order, so elsewhere a tensor may differ by rounding, which is relative to the largest value of the tensor: what
cancels in one element keeps the error of its summands, so no element is compared relative to itself.
"""

import json
from pathlib import Path

import torch
from torch import Tensor


def processor() -> dict[str, str]:
    """Return what decides the last bits of a result: processor model, instruction set in use and torch version."""
    pairs = (line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    known = {key.strip(): value.strip() for key, value in pairs}
    return {
        "processor": " ".join(known.get(key, "unknown") for key in ("vendor_id", "cpu family", "model")),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def is_recorded_here(path: Path) -> bool:
    """Return whether the file at `path`, written from `processor()`, names this processor and torch."""
    return json.loads(path.read_text()) == processor()


def relative_difference(ours: Tensor, recorded: Tensor) -> float:
    """Return max |ours - recorded| / max |recorded|; infinity where only `recorded` is all zeros."""
    assert (ours.shape, ours.dtype) == (recorded.shape, recorded.dtype)
    difference = float((ours.double() - recorded.double()).abs().max())
    scale = float(recorded.double().abs().max())
    return difference / scale if scale else float("inf") * difference if difference else 0.0


def assert_recorded(ours: Tensor, recorded: Tensor, tolerance: float = 1e-5, what: str = "") -> None:
    """Assert that a tensor equals a recorded one but for rounding: `relative_difference` is at most `tolerance`."""
    found = relative_difference(ours, recorded)
    assert found <= tolerance, f"{what}: differs by {found:.1e} of the largest value, allowed {tolerance:.1e}"
