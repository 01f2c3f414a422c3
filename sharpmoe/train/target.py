"""The scales of L_routing that follow from the training split: loss.saliency_entropy and loss.mass_spread.

They are found once, when a run starts, from the stored maps of samples spread evenly over the split, and written where
a given scale would be: in the run's configuration, and with it in config.yaml and in every checkpoint. A resumed run
takes them from its checkpoint.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.read.mixture import Mixture
from data_pipeline.read.samples import Sample
from sharpmoe.config import LossConfig, RunConfig
from sharpmoe.errors import ConfigError, DataError
from sharpmoe.evaluation.held_out import spread
from sharpmoe.invocation import spell_command
from sharpmoe.parallel.ranks.launch import World, gather_objects, raise_on_all_ranks
from sharpmoe.saliency import entropy_share, scale_for_entropy
from sharpmoe.train.setup import RunPlan
from sharpmoe.train.terms import has_routing_loss

_SAMPLES = 1024
_RESULTS = ("saliency_scale", "mass_scale")


def with_target_scales(plan: RunPlan, world: World) -> RunPlan:
    """Return the plan with the scales that its run asks for as numbers; the plan itself where it asks for none.

    Communicates: each rank reads its share of the samples. Raises ConfigError or DataError on every rank.
    """
    run = plan.run
    if not has_routing_loss(run) or (run.loss.saliency_entropy is None and run.loss.mass_spread is None):
        return plan
    kept = _kept(run, plan.saved.settings if plan.saved is not None else {})
    if kept is not None:
        return replace(plan, run=_with(run, kept))
    own: list[np.ndarray] = []
    with raise_on_all_ranks(world):
        own = _read_maps(plan.data.train, world.rank, world.size)
    maps = _by_size([one for part in gather_objects(own, world) for one in part])
    found = _scales(run, maps, plan.run.data.train_split)
    return replace(plan, run=_with(run, found), notes=(*plan.notes, _note(found, maps)))


def _kept(run: RunConfig, saved: Mapping[str, Any]) -> dict[str, float] | None:
    """Return the scales of a checkpoint where all that they follow from is the same there; its data always are."""
    before = {key: saved.get(key) for key in _premises(run)}
    if before != _premises(run) or any(f"loss.{name}" not in saved for name in _RESULTS):
        return None
    return {name: float(saved[f"loss.{name}"]) for name in _RESULTS}


def _premises(run: RunConfig) -> dict[str, Any]:
    """Return what the scales follow from, beside the training split, by dotted key."""
    loss = run.loss
    found: dict[str, Any] = {"loss.saliency_entropy": loss.saliency_entropy, "loss.mass_spread": loss.mass_spread}
    if loss.saliency_entropy is None:
        found["loss.saliency_scale"] = loss.saliency_scale
    if loss.mass_spread is None:
        found["loss.mass_scale"] = loss.mass_scale
    elif loss.mass_reduction == "sum":
        found["rollout.num_steps"] = run.rollout.num_steps
    return found | {"loss.mass_reduction": loss.mass_reduction}


def _scales(run: RunConfig, maps: list[Tensor], split: str) -> dict[str, float]:
    """Return both scales. Raises ConfigError where the maps allow none, DataError where there are no maps."""
    loss = run.loss
    if not maps:
        raise DataError(
            f"data.train_split {split}: none of its saliency maps can be read to find the scales of L_routing from; "
            f"`{spell_command('shards')} verify` names what is damaged"
        )
    saliency_scale, mass_scale = loss.saliency_scale, loss.mass_scale
    if loss.saliency_entropy is not None:
        try:
            saliency_scale = scale_for_entropy(maps, loss.saliency_entropy)
        except ValueError as error:
            raise ConfigError(
                f"loss.saliency_entropy is {loss.saliency_entropy}, but in data.train_split {split} {error}; "
                "set a larger one"
            ) from None
    if loss.mass_spread is not None:
        mass_scale = _mass_scale(run, saliency_scale * _deviation(maps))
    return {"saliency_scale": saliency_scale, "mass_scale": mass_scale}


def _mass_scale(run: RunConfig, deviation: float) -> float:
    """Return the scale of A at which counts that vary as much as is asked for vary by `deviation` in the logits."""
    assert run.loss.mass_spread is not None
    per_layer_and_step = deviation / (run.loss.mass_spread * run.model.mean_capacity)
    if per_layer_and_step == 0:
        raise ConfigError(
            "loss.mass_spread: every saliency map of the training split is flat; set loss.mass_scale instead"
        )
    terms = run.rollout.num_steps * run.model.num_moe_layers if run.loss.mass_reduction == "sum" else 1
    return float(f"{per_layer_and_step / terms:.6g}")


def _deviation(maps: list[Tensor]) -> float:
    """Return the standard deviation of M over the tokens of an image, mean over images."""
    return float(torch.cat([each.double().std(-1, correction=0) for each in maps]).mean())


def _with(run: RunConfig, scales: Mapping[str, float]) -> RunConfig:
    loss: LossConfig = run.loss.model_copy(update=dict(scales))
    return run.model_copy(update={"loss": loss})


def _note(scales: Mapping[str, float], maps: list[Tensor]) -> str:
    images, share = sum(len(each) for each in maps), entropy_share(maps, scales["saliency_scale"])
    return (
        f"loss.saliency_scale {scales['saliency_scale']:g}, loss.mass_scale {scales['mass_scale']:g}: "
        f"softmax(scale * M) has {share:.3f} of log N of entropy on {images} training images"
    )


def _read_maps(data: Mixture, rank: int, world: int) -> list[np.ndarray]:
    """Read a rank's share of the maps, sources in proportion to their weights. Damaged samples are left out."""
    weights = [
        sum(float(stream.weight) for stream in data.streams if stream.source == n) for n in range(len(data.sources))
    ]
    counts = [max(1, round(_SAMPLES * weight / sum(weights))) for weight in weights]
    places = [(s, i) for s, count in zip(data.sources, counts, strict=True) for i in spread(s.num_samples, count)]
    samples = [source.load(index) for source, index in places[rank::world]]
    return [sample.saliency for sample in samples if isinstance(sample, Sample)]


def _by_size(maps: list[np.ndarray]) -> list[Tensor]:
    """Stack maps of equal numbers of tokens: (I, N) each. An image of one token has no distribution."""
    sizes: dict[int, list[np.ndarray]] = defaultdict(list)
    for each in maps:
        sizes[each.size].append(each)
    return [torch.from_numpy(np.stack(sizes[size])).double() for size in sorted(sizes) if size > 1]
