"""A dry run: it refuses what a start refuses, with the same line, and changes nothing.

`REFUSALS` lists every refusal that a start can give before its first step, in the order of the code: launcher, plan
(train/setup.py), owner, checkpoint, initial weights, engine, log, monitor, first batch. Each is made here by breaking
one thing, and both a dry run and a real start are asked.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data_pipeline.index import EMPTY_FILE
from data_pipeline.read import shards as shards_module
from launcher.train import main
from sharpmoe.checkpoint import retention
from sharpmoe.checkpoint.manifest import FileEntry, read_manifest, write_manifest
from sharpmoe.checkpoint.save import Checkpoints
from sharpmoe.config_io import dump_run_config
from sharpmoe.durable import sha256_of
from sharpmoe.errors import DataError
from sharpmoe.model.weights import save_weights, weight_specs
from sharpmoe.parallel.experts import dispatch
from sharpmoe.parallel.ranks import launch
from sharpmoe.parallel.zero import patches
from sharpmoe.trackers import registry
from tests.fixtures_data import make_shards
from tests.train.setting import ALONE, CONFIGS, make_run, plan_for, stirred_model

ROOT = Path(__file__).resolve().parents[2]
Break = Callable[[Path, pytest.MonkeyPatch], list[str]]  # (folder of the place, ...) -> more words of the command


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with shards, a run file, a run that has taken its one step, and its weights as a base."""
    place = tmp_path_factory.mktemp("place")
    start = {"resume": "auto", "init": str(place / "base.safetensors")}
    run = make_run(make_shards(place / "shards"), place / "runs", train={"steps": 1}, checkpoint=start)
    make_shards(place / "others", num_images=18)
    origin = plan_for(run, ALONE).data.origin()
    save_weights(place / "base.safetensors", stirred_model(run).state_dict(), run.model, origin)
    (place / "run.yaml").write_text(dump_run_config(run).replace(f"{place}/", ""))
    assert in_place(place, []) == 0
    return place


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that may be broken."""
    return Path(shutil.copytree(finished, tmp_path / "place"))


def in_place(place: Path, words: list[str]) -> int:
    before = Path.cwd()
    os.chdir(place)
    try:
        return main(["--deepspeed", str(CONFIGS / "zero3.json"), "--config", "run.yaml", *words])
    finally:
        os.chdir(before)


def checkpoint(place: Path) -> Path:
    return place / "runs" / "run" / "checkpoints" / "step00000001"


def hashes(folder: Path) -> dict[str, Any]:
    """All names below a folder, with the contents and times of files."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in sorted(folder.rglob("*"))
    }


def new(*words: str) -> Break:
    """A run of its own in an unbroken place, with these words."""
    return lambda place, patch: ["--name", "new", *words]


def again(*words: str) -> Break:
    """The run that is there, once more, with these words."""
    return lambda place, patch: ["--train.steps", "2", *words]


def broken(change: Callable[[Path], object], *words: str) -> Break:
    def act(place: Path, patch: pytest.MonkeyPatch) -> list[str]:
        change(place)
        return list(words)

    return act


def patched(target: Any, name: str, value: Any, *words: str) -> Break:
    def act(place: Path, patch: pytest.MonkeyPatch) -> list[str]:
        patch.setattr(target, name, value)
        return ["--name", "new", *words]

    return act


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def no_encoder(*_: object) -> None:
    raise DataError("text encoder nothere: cannot be loaded")


def sealed(name: str, change: Callable[[dict[str, torch.Tensor], dict[str, str]], object]) -> Callable[[Path], object]:
    """Change the tensors of a file of the checkpoint, and its manifest accordingly."""

    def act(place: Path) -> None:
        folder = checkpoint(place)
        rewrite(folder / name, change)
        manifest = read_manifest(folder)
        size = (folder / name).stat().st_size
        manifest.files[name] = FileEntry(size, sha256_of(folder / name))
        write_manifest(manifest)

    return act


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], object]) -> None:
    with safe_open(path, framework="pt") as file:
        meta = dict(file.metadata())
    tensors = load_file(path)
    change(tensors, meta)
    save_file(tensors, path, meta)


def to_nan(tensors: dict[str, torch.Tensor], meta: dict[str, str]) -> None:
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name].view(-1)[0] = float("nan")


def to_one(tensors: dict[str, torch.Tensor], meta: dict[str, str]) -> None:
    next(tensor for tensor in tensors.values() if tensor.is_floating_point()).view(-1)[0] = 1.0


def lose_one(tensors: dict[str, torch.Tensor], meta: dict[str, str]) -> None:
    del tensors[next(iter(tensors))]


