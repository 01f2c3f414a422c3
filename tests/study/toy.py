"""A study of two arms on drawn shapes: two optimizer steps of a class-conditional toy."""

from pathlib import Path
from typing import Any

import torch
import yaml

from sharpmoe.config_io import dump_run_config
from sharpmoe.model.build import build_model
from sharpmoe.model.weights import save_weights
from sharpmoe.study.plan import Study
from tests.fixtures_data import make_shards
from tests.train.setting import make_run

Figures = dict[str, dict[int, list[float]]]  # of an arm: name -> seed -> values of images


def make_study(root: Path, **changes: Any) -> Path:
    """Write shards, a base, a run file and root/study.yaml; return the last. `changes` are keys of the study file."""
    shards = make_shards(root / "shards")
    base = root / "base.safetensors"
    model = {"conditioning": "class", "num_classes": 4}
    checkpoint = {"init": str(base), "resume": "auto"}
    run = make_run(shards, root, model=model, checkpoint=checkpoint, sample={"num_steps": 2})
    torch.manual_seed(0)
    plain = run.model.model_copy(update={"saliency_router": False})
    save_weights(base, build_model(plain).state_dict(), plain)
    (root / "run.yaml").write_text(dump_run_config(run))
    content = {
        "name": "toy",
        "output": str(root / "studies"),
        "base": str(root / "run.yaml"),
        "seeds": [0, 1],
        "trained_images": 48,  # two steps of 8 images and 3 rollout steps
        "control": "plain",
        "arms": [
            {"name": "plain", "overrides": {"model": {"saliency_router": False}, "loss": {"routing_weight": 0.0}}},
            {"name": "steered", "about": "with both", "overrides": {"optim": {"lr_scale": {"saliency_router": 20}}}},
        ],
        "evaluate": {"images": 2, "chunk": 2, "samples": 8, "sample_batch": 4, "metrics": ["fd", "accuracy"]},
        "classifier": {"epochs": 2, "batch_size": 8, "width": 4},
    }
    path = root / "study.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


def pretend_trained(study: Study) -> None:
    """Give every trained part of a study a last checkpoint of random weights, another for each."""
    for number, part in enumerate(study.parts):
        if not part.arm.trained:
            continue
        checkpoint = part.run_folder / "checkpoints" / f"step{part.run.train.steps:08}"
        torch.manual_seed(number)
        model = build_model(part.run.model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        for kind in ("live", "ema"):
            save_weights(checkpoint / f"{kind}.safetensors", model.state_dict(), part.run.model)
        (checkpoint.parent / "latest").write_text(f"{checkpoint.name}\n")
        (part.run_folder / "config.yaml").write_text(dump_run_config(part.run))
