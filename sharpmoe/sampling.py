"""Samplers from noise (t = 1) to data (t = 0), carrying the clean prediction that the saliency router reads.

The model is a callable without state: latents and one x0_prev per branch of classifier-free guidance are the state of
the loop. One sampler is one short function over a `Field`; only `make_field` knows branches and guidance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from sharpmoe import draws, flow
from sharpmoe.config import ModelConfig, SampleConfig
from sharpmoe.console import progress_bar
from sharpmoe.errors import ConfigError
from sharpmoe.invocation import spell_command
from sharpmoe.model.backbone import (
    Backbone,
    ClassCondition,
    Condition,
    ModelOutput,
    Prepared,
    TextCondition,
    map_condition,
)
from sharpmoe.moe.routing import CallMode, Routing


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
        """Predict the velocity of x_t (B, C, [T,] H, W) at t (B,)."""
        ...


class _Evaluation(NamedTuple):
    """One evaluation of the guided velocity field."""

    velocity: Tensor  # (B, C, H, W) float32, after classifier-free guidance
    x0_prev: tuple[Tensor, ...]  # x0_hat of each branch, (B, C, H, W) float32, for the next evaluation
    routing: tuple[Routing, ...] = ()  # of the first branch, one per MoE layer; empty where it is not kept


@dataclass(frozen=True, kw_only=True)
class SamplingStep:
    """What a sampler knows in one step, for a callback. The tensors are the sampler's own: read them, or copy.

    Latents of a model with frames are (B, C, T, H, W).
    """

    step: int  # from 0
    steps: int  # how many there are
    t: float  # time of x_t: 1 is noise, 0 is data
    images: tuple[int, ...]  # (B,) numbers of the images that are drawn together, in the order of the prompts
    x_t: Tensor  # (B, C, H, W) float32, the latents before the step
    x0_hat: Tensor  # (B, C, H, W) float32, the clean latents that the guided velocity at x_t predicts
    x0_prev: Tensor | None  # (B, C, H, W) float32, what the saliency routers read; None: the model has none
    routing: tuple[Routing, ...]  # of the conditional branch, one per MoE layer, with B rows; empty for a dense model


SamplingCallback = Callable[[SamplingStep], object]
SaliencyInput = Literal["own", "off", "swapped"]  # whose x0_hat the saliency routers read

Field = Callable[[Tensor, Tensor, tuple[Tensor, ...]], _Evaluation]  # (x_t, t 0-d, x0_prev) -> _Evaluation


@dataclass(frozen=True, kw_only=True)
class CfgSettings:
    """Guidance, and what each branch of it reads."""

    cfg_scale: float = 1.0  # v = v_empty + cfg_scale * (v_cond - v_empty); 1 needs no empty branch
    source: Literal["own", "guided"] = (
        "own"  # the velocity that gives a branch its next x0_prev: its own, or the guided one
    )
    saliency_router: bool = True  # False: the model has no saliency router, or it is off, so no x0_prev is passed
    is_swapped: bool = False  # each image's saliency routers read the x0_prev of the image before it in the call
    # Whose tokens an expert compares where it ranks tokens of a call: the batch's, a branch's, an image's.
    pool: Literal["all", "call", "image"] = "call"
    norm_patch: int | None = None  # patch size of the tokens that keep the norm of their conditional velocity
    interval: tuple[float, float] = (0.0, 1.0)  # times at which guidance acts, both included

    @classmethod
    def of(
        cls, model: ModelConfig, sample: SampleConfig, *, pool_per_image: bool = False, has_weak: bool = False
    ) -> CfgSettings:
        """Read the settings from a configuration; branches are pools of their own only where tokens are ranked.

        That is DiffMoE's count. Its mask and Expert Race compare each token with a threshold, token choice a token's
        own scores, expert choice the tokens of an image. `has_weak`: a weak model is the other branch.
        Raises ConfigError for guidance of a model that has nothing to guide away from.
        """
        if model.conditioning == "class" and not model.class_dropout and sample.cfg_scale != 1 and not has_weak:
            raise ConfigError(
                f'sample.cfg_scale is {sample.cfg_scale:g}, but the label table of the model has no row for "no class" '
                "(model.class_dropout: false), so that guidance is impossible; set it to 1 (--cfg-scale 1)"
            )
        pool: Literal["all", "call", "image"] = "call" if model.counts_calls else "all"
        return cls(
            cfg_scale=sample.cfg_scale,
            source=sample.guidance_source,
            saliency_router=model.saliency_router,
            pool="image" if pool_per_image else pool,
            norm_patch=model.patch_size if sample.cfg_norm == "tokens" else None,
            interval=sample.cfg_interval,
        )


def empty_condition(cond: Condition, model: ModelConfig, empty_text: tuple[Tensor, Tensor, Tensor] | None) -> Condition:
    """Build the condition of the unguided branch: the stored empty caption (L, D), (L,), (D,), or the null class."""
    if isinstance(cond, ClassCondition):
        return ClassCondition(torch.full_like(cond.labels, model.num_classes))
    if empty_text is None:
        raise ValueError("text-conditioned sampling with cfg_scale != 1 needs the embedding of the empty caption")
    rows, device = len(cond.tokens), cond.tokens.device
    return TextCondition(*(part.to(device).expand(rows, *part.shape) for part in empty_text))


class WeakModel(NamedTuple):
    """A worse model of the same images that guides away from its own mistakes (autoguidance, arXiv 2406.02070)."""

    model: Denoiser
    saliency_router: bool  # whether it reads an x0_prev, which is its own


class _Called(NamedTuple):
    """What a call of the model gave."""

    velocities: tuple[Tensor, ...]  # of each branch, float32
    routing: tuple[Routing, ...]  # of all branches


_Calls = Callable[[Tensor, Tensor, tuple[Tensor, ...]], _Called]


def make_field(
    model: Denoiser,
    branches: tuple[Condition, ...],
    settings: CfgSettings,
    weak: WeakModel | None = None,
    *,
    keep_routing: bool = False,
) -> Field:
    """Turn a model and one condition per branch, (cond,) or (cond, empty), into a velocity field.

    x0_prev of each branch is the x0_hat of its own unguided velocity, as in training (`source="own"`), or of the guided
    velocity (`source="guided"`). All branches are one call, in which pools stay apart. A `Backbone` prepares the
    conditions here, once for all steps. `weak`: it is the second branch, with the condition of the only one of
    `branches`, in a call of its own. `keep_routing`: return the routing of the first branch too.
    """
    call = _calls(model, branches, settings.pool, settings.saliency_router, settings.is_swapped)
    call_weak = None if weak is None else _calls(weak.model, branches, settings.pool, weak.saliency_router)

    def field(x: Tensor, t: Tensor, x0_prev: tuple[Tensor, ...]) -> _Evaluation:
        called = call(x, t, x0_prev[: len(branches)])
        own = called.velocities
        own += () if call_weak is None else call_weak(x, t, x0_prev[len(branches) :]).velocities
        v = own[0] if len(own) == 1 else _guided(own[0], own[1], t, settings)
        sources = own if settings.source == "own" else (v,) * len(own)
        times = t.to(x).expand(len(x))
        routing = tuple(_first_rows(each, len(x)) for each in called.routing) if keep_routing else ()
        return _Evaluation(v, tuple(flow.clean_prediction(x, u, times) for u in sources), routing)

    return field


def _calls(
    model: Denoiser, branches: tuple[Condition, ...], pool: str, saliency_router: bool, is_swapped: bool = False
) -> _Calls:
    """Return a function that computes the velocity of every branch in one call of the model."""
    condition = join_conditions(branches)
    fixed = model.prepare(condition) if isinstance(model, Backbone) else condition

    def call(x: Tensor, t: Tensor, x0_prev: tuple[Tensor, ...]) -> _Called:
        rows = len(branches) * len(x)
        x0_prev_all = torch.cat(_swapped(x0_prev) if is_swapped else x0_prev) if saliency_router else None
        pools = {"all": 1, "call": len(branches), "image": rows}[pool]
        x_t = x.repeat(len(branches), *[1] * (x.ndim - 1))
        output = model(x_t, t.to(x).expand(rows), fixed, x0_prev_all, CallMode(pools=pools))
        return _Called(output.v.float().chunk(len(branches)), output.routing)

    return call


def _swapped(x0_prev: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Give each image of every branch the x0_prev of the image before it; the first gets that of the last."""
    return tuple(each.roll(1, 0) for each in x0_prev)


