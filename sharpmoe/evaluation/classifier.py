"""A small classifier of a labelled data set, trained on its training split: features and classes that judge samples.

Made for sets that published networks do not fit, such as Fashion-MNIST. The file (safetensors) holds in its header how
it was trained; figures in its features are comparable only among samples that the same file judged.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from data_pipeline.read.shards import ShardSet
from sharpmoe.console import progress_bar
from sharpmoe.durable import write_atomically
from sharpmoe.errors import DataError, first_line

_FORMAT = "sharpmoe classifier 1"
_READ = 256  # samples per read of the shards


class ClassifierSettings(BaseModel):
    """How a classifier is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    epochs: int = Field(3, ge=1)
    batch_size: int = Field(128, ge=2)
    lr: float = Field(2e-3, gt=0)  # highest rate, of AdamW with one cycle
    width: int = Field(32, ge=4, multiple_of=4)  # channels of the first layer; features have four times as many
    images: int | None = Field(None, ge=2)  # the first so many of the split; None: all
    seed: int = Field(0, ge=0)


class Classifier(nn.Module):
    """Convolutions to the mean over positions, and a linear layer; for images of any size."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        channels = (3, width, 2 * width, 4 * width, 4 * width)
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2 if number in (0, 2) else 1, padding=1)
            for number, (a, b) in enumerate(pairwise(channels))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(4, b) for b in channels[1:])
        self.last = nn.Linear(4 * width, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Return the features (B, 4 * width) of images (B, 3, H, W) uint8."""
        x = images.float() / 127.5 - 1
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = functional.gelu(norm(layer(x)))
        return x.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, K) of images (B, 3, H, W) uint8."""
        logits: Tensor = self.last(self.features(images))
        return logits


def train_classifier(
    path: Path, shards: ShardSet, held_out: ShardSet, settings: ClassifierSettings, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Train on labelled shards, write the weights to `path` and a card beside it (.json); return the card.

    The same file for the same seed, data and device. The card's accuracy is that on at most 5,000 images of `held_out`.
    Raises DataError where an image has no label.
    """
    images, labels = _read(shards, settings.images)
    num_classes = int(labels.max()) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = Classifier(settings.width, num_classes).to(device)
    _fit(model, images.to(device), labels.to(device), settings)
    seen, truth = _read(held_out, 5000)
    with torch.no_grad():
        guesses = torch.cat([model(part.to(device)).argmax(1).cpu() for part in seen.split(500)])
    card = {
        "format": _FORMAT,
        "num_classes": num_classes,
        "image": list(images.shape[2:]),
        "settings": settings.model_dump(),
        "training": f"{len(images)} images of split {shards.split}, {shards.location}",
        "index": shards.fingerprint,
        "accuracy": round(float((guesses == truth).double().mean()), 4),
        "held_out": f"{len(seen)} images of split {held_out.split}",
    }
    state = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    write_atomically(path, lambda draft: save_file(state, draft, {"card": json.dumps(card)}))
    write_atomically(path.with_suffix(".json"), json.dumps(card, indent=1) + "\n")
    return card


def load_classifier(path: Path) -> tuple[Classifier, Mapping[str, Any]]:
    """Load a file of `train_classifier` in eval mode, with its card. Raises DataError for any other file."""
    try:
        with safe_open(path, "pt") as file:
            card = json.loads((file.metadata() or {}).get("card", "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        if card.get("format") != _FORMAT:
            raise ValueError("not written by a study")
        model = Classifier(card["settings"]["width"], card["num_classes"])
        model.load_state_dict(state)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DataError(
            f"{path}: no classifier ({first_line(error)}); expected classifier.safetensors of a study"
        ) from None
    return model.eval(), card


def _read(shards: ShardSet, count: int | None) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, H, W) uint8 and labels (N,) of the first `count` samples of the main bucket."""
    shards.require_still("a classifier")
    rows = shards.indices_of(shards.main_bucket)[:count]
    codec, images, labels = shards.codec_object(), [], []
    with progress_bar(f"reading split {shards.split}", len(rows)) as advance:
        for picked in _cut(rows):
            batch = shards.batch(list(picked))
            if bool((batch.label < 0).any()):
                key = batch.keys[int((batch.label < 0).nonzero()[0])]
                raise DataError(f"{shards.location}: {key} has no label; a classifier needs one of every image")
            images.append((127.5 * codec.decode(batch.latent) + 128).clamp(0, 255).to(torch.uint8))
            labels.append(batch.label.long())
            advance(len(picked))
    return torch.cat(images), torch.cat(labels)


def _cut(rows: range) -> Iterator[range]:
    for start in range(0, len(rows), _READ):
        yield rows[start : start + _READ]


def _fit(model: Classifier, images: Tensor, labels: Tensor, settings: ClassifierSettings) -> None:
    size, random = min(settings.batch_size, len(images)), torch.Generator().manual_seed(settings.seed)
    steps = settings.epochs * (len(images) // size)
    optimizer = torch.optim.AdamW(model.parameters(), settings.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=max(steps, 2))
    model.train()
    with progress_bar("training the classifier", steps, "step") as advance:
        for _ in range(settings.epochs):
            order = torch.randperm(len(images), generator=random).to(images.device)
            for picked in order.split(size)[: len(images) // size]:
                loss = functional.cross_entropy(model(images[picked]), labels[picked])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                advance(1)
    model.eval()
