"""A checkpoint with one wrong bit, or cut short, is never loaded; what is in its files is never executed."""

import io
import pickle
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sharpmoe.checkpoint import load, manifest
from sharpmoe.checkpoint.state import Contents
from sharpmoe.config import RunConfig
from sharpmoe.errors import CheckpointError, SharpMoEError
from sharpmoe.model.weights import load_model
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.train import loop
from sharpmoe.train.setup import choose_checkpoint, initial_model
from tests.distributed import run_ranks
from tests.train.setting import ALONE, make_run, plan_for

OLDER, NEWER = "step00000001", "step00000002"
FLIPS = CUTS = 100

pytestmark = pytest.mark.dist  # all but few damage what two ranks saved


def train(world: World, run: RunConfig, stage: int = 3) -> None:
    loop.train(plan_for(run, world, stage), world)


@pytest.fixture(scope="module")
def made(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with two checkpoints of two ranks."""
    run = two_steps(shards, tmp_path_factory.mktemp("made"))
    run_ranks(train, 2, run)
    return Path(run.output) / run.name


def two_steps(shards: Path, output: Path, steps: int = 2) -> RunConfig:
    checkpoint = {"every": 1, "keep": 3, "resume": "auto"}
    return make_run(shards, output, train={"steps": steps}, checkpoint=checkpoint)


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """Checkpoints of that run that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "run")) / "checkpoints"


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damages(files: list[Path]) -> Iterator[tuple[Path, bytes]]:
    """Every file in turn: one bit flipped, then one cut off, at random places."""
    draw = random.Random(0)
    for number in range(FLIPS):
        path = files[number % len(files)]
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        yield path, bytes(content)
    for number in range(CUTS):
        path = files[number % len(files)]
        yield path, path.read_bytes()[: draw.randrange(path.stat().st_size)]


def test_no_flipped_bit_and_no_cut_is_loaded(root: Path) -> None:
    files = files_of(root / NEWER)
    assert {"manifest.json", "manifest.sha256", "live.safetensors"} < {path.name for path in files}
    refused = 0
    for path, content in damages(files):
        sound = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            load.first_sound(load.find_checkpoints(root, str(root / NEWER)), root, str(root / NEWER), ALONE)
        assert NEWER in str(caught.value)
        assert "\n" not in str(caught.value)
        choice = load.first_sound(load.find_checkpoints(root, "auto"), root, "auto", ALONE)
        assert choice.saved is not None
        assert choice.saved.folder.name == OLDER
        assert NEWER in choice.notes[0]
        assert (root / "latest").read_text() == OLDER
        refused += 1
        (root / f"damaged.{NEWER}").rename(root / NEWER)
        path.write_bytes(sound)
        (root / "latest").write_text(NEWER)
    assert refused == FLIPS + CUTS
    assert load.first_sound(
        load.find_checkpoints(root, "auto"), root, "auto", ALONE
    ).saved == manifest.verify_checkpoint(root / NEWER)


@pytest.mark.parametrize("content", [b"", b"step00000009", b"step0000000", b"\xff\xfe", b"../../etc", b"damaged"])
def test_a_damaged_pointer_costs_nothing(content: bytes, root: Path) -> None:
    (root / "latest").write_bytes(content)
    choice = load.first_sound(load.find_checkpoints(root, "auto"), root, "auto", ALONE)
    assert choice.saved is not None
    assert choice.saved.folder.name == NEWER


def test_a_file_that_the_manifest_does_not_know_is_refused(root: Path) -> None:
    shutil.copy(root / NEWER / "state_rank00000.safetensors", root / NEWER / "state_rank00002.safetensors")
    with pytest.raises(CheckpointError, match="not part of the checkpoint"):
        manifest.verify_checkpoint(root / NEWER)


def resumed(world: World, run: RunConfig) -> tuple[int, tuple[str, ...]]:
    plan = choose_checkpoint(plan_for(run, world), world)
    return plan.start.step, plan.notes


