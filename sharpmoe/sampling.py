"""Samplers from noise (t = 1) to data (t = 0), carrying the clean prediction that the saliency router reads.

The model is a callable without state: latents and one x0_prev per branch of classifier-free guidance are the state of
the loop. One sampler is one short function over a `Field`; only `make_field` knows branches and guidance.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sharpmoe import draws, flow
from sharpmoe.config import ModelConfig, SampleConfig
from sharpmoe.console import progress_bar
from sharpmoe.errors import ConfigError
from sharpmoe.model.backbone import Backbone, ClassCondition, Condition, ModelOutput, Prepared, TextCondition
from sharpmoe.moe.routing import CallMode


class Denoiser(Protocol):
    """What the samplers need of a model; a `Backbone` in eval mode is one."""

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition | Prepared,
        x0_prev: Tensor | None = None,
        mode: CallMode = CallMode(),
    ) -> ModelOutput:
        """Predict the velocity of x_t (B, C, H, W) at t (B,)."""
        ...


class _Evaluation(NamedTuple):
    """One evaluation of the guided velocity field."""

    velocity: Tensor  # (B, C, H, W) float32, after classifier-free guidance
    x0_prev: tuple[Tensor, ...]  # x0_hat of each branch, (B, C, H, W) float32, for the next evaluation


Field = Callable[[Tensor, Tensor, tuple[Tensor, ...]], _Evaluation]  # (x_t, t 0-d, x0_prev) -> _Evaluation


class CfgSettings(NamedTuple):
    """Classifier-free guidance, and what each branch of it reads."""

    cfg_scale: float = 1.0  # v = v_empty + cfg_scale * (v_cond - v_empty); 1 needs no empty branch
    source: Literal["own", "guided"] = (
        "own"  # the velocity that gives a branch its next x0_prev: its own, or the guided one
    )
    saliency_router: bool = True  # False: the model has no saliency router, so no x0_prev is passed
    # Whose tokens an expert compares where it ranks tokens of a call: the batch's, a branch's, an image's.
    pool: Literal["all", "call", "image"] = "call"

    @classmethod
    def of(cls, model: ModelConfig, sample: SampleConfig, *, pool_per_image: bool = False) -> CfgSettings:
        """Read the settings from a configuration; branches are pools of their own only where tokens are ranked.

        That is DiffMoE's count. Its mask and Expert Race compare each token with a threshold, token choice a token's
        own scores, expert choice the tokens of an image.
        Raises ConfigError for guidance of a model that has nothing to guide away from.
        """
        if model.conditioning == "class" and not model.class_dropout and sample.cfg_scale != 1:
            raise ConfigError(
                f'sample.cfg_scale is {sample.cfg_scale:g}, but the label table of the model has no row for "no class" '
                "(model.class_dropout: false), so that guidance is impossible; set it to 1 (--cfg-scale 1)"
            )
        pool: Literal["all", "call", "image"] = "call" if model.counts_calls else "all"
        return cls(sample.cfg_scale, sample.guidance_source, model.saliency_router, "image" if pool_per_image else pool)


def empty_condition(cond: Condition, model: ModelConfig, empty_text: tuple[Tensor, Tensor, Tensor] | None) -> Condition:
    """Build the condition of the unguided branch: the stored empty caption (L, D), (L,), (D,), or the null class."""
    if isinstance(cond, ClassCondition):
        return ClassCondition(torch.full_like(cond.labels, model.num_classes))
    if empty_text is None:
        raise ValueError("text-conditioned sampling with cfg_scale != 1 needs the embedding of the empty caption")
    rows = cond.pooled.shape[0]
    return TextCondition(*(part.to(cond.pooled.device).expand(rows, *part.shape) for part in empty_text))


def make_field(model: Denoiser, branches: tuple[Condition, ...], settings: CfgSettings) -> Field:
    """Turn a model and one condition per branch, (cond,) or (cond, empty), into a velocity field.

    x0_prev of each branch is the x0_hat of its own unguided velocity, as in training (`source="own"`), or of the guided
    velocity (`source="guided"`). All branches are one call, in which pools stay apart. A `Backbone` prepares the
    conditions here, once for all steps.
    """
    condition = _join(branches)
    fixed = model.prepare(condition) if isinstance(model, Backbone) else condition

    def field(x: Tensor, t: Tensor, x0_prev: tuple[Tensor, ...]) -> _Evaluation:
        rows = len(branches) * len(x)
        times = t.to(x).expand(rows)
        x0_prev_all = torch.cat(x0_prev) if settings.saliency_router else None
        pools = {"all": 1, "call": len(branches), "image": rows}[settings.pool]
        x_t = x.repeat(len(branches), 1, 1, 1)
        output = model(x_t, times, fixed, x0_prev_all, CallMode(pools=pools))
        own = output.v.float().chunk(len(branches))
        v = own[0] if len(own) == 1 else own[1] + settings.cfg_scale * (own[0] - own[1])
        sources = own if settings.source == "own" else (v,) * len(own)
        return _Evaluation(v, tuple(flow.clean_prediction(x, u, times[: len(x)]) for u in sources))

    return field


def _euler(field: Field, x: Tensor, times: Tensor, x0_prev: tuple[Tensor, ...]) -> Tensor:
    """Integrate dx/dt = v by Euler steps along times (S + 1,) from 1 to 0; x (B, C, H, W) float32."""
    for t, t_next in pairwise(times):
        v, x0_prev = field(x, t, x0_prev)
        x = flow.advance(x, v, t, t_next)
    return x


def _heun(field: Field, x: Tensor, times: Tensor, x0_prev: tuple[Tensor, ...]) -> Tensor:
    """Integrate dx/dt = v by Heun's trapezoid rule (2 S - 1 evaluations); the last step, into t = 0, is an Euler step.

    x0_prev of every evaluation is the x0_hat of the evaluation before it, for predictor and corrector alike.
    """
    last = len(times) - 2
    for step, (t, t_next) in enumerate(pairwise(times)):
        v, x0_prev = field(x, t, x0_prev)
        if step < last:
            corrector, x0_prev = field(flow.advance(x, v, t, t_next), t_next, x0_prev)
            v = (v + corrector) / 2
        x = flow.advance(x, v, t, t_next)
    return x


SAMPLERS: dict[str, Callable[[Field, Tensor, Tensor, tuple[Tensor, ...]], Tensor]] = {"euler": _euler, "heun": _heun}
_EVALUATIONS: dict[str, Callable[[int], int]] = {"euler": lambda steps: steps, "heun": lambda steps: 2 * steps - 1}


class Request(NamedTuple):
    """What to draw: one image per row of `cond`, whose noise is keyed by (seed, index)."""

    cond: Condition
    empty: Condition | None  # rows as cond; None where cfg_scale is 1
    indices: tuple[int, ...]

    def select(self, rows: range) -> Request:
        """Return the request for some of its rows; each image stays the same."""
        part = slice(rows.start, rows.stop)
        empty = None if self.empty is None else _rows_of(self.empty, part)
        return Request(_rows_of(self.cond, part), empty, self.indices[part])


class ImagePart(NamedTuple):
    """One of several parts of the images to draw, for a process of its own."""

    number: int = 1  # from 1
    of: int = 1

    def rows(self, count: int, batch_size: int) -> range:
        """Return the images of this part, of `count`: whole batches, so that all parts draw what one process would."""
        batches = -(-count // batch_size)
        first, end = (number * batches // self.of * batch_size for number in (self.number - 1, self.number))
        return range(min(first, count), min(end, count))

    def __str__(self) -> str:
        return f"{self.number} of {self.of}"


def compile_blocks(model: Backbone) -> Backbone:
    """Compile every block with torch.compile, in place; returns the model.

    Equal to the rounding of float32 (tests: 1e-5 of a latent's range). The first call of a batch size and of a size
    of images compiles, one to three minutes; it pays off for many images. Raises ConfigError where a CPU has no C++
    compiler.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and not any(shutil.which(tool) for tool in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        raise ConfigError("--compile needs a C++ compiler on a CPU, and there is none; install g++, or leave it out")
    for block in model.blocks:
        block.compile(dynamic=False)
    return model


@torch.no_grad()
def generate(
    model: Denoiser,
    config: ModelConfig,
    sample: SampleConfig,
    request: Request,
    *,
    batch_size: int = 16,
    pool_per_image: bool = False,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Draw latents (B, C, H, W) float32 for the request, at most `batch_size` images, in all branches, per model call.

    `size` (H, W) of the latents: the square of the configured size by default, else multiples of the patch.
    Noise is counter-based by (sample.seed, index), so the split into batches does not matter; DiffMoE's count rule
    pools the tokens of the images drawn at a time and is the one exception, unless `pool_per_image` makes every image
    a pool of its own. The model must be whole and in eval mode. Nothing is communicated, and the loop reads nothing
    back from the device.
    """
    settings = CfgSettings.of(config, sample, pool_per_image=pool_per_image)
    shape = (config.latent_channels, *(size or (config.latent_size, config.latent_size)))
    parts, starts = [], range(0, len(request.indices), batch_size)
    with progress_bar("sampling", len(starts) * _EVALUATIONS[sample.method](sample.num_steps), "model call") as advance:
        for start in starts:
            cond, empty, indices = request.select(range(start, start + batch_size))
            branches = (cond,) if empty is None or settings.cfg_scale == 1 else (cond, empty)
            noise = draws.noise(sample.seed, indices, shape, draws.Purpose.SAMPLE_NOISE).to(cond[0].device)
            field = _counted(make_field(model, branches, settings), advance)
            times = flow.sampling_times(sample.num_steps).to(noise)
            parts.append(SAMPLERS[sample.method](field, noise, times, (noise,) * len(branches)))
    return torch.cat(parts)


def _counted(field: Field, advance: Callable[[int], object]) -> Field:
    """Return the same field, which adds one to what is shown as done for each evaluation."""

    def counted(x: Tensor, t: Tensor, x0_prev: tuple[Tensor, ...]) -> _Evaluation:
        found = field(x, t, x0_prev)
        advance(1)
        return found

    return counted


def _rows_of(cond: Condition, rows: slice) -> Condition:
    return type(cond)(*(part[rows] for part in cond))


def _join(branches: tuple[Condition, ...]) -> Condition:
    if isinstance(branches[0], ClassCondition):
        return ClassCondition(torch.cat([b[0] for b in branches]))
    texts = [b for b in branches if isinstance(b, TextCondition)]
    length = max(b.mask.shape[1] for b in texts)
    tokens = [F.pad(b.tokens, (0, 0, 0, length - b.tokens.shape[1])) for b in texts]
    masks = [F.pad(b.mask, (0, length - b.mask.shape[1])) for b in texts]
    return TextCondition(torch.cat(tokens), torch.cat(masks), torch.cat([b.pooled for b in texts]))
