"""The Python interface: load a model, compute the loss of a rollout, draw images, save. `sharpmoe.NAME` finds it here.

Nothing here imports DeepSpeed, starts processes or communicates: `sharpmoe.training` and the commands of launcher/ do,
with the same functions below, so that a loop of one's own computes what they compute.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from data_pipeline.encode.like import OriginCoders, origin_header
from data_pipeline.read.shards import ShardSet
from data_pipeline.read.stream import stream
from data_pipeline.schema import Batch
from sharpmoe import draws
from sharpmoe.config import LossConfig, ModelConfig, OptimConfig, RolloutConfig, RunConfig, SampleConfig
from sharpmoe.devices import send
from sharpmoe.errors import ConfigError, DataError
from sharpmoe.model.backbone import Backbone, map_condition
from sharpmoe.model.weights import load_model, save_weights
from sharpmoe.moe.thresholds import move_cutoffs, update_routers
from sharpmoe.report.counterfactual import draw_counterfactual, write_counterfactual
from sharpmoe.report.figures import to_pictures
from sharpmoe.report.film import record_film, write_film
from sharpmoe.report.runs import find_origin, find_saved_model
from sharpmoe.report.samples import (
    Prompts,
    Size,
    check_shards,
    check_weak_origin,
    draw_images,
    encode_prompts,
    override_sampling,
)
from sharpmoe.rollout import TrajectoryBatch
from sharpmoe.sampling import SamplingCallback, SamplingOptions, require_still
from sharpmoe.train.objective import Objective, StepRequest
from sharpmoe.train.rollout_schedules import check_schedule, num_segments, with_schedule
from sharpmoe.train.tally import pools_trajectories
from sharpmoe.train.terms import LossTerms, routing_weight, steers_alone
from sharpmoe.train.trajectories import EmptyText, draw_trajectories

_ANY_POSITION = 2**62  # positions of batches that have none are drawn below it
_TEXT_FIELDS = ("text", "text_mask", "pooled")
_FIELDS = ("latent", "saliency", "label", *_TEXT_FIELDS, "position")


class RolloutLoss(NamedTuple):
    """The loss of a micro-batch of rollouts, and what moves once per optimizer step (`finish_step`)."""

    total: Tensor  # 0-d; its backward gives the gradient
    parts: LossTerms  # total, flow, routing, router, heads: 0-d, detached, unweighted but for total
    thresholds: Tensor | None  # (MoE layers, E) where the family has thresholds (DiffMoE, Expert Race)
    loads: Tensor | None  # (MoE layers, E) where a bias balances the loads (DSMoE)
    cutoffs: Tensor | None  # (MoE layers, E) where the steps of a trajectory are one pool (rollout.pool)


def load(path: str | Path, *, weights: Literal["ema", "live"] = "ema") -> Backbone:
    """Return the model of a run or checkpoint folder, a weights file or a folder of one model: float32, eval mode, CPU.

    The last is what `export` has written, or Nucleus-Image in the layout of diffusers. `weights`: of a run or
    checkpoint, the averaged or the live ones. `model.config` is its architecture, and `model.origin` says with which
    codec and text encoder it was trained, so that `sample` works. Raises CheckpointError; checkpoints that do not say
    what they are, of other projects, are loaded by `load_pretrained`.
    """
    saved = find_saved_model(path, weights)
    model, header = load_model(saved.weights)
    model.origin = find_origin(saved, header)
    return model


def save(model: Backbone, path: str | Path, *, shards: ShardSet | str | Path | None = None) -> Path:
    """Write a model as a weights file that `load`, the commands and `checkpoint.init` of a run read; return it.

    The file names the codec and the text encoder of `shards`, by default those in `model.origin`. Raises OSError, and
    CheckpointError where a value is not finite.
    """
    origin = model.origin if shards is None else origin_header(_opened(shards))
    state = {name: value.detach() for name, value in model.state_dict().items()}
    save_weights(path, state, model.config, origin)
    return Path(path)


def open_shards(place: str | Path, split: str = "train") -> ShardSet:
    """Open a split of prepared shards: a folder or a URL (docs/data.md). Raises DataError."""
    return ShardSet.open(place, split)


def batches(
    shards: ShardSet, batch_size: int, *, seed: int = 0, start: int = 0, num_workers: int = 0
) -> Iterator[Batch]:
    """Yield batches of shards without end, each of one resolution, in the order of a run with this seed.

    `start`: samples taken before, to go on. `num_workers`: processes that read ahead; 0 is a thread. Fields and shapes:
    `data_pipeline.schema.Batch`. Raises DataError where a sample is damaged. No communication.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, expected 1 or more")
    steps = stream(
        shards,
        seed=seed,
        global_batch=batch_size,
        micro_batch=batch_size,
        rank=0,
        world=1,
        start=start,
        num_workers=num_workers,
    )
    return (loaded.batches[0] for loaded in steps)


