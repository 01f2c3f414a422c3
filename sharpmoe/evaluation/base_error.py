"""Saliency maps without pictures' edges: how wrong a base is about each token, measured while data are prepared."""

import json
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data_pipeline.encode.like import is_fitted, same_fit
from data_pipeline.encode.saliency import (
    EncodedImages,
    MapContext,
    Maps,
    SaliencyChoice,
    SaliencyKind,
    SaliencyOption,
    numbers,
    whole,
)
from data_pipeline.index import Bucket, bucket_name
from data_pipeline.schema import Batch
from sharpmoe.errors import DataError
from sharpmoe.evaluation.held_out import observe
from sharpmoe.model.weights import load_model

_CHUNK = 16  # images of a model call


class _AsHeldOut:
    """Images that are about to be stored, as samples that `observe` takes; their indices key the draws of noise."""

    def __init__(self, batch: EncodedImages) -> None:
        self.num_samples = len(batch.numbers)
        height, width = (int(side) for side in batch.images.shape[-2:])
        channels, rows, columns = batch.latents.shape[1:]
        self._name = bucket_name((height, width))
        bucket = Bucket((height, width), (channels, rows, columns), batch.grid, self.num_samples)
        self.buckets = {self._name: bucket}
        self._images = batch

    def batch(self, indices: Sequence[int]) -> Batch:
        picked = self._images.pick([list(self._images.numbers).index(index) for index in indices])
        states = [text["text"].float() for text in picked.texts]
        lengths = torch.tensor([len(each) for each in states])
        no_map = torch.zeros(len(indices), picked.grid[0] * picked.grid[1])
        return Batch(
            latent=picked.latents.float(),
            text=pad_sequence(states, batch_first=True),
            text_mask=torch.arange(int(lengths.max())) < lengths[:, None],
            pooled=torch.stack([text.get("pooled", torch.empty(0)) for text in picked.texts]),
            label=torch.tensor(picked.labels),
            saliency=no_map,
            foreground=no_map,
            position=torch.tensor(indices),
            keys=tuple(map(str, indices)),
            captions=("",) * len(indices),
        )

    def bucket_of(self, index: int) -> str:
        return self._name


class _BaseError:
    """Maps of one base."""

    def __init__(self, choice: SaliencyChoice, context: MapContext) -> None:
        self._path, self._spec = choice.path, choice.identity
        model, meta = load_model(choice.path)
        if model.config.patch_size != context.patch_size:
            raise self._refusal(f"its patch size is {model.config.patch_size}, that of the shards {context.patch_size}")
        for what, here in (("codec", context.codec.identity), ("encoder", context.encoder.identity)):
            there = json.loads(meta[what]) if what in meta else here
            same = there == here or (what == "codec" and is_fitted(here) and same_fit(meta, context.codec))
            if not same:
                raise self._refusal(
                    f"was trained with another {what} ({there['kind']}), so it would not understand these latents or "
                    f"texts; add --like {choice.path}"
                )
        self._model = model.to(context.device)

    def __call__(self, batch: EncodedImages) -> Tensor:
        """Return (B, N) float32 in [0, 1): e / (1 + e) of the flow loss e of each token, mean over times and draws."""
        self._check(batch)
        samples, times = _AsHeldOut(batch), sorted(self._spec["times"], reverse=True)
        seen = [
            observe(self._model, samples, batch.numbers, times, seed=seed, chunk=_CHUNK, quiet=True).tokens[0].flow
            for seed in range(self._spec["draws"])
        ]
        error = torch.stack(seen).mean((0, 2))
        return error / (1 + error)

    def _check(self, batch: EncodedImages) -> None:
        config = self._model.config
        if batch.latents.shape[1] != config.latent_channels:
            raise self._refusal(f"takes {config.latent_channels} latent channels, these have {batch.latents.shape[1]}")
        if config.conditioning == "class":
            labels = [label for label in batch.labels if not 0 <= label < config.num_classes]
            if labels:
                raise self._refusal(
                    f"takes classes 0 to {config.num_classes - 1}, a picture has {labels[0]} (-1: none); take a source "
                    "with classes, or a base that takes captions"
                )
            return
        widths = [("text", config.text_width)]
        if "pooled_width" not in config.architecture.ignores:
            widths.append(("pooled", config.pooled_width))
        for name, expected in widths:
            found = batch.texts[0][name].shape[-1] if name in batch.texts[0] else 0
            if found != expected:
                raise self._refusal(
                    f"takes {name} states of {expected} features, these have {found}; use the --encoder of the base"
                )

    def _refusal(self, what: str) -> DataError:
        return DataError(f"--saliency base-error:path={self._path}: {what}")


def _create(choice: SaliencyChoice, context: MapContext) -> Maps:
    return _BaseError(choice, context)


BASE_ERROR = SaliencyKind(
    name="base-error",
    text="weights of a base (.safetensors written here), whose flow loss of each token is the map",
    create=_create,
    options={
        "times": SaliencyOption(numbers(0.01, 1.0, range(1, 17)), "T/T/...", [0.8, 0.5, 0.2]),
        "draws": SaliencyOption(whole(1, 64), "NUMBER", 1),
    },
    needs_file=True,
)