def other_codec(tensors: dict[str, torch.Tensor], meta: dict[str, str]) -> None:
    meta["codec"] = json.dumps(json.loads(meta["codec"]) | {"sha256": "b"})
    meta.pop("codec_file", None)


def tar(place: Path, split: str) -> Path:
    return next((place / "shards").glob(f"*{split}*.tar"))


def damage_samples(place: Path, split: str) -> None:
    """Every sample of a split is damaged, in a tar of the same size."""
    path = tar(place, split)
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))


MEASURES = "--log.validate_every=1"
REFUSALS: dict[str, tuple[Break, str]] = {
    # the launcher
    "unknown key": (new("--train.stepz", "3"), "did you mean train.steps"),
    "no such run file": (new("--config", "nothere.yaml"), "run file nothere.yaml does not exist"),
    "no such DeepSpeed file": (new("--deepspeed", "nothere.json"), "DeepSpeed file nothere.json does not exist"),
    "batch against ranks": (new("--train.micro_batch", "3"), "train.micro_batch"),
    "no schedule fits": (
        patched(launch, "_own_memory", lambda world: 1e-4, "--rollout.schedule", "auto"),
        "auto finds no schedule that fits",
    ),
    # the plan
    "ep_size": (new("--parallel.ep_size", "2"), "parallel.ep_size is 2, allowed: 1"),
    "output is a file": (new("--output", "base.safetensors"), "base.safetensors is not a folder"),
    "the log is a folder": (
        broken(lambda place: [(place / "runs/run/log.jsonl").unlink(), (place / "runs/run/log.jsonl").mkdir()]),
        "output: runs/run/log.jsonl is not a file; move it away",
    ),
    "TensorBoard's folder is a file": (
        broken(lambda place: [shutil.rmtree(place / "runs/run/tensorboard"), (place / "runs/run/tensorboard").touch()]),
        "output: runs/run/tensorboard is not a folder",
    ),
    "a tracker is not installed": (
        patched(registry, "find_spec", lambda package: None, "--log.trackers", "[tensorboard, wandb]"),
        "log.trackers: wandb is not installed; install the extra: pip install 'sharpmoe[trackers]'",
    ),
    "merged steps": (
        new("--rollout.merged_steps", "3", "--rollout.schedule", "two_pass", "--model.capacity", "1.03"),
        "rollout.merged_steps is 3",
    ),
    "no shards": (new("--data.shards", "nothere"), "nothere: no index.json; run `python "),
    "no such split": (new("--data.train_split", "nothing"), "no samples in split 'nothing'"),
    "a shard is missing": (broken(lambda place: tar(place, "train").unlink()), "shard is missing"),
    "a shard is cut short": (
        broken(lambda place: os.truncate(tar(place, "train"), 1000)),
        "shard has 1000 bytes, expected",
    ),
    "an index of something else": (
        broken(lambda place: (place / "shards/index.json").write_text("{}"), "--name", "new"),
        "shards/index.json",
    ),
    "an address that nobody serves": (
        new("--data.shards", "http://127.0.0.1:9/x", "--data.remote.retries", "0"),
        "http://127.0.0.1:9/x",
    ),
    "latents of another size": (new("--model.latent_size", "16"), "made for model.latent_size 8, the run has 16"),
    "latents of another codec": (new("--model.latent_channels", "8"), "made for model.latent_channels 4"),
    "texts of another width": (new("--model.text_width", "64"), "made for model.text_width 32, the run has 64"),
    "no held-out samples": (
        new("--data.validation_split", "nothing", "--log.validate_every", "1"),
        "no samples in split 'nothing' (data.validation_split) to measure on",
    ),
    "a label without a class": (
        new("--model.conditioning", "class", "--model.num_classes", "3"),
        "has label 3, model.num_classes is 3",
    ),
    "no empty caption": (broken(lambda place: (place / "shards" / EMPTY_FILE).unlink()), ": missing or damaged"),
    # checkpoints
    "a run is there": (again("--checkpoint.resume", "none"), "which checkpoint.resume: none would mix"),
    "no checkpoint there": (again("--checkpoint.resume", "shards"), "checkpoint.resume: shards is no checkpoint"),
    "another architecture": (again("--model.num_experts", "2"), "model.num_experts is 4 there, 2 in the run"),
    "another precision": (again("--train.precision", "bf16"), "precision is 'fp32' there, 'bf16' in the run"),
    "another optimizer": (again("--optim.name", "sgd"), "optimizer is 'adamw' there, 'sgd' in the run"),
    "another seed": (again("--seed", "1"), "seed is 0 there, 1 in the run"),
    "another base": (
        broken(
            lambda place: rewrite(Path(shutil.copy(place / "base.safetensors", place / "other.safetensors")), to_one),
            "--train.steps=2",
            "--checkpoint.init=other.safetensors",
        ),
        "checkpoint.init is 'base.safetensors' there, 'other.safetensors' in the run",
    ),
    "other shards": (again("--data.shards", "others"), "shards is '"),
    "other parameters are trained": (
        again("--train.trainable", "[saliency_router]"),
        "is trained there, frozen in the run; set train.trainable to [] and train.frozen to [], or start a new run",
    ),
    "a manifest is damaged": (
        broken(lambda place: flip(checkpoint(place) / "manifest.json", 20), "--train.steps", "2"),
        "no checkpoint is sound",
    ),
    "a state file is damaged": (
        broken(lambda place: flip(next(checkpoint(place).glob("state_*"))), "--train.steps", "2"),
        "no checkpoint is sound",
    ),
    "a file is damaged, by path": (
        broken(
            lambda place: flip(checkpoint(place) / "live.safetensors"),
            "--train.steps=2",
            "--checkpoint.resume=runs/run/checkpoints/step00000001",
        ),
        "damaged (its sha256 differs)",
    ),
    "a state that is not finite": (
        broken(sealed("state_rank00000.safetensors", to_nan), "--train.steps", "2"),
        "holds values that are not finite",
    ),
    "a state without a part": (
        broken(sealed("state_rank00000.safetensors", lose_one), "--train.steps", "2"),
        "elements found in the checkpoint",
    ),
    "no scale for the maps": (new("--loss.saliency_entropy", "1e-6"), "loss.saliency_entropy is 1e-06, but in data."),
    # initial weights
    "no base": (new("--checkpoint.init", "nothere.safetensors"), "nothere.safetensors: no such weights file"),
    "the base is something else": (new("--checkpoint.init", "run.yaml"), "run.yaml: not a sound safetensors file"),
    "the base is another architecture": (new("--model.num_experts", "2"), "model.num_experts is 4 there, 2"),
    "the base has another codec": (
        broken(lambda place: rewrite(place / "base.safetensors", other_codec), "--name", "new"),
        "trained with codec sha256",
    ),
    "the base is not finite": (
        broken(lambda place: rewrite(place / "base.safetensors", to_nan), "--name", "new"),
        "holds values that are not finite",
    ),
    "the base lacks a tensor": (
        broken(lambda place: rewrite(place / "base.safetensors", lose_one), "--name", "new"),
        "is missing (1 missing",
    ),
    "a pattern of nothing": (new("--optim.lr_scale", "{nothing: 2}"), "optim.lr_scale: 'nothing' matches no parameter"),
    "a trained pattern of nothing": (new("--train.trainable", "[nothing]"), "train.trainable: 'nothing' matches no pa"),
    "nothing is trained": (new("--train.frozen", "['*']"), "train.frozen: ['*'] leaves nothing to train"),
    "a factor on what is frozen": (
        new("--train.trainable", "[gate]", "--optim.lr_scale", "{attn: 2}"),
        "optim.lr_scale: 'attn' matches frozen parameters only",
    ),
    # the engine
    "another DeepSpeed": (patched(patches, "_WRITTEN_FOR", "0.0.1"), "DeepSpeed 0.19.8 is installed"),
    "no Megatron-core": (
        patched(dispatch, "_is_installed", lambda package: False, "--parallel.dispatcher", "megatron"),
        "needs the package megatron-core",
    ),
    "no apex": (new("--optim.impl", "apex"), "optim.impl: apex is not NVIDIA's here"),
    # the monitor and the first batch
    "a held-out sample is damaged": (
        broken(lambda place: damage_samples(place, "unseen"), "--name", "new", MEASURES),
        "unseen",
    ),
    "no codec to draw with": (
        broken(lambda place: next((place / "shards").glob("codec*")).unlink(), "--name", "new", MEASURES),
        "codec",
    ),
    "no text encoder for the captions": (
        patched(shards_module, "restore_text_encoder", no_encoder, "--log.sample_every=1", "--sample.captions=[a]"),
        "text encoder nothere: cannot be loaded",
    ),
    "samples are damaged": (broken(lambda place: damage_samples(place, "train"), "--name", "new"), "train"),
}