def rollout_loss(
    model: Backbone,
    batch: Batch | Mapping[str, Tensor] | TrajectoryBatch,
    *,
    loss: LossConfig | None = None,
    rollout: RolloutConfig | None = None,
    empty_text: EmptyText | None = None,
    seed: int = 0,
    step: int | None = None,
    cutoffs: Tensor | None = None,
) -> RolloutLoss:
    """Compute the loss of SharpMoE's post-training on a batch of images, as a run with these settings computes it.

    L = mean over T steps of (L_FM + the family's own losses) + routing_weight * L_routing (arXiv 2606.26938, section 3;
    docs/notation.md): each step denoises x_t at t_1 > ... > t_T > 0, and its saliency routers read the clean latent
    predicted by the step before; L_routing is KL(softmax(mass_scale A) || softmax(saliency_scale M)) of the compute A
    that each token got over the rollout and the saliency M of the image.

    `batch`: one of
    * a `Batch`, as `batches` yields it;
    * a mapping of tensors: latent (B, C, H, W) or (B, C, T, H, W), saliency (B, N) in [0, 1] (N tokens, row-major;
      `sharpmoe.saliency.saliency_map`), and label (B,) int64, or text (B, L, D), text_mask (B, L) bool and pooled
      (B, P). position (B,) int64 keys the noise, the times and the dropped captions of each image with `seed`; without
      it they are drawn from torch's global generator;
    * a `TrajectoryBatch`, with noise and times already drawn; the length of `times` is T then.
    All are moved to the model's device; labels and positions are read on the host, so leave them there. `loss` and
    `rollout` have the defaults of a run (docs/configuration.md).
    `empty_text`: the empty caption (`shards.empty_text()`) for `rollout.caption_dropout`; by default it is encoded with
    the text encoder in `model.origin`. `step`: number of the optimizer step, 0 is the first; loss.routing_warmup_steps
    needs it, and schedule segments trains the segment that a run trains then (without it, one drawn by position).
    `cutoffs` (MoE layers, E): with rollout.pool: trajectory, what `finish_step` returned for the step before; None in
    the first step.

    With a schedule other than plain and checkpoint some of the backward is done here (rollout.schedule,
    docs/design/0003); `total.backward()` completes the gradient, whatever the schedule. Under torch.no_grad nothing is
    kept. Raises ConfigError, and DataError where the batch does not fit the model. No communication.
    """
    run = RunConfig(model=model.config, loss=loss or LossConfig(), rollout=rollout or RolloutConfig(), seed=seed)
    _check_settings(run, step)
    if not torch.is_grad_enabled():
        run = with_schedule(run, schedule="plain")  # one call a step is all that is needed without a graph
    if not model.training:
        raise ConfigError(
            "rollout_loss: the model is in eval mode, in which experts choose otherwise than in training; call "
            "model.train() first (under torch.no_grad() too)"
        )
    if isinstance(batch, TrajectoryBatch):
        item, position = _to_device(batch, model), 0
        run = run.model_copy(update={"rollout": run.rollout.model_copy(update={"num_steps": len(batch.times)})})
    else:
        whole = batch if isinstance(batch, Batch) else _as_batch(batch, model.config)
        _check_batch(whole, model.config)
        whole, empty = _texts(whole, model, empty_text, run)
        (item,) = draw_trajectories([whole], empty, run, _device(model))
        position = int(whole.position[0])
    check_schedule(run, len(item.x0), (item.saliency.shape[1],))
    _check_cutoffs(cutoffs, run)
    if cutoffs is not None:  # kept in float64, compared in the precision of scores, as a run does
        cutoffs = cutoffs.to(_device(model), torch.float32)
    segment = draws.rollout_block(seed, position if step is None else step, num_segments(run))
    weight = None if step is None else routing_weight(run, step)
    answer = Objective(model, run)(StepRequest((item,), segment, routing_weight=weight, cutoffs=cutoffs))
    (record,) = answer.records
    total = answer.loss - answer.loss.detach() + record.terms.total  # the last pass has the graph, the record the value
    return RolloutLoss(total, record.terms, record.thresholds, record.loads, record.cutoffs)