def _first_rows(routing: Routing, rows: int) -> Routing:
    """Return the record of the first `rows` images of a call, as views."""
    shared = {"similarity", "bias"} | ({"cutoff"} if len(routing.cutoff) == 1 else set())  # have no row per image
    fields = routing._asdict().items()
    return Routing(**{name: each if each is None or name in shared else each[:rows] for name, each in fields})


def _guided(cond: Tensor, other: Tensor, t: Tensor, settings: CfgSettings) -> Tensor:
    """Return the guided velocity (B, C, H, W) of the conditional one and that of the other branch, at t 0-d."""
    v = other + settings.cfg_scale * (cond - other)
    if settings.norm_patch is not None:
        v = _with_norm_of(cond, v, settings.norm_patch)
    lower, upper = settings.interval
    return v if (lower, upper) == (0, 1) else torch.where((t >= lower) & (t <= upper), v, cond)


def _with_norm_of(cond: Tensor, v: Tensor, patch: int) -> Tensor:
    """Rescale v (B, C, [T,] H, W) so that each token, a patch of all channels, has the norm that it has in cond."""
    squares = torch.stack([cond, v]).square().sum(2)  # (2, B, [T,] H, W)
    wanted, found = functional.avg_pool2d(squares.flatten(1, -3), patch)
    scale = (wanted / found.clamp_min(torch.finfo(found.dtype).tiny)).sqrt()
    return v * scale.repeat_interleave(patch, 1).repeat_interleave(patch, 2).view_as(squares[0])[:, None]


