"""Measure one part of a study on a part of a split: allocation, flow losses, and samples against real images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.read.shards import ShardSet, SplitPart
from sharpmoe.config import SampleConfig
from sharpmoe.durable import fresh_folder, sha256_of, write_atomically
from sharpmoe.errors import CheckpointError
from sharpmoe.evaluation.adm import AdmBatch, draw_adm_batch
from sharpmoe.evaluation.allocation import Allocation, measure_allocation
from sharpmoe.evaluation.classifier import train_classifier
from sharpmoe.evaluation.extractors import ExtractorOptions
from sharpmoe.evaluation.metrics import MetricSettings
from sharpmoe.evaluation.sample_metrics import judge_sets
from sharpmoe.model.backbone import Backbone
from sharpmoe.model.weights import load_model
from sharpmoe.report.comparison import check_held_out
from sharpmoe.report.runs import find_saved_model
from sharpmoe.report.samples import pixels_per_latent
from sharpmoe.study.plan import EvaluateConfig, Part, Study

_ALLOCATION, _FIGURES, _BEGUN = "allocation.json", "figures.json", "settings.json"
_OWN = "classifier"  # the extractor that a study trains itself


def measures_samples(study: Study) -> bool:
    """Whether samples are drawn and judged, for which `prepare_judging` comes first."""
    return study.evaluate.samples > 0


def judging_files(study: Study, split: str) -> tuple[Path, ...]:
    """Return the files that `prepare_judging` writes for a split, "tuning" or "final"."""
    reference = study.folder / f"reference-{split}.npz"
    return (reference, _classifier_file(study)) if _trains_classifier(study) else (reference,)


def prepare_judging(study: Study, split: str, device: str) -> None:
    """Write the real images of a split as a batch, and train the study's classifier where it needs one."""
    data = study.measured_data
    place = getattr(study.evaluate, split)
    _write_reference(
        study.folder / f"reference-{split}.npz", ShardSet.open(data.first_place, place, data.remote.options())
    )
    if _trains_classifier(study) and not _classifier_file(study).is_file():
        training = ShardSet.open(data.first_place, data.train_split, data.remote.options())
        whole = ShardSet.open(data.first_place, SplitPart.read(place).split, data.remote.options())
        card = train_classifier(_classifier_file(study), training, whole, study.classifier, device)
        print(f"classifier: accuracy {card['accuracy']:.4f} on {card['held_out']}", flush=True)


def measure_part(study: Study, part: Part, split: str, device: str) -> Path:
    """Measure a trained part on a split, "tuning" or "final", and return the file of its figures.

    Held-out noise is that of `evaluate.seed` for all parts; images are drawn with the seed of the part.
    """
    folder, settings = part.folder / f"seed{part.seed}-{split}", study.evaluate
    wanted = _settings(study, part, split)
    _begin(folder, wanted)
    data = study.measured_data
    shards = ShardSet.open(data.first_place, getattr(settings, split), data.remote.options())
    model, header = load_model(weights_of(study, part))
    check_held_out(model.config, shards, settings.images, header)
    model = model.to(device)
    measure_allocation(
        model,
        shards,
        images=settings.images,
        seed=settings.seed,
        chunk=settings.chunk,
        with_markov_noise=True,
    ).save(folder / _ALLOCATION)
    figures: dict[str, float] = {}
    for scale in settings.cfg_scales if measures_samples(study) else ():
        figures |= _judge_samples(study, part, model, shards, split, scale, device)
    content = {"settings": wanted, "figures": figures}
    write_atomically(folder / _FIGURES, json.dumps(content, indent=1) + "\n")
    return folder / _FIGURES