def finish_step(
    model: Backbone, *losses: RolloutLoss, optim: OptimConfig | None = None, cutoffs: Tensor | None = None
) -> Tensor | None:
    """Move what moves once per optimizer step, after `optimizer.step()`: thresholds and balancing biases, in place.

    `losses`: of all micro-batches of the step. `optim`: threshold_decay and bias_rate, by default those of a run.
    `cutoffs`: those that the step had. Returns the cutoffs of the next step (MoE layers, E) for `rollout_loss`, None
    where the steps of a trajectory are no pool. Does nothing for families without any of these. No communication.
    """
    optim = optim or OptimConfig()
    thresholds = [loss.thresholds for loss in losses if loss.thresholds is not None]
    loads = [loss.loads for loss in losses if loss.loads is not None]
    update_routers(model.moe_layers(), _mean(thresholds), _mean(loads), optim)
    candidates = _mean([loss.cutoffs for loss in losses if loss.cutoffs is not None])
    return None if candidates is None else move_cutoffs(cutoffs, candidates, optim.threshold_decay)


def sample(
    model: Backbone,
    prompts: str | int | Sequence[str] | Sequence[int],
    *,
    shards: ShardSet | str | Path | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 16,
    num_steps: int | None = None,
    method: Literal["euler", "heun"] | None = None,
    cfg_scale: float | None = None,
    guidance_source: Literal["own", "guided"] | None = None,
    cfg_norm: Literal["none", "tokens"] | None = None,
    cfg_interval: tuple[float, float] | None = None,
    shift: float | Literal["tokens"] | None = None,
    weak_model: Backbone | None = None,
    seed: int | None = None,
    callback: SamplingCallback | None = None,
    film: str | Path | None = None,
    film_frames: int = 8,
    counterfactual: str | Path | None = None,
) -> list[Any]:
    """Draw one image per caption, or per label of a class-conditional model, on the model's device.

    Returns PIL images; of a model with frames a list of the frames of each clip.
    `shards` decode the latents and encode the captions; by default the codec and the text encoder in `model.origin` do.
    `height` and `width` are pixels, by default those of the model's square. Settings that are not given have the
    defaults of the `sample` section (docs/configuration.md); `shift` is sample.shift.factor. `weak_model`: guidance
    away from a worse model of the same latents, such as the base of a post-trained one, in place of the empty caption
    (autoguidance, arXiv 2406.02070); it is moved to the device of the model. The noise of image i is keyed by (seed,
    i). `callback` is called with a `SamplingStep` once per step and batch; what it raises ends the sampling. The mode
    of the models is restored. Raises ConfigError and DataError. No communication.

    `film`: a folder for film.png and film.json, what the saliency routers read at `film_frames` steps above the experts
    per token. `counterfactual`: a folder for counterfactual.png and .json, the same noise with the saliency routers on,
    off and guided by another image; the images are those with them on. One of `film`, `counterfactual`, `callback`.
    """
    if film is not None or counterfactual is not None:
        require_still(model.config, "sharpmoe.sample: film and counterfactual")
    given: dict[str, object] = {"num_steps": num_steps, "method": method, "cfg_scale": cfg_scale, "seed": seed}
    given |= {"guidance_source": guidance_source, "cfg_norm": cfg_norm, "cfg_interval": cfg_interval}
    settings = override_sampling(SampleConfig(), given | {"shift": None if shift is None else {"factor": shift}})
    coders = _coders_of(model, shards)
    many: list[str | int] = [prompts] if isinstance(prompts, str | int) else [*prompts]
    request = encode_prompts(model.config, coders, Prompts.of(many, model.config), _device(model))
    codec = coders.codec_object()
    latents = Size(height, width).of_latents(model.config, codec)
    weak = None
    if weak_model is not None:
        check_weak_origin(weak_model.origin, model.origin)
        weak = weak_model.to(_device(model))
    if sum(look is not None for look in (film, counterfactual, callback)) > 1:
        raise ConfigError("sample: film, counterfactual and callback are of one call each; give one of them")
    options = SamplingOptions(batch_size=batch_size, size=latents, weak=weak, callback=callback)
    titles = Prompts.of(many, model.config).titles()
    if film is not None:
        strip = record_film(model, request, settings, codec.decode, film_frames, options)
        write_film(Path(film), strip, titles, "sample", settings.seed)
        images = strip.images
    elif counterfactual is not None:
        found = draw_counterfactual(model, request, settings, codec.decode, options)
        write_counterfactual(Path(counterfactual), found, titles, "sample", settings.seed)
        images = found.images["on"]
    else:
        images = draw_images(model, request, settings, codec.decode, options)
    return to_pictures(images)


