"""Cost of the saliency router in sampling, and savings by shared model calls and by prepared text.

    python -m benchmarks.sampling [--device cuda] [--dtype bf16] [--only saliency_router] [--json FILE] [--tiny]

Times are per sampling step of one batch at 256 tokens per image. Models have random weights; DiffMoE's thresholds are
set so that a token gets one expert on average.
"""

import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Case, Goals, Options, Planned, SizeTable, Work, main, sizes_for
from benchmarks.models import drawn_model
from sharpmoe import draws, flow, sampling
from sharpmoe.config import SIZES as PRESETS
from sharpmoe.config import ModelConfig, SampleConfig
from sharpmoe.model.backbone import Backbone, ClassCondition, Condition, ModelOutput, TextCondition
from sharpmoe.moe.routing import CallMode
from sharpmoe.sampling import CfgSettings, Request

_STEPS = 2
_CPU_COST, _CUDA_COST = 0.045, 0.04  # largest allowed cost of the saliency router
_TEXT = 77, 768  # tokens and width of a caption


class Size(NamedTuple):
    """Size of a model."""

    width: int
    depth: int
    num_heads: int
    latent_size: int = 32


class Sizes(NamedTuple):
    """What is sampled."""

    guided: list[tuple[str, int]]  # presets and images of the saliency router's cases
    preset: str  # of the others
    images: tuple[int, int]


SIZES: SizeTable[Sizes] = {
    "tiny": {0: Sizes([("tiny", 2)], "tiny", (1, 2))},
    "cpu": {0: Sizes([("s", 4), ("b", 2)], "s", (1, 8))},
    "cuda": {0: Sizes([("b", 32), ("l", 16)], "b", (1, 16)), 36: Sizes([("b", 64), ("l", 64)], "l", (1, 64))},
}
SHAPES = {name: Size(**fields) for name, fields in PRESETS.items()}


