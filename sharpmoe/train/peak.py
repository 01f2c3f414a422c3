"""What a device could do at most: the figures of its maker, without sparsity."""

import re
from typing import NamedTuple

import torch

from sharpmoe.config import RunConfig


class Peak(NamedTuple):
    """TFLOP/s of matrix products."""

    bf16: float
    fp32: float  # of the float32 units; TensorFloat-32 does half of bf16 on all of these


# Words of a device's name, the more specific first, and NVIDIA's data sheets (their figures with sparsity, halved).
PEAKS: dict[tuple[str, ...], Peak] = {
    ("B200",): Peak(2250, 75),
    ("GH200",): Peak(989.5, 67),
    ("H200", "NVL"): Peak(835.5, 60),
    ("H200",): Peak(989.5, 67),
    ("H100", "NVL"): Peak(835.5, 60),
    ("H100", "PCIE"): Peak(756.5, 51),
    ("H100",): Peak(989.5, 67),
    ("H800", "PCIE"): Peak(756.5, 51),
    ("H800",): Peak(989.5, 67),
    ("H20",): Peak(148, 44),
    ("A100",): Peak(312, 19.5),
    ("A800",): Peak(312, 19.5),
    ("A40",): Peak(149.7, 37.4),
    ("A30",): Peak(165, 10.3),
    ("A10",): Peak(125, 31.2),
    ("L40S",): Peak(362, 91.6),
    ("L40",): Peak(181, 90.5),
    ("L4",): Peak(121, 30.3),
}


def peak_tflops(run: RunConfig, device: torch.device) -> float | None:
    """TFLOP/s of one device in the run's precision: log.peak_tflops, or as its name says; None where nobody knows."""
    if run.log.peak_tflops is not None:
        return run.log.peak_tflops
    return named_peak(torch.cuda.get_device_name(device), run.train.precision) if device.type == "cuda" else None


def named_peak(name: str, precision: str) -> float | None:
    """TFLOP/s of a CUDA device by its name in fp32 or bf16; None where it is not in the table."""
    words = set(re.findall(r"[A-Z0-9]+", name.upper()))
    peak = next((peak for asked, peak in PEAKS.items() if words.issuperset(asked)), None)
    if peak is None or precision == "bf16":
        return None if peak is None else peak.bf16
    return peak.fp32 if torch.get_float32_matmul_precision() == "highest" else peak.bf16 / 2
