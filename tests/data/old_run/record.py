"""Record what an old version of the code wrote and computed: shards, run folders, weights, samples, allocation.

OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu PYTHONPATH=TREE python tests/data/old_run/record.py TREE

TREE is a checkout of the version to record (commit 5767a9b), not the one this file is in. Everything is written beside
this file; paths are relative, so that no file names a machine.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from sharpmoe.model.pretrained import load_model  # the place of that version

from data_pipeline.read.shards import ShardSet
from data_pipeline.read.stream import stream
from sharpmoe import sampling
from sharpmoe.config import SampleConfig
from sharpmoe.report import samples
from tests.fixtures_data import make_shards

TREE = Path(sys.argv[1]).resolve()
HERE = Path(__file__).resolve().parent
RANKS = {"diffmoe": 1, "ec": 2}  # name of a run, and how many ranks wrote it
CAPTIONS = ("a red circle", "a blue square", "a green cross")


def run_file(router: str, stage: str, **sections: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": router,
        "output": ".",
        "stage": stage,
        "model": {"width": 12, "depth": 2, "num_heads": 3, "latent_size": 8, "num_experts": 4, "mlp_ratio": 1.0}
        | {"router": router, "text_width": 8, "pooled_width": 8},
        "data": {"shards": "shards"},
        "rollout": {"num_steps": 3, "schedule": {"diffmoe": "plain", "ec": "two_pass"}[router]},
        "loss": {"routing_weight": 0.5},
        "optim": {"lr": 2e-3, "eps": 1e-6, "schedule": "cosine", "final_lr": 5e-4, "warmup_steps": 2, "ema_decay": 0.8},
        "train": {"steps": 6, "global_batch": 8, "micro_batch": 4},
        "log": {"every": 1, "validate_every": 0, "validation_images": 4, "allocation": False},
        "checkpoint": {"every": 3, "keep": 9, "resume": "auto", "init": f"{router}.base.safetensors"},
    }
    for name, section in sections.items():
        values[name] = values[name] | section
    return values


def launch(program: str, ranks: int, *words: str) -> None:
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    subprocess.run([sys.executable, *start, str(TREE / "launcher" / program), *words], cwd=HERE, check=True)


def train(values: dict[str, Any], ranks: int) -> Path:
    path = HERE / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    launch("train.py", ranks, "--deepspeed", str(TREE / "configs" / "zero3.json"), "--config", str(path))
    path.unlink()
    folder = HERE / values["name"]
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    return folder


def record_run(router: str, ranks: int) -> None:
    """Pretrain a base until no part of it is zero, post-train it, measure it and sample from it."""
    base = run_file(
        router, "pretrain", train={"steps": 40}, optim={"lr": 0.02}, checkpoint={"init": None, "every": 0}
    ) | {"name": "base"}
    folder = train(base, 1)
    shutil.copy(folder / "checkpoints" / "step00000040" / "ema.safetensors", HERE / f"{router}.base.safetensors")
    shutil.rmtree(folder)
    folder = train(run_file(router, "posttrain"), ranks)
    launch("evaluate.py", 1, str(folder.name), "--images", "4", "--sheet-images", "0", "--out", "drawn")
    (result,) = (HERE / "drawn").glob("*.json")
    shutil.copy(result, folder / "allocation.json")
    shutil.rmtree(HERE / "drawn")
    save_file({"latents": draw(folder)}, folder / "samples.safetensors")
    for path in (folder / "checkpoints" / "step00000006").glob("*_rank*"):
        path.unlink()  # the manifest keeps their hashes


def draw(folder: Path) -> torch.Tensor:
    model, _ = load_model(folder / "checkpoints" / "step00000006" / "ema.safetensors")
    shards = ShardSet.open(HERE / "shards", "train")
    request = samples.request(model.config, shards, samples.Wish(CAPTIONS, ()))
    settings = SampleConfig(num_steps=6, method="heun", cfg_scale=2.0)
    return sampling.generate(model.eval(), model.config, settings, request, batch_size=2)


def record_shards() -> None:
    make_shards(HERE / "shards", text_width=8, shard_samples=12, captions=2)
    shards = ShardSet.open(HERE / "shards", "train")
    steps = stream(shards, seed=0, global_batch=4, micro_batch=4, rank=0, world=1)
    order = [key for loaded in itertools.islice(steps, 10) for batch in loaded.batches for key in batch.keys]
    batch = shards.batch(range(shards.num_samples))
    kept = {name: getattr(batch, name) for name in ("latent", "text", "text_mask", "pooled", "label", "saliency")}
    save_file(kept | {"foreground": batch.foreground}, HERE / "shards.safetensors")
    facts = {"keys": batch.keys, "captions": batch.captions, "order": order}
    (HERE / "shards.json").write_text(json.dumps(facts, indent=1) + "\n")


def processor() -> dict[str, str]:
    """Return what decides the last bits of a result: processor model, instruction set in use and torch version."""
    lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    known = {key.strip(): value.strip() for key, value in lines.items()}
    return {
        "processor": " ".join(known[key] for key in ("vendor_id", "cpu family", "model")),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def main() -> None:
    for path in HERE.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    torch.set_num_threads(1)
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_FP16"
    record_shards()
    for router, ranks in RANKS.items():
        record_run(router, ranks)
    (HERE / "recorded_on.json").write_text(json.dumps(processor(), indent=1) + "\n")


if __name__ == "__main__":
    main()