# (step from 0, x_t, x0_prev that was read, what it gave) after the evaluation at x_t
_Observe = Callable[[int, Tensor, tuple[Tensor, ...], _Evaluation], object]


def _unseen(*_: object) -> None:
    pass


def _euler(field: Field, x: Tensor, times: Tensor, x0_prev: tuple[Tensor, ...], observe: _Observe = _unseen) -> Tensor:
    """Integrate dx/dt = v by Euler steps along times (S + 1,) from 1 to 0; x (B, C, H, W) float32."""
    for step, (t, t_next) in enumerate(pairwise(times)):
        found = field(x, t, x0_prev)
        observe(step, x, x0_prev, found)
        x, x0_prev = flow.advance(x, found.velocity, t, t_next), found.x0_prev
    return x


def _heun(field: Field, x: Tensor, times: Tensor, x0_prev: tuple[Tensor, ...], observe: _Observe = _unseen) -> Tensor:
    """Integrate dx/dt = v by Heun's trapezoid rule (2 S - 1 evaluations); the last step, into t = 0, is an Euler step.

    x0_prev of every evaluation is the x0_hat of the evaluation before it, for predictor and corrector alike. Observed
    is the predictor.
    """
    last = len(times) - 2
    for step, (t, t_next) in enumerate(pairwise(times)):
        found = field(x, t, x0_prev)
        observe(step, x, x0_prev, found)
        v, x0_prev = found.velocity, found.x0_prev
        if step < last:
            corrector = field(flow.advance(x, v, t, t_next), t_next, x0_prev)
            v, x0_prev = (v + corrector.velocity) / 2, corrector.x0_prev
        x = flow.advance(x, v, t, t_next)
    return x


class Sampler(Protocol):
    """A rule that integrates a field from noise to data."""

    def __call__(
        self, field: Field, x: Tensor, times: Tensor, x0_prev: tuple[Tensor, ...], observe: _Observe = ...
    ) -> Tensor:
        """Integrate x (B, C, H, W) along times (S + 1,); calls `observe` once per step."""
        ...