def test_ranks_find_damage_in_each_others_share_and_go_on_alike(made: Path, shards: Path, tmp_path: Path) -> None:
    run = two_steps(shards, tmp_path, steps=3)
    root = Path(shutil.copytree(made, tmp_path / "run")) / "checkpoints"
    shares = manifest.split_files(manifest.read_manifest(root / NEWER), 2)
    assert all(shares)
    path = root / NEWER / shares[1][0]
    path.write_bytes(path.read_bytes()[:-1])
    answers = run_ranks(resumed, 2, run)
    assert answers[0] == answers[1]
    step, (note,) = answers[0]
    assert step == 1
    assert f"{shares[1][0]}: damaged" in note
    assert (root / f"damaged.{NEWER}").is_dir()


def test_where_nothing_is_sound_a_run_does_not_begin_again(root: Path) -> None:
    for name in (OLDER, NEWER):
        (root / name / "live.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint is sound; the newest: .*step00000002"):
        load.first_sound(load.find_checkpoints(root, "auto"), root, "auto", ALONE)
    for name in (OLDER, NEWER):
        (root / name / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is sound"):
        load.find_checkpoints(root, "auto")


class Malice:
    """Unpickled freely, it leaves a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


def malicious(target: Path, files: list[Path]) -> Iterator[tuple[Path, bytes]]:
    """Every file replaced by a pickle that executes: bare, in torch's archive, in torch's older format, in a dict."""
    bare = pickle.dumps(Malice(target))
    forms = [bare]
    for state, archive in ((Malice(target), True), (Malice(target), False), ({"shards": [Malice(target)]}, True)):
        file = io.BytesIO()
        torch.save(state, file, _use_new_zipfile_serialization=archive)
        forms.append(file.getvalue())
    for path in files:
        for form in forms:
            yield path, form


def reseal(folder: Path) -> None:
    """Write the manifest anew, as one would who wants the files to be believed."""
    found = manifest.read_manifest(folder)
    manifest.write_manifest(replace(found, files={name: manifest.file_entry(folder / name) for name in found.files}))


def test_the_pickles_do_execute_when_they_are_unpickled_freely(tmp_path: Path) -> None:
    target = tmp_path / "executed"
    for _, form in malicious(target, [tmp_path / "any"]):
        torch.load(io.BytesIO(form), weights_only=False) if form[:2] != b"\x80\x04" else pickle.loads(form)
        assert target.exists()
        target.unlink()


def test_no_pickle_in_any_file_is_executed(root: Path, tmp_path: Path) -> None:
    target = tmp_path / "executed"
    for path, content in malicious(target, files_of(root / NEWER)):
        sound = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            load.first_sound(load.find_checkpoints(root, str(root / NEWER)), root, str(root / NEWER), ALONE)
        assert not target.exists()
        path.write_bytes(sound)


def load_forged(world: World, run: RunConfig, stage: int, target: Path) -> list[tuple[str, str]]:
    """Load a checkpoint whose manifest vouches for malicious files; what became of each."""
    plan = plan_for(run, world, stage)
    session = loop.open_session(plan, world, initial_model(plan))
    contents = Contents(engine=session.engine, ema=session.ema, model=session.objective.model, origin={})
    folder = plan.checkpoints / NEWER
    told = []
    for path, content in malicious(target, [folder / name for name in manifest.read_manifest(folder).files]):
        sound = path.read_bytes()
        path.write_bytes(content)
        reseal(folder)
        saved = manifest.verify_checkpoint(folder)
        try:
            load.load_checkpoint(saved, contents)
            load_model(path)
            told.append((path.name, "loaded"))
        except SharpMoEError as error:
            told.append((path.name, str(error)))
        path.write_bytes(sound)
    return told


@pytest.mark.parametrize("stage", [2, 3])
def test_no_pickle_is_executed_where_the_manifest_vouches_for_it(stage: int, shards: Path, tmp_path: Path) -> None:
    run = two_steps(shards, tmp_path)
    run_ranks(train, 1, run, stage)
    (told,) = run_ranks(load_forged, 1, run, stage, tmp_path / "executed")
    assert not (tmp_path / "executed").exists()
    assert len(told) == 4 * 4
    assert [name for name, words in told if words == "loaded"] == []