# --- models -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _coders(origin: tuple[tuple[str, str], ...]) -> OriginCoders:
    return OriginCoders(dict(origin), "model.origin")


def _coders_of(model: Backbone, shards: ShardSet | str | Path | None) -> ShardSet | OriginCoders:
    """Return what decodes latents and encodes captions: shards of this model, or what its origin names."""
    if shards is not None:
        opened = _opened(shards)
        check_shards(model.config, opened, model.origin)
        return opened
    if "codec" not in model.origin:
        raise ConfigError("sample: the model does not say with which codec it was trained; give shards=FOLDER")
    return _coders(tuple(sorted(model.origin.items())))


def _opened(shards: ShardSet | str | Path) -> ShardSet:
    return shards if isinstance(shards, ShardSet) else open_shards(shards)


def _device(model: Backbone) -> torch.device:
    return next(model.parameters()).device


# --- batches ----------------------------------------------------------------------------------------------------------


def _check_settings(run: RunConfig, step: int | None) -> None:
    """Raise ConfigError where a setting of the loss needs what the model lacks, or what a batch does not tell."""
    loss = run.loss
    if steers_alone(run) and not run.model.saliency_router:
        raise ConfigError(
            "rollout_loss: loss.routing_gradient is saliency_routers, but the model has none: nothing would learn from "
            "the routing loss; call sharpmoe.attach(model) first, or set routing_gradient to all"
        )
    if loss.saliency_entropy is not None or loss.mass_spread is not None:
        raise ConfigError(
            "rollout_loss: a run finds the scales for loss.saliency_entropy and loss.mass_spread from its training "
            "split; set both to None, and saliency_scale and mass_scale to those in the run's config.yaml"
        )
    if loss.routing_warmup_steps and step is None:
        raise ConfigError("rollout_loss: loss.routing_warmup_steps needs the number of the step; give step=N, from 0")


def _to_device(item: TrajectoryBatch, model: Backbone) -> TrajectoryBatch:
    device = _device(model)
    condition = map_condition(item.condition, lambda part: send(part, device))
    return TrajectoryBatch(
        x0=send(item.x0, device),
        x1=send(item.x1, device),
        times=send(item.times, device),
        condition=condition,
        saliency=send(item.saliency, device),
    )


