"""FLOPs of one optimizer step, by what they are spent on, and the peak rate of a device.

Model FLOPs are a forward and a backward of every trained rollout step, each once: what the mathematics needs.
Everything else that a schedule computes is counted as wasted: first passes, recomputed blocks, steps that train
nothing.
"""

import re
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch

from sharpmoe.config import LoraConfig, ModelConfig, RunConfig
from sharpmoe.families import rows_of_call
from sharpmoe.model.flops import Call, Product, backward_flops, forward_flops, products, with_adapters
from sharpmoe.model.trainable import planned_adapters
from sharpmoe.train.rollout_schedules import schedule_of
from sharpmoe.train.terms import steers_alone


class StepFlops(NamedTuple):
    """FLOPs per trained image, over all of its rollout steps."""

    dense: float
    routed: float
    router: float
    wasted: float

    @property
    def model(self) -> float:
        """What the mathematics needs: model FLOP utilisation counts these."""
        return self.dense + self.routed + self.router


class _Peak(NamedTuple):
    """TFLOP/s of matrix products, as the maker states them without sparsity."""

    bf16: float
    fp32: float  # of the float32 units; TensorFloat-32 does half of bf16 on all of these


# Words of a device's name, the more specific first, and NVIDIA's data sheets (their figures with sparsity, halved).
_PEAKS: dict[tuple[str, ...], _Peak] = {
    ("B200",): _Peak(2250, 75),
    ("GH200",): _Peak(989.5, 67),
    ("H200", "NVL"): _Peak(835.5, 60),
    ("H200",): _Peak(989.5, 67),
    ("H100", "NVL"): _Peak(835.5, 60),
    ("H100", "PCIE"): _Peak(756.5, 51),
    ("H100",): _Peak(989.5, 67),
    ("H800", "PCIE"): _Peak(756.5, 51),
    ("H800",): _Peak(989.5, 67),
    ("H20",): _Peak(148, 44),
    ("A100",): _Peak(312, 19.5),
    ("A800",): _Peak(312, 19.5),
    ("A40",): _Peak(149.7, 37.4),
    ("A30",): _Peak(165, 10.3),
    ("A10",): _Peak(125, 31.2),
    ("L40S",): _Peak(362, 91.6),
    ("L40",): _Peak(181, 90.5),
    ("L4",): _Peak(121, 30.3),
}


def step_flops(run: RunConfig, tokens: int, text_tokens: int, rows: float) -> StepFlops:
    """Count the FLOPs of one trained image of `tokens` tokens.

    text_tokens: per caption, padding included. rows: computed by experts for an image at a rollout step, over all MoE
    layers: as the routing was, or `rows_expected`. Of steps that take different rows (`rollout.pool: trajectory`) it is
    their mean, with which also those are counted that run twice.
    """
    uses_x0_prev = run.stage == "posttrain" and run.model.saliency_router
    call = Call(
        tokens=tokens, rows=rows, text_tokens=text_tokens, uses_x0_prev=uses_x0_prev, steering=steers_alone(run)
    )
    done, first = _products(run, call), _products(run, replace(call, for_losses=False))
    forward, backward, schedule = forward_flops(done), backward_flops(done), schedule_of(run)
    dense, routed, router = (
        schedule.num_trained * (there + back) for there, back in zip(forward, backward, strict=True)
    )
    whole = schedule.forwards - schedule.num_trained - schedule.run_twice
    wasted = whole * forward.total + schedule.run_twice * forward_flops(first).total
    wasted += schedule.recomputed * forward_flops(product for product in done if product.in_block).total
    return StepFlops(dense, routed, router, wasted)


def _products(run: RunConfig, call: Call) -> list[Product]:
    """Return the matrix products of a forward, with those of the run's adapters."""
    done = products(run.model, call)
    if not run.lora.rank:
        return done
    return with_adapters(done, _adapted(run.model, run.lora), run.lora.rank, bool(run.train.trainable))


@cache
def _adapted(model: ModelConfig, lora: LoraConfig) -> tuple[str, ...]:
    """Return the names of the adapted weights; a log asks for them at every step."""
    return tuple(planned_adapters(model, lora).pairs)


def rows_expected(run: RunConfig, pool: int, tokens: int) -> float:
    """Return the rows of an image at a rollout step by the selection rule.

    `pool` images of `tokens` tokens compete in a call.

    What was really taken differs only by how many images happen to have no class.
    """
    config = run.model
    rows = sum(rows_of_call(layer, pool, tokens) for layer in config.moe_blocks) / pool
    if config.unconditional_expert and config.class_dropout:
        dropped = run.rollout.caption_dropout
        rows = (1 - dropped) * rows + dropped * tokens * config.num_moe_layers
    return rows


def peak_tflops(run: RunConfig, device: torch.device) -> float | None:
    """TFLOP/s of one device in the run's precision: log.peak_tflops, or by its name; None where unknown."""
    if run.log.peak_tflops is not None:
        return run.log.peak_tflops
    return _named_peak(torch.cuda.get_device_name(device), run.train.precision) if device.type == "cuda" else None


def _named_peak(name: str, precision: str) -> float | None:
    """TFLOP/s of a CUDA device by its name in fp32 or bf16; None where it is not in the table."""
    words = set(re.findall(r"[A-Z0-9]+", name.upper()))
    peak = next((peak for needed, peak in _PEAKS.items() if words.issuperset(needed)), None)
    if peak is None or precision == "bf16":
        return None if peak is None else peak.bf16
    return peak.fp32 if torch.get_float32_matmul_precision() == "highest" else peak.bf16 / 2