def cases(options: Options) -> Iterator[Planned]:
    guided, preset, (one, many) = sizes_for(SIZES, options)
    for name, images in guided:
        case = f"sampling.saliency_router_diffmoe_{name}_{images}_images"
        model = cache(partial(class_model, "diffmoe", SHAPES[name], options))
        yield _planned(case, saliency_router, model, images, options)
    for router in ("tc", "diffmoe"):
        model = cache(partial(class_model, router, SHAPES[preset], options))
        for images in (one, many):
            case = f"sampling.branches_in_a_call_{router}_{preset}_{images}_images"
            yield _planned(case, joined_branches, model, images, options)
    case = f"sampling.pool_per_image_diffmoe_{preset}_{many}_images"
    yield _planned(case, pool_per_image, model, many, options)
    text = partial(text_model, SHAPES[preset], options)
    images = max(1, many // 2)
    yield _planned(f"sampling.prepared_text_tc_{preset}_{images}_images", prepared_text, text, images, options)


def _planned(
    name: str,
    build: Callable[[str, Backbone, int, Options], Case],
    model: Callable[[], Backbone],
    images: int,
    options: Options,
) -> Planned:
    return Planned(name, lambda: build(name, model(), images, options))


def class_model(router: str, size: Size, options: Options) -> Backbone:
    """Return a class-conditional model with an untrained saliency router, in eval mode."""
    return _model(options, router=router, conditioning="class", num_classes=1000, **size._asdict())


def text_model(size: Size, options: Options) -> Backbone:
    """Return a text-conditional model in eval mode."""
    width = _TEXT[1]
    return _model(options, router="tc", conditioning="text", text_width=width, pooled_width=width, **size._asdict())


@torch.no_grad()
def _model(options: Options, **fields: Any) -> Backbone:
    model = drawn_model(ModelConfig(**fields), options.device, options.dtype).eval()
    for layer in model.moe_layers():
        if layer.saliency_router is not None:
            for parameter in layer.saliency_router.out.parameters():
                parameter.zero_()  # untrained: it changes no choice
    if model.config.router == "diffmoe":
        set_thresholds(model, options.device)
    return model


def set_thresholds(model: Backbone, device: torch.device) -> None:
    """Set DiffMoE's thresholds so that a token gets `capacity` experts on average: its predictors are untrained."""
    size, channels = model.config.latent_size, model.config.latent_channels
    x, t = torch.randn(4, channels, size, size, device=device), torch.full((4,), 0.5, device=device)
    share = model.config.capacity / model.config.num_experts
    for layer, record in zip(model.moe_layers(), model(x, t, torch.arange(4, device=device)).routing, strict=True):
        assert record.capacity_logits is not None
        layer.expert_threshold.copy_(record.capacity_logits.flatten(0, 1).sigmoid().quantile(1 - share, dim=0))


def saliency_router(name: str, model: Backbone, images: int, options: Options) -> Case:
    """Compare a model with saliency routers to one without; a new router changes no choice, so nothing else differs."""
    base = model.config.model_copy(update={"saliency_router": False})
    request = Request(labels(images, options), None, tuple(range(images)))

    def draw(config: ModelConfig) -> Tensor:
        return sampling.generate(model, config, SampleConfig(num_steps=_STEPS, cfg_scale=1.0), request)

    def check() -> None:
        assert torch.equal(draw(model.config), draw(base))

    cost = _CPU_COST if options.device.type == "cpu" else _CUDA_COST
    return Case(
        name,
        _steps(lambda: draw(model.config)),
        _steps(lambda: draw(base)),
        goals=Goals(1 / (1 + cost)),
        check=check,
        facts={"flops_added": flops_added(model, options.device)},
    )


@torch.no_grad()
def flops_added(model: Backbone, device: torch.device) -> float:
    """Return the fraction that x0_prev adds to the FLOPs of a call."""
    size = model.config.latent_size
    x, t = torch.randn(1, model.config.latent_channels, size, size, device=device), torch.full((1,), 0.5, device=device)
    flops = []
    for x0_prev in (x, None):
        with FlopCounterMode(display=False) as counter:
            model(x, t, torch.zeros(1, dtype=torch.long, device=device), x0_prev)
        flops.append(counter.get_total_flops())
    return flops[0] / flops[1] - 1


def joined_branches(name: str, model: Backbone, images: int, options: Options) -> Case:
    """Compare one call for both branches of classifier-free guidance to one call for each."""
    settings = CfgSettings.of(model.config, SampleConfig(cfg_scale=1.5))
    return _against_parts(name, model, 2, settings, images, options)


def pool_per_image(name: str, model: Backbone, images: int, options: Options) -> Case:
    """Compare one call with separate pools per image to one call per image."""
    settings = CfgSettings.of(model.config, SampleConfig(cfg_scale=1.5), pool_per_image=True)
    return _against_parts(name, model, 2 * images, settings, images, options)


def prepared_text(name: str, model: Backbone, images: int, options: Options) -> Case:
    """Compare text that is embedded once, with keys and values of every block, to embedding it at every step."""
    length, width = _TEXT
    states = torch.randn(images, length, width, device=options.device)
    mask = torch.ones(images, length, dtype=torch.bool, device=options.device)
    text = TextCondition(states, mask, torch.randn(images, width, device=options.device))

    def draw(denoiser: sampling.Denoiser, steps: int = 2 * _STEPS) -> Tensor:
        return _euler(denoiser, (text,), CfgSettings(), images, model, options, steps)

    def check() -> None:
        assert torch.equal(draw(model), draw(_InParts(model, 1)))

    return Case(
        name, _steps(lambda: draw(model), 2 * _STEPS), _steps(lambda: draw(_InParts(model, 1)), 2 * _STEPS), check=check
    )


def _against_parts(
    name: str, model: Backbone, parts: int, settings: CfgSettings, images: int, options: Options
) -> Case:
    cond = labels(images, options)
    branches = (cond, sampling.empty_condition(cond, model.config, None))

    def draw(denoiser: sampling.Denoiser) -> Tensor:
        return _euler(denoiser, branches, settings, images, model, options, _STEPS)

    def check() -> None:
        one, many = draw(model), draw(_InParts(model, parts))
        tolerance = 1e-5 if options.dtype == torch.float32 else 2e-2  # in half precision a near-tie may flip
        assert (one - many).norm() <= tolerance * many.norm()

    return Case(name, _steps(lambda: draw(model)), _steps(lambda: draw(_InParts(model, parts))), check=check)


def labels(images: int, options: Options) -> ClassCondition:
    """Return one class per image."""
    return ClassCondition(torch.arange(images, device=options.device))


@torch.no_grad()
def _euler(
    denoiser: sampling.Denoiser,
    branches: tuple[Condition, ...],
    settings: CfgSettings,
    images: int,
    model: Backbone,
    options: Options,
    steps: int,
) -> Tensor:
    size = model.config.latent_size
    noise = draws.noise(0, range(images), (model.config.latent_channels, size, size)).to(options.device)
    field = sampling.make_field(denoiser, branches, settings)
    return sampling.SAMPLERS["euler"](field, noise, flow.sampling_times(steps).to(noise), (noise,) * len(branches))


def _steps(draw: Any, steps: int = _STEPS) -> Work:
    def work() -> int:
        draw()
        return steps

    return work


class _InParts:
    """A model that computes equal parts of a batch one after the other and prepares nothing."""

    def __init__(self, model: Backbone, parts: int) -> None:
        self.model, self.parts = model, parts

    def __call__(
        self, x_t: Tensor, t: Tensor, condition: Any, x0_prev: Tensor | None = None, mode: CallMode = CallMode()
    ) -> ModelOutput:
        assert x0_prev is not None
        columns = [part.chunk(self.parts) for part in (x_t, t, x0_prev, *condition)]
        outputs = [
            self.model(x, times, type(condition)(*parts), previous)
            for x, times, previous, *parts in zip(*columns, strict=True)
        ]
        return ModelOutput(torch.cat([output.v for output in outputs]), ())


if __name__ == "__main__":
    sys.exit(main(cases, __doc__.splitlines()[0]))
