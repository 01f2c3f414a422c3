"""20 steps of a run, its resume, and pictures: python -m benchmarks.gpu_check.training ... --folder FOLDER.

Drawn shapes, prepared here: no download. The run trains a DiffMoE with saliency routers on captions, under ZeRO-3, with
256 tokens per image on a GPU (attention sums in an order of its own above 128). The second run starts from the
checkpoint of step 10 and is compared with the first bit by bit.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.gpu_check.environment import part_parser
from benchmarks.gpu_check.facts import Facts
from benchmarks.models import drawn_model
from benchmarks.shapes import make_shards
from sharpmoe.config import ModelConfig
from sharpmoe.config_io import PROJECT_ROOT
from sharpmoe.durable import write_atomically
from sharpmoe.log_file import read_log
from sharpmoe.model.weights import save_weights

STEPS, RESUMED = 20, 10
_SIZES: dict[str, dict[str, Any]] = {
    "cpu": {
        "shards": {"num_images": 48, "size": 32, "text_width": 32},
        "model": {"width": 24, "depth": 2, "num_heads": 2, "latent_size": 8, "num_experts": 4},
        "batch": 8,
        "rollout": 2,
    },
    "cuda": {
        "shards": {"num_images": 192, "size": 128, "text_width": 64, "shard_samples": 64},
        "model": {"preset": "s", "latent_size": 32, "num_experts": 8},
        "batch": 32,
        "rollout": 10,
    },
}
_FIGURES = ("throughput/seconds_per_step", "throughput/mfu", "throughput/data_wait_share", "memory/peak_mib")


def main(argv: Sequence[str] | None = None) -> int:
    parser = part_parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where data and runs are written")
    given = parser.parse_args(argv)
    facts, folder = Facts(given.facts), given.folder
    size = _SIZES[given.device]
    began = time.monotonic()
    shards = make_shards(folder / "shards", **size["shards"])
    base = _base(size, folder)
    facts.tell(fact="data", seconds=time.monotonic() - began, images=size["shards"]["num_images"])
    fine = True
    for strict in (False, True):
        name = "deterministic" if strict else "default"
        settings = run_settings(size, shards, base, given.device, strict)
        first = _train(facts, settings, folder, name)
        fork(first, folder / f"{name}-again", RESUMED)
        second = _train(facts, settings, folder, f"{name}-again")
        found = compare(first, second)
        facts.tell(fact="resume", run=name, **found)
        must = given.device == "cpu" or strict  # on CUDA the order of some sums is not fixed otherwise
        fine &= found["same_bits"] or not must
    _sample(facts, folder / "default", given.device)
    return int(not fine)


def _model(size: dict[str, Any]) -> dict[str, Any]:
    width = size["shards"]["text_width"]
    return size["model"] | {"router": "diffmoe", "text_width": width, "pooled_width": width}


def _base(size: dict[str, Any], folder: Path) -> Path:
    """Write the weights that the runs start from: random ones, in which every parameter has an effect."""
    config, path = ModelConfig.model_validate(_model(size)), folder / "base.safetensors"
    save_weights(path, drawn_model(config, torch.device("cpu"), torch.float32).state_dict(), config)
    return path


def run_settings(size: dict[str, Any], shards: Path, base: Path, device: str, strict: bool) -> dict[str, Any]:
    """Return the run file."""
    train: dict[str, Any] = {"steps": STEPS, "global_batch": size["batch"], "micro_batch": size["batch"]}
    train |= {"precision": "bf16" if device == "cuda" else "fp32", "deterministic": strict}
    return {
        "output": str(base.parent),
        "model": _model(size),
        "data": {"shards": str(shards)},
        "rollout": {"num_steps": size["rollout"], "schedule": "plain"},
        "optim": {"ema_decay": 0.9},
        "train": train,
        "log": {"every": 1, "validate_every": 0, "allocation": False},
        "checkpoint": {"every": RESUMED, "keep": 3, "init": str(base)},
    }


def _train(facts: Facts, settings: dict[str, Any], folder: Path, name: str) -> Path:
    """Train in a process of its own and return the run folder. Raises CalledProcessError."""
    file = folder / f"{name}.yaml"
    write_atomically(file, json.dumps(settings | {"name": name}))  # JSON is YAML
    began = time.monotonic()
    words = ("launcher/train.py", "--deepspeed", "configs/zero3.json", "--config", str(file))
    subprocess.run([sys.executable, *words], cwd=PROJECT_ROOT, check=True)
    log = read_log(folder / name / "log.jsonl")
    last = {key.rpartition("/")[2]: _last(log.get(key, {})) for key in _FIGURES}
    losses = {step: round(value, 6) for step, value in log["loss/total"].items()}
    facts.tell(fact="run", run=name, seconds=time.monotonic() - began, losses=losses, **last)
    return folder / name


def _last(values: dict[int, float]) -> float | None:
    return values[max(values)] if values else None


def fork(run: Path, again: Path, step: int) -> None:
    """Make a run folder that can only go on from the checkpoint of a step of another run."""
    saved = run / "checkpoints"
    (early,) = (folder for folder in saved.glob("step*") if int(folder.name.removeprefix("step")) == step)
    shutil.copytree(early, again / "checkpoints" / early.name)
    write_atomically(again / "checkpoints" / "latest", early.name)


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Return whether the last checkpoints of two runs hold the same bits, by file, and which losses differ."""
    folders = [run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip() for run in (first, second)]
    files = sorted(path.name for path in folders[0].glob("*.safetensors"))
    assert files, folders[0]
    distances = {file: distance(*(load_file(folder / file) for folder in folders)) for file in files}
    losses = [read_log(run / "log.jsonl")["loss/total"] for run in (first, second)]
    common = sorted(losses[0].keys() & losses[1].keys())
    return {
        "same_bits": not any(distances.values()),
        "largest_difference": max(distances.values()),
        "files": distances,
        "losses_differ_at": [step for step in common if losses[0][step] != losses[1][step]],
    }


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of two sets of tensors; 0 where they are equal bit for bit."""
    assert one.keys() == other.keys()
    apart = [key for key in one if not torch.equal(one[key], other[key])]
    return max((float((one[key].double() - other[key].double()).abs().max()) for key in apart), default=0.0)


def _sample(facts: Facts, run: Path, device: str) -> None:
    began = time.monotonic()
    words = ("launcher/sample.py", str(run), "--captions", "a red circle", "a blue cross", "--device", device)
    subprocess.run([sys.executable, *words, "--steps", "10"], cwd=PROJECT_ROOT, check=True)
    facts.tell(fact="sample", seconds=time.monotonic() - began)


if __name__ == "__main__":
    sys.exit(main())