SAMPLERS: dict[str, Sampler] = {"euler": _euler, "heun": _heun}


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


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How a request is drawn, beside the settings of a run (`SampleConfig`)."""

    batch_size: int = 16  # images, in all branches, per model call
    pool_per_image: bool = False  # an image is a pool of DiffMoE, so that the batch size has no effect
    size: tuple[int, int] | None = None  # (h, w) of the latents, multiples of the patch; None: the model's square
    # Guidance away from this model (autoguidance) in place of the empty condition: of the same latents and conditions.
    weak: Backbone | None = None
    callback: SamplingCallback | None = None  # called once per step and batch, after the model call at x_t
    # The saliency routers read the model's own x0_hat; nothing (they are off; the model is not changed); or that of
    # another image of the batch, in a batch of several.
    saliency: SaliencyInput = "own"
    noise: Tensor | None = None  # of the shape of the latents, in place of that of the seed


_PLAIN = SamplingOptions()


@torch.no_grad()
def generate(
    model: Denoiser, config: ModelConfig, sample: SampleConfig, request: Request, options: SamplingOptions = _PLAIN
) -> Tensor:
    """Draw latents (B, C, H, W) float32 for the request; (B, C, T, H, W) with a model of T frames.

    Noise is counter-based by (sample.seed, index), so the split into batches does not matter; DiffMoE's count rule
    pools the tokens of the images drawn at a time and is the one exception, unless `options.pool_per_image`. The times
    of the steps are shifted by `sample.shift` for the tokens of `options.size`. Models must be whole and in eval mode.
    What the callback raises ends the sampling. Nothing is communicated, and the loop reads nothing back from the
    device.
    """
    weak, batch_size = options.weak, options.batch_size
    settings = CfgSettings.of(config, sample, pool_per_image=options.pool_per_image, has_weak=weak is not None)
    is_on = settings.saliency_router and options.saliency != "off"
    settings = replace(settings, saliency_router=is_on, is_swapped=options.saliency == "swapped")
    shape = config.shape_of_latent(options.size)
    tokens = math.prod(shape[1:]) // config.patch_size**2
    times = flow.sampling_times(sample.num_steps, flow.shift_factor(sample.shift, tokens))
    is_guided = settings.cfg_scale != 1
    other = _weak_model(weak, config) if weak is not None and is_guided else None
    starts, watched = range(0, len(request.indices), batch_size), options.callback is not None
    parts = []
    with progress_bar("sampling", len(starts) * sample.num_steps, "step") as advance:
        for start in starts:
            cond, empty, indices = request.select(range(start, start + batch_size))
            branches = (cond,) if empty is None or not is_guided or other is not None else (cond, empty)
            if options.noise is None:
                x1 = draws.noise(sample.seed, indices, shape, draws.Purpose.SAMPLE_NOISE).to(cond[0].device)
            else:
                x1 = options.noise[start : start + batch_size].to(cond[0].device, torch.float32)
            field = make_field(model, branches, settings, other, keep_routing=watched)
            x0_prev = (x1,) * (len(branches) + (other is not None))
            reader = None
            if options.callback is not None:
                reader = _Reader(options.callback, times.tolist(), indices, settings)
            observe = partial(_observed, advance, reader)
            parts.append(SAMPLERS[sample.method](field, x1, times.to(x1), x0_prev, observe))
    return torch.cat(parts)


def require_still(config: ModelConfig, what: str) -> None:
    """Raise ConfigError for a model with frames, where `what` is made for still images."""
    if config.latent_frames > 1:
        raise ConfigError(
            f"{what}: takes still images alone, the model has clips of {config.latent_frames} frames "
            f"(model.latent_frames); draw clips with `{spell_command('sample')} MODEL --captions ...`"
        )


def _weak_model(weak: Backbone, config: ModelConfig) -> WeakModel:
    """Return the weak model of guidance. Raises ConfigError where it does not take what the model takes."""
    reads = ("text_width", "pooled_width") if config.conditioning == "text" else ("num_classes",)
    for name in ("latent_channels", "latent_frames", "conditioning", *reads):
        wanted, found = getattr(config, name), getattr(weak.config, name)
        if found != wanted:
            raise ConfigError(
                f"weak model: {name} is {found}, expected {wanted} as in the model; take weights of the same data"
            )
    return WeakModel(weak, weak.config.saliency_router)


class _Reader(NamedTuple):
    """A callback, and what a step of one batch does not tell."""

    callback: SamplingCallback
    times: Sequence[float]
    images: tuple[int, ...]
    settings: CfgSettings

    def read(self, step: int, x_t: Tensor, x0_prev: tuple[Tensor, ...], found: _Evaluation) -> None:
        """Call the callback with the record of a step."""
        t = x_t.new_full((len(x_t),), self.times[step])
        read = _swapped(x0_prev[:1]) if self.settings.is_swapped else x0_prev
        record = SamplingStep(
            step=step,
            steps=len(self.times) - 1,
            t=self.times[step],
            images=self.images,
            x_t=x_t,
            x0_hat=flow.clean_prediction(x_t, found.velocity, t),
            x0_prev=read[0] if self.settings.saliency_router else None,
            routing=found.routing,
        )
        self.callback(record)


def _observed(
    advance: Callable[[int], object],
    reader: _Reader | None,
    step: int,
    x_t: Tensor,
    x0_prev: tuple[Tensor, ...],
    found: _Evaluation,
) -> None:
    """Show that a step is done, and let the callback read it where there is one."""
    if reader is not None:
        reader.read(step, x_t, x0_prev, found)
    advance(1)


def _rows_of(cond: Condition, rows: slice) -> Condition:
    return map_condition(cond, lambda part: part[rows])


def join_conditions(branches: tuple[Condition, ...]) -> Condition:
    """Return conditions one after the other as one, captions padded to the longest."""
    if isinstance(branches[0], ClassCondition):
        return ClassCondition(torch.cat([b[0] for b in branches]))
    texts = [b for b in branches if isinstance(b, TextCondition)]
    length = max(b.mask.shape[1] for b in texts)
    tokens = [functional.pad(b.tokens, (0, 0, 0, length - b.tokens.shape[1])) for b in texts]
    masks = [functional.pad(b.mask, (0, length - b.mask.shape[1])) for b in texts]
    pooled = [b.pooled for b in texts if b.pooled is not None]
    return TextCondition(torch.cat(tokens), torch.cat(masks), torch.cat(pooled) if len(pooled) == len(texts) else None)