def _as_batch(given: Mapping[str, Tensor], config: ModelConfig) -> Batch:
    """Fill up a batch of tensors to a `Batch`. Raises DataError where it lacks one, or has one of another name."""
    needed = ("latent", "saliency", *(_TEXT_FIELDS if config.conditioning == "text" else ("label",)))
    missing, unknown = [name for name in needed if name not in given], sorted(given.keys() - {*_FIELDS})
    if missing or unknown:
        wrong = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(unknown)}"
        raise DataError(
            f"batch: {wrong}; a {config.conditioning}-conditional model takes {', '.join(needed)}, and position"
        )
    latent, count = given["latent"], len(given["latent"])
    return Batch(
        latent=latent,
        text=given.get("text", latent.new_zeros(count, 0, 0)),
        text_mask=given.get("text_mask", torch.zeros(count, 0, dtype=torch.bool)),
        pooled=given.get("pooled", latent.new_zeros(count, 0)),
        label=given.get("label", torch.full((count,), -1)),
        saliency=given["saliency"],
        foreground=torch.full_like(given["saliency"], torch.nan),
        position=given.get("position", torch.randint(_ANY_POSITION, (count,))).cpu(),
        keys=tuple(map(str, range(count))),
        captions=("",) * count,
    )


def _check_batch(batch: Batch, config: ModelConfig) -> None:
    """Raise DataError where the shapes of a batch are not those of the model."""
    shape, patch = tuple(batch.latent.shape), config.patch_size
    axes = 5 if config.latent_frames > 1 else 4
    if len(shape) != axes or shape[1] != config.latent_channels or shape[-2] % patch or shape[-1] % patch:
        frames = "T, " if axes > 4 else ""
        raise DataError(
            f"batch: latent has shape {shape}, expected (B, {config.latent_channels}, {frames}H, W) with H and W "
            f"multiples of {patch}"
        )
    count, tokens = shape[0], math.prod(shape[2:]) // patch**2
    expected: dict[str, tuple[int, ...]] = {"saliency": (count, tokens)}
    if config.conditioning == "text":
        length = batch.text.shape[1] if batch.text.dim() == 3 else 0
        expected["text"] = (count, length, config.text_width)
        expected |= {"text_mask": (count, length), "pooled": (count, config.pooled_width)}
    else:
        expected["label"] = (count,)
    for name, wanted in expected.items():
        found = tuple(getattr(batch, name).shape)
        if found != wanted:
            raise DataError(f"batch: {name} has shape {found}, expected {wanted} beside a latent of shape {shape}")


def _texts(batch: Batch, model: Backbone, empty_text: EmptyText | None, run: RunConfig) -> tuple[Batch, EmptyText]:
    """Return the batch and the empty caption, padded to one length. Raises ConfigError where it is not known."""
    if model.config.conditioning != "text" or (empty_text is None and run.rollout.caption_dropout == 0):
        return batch, (batch.text[0], batch.text_mask[0], batch.pooled[0])  # not used
    if empty_text is None and "encoder" not in model.origin:
        raise ConfigError(
            "rollout_loss: rollout.caption_dropout needs the empty caption; give empty_text=shards.empty_text(), or "
            "rollout=RolloutConfig(caption_dropout=0)"
        )
    tokens, mask, pooled = empty_text or _coders(tuple(sorted(model.origin.items()))).empty_text()
    missing = batch.text.shape[1] - len(mask)
    if missing >= 0:
        return batch, (functional.pad(tokens, (0, 0, 0, missing)), functional.pad(mask, (0, missing)), pooled)
    text, text_mask = functional.pad(batch.text, (0, 0, 0, -missing)), functional.pad(batch.text_mask, (0, -missing))
    return batch._replace(text=text, text_mask=text_mask), (tokens, mask, pooled)


def _check_cutoffs(cutoffs: Tensor | None, run: RunConfig) -> None:
    """Raise ConfigError for cutoffs that this loss does not have, or of another model."""
    if cutoffs is None:
        return
    if not pools_trajectories(run):
        raise ConfigError(
            f"rollout_loss: cutoffs are of rollout.pool: trajectory and of families whose tokens compete with those of "
            f"other images; rollout.pool is {run.rollout.pool}, model.router {run.model.router}: leave them out"
        )
    expected = (run.model.num_moe_layers, run.model.num_experts)
    if tuple(cutoffs.shape) != expected:
        raise ConfigError(
            f"rollout_loss: cutoffs have shape {tuple(cutoffs.shape)}, the model's have {expected} (MoE layers, "
            "experts); give what finish_step returned for this model"
        )


def _mean(parts: Sequence[Tensor]) -> Tensor | None:
    return torch.stack(list(parts)).double().mean(0) if parts else None