def last_line(capfd: pytest.CaptureFixture[str]) -> str:
    said = capfd.readouterr().err
    assert "Traceback" not in said
    return said.splitlines()[-1]


@pytest.mark.parametrize("name", REFUSALS)
def test_a_dry_run_refuses_what_a_start_refuses(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    act, part = REFUSALS[name]
    words = act(place, monkeypatch)
    before = hashes(place)
    assert in_place(place, [*words, "--dry-run"]) == 2
    assert hashes(place) == before
    line = last_line(capfd)
    assert line.startswith("error: ")
    assert part in line
    assert in_place(place, words) == 2
    assert last_line(capfd) == line


@pytest.mark.slow
def test_an_owner_that_lives_is_named(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys, time; from pathlib import Path; from sharpmoe.train.owner import _lock\n"
        "file = _lock(Path(sys.argv[1])); print('owned', flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", code, str(place / "runs/run")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "owned\n"
            before = hashes(place)
            assert in_place(place, ["--train.steps", "2", "--dry-run"]) == 2
            assert hashes(place) == before
            line = last_line(capfd)
            assert f"process {process.pid} on " in line
            assert in_place(place, ["--train.steps", "2"]) == 2
            assert last_line(capfd) == line
        finally:
            process.kill()
    assert in_place(place, ["--train.steps", "2", "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("words", "beginning"),
    [
        (["--name", "new", "--stage=pretrain"], "a new run of 1 steps from the weights base.safetensors"),
        (["--name", "new"], "a new run of 1 steps from the weights base.safetensors"),
        (["--train.steps", "2"], "resumes step 1 of 2 from runs/run/checkpoints/step00000001"),
        ([], "nothing to train: runs/run/checkpoints/step00000001 is at step 1 of 1"),
    ],
    ids=["new", "base", "resume", "finished"],
)
def test_what_will_run_is_said_and_nothing_is_changed(
    words: list[str], beginning: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before, started = hashes(place), time.monotonic()
    assert in_place(place, [*words, "--dry-run", "--log.validate_every", "1"]) == 0
    assert time.monotonic() - started < 60
    assert hashes(place) == before
    lines = capfd.readouterr().out.splitlines()
    assert lines[-1] == "ok"
    assert f"  starts     {beginning}" in lines
    (memory,) = (line for line in lines if line.startswith("  memory"))
    assert "per rank at the peak as planned of" in memory
    assert any(line.startswith("  disk ") for line in lines)


def test_it_plans_for_other_ranks(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--name", "new", "--dry-run", "--world", "4", "--train.micro_batch", "2", "--parallel.ep_size", "2"]
    assert in_place(place, [*words, "--device-memory", "16"]) == 0
    said = capfd.readouterr().out
    assert "8 = 2 per rank x 1 accumulation x 4 rank(s)" in said
    assert "experts over 2 ranks" in said
    assert "of 16.0 GiB (fits)" in said
    assert "  note: ZeRO-2 fits too, " in said
    assert in_place(place, ["--name", "new", "--dry-run", "--world", "3"]) == 2
    assert "train.global_batch" in last_line(capfd)
    assert in_place(place, [*words, "--device-memory", "0.0001"]) == 2
    assert "memory: ZeRO-3, ep 2, plain takes " in last_line(capfd)


def test_what_a_dry_run_assumes_is_not_for_a_start(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert in_place(place, ["--name", "new", "--world", "4"]) == 2
    assert "--world has no effect without --dry-run; leave it out" in last_line(capfd)


def test_a_disk_without_room_for_the_checkpoints(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(retention, "free_bytes", lambda root: 10)
    for words in (["--dry-run"], []):
        assert in_place(place, ["--name", "new", *words]) == 2
        assert "a checkpoint takes " in last_line(capfd)
    assert not (place / "runs" / "new").exists()


def test_the_size_of_a_checkpoint_is_that_of_its_files(finished: Path) -> None:
    manifest = read_manifest(checkpoint(finished))
    count = sum(spec.shape.numel() for spec in weight_specs(manifest.model).values())
    stored = sum(entry.size for name, entry in manifest.files.items() if name.endswith(".safetensors"))
    assert Checkpoints.size(manifest.model, 8 * count) == pytest.approx(stored, rel=0.1)


def test_a_schedule_that_is_chosen_is_shown(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert in_place(place, ["--name", "new", "--dry-run", "--rollout.schedule", "auto"]) == 0
    said = capfd.readouterr().out
    assert "T = 3, plain" in said
    assert "  note: rollout.schedule: auto took plain" in said


@pytest.mark.parametrize("path", sorted((CONFIGS / "runs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_run_file_lacks_nothing_but_its_data(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # neither data nor weights are here
    words = ["--deepspeed", str(CONFIGS / "zero3.json"), "--config", str(path), "--dry-run", "--world", "8"]
    assert main(words) == 2
    assert "/launcher/prepare.py --out" in last_line(capfd)