def _same(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether figures were measured as wanted: keys that came later have their defaults in what was stored before."""
    evaluate, sample = EvaluateConfig().model_dump(mode="json"), SampleConfig().model_dump(mode="json")
    filled = {key: evaluate.get(key) for key in wanted} | dict(stored)
    filled["sample"] = {key: sample.get(key) for key in wanted["sample"]} | dict(filled["sample"] or {})
    return filled == dict(wanted)


def _begin(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Empty the folder of a part's figures, unless a killed process began them with the same settings."""
    path = folder / _BEGUN
    if not path.is_file() or not _same(json.loads(path.read_text(encoding="utf-8")), wanted):
        fresh_folder(folder)
        write_atomically(path, json.dumps(wanted) + "\n")


def is_measured(study: Study, part: Part, split: str) -> bool:
    """Whether a part has figures of these weights under these settings."""
    return read_measured(study, part, split) is not None


def read_measured(study: Study, part: Part, split: str) -> tuple[Allocation, dict[str, float]] | None:
    """Return the allocation and the figures of samples of a part, None where it is not measured as the study says."""
    folder = part.folder / f"seed{part.seed}-{split}"
    if not (folder / _FIGURES).is_file() or not is_trained(part):
        return None
    content = json.loads((folder / _FIGURES).read_text(encoding="utf-8"))
    if not _same(content["settings"], _settings(study, part, split)):
        return None
    return Allocation.load(folder / _ALLOCATION), content["figures"]


def read_protocols(study: Study, part: Part, split: str) -> list[dict[str, str]]:
    """Return how the samples of a measured part were judged, once for each way: name, reference and extractor.

    Nothing where its protocol is not on the disk.
    """
    found: dict[str, dict[str, str]] = {}
    for scale in study.evaluate.cfg_scales:
        path = part.folder / f"seed{part.seed}-{split}" / f"samples-cfg{scale:g}.figures.json"
        if path.is_file():
            protocol = json.loads(path.read_text(encoding="utf-8"))["protocol"]
            kept = {"name": str(protocol["name"])}
            for what in ("reference", "extractor"):
                values = {key: value[:12] if key == "sha256" else value for key, value in protocol[what].items()}
                kept[what] = ", ".join(f"{key} {value}" for key, value in values.items())
            found[json.dumps(kept)] = kept
    return list(found.values())


def is_trained(part: Part) -> bool:
    """Whether the run of a part has its last checkpoint; an arm that is not trained has its weights."""
    if not part.arm.trained:
        return Path(part.run.checkpoint.init or "").is_file()
    try:
        saved = find_saved_model(part.run_folder, "live")
    except CheckpointError:
        return False
    return saved.weights.parent.name == f"step{part.run.train.steps:08}"


def weights_of(study: Study, part: Part) -> Path:
    """Return the weights file that is measured. Raises CheckpointError."""
    if not part.arm.trained:
        return Path(part.run.checkpoint.init or "")
    return find_saved_model(part.run_folder, "ema" if study.evaluate.weights == "ema" else "live").weights


def _settings(study: Study, part: Part, split: str) -> dict[str, Any]:
    """Return all that the figures of a part depend on, as JSON values."""
    settings = study.evaluate.model_dump(mode="json")
    kept = {key: value for key, value in settings.items() if key not in ("tuning", "final")}
    drawn = part.run.sample.model_dump(mode="json", exclude={"captions", "seed", "cfg_scale"})
    own = {"classifier": study.classifier.model_dump(mode="json")} if _trains_classifier(study) else {}
    weights = weights_of(study, part)
    return {
        **kept,
        **own,
        "split": settings[split],
        "sample": drawn,
        "shards": study.measured_data.first_place,
        "weights_file": sha256_of(weights),
    }


def _trains_classifier(study: Study) -> bool:
    settings = study.evaluate
    return measures_samples(study) and settings.extractor == _OWN and settings.extractor_weights is None


def _classifier_file(study: Study) -> Path:
    return study.folder / "classifier.safetensors"


def _write_reference(path: Path, shards: ShardSet) -> None:
    """Write the images of a part of a split, of its main bucket, as arr_0 (N, H, W, 3) uint8."""
    shards.require_still("a reference set")
    rows, codec, found = shards.indices_of(shards.main_bucket), shards.codec_object(), []
    for start in range(0, len(rows), 256):
        images = codec.decode(shards.batch(rows[start : start + 256]).latent)
        found.append((127.5 * images + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy())
    pixels = np.concatenate(found)

    def write(draft: Path) -> None:
        with draft.open("wb") as file:
            np.savez(file, arr_0=pixels)

    write_atomically(path, write)


def _judge_samples(
    study: Study, part: Part, model: Backbone, shards: ShardSet, split: str, scale: float, device: str
) -> dict[str, float]:
    """Draw images with one scale of guidance, judge them and return the figures by name, such as "fd, cfg 1.5"."""
    settings, folder = study.evaluate, part.folder / f"seed{part.seed}-{split}"
    sample = part.run.sample.model_copy(update={"cfg_scale": scale, "seed": part.seed})
    codec = shards.codec_object(device)
    batch = AdmBatch(
        path=folder / f"samples-cfg{scale:g}.npz",
        num_images=settings.samples,
        image_size=model.config.latent_size * pixels_per_latent(codec),
        batch_size=settings.sample_batch,
        weights=f"{part.name}, {settings.weights}",
    )
    draw_adm_batch(model, sample, codec.decode, batch)
    weights = _classifier_file(study) if _trains_classifier(study) else settings.extractor_weights
    options = ExtractorOptions(settings.extractor, None if weights is None else Path(weights), device=device)
    reference = study.folder / f"reference-{split}.npz"
    (found,) = judge_sets([str(batch.path)], str(reference), options, MetricSettings(metrics=settings.metrics))
    found.save(batch.path.with_suffix(".figures.json"))
    return {f"{name}, cfg {scale:g}": figure.value for name, figure in found.figures.items()}
