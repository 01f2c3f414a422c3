"""Which optimizer steps are taken, from figures that are the same on every rank. Pure.

A step with a loss or gradient that is not finite is never taken. A spike, a gradient norm far above its moving average,
is reported, and skipped where guard.skip_spikes is set.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from sharpmoe.checkpoint.manifest import Watch
from sharpmoe.config import GuardConfig


class Verdict(NamedTuple):
    """What is wrong with one optimizer step, and whether it was taken; the same on every rank."""

    fault: str = ""  # what is wrong with its figures; empty if nothing is
    applied: bool = True  # False: skipped, nothing was updated


def loss_fault(losses: Mapping[str, float]) -> str:
    """Name the first loss that is not finite, a part rather than the total; an empty string if all are finite."""
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    name = next((name for name in bad if name != "total"), "total")
    return f"loss {name} is not finite" if bad else ""


def norm_fault(norm: float, watch: Watch, guard: GuardConfig) -> str:
    """Return what is wrong with a gradient norm, a spike included; an empty string if nothing is."""
    if not math.isfinite(norm):
        return "gradient norm is not finite"
    if norm > _spike_limit(watch, guard):
        return f"gradient norm {norm:.4g} is {norm / watch.average:.3g} times its moving average {watch.average:.4g}"
    return ""


def _spike_limit(watch: Watch, guard: GuardConfig) -> float:
    """Gradient norm above which a step is a spike; infinite until spike_window norms were seen, or at average zero."""
    return guard.spike_factor * watch.average if watch.seen >= guard.spike_window and watch.average else math.inf


def next_watch(watch: Watch, norm: float, applied: bool, guard: GuardConfig) -> Watch:
    """Return the state after a step with this norm.

    The average is a plain mean of the first spike_window norms and moves by 1/spike_window from then on. A spike counts
    as the limit that it broke, so that a lasting change of level is followed, and one spike moves the average little.
    """
    skipped = 0 if applied else watch.skipped + 1
    if not math.isfinite(norm):
        return watch._replace(skipped=skipped)
    seen = min(watch.seen + 1, guard.spike_window)
    counted = min(norm, _spike_limit(watch, guard))
    return Watch(watch.average + (counted - watch.average) / seen, seen, skipped)
