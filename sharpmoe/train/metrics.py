"""What a run tells: TensorBoard from step 1, log.jsonl, one progress line. Written on rank 0, from returned records.

Figures are computed by pure functions of records (`routing_sums`, `routing_scalars`), so that the loop can add them up
over micro-batches and ranks before they are named; `RunLog` only writes.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from sharpmoe.config import ModelConfig
from sharpmoe.moe.routing import Routing, batch_pool, expert_choice, group_limited, race, score_logits, token_choice

TRAINING_SELECTION: dict[str, Callable[[Tensor, ModelConfig], Tensor]] = {
    "tc": lambda scores, config: token_choice(scores, config.top_k),
    "ec": lambda scores, config: expert_choice(scores, config.capacity),
    "diffmoe": lambda scores, config: batch_pool(scores, config.capacity),
    "promoe_tc": lambda scores, config: token_choice(scores, config.top_k),
    "promoe_ec": lambda scores, config: expert_choice(scores, config.capacity),
    "dit_moe": lambda scores, config: token_choice(scores, config.top_k),
    "dsmoe": lambda scores, config: group_limited(scores, config.top_k, config.num_groups, config.top_groups),
    "race": lambda scores, config: race(scores, config.capacity),
}
SUMS = 4  # tokens, entropy, choices, flipped choices; then one column per expert


class StepStats(NamedTuple):
    """One optimizer step as it is logged; every figure already averaged (or added) over ranks."""

    step: int  # counted from 1
    losses: Mapping[str, float]  # name -> value, logged as loss/<name>
    grad_norm: float  # before clipping
    lr: float
    images: int  # trajectories of this step, all ranks
    tokens: int  # image tokens that went through the model in this step: images * T * N, all ranks
    seconds: float  # wall time of the step
    wait_seconds: float  # part of it spent waiting for data


def due(step: int, every: int) -> bool:
    """Tell whether something that happens every `every` steps (0: never) happens at `step` (from 1); step 1 counts."""
    return every > 0 and (step == 1 or step % every == 0)


def routing_sums(routing: Sequence[Sequence[Routing]], config: ModelConfig) -> Tensor:
    """Add up the routing of T training steps x MoE layers: (layers, 4 + E) float64, additive over calls and ranks.

    Columns: tokens, entropy of the scores in nats, choices, choices that the saliency router flipped (made, but not by
    the gate's own logits under the same selection rule and pool), then tokens taken by each expert. No grad.
    """
    with torch.no_grad():
        steps = [torch.stack([_layer_sums(layer, config) for layer in step]) for step in routing if step]
        return torch.stack(steps).sum(0) if steps else torch.zeros(0, SUMS + config.total_experts, dtype=torch.float64)


def _layer_sums(record: Routing, config: ModelConfig) -> Tensor:
    chosen = record.routing_map
    by_scores = score_logits(record.gate_logits, config.score)
    by_gate = TRAINING_SELECTION[config.router](by_scores if record.bias is None else by_scores + record.bias, config)
    shares = record.logits.softmax(-1)
    entropy = -torch.special.xlogy(shares, shares).sum()
    flipped = (chosen[..., : config.num_experts] & ~by_gate).sum()
    sums = [chosen[..., 0].numel(), entropy, chosen.sum(), flipped]
    head = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=chosen.device) for value in sums])
    return torch.cat([head, chosen.flatten(0, 1).sum(0).double()])


def routing_scalars(sums: Tensor) -> dict[str, float]:
    """Name the figures of every MoE layer from summed `routing_sums` (layers, 4 + E).

    load_min and load_max: tokens of the least and most loaded expert over the mean load; dead_experts: experts without
    a token; entropy: of the scores, as a share of its maximum log E; flipped: share of choices.
    """
    named: dict[str, float] = {}
    for layer, row in enumerate(sums.cpu().double()):
        tokens, entropy, choices, flipped = row[:SUMS].tolist()
        load = row[SUMS:]
        ideal = max(choices / len(load), 1e-12)
        figures = {
            "load_min": load.min().item() / ideal,
            "load_max": load.max().item() / ideal,
            "dead_experts": float((load == 0).sum()),
            "entropy": entropy / max(tokens, 1.0) / max(float(np.log(len(load))), 1e-12),
            "flipped": flipped / max(choices, 1.0),
        }
        named |= {f"routing_{name}/layer{layer}": value for name, value in figures.items()}
    return named


def memory_mib() -> float:
    """Peak memory in MiB: of the accelerator where there is one, else resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # KiB on Linux


def step_scalars(stats: StepStats) -> dict[str, float]:
    """Name the figures of a step: loss/*, optim/*, throughput/*, memory/*."""
    seconds = max(stats.seconds, 1e-9)
    return {
        **{f"loss/{name}": value for name, value in stats.losses.items()},
        "optim/grad_norm": stats.grad_norm,
        "optim/lr": stats.lr,
        "throughput/images_per_second": stats.images / seconds,
        "throughput/tokens_per_second": stats.tokens / seconds,
        "throughput/seconds_per_step": stats.seconds,
        "throughput/data_wait_share": stats.wait_seconds / seconds,
        "memory/peak_mib": memory_mib(),
    }


class RunLog:
    """Writer of one run folder: TensorBoard events, log.jsonl and the progress line. Made on rank 0 only.

    log.jsonl holds one object per line: {"step": n, "<tag>": value, ...}. A resumed run appends; where a step stands
    twice the later line holds (`read_log`), and TensorBoard hides the events from `first_step` on.
    """

    def __init__(
        self, folder: Path | str, total_steps: int, first_step: int = 1, every: int = 10, stream: TextIO | None = None
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.total_steps, self.first_step, self.every = total_steps, first_step, every
        self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=first_step)
        self.lines = open_log(self.folder / "log.jsonl")
        self.progress = Progress(total_steps, first_step, sys.stdout if stream is None else stream)

    def due(self, step: int) -> bool:
        """Tell whether the figures of this step are written: the first, the last and every `every`-th."""
        return step in (self.first_step, self.total_steps) or due(step, self.every)

    def step(self, stats: StepStats, more: Mapping[str, float] | None = None) -> None:
        """Write one step, with `more` figures such as `routing_scalars`, where it is due; move the progress line."""
        if self.due(stats.step):
            self.scalars(stats.step, {**step_scalars(stats), **(more or {})})
        self.progress.update(stats, written=self.due(stats.step))

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        """Write named figures of a step to TensorBoard and as one line of log.jsonl."""
        for tag, value in figures.items():
            self.writer.add_scalar(tag, value, step)
        self.lines.write(json.dumps({"step": step, **figures}) + "\n")
        self.lines.flush()

    def image(self, step: int, tag: str, pixels: np.ndarray) -> None:
        """Write a picture (H, W, 3) uint8 to TensorBoard."""
        self.writer.add_image(tag, pixels, step, dataformats="HWC")

    def text(self, step: int, tag: str, text: str) -> None:
        """Write a table or note to TensorBoard, laid out as it is."""
        self.writer.add_text(tag, "\n".join("    " + line for line in text.splitlines()), step)

    def say(self, text: str) -> None:
        """Print text above the progress line."""
        self.progress.say(text)

    def close(self) -> None:
        """Flush and close; the progress line ends with a line break."""
        self.progress.close()
        self.writer.close()
        self.lines.close()


class Progress:
    """One line that moves on a terminal; one line per written step elsewhere (a file, a Slurm log)."""

    def __init__(self, total_steps: int, first_step: int, stream: TextIO) -> None:
        self.total_steps, self.first_step, self.stream = total_steps, first_step, stream
        self.live = stream.isatty()
        self.started = time.monotonic()
        self.line = ""

    def update(self, stats: StepStats, written: bool) -> None:
        """Show a step: always on a terminal, elsewhere where its figures were `written`."""
        self.line = self.render(stats)
        if self.live:
            self.stream.write("\r\x1b[K" + self.line)
        elif written:
            self.stream.write(self.line + "\n")
        self.stream.flush()

    def render(self, stats: StepStats) -> str:
        """Lay out a step: counter, losses, gradient norm, learning rate, speed, data wait, time left."""
        done = stats.step - self.first_step + 1
        left = (time.monotonic() - self.started) / done * (self.total_steps - stats.step)
        losses = "  ".join(f"{name} {value:.4g}" for name, value in stats.losses.items() if value)
        speed = stats.images / max(stats.seconds, 1e-9)
        wait = stats.wait_seconds / max(stats.seconds, 1e-9)
        counter = f"{stats.step:>{len(str(self.total_steps))}}/{self.total_steps}"
        return (
            f"step {counter}  {losses}  grad {stats.grad_norm:.3g}  lr {stats.lr:.2e}  {speed:.1f} images/s"
            f"  data {wait:.0%}  left {clock(left)}"
        )

    def say(self, text: str) -> None:
        """Print text on lines of its own."""
        self.stream.write(("\r\x1b[K" if self.live else "") + text + "\n" + (self.line if self.live else ""))
        self.stream.flush()

    def close(self) -> None:
        """End the moving line."""
        if self.live and self.line:
            self.stream.write("\n")
        self.stream.flush()


def clock(seconds: float) -> str:
    """Show a duration as m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def open_log(path: Path) -> TextIO:
    """Open log.jsonl for appending; a line cut short by a killed run is ended first, so that the next one is whole."""
    torn = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
    stream = path.open("a", encoding="utf-8")
    if torn:
        stream.write("\n")
    return stream


def read_log(path: Path) -> dict[str, dict[int, float]]:
    """Read log.jsonl as {tag: {step: value}}; later lines replace earlier ones, torn lines are skipped."""
    curves: dict[str, dict[int, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        step = record.pop("step")
        for tag, value in record.items():
            curves.setdefault(tag, {})[step] = value
    return {tag: dict(sorted(points.items())) for tag, points in curves.items()}
