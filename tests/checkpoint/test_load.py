"""Going on from a checkpoint is the same run, and a checkpoint that does not fit or is damaged is refused."""

import errno
import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sharpmoe.checkpoint import load, manifest, save
from sharpmoe.checkpoint.manifest import Progress
from sharpmoe.config import RunConfig
from sharpmoe.errors import CheckpointDamageError, CheckpointError, SharpMoEError
from sharpmoe.log_file import read_log
from sharpmoe.model.weights import load_model
from sharpmoe.parallel.ranks.launch import World, gather_objects
from sharpmoe.train import loop, setup
from sharpmoe.train.setup import initial_model
from tests.distributed import run_ranks
from tests.train.setting import ALONE, identical, make_run, plan_for

HALF, WHOLE = 3, 6

pytestmark = pytest.mark.dist  # all read what ranks saved


class Ended(NamedTuple):
    """What a finished run left in its folder."""

    live: dict[str, Tensor]
    ema: dict[str, Tensor]
    state: dict[str, Tensor]  # every rank's part of masters, optimizer and EMA
    losses: dict[int, float]
    samples: int


def read(folder: Path) -> Ended:
    last = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text()
    files = sorted(last.glob("state_rank*.safetensors"))
    return Ended(
        load_file(last / "live.safetensors"),
        load_file(last / "ema.safetensors"),
        {f"{file.name}/{key}": value for file in files for key, value in load_file(file).items()},
        read_log(folder / "log.jsonl")["loss/total"],
        manifest.verify_checkpoint(last).progress.samples,
    )


def train_each(world: World, runs: list[tuple[RunConfig, int]]) -> None:
    for run, stage in runs:
        loop.train(plan_for(run, world, stage), world)


def with_steps(run: RunConfig, name: str, steps: int) -> RunConfig:
    """The same run under another name, stopped at `steps` (the schedule does not depend on the number of steps)."""
    train = run.train.model_copy(update={"steps": steps})
    resume = run.checkpoint.model_copy(update={"resume": "auto"})
    return run.model_copy(update={"name": name, "train": train, "checkpoint": resume})


@pytest.mark.parametrize(("ranks", "stage"), [(1, 3), (2, 3), (2, 2)])
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(ranks: int, stage: int, shards: Path, tmp_path: Path) -> None:
    # 20 training images, 8 a step: the order of the second epoch is passed too
    rollout = {"num_steps": 2, "schedule": "segments", "segment_steps": 1}
    precision = "bf16" if stage == 2 else "fp32"
    run = make_run(shards, tmp_path, rollout=rollout, train={"precision": precision})
    run = run.model_copy(update={"stage": "pretrain"}) if ranks == 1 else run
    plans = [("once", WHOLE), ("twice", HALF), ("twice", WHOLE)]
    run_ranks(train_each, ranks, [(with_steps(run, name, steps), stage) for name, steps in plans])
    once, twice = read(tmp_path / "once"), read(tmp_path / "twice")
    assert list(once.losses) == list(twice.losses) == list(range(1, WHOLE + 1))
    assert once.losses == twice.losses
    assert identical(once.live, twice.live)
    assert identical(once.ema, twice.ema)
    assert identical(once.state, twice.state)
    assert once.samples == twice.samples == WHOLE * 8
    assert any("expert_threshold" in key and value.any() for key, value in once.live.items())
    assert not identical(once.live, once.ema)


def messages(world: World, runs: list[RunConfig]) -> list[str]:
    """The error of each run; all stages of a start are passed as by the launcher."""
    return [message(lambda run=run: loop.train(plan_for(run, world), world)) for run in runs]


def message(action: Callable[[], Any]) -> str:
    try:
        action()
    except SharpMoEError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.fixture(scope="module")
def saved(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of two steps on one rank, checkpoints after each."""
    base = make_run(shards, tmp_path_factory.mktemp("saved"), train={"steps": 2}, checkpoint={"every": 1, "keep": 2})
    run = with_steps(base, "run", 2)
    run_ranks(train_each, 1, [(run, 3)])
    return run


def root(run: RunConfig) -> Path:
    return Path(run.output) / run.name / "checkpoints"


def changed(run: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    parts = {name: getattr(run, name).model_copy(update=section) for name, section in sections.items()}
    return run.model_copy(update=parts)


def test_a_checkpoint_that_does_not_fit_is_refused_on_every_rank(saved: RunConfig) -> None:
    further = with_steps(saved, "run", 4)
    answers = run_ranks(
        messages,
        2,
        [
            changed(further, model={"num_experts": 2}),
            changed(further, model={"saliency_router": False}),
            changed(further, optim={"name": "sgd"}),
            further.model_copy(update={"seed": 1}),
        ],
    )
    assert answers[0] == answers[1]
    fields = ("model.num_experts is 4", "model.saliency_router is True", "optimizer is 'adamw'", "seed is 0")
    for text, part in zip(answers[0], fields, strict=True):
        assert text.startswith("CheckpointError: ")
        assert f"{part} there" in text
        assert "\n" not in text


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("precision", "bf16", "precision is 'fp32' there"),
        ("optimizer", "sgd", "optimizer is 'adamw' there"),
        ("seed", 1, "seed is 0 there, 1 in the run; set seed accordingly"),
        ("shards", "0", "shards is"),
    ],
)
def test_each_field_of_the_layout_is_compared(field: str, value: object, part: str, saved: RunConfig) -> None:
    found = manifest.read_manifest(root(saved) / "step00000002")
    load.check_fits(found, saved.model, found.identity)
    with pytest.raises(CheckpointError, match=part):
        load.check_fits(found, saved.model, found.identity._replace(**{field: value}))


def test_weights_are_readable_without_deepspeed(saved: RunConfig) -> None:
    for name in ("live", "ema"):
        model, meta = load_model(root(saved) / "step00000002" / f"{name}.safetensors")
        assert model.config == saved.model
        assert (meta["step"], meta["samples"], meta["weights"]) == ("2", "16", name)
        assert json.loads(meta["codec"])["kind"] == "patch_pca"


def test_resume_names_are_understood(saved: RunConfig, tmp_path: Path) -> None:
    last = root(saved) / "step00000002"

    def first(folder: Path, resume: str) -> Path | None:
        return next((found.folder for found in load.find_checkpoints(folder, resume).readable), None)

    assert first(tmp_path, "auto") is None
    assert first(tmp_path, "none") is None
    assert first(root(saved), "auto") == last
    assert [found.folder.name for found in load.find_checkpoints(root(saved), "auto").readable][1:] == ["step00000001"]
    assert first(tmp_path, str(last)) == last
    assert first(tmp_path, str(root(saved))) == last
    with pytest.raises(CheckpointError, match="would mix"):
        load.find_checkpoints(root(saved), "none")
    shutil.copytree(last, tmp_path / "cut" / last.name)  # the run ended before `latest` was written
    with pytest.raises(CheckpointError, match="would mix"):
        load.find_checkpoints(tmp_path / "cut", "none")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        load.find_checkpoints(tmp_path, str(tmp_path / "nothing"))


@pytest.fixture
def copied(saved: RunConfig, tmp_path: Path) -> Path:
    """Two sound checkpoints that a test may spoil."""
    return Path(shutil.copytree(root(saved), tmp_path / "checkpoints"))


def with_schema(folder: Path, schema: int) -> None:
    """Write a manifest as another version would: sound, with a schema that this one does not know."""
    content = json.loads((folder / "manifest.json").read_text()) | {"schema": schema}
    text = json.dumps(content)
    (folder / "manifest.json").write_text(text)
    (folder / "manifest.sha256").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  manifest.json\n")


def choose(folder: Path) -> load.ResumePoint:
    return load.first_sound(load.find_checkpoints(folder, "auto"), folder, "auto", ALONE)


def failing(original: Callable[..., Any], name: str, number: int) -> Callable[..., Any]:
    """A function that reads, with an error of the system for a path of this name."""

    def called(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == name and path.parent.name == "step00000002":
            raise OSError(number, os.strerror(number), str(path))
        return original(path, *args, **kwargs)

    return called


REASONS: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], object], str]] = {
    "another schema": (lambda folder, _: with_schema(folder, 3), "schema 3, expected 2"),
    "a stray file": (lambda folder, _: (folder / "notes.txt").write_text("x"), "notes.txt: not part of the checkpoint"),
    "weights fail": (
        lambda _, patch: patch.setattr(
            manifest, "file_entry", failing(manifest.file_entry, "live.safetensors", errno.EIO)
        ),
        "live.safetensors: cannot be read (Input/output error)",
    ),
    "the manifest fails": (
        lambda _, patch: patch.setattr(Path, "read_bytes", failing(Path.read_bytes, "manifest.json", errno.EACCES)),
        "manifest.json: cannot be read (Permission denied)",
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_is_no_damage_refuses_and_renames_nothing(
    reason: str, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(os.listdir(copied))
    spoil, part = REASONS[reason]
    spoil(copied / "step00000002", monkeypatch)
    with pytest.raises(CheckpointError) as caught:
        choose(copied)
    assert not isinstance(caught.value, CheckpointDamageError)
    assert part in str(caught.value)
    assert "or name another checkpoint with --checkpoint.resume" in str(caught.value)
    assert sorted(os.listdir(copied)) == before
    assert (copied / "latest").read_text() == "step00000002"


def test_what_is_older_than_the_one_resumed_is_not_judged(copied: Path) -> None:
    with_schema(copied / "step00000001", 3)
    found = choose(copied).saved
    assert found is not None
    assert found.folder.name == "step00000002"


def test_behind_a_damaged_one_that_which_cannot_be_judged_refuses(copied: Path) -> None:
    with_schema(copied / "step00000001", 3)
    (copied / "step00000002" / "live.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="step00000001.*schema 3"):
        choose(copied)
    assert (copied / "step00000002").is_dir()


def test_where_none_is_sound_the_newest_is_named(copied: Path) -> None:
    (copied / "step00000001" / "manifest.json").unlink()  # found first, though it is older
    (copied / "step00000002" / "live.safetensors").unlink()
    with pytest.raises(CheckpointError, match="the newest: .*step00000002/live.safetensors: missing"):
        choose(copied)


def test_a_manifest_tells_what_the_checkpoint_is(saved: RunConfig) -> None:
    found = manifest.verify_checkpoint(root(saved) / "step00000002")
    assert (found.progress.step, found.progress.samples) == (2, 16)
    assert (found.settings["world"], found.settings["parallel.ep_size"]) == (1, 1)
    assert found.model == saved.model
    assert found.settings["train.steps"] == 2
    assert found.settings["version.torch"] == torch.__version__
    assert found.settings["zero.zero_optimization.stage"] == 3
    names = {"live.safetensors", "ema.safetensors", "state_rank00000.safetensors", "generators_rank00000.json"}
    assert names == found.files.keys()
    there = {str(path.relative_to(found.folder)) for path in found.folder.rglob("*") if path.is_file()}
    assert there == {*found.files, "manifest.json", "manifest.sha256"}


def save_and_fail(world: World, run: RunConfig) -> tuple[list[str], list[str], list[str]]:
    """Names kept after some saves; then saves that one rank cannot write; names after that, and the errors."""
    plan = plan_for(run, world)
    session = loop.open_session(plan, world, initial_model(plan))
    folder = root(run)
    for step in (1, 2, 2, 3):
        loop.ensure_saved(session, Progress(step, step * 8))
    kept = sorted(os.listdir(folder))
    gather_objects(None, world)
    errors = []
    for full in range(world.size):
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        if world.rank == full:  # as if the disk were full after so many bytes of each file
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
        errors.append(message(lambda: loop.ensure_saved(session, Progress(4, 32))))
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        gather_objects(None, world)
    latest = (folder / "latest").read_text()
    manifest.verify_checkpoint(folder / latest)
    return kept, [latest, *sorted(os.listdir(folder))], errors


def test_a_save_that_fails_on_one_rank_leaves_the_last_checkpoint(shards: Path, tmp_path: Path) -> None:
    run = make_run(shards, tmp_path, checkpoint={"keep": 2})
    for kept, after, errors in run_ranks(save_and_fail, 2, run):
        assert kept == ["latest", "step00000002", "step00000003"]
        assert after == ["step00000003", "latest", "step00000002", "step00000003"]
        for rank, error in enumerate(errors):
            assert error.startswith(f"CheckpointError: rank {rank}: ")
            assert "cannot be written (" in error
            assert "\n" not in error


def whole_weights(world: World, run: RunConfig, stage: int) -> tuple[bool, bool]:
    """Whether the weights files of a checkpoint hold what the engine gathers, names in the model's order."""
    plan = plan_for(run, world, stage)
    session = loop.open_session(plan, world, initial_model(plan))
    with torch.no_grad():
        for part in session.ema.shards:
            part.add_(0.25)
    folder = loop.ensure_saved(session, Progress(1, 8))
    model = session.objective.model
    expected = {"live": session.engine.full_weights(model, True), "ema": session.ema.full_weights(model, True)}
    return tuple(identical(load_file(folder / f"{name}.safetensors"), state) for name, state in expected.items())


@pytest.mark.parametrize(("ranks", "stage"), [(1, 3), (3, 3), (2, 2)])
def test_weights_put_together_beside_the_training_are_those_it_gathers(
    ranks: int, stage: int, shards: Path, tmp_path: Path
) -> None:
    run = make_run(shards, tmp_path, train={"global_batch": 12, "micro_batch": None})
    assert run_ranks(whole_weights, ranks, run, stage) == [(True, True)] * ranks


def test_a_finished_run_has_nothing_to_do(saved: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert loop.train(plan_for(saved, ALONE), ALONE) == root(saved) / "step00000002"
    assert "nothing to do" in capsys.readouterr().out


def resumed_from_broken(world: World, run: RunConfig, kind: str) -> str:
    """The error of resuming a checkpoint with a value that is not finite, which an earlier version could save."""
    session = loop.open_session(plan_for(run, world), world, initial_model(plan_for(run, world)))
    parts = {"ema": session.ema.shards, "master": session.engine.state.masters()}.get(kind)
    with torch.no_grad():
        if parts is None:
            next(buffer for name, buffer in session.objective.model.named_buffers() if kind in name).fill_(torch.nan)
        else:
            parts[0].data.view(-1)[3] = torch.nan
    first = message(lambda: loop.ensure_saved(session, Progress(1, 8)))
    save.check_finite = lambda *_: None  # type: ignore[attr-defined]
    loop.ensure_saved(session, Progress(1, 8))
    return f"{first}\n{message(lambda: loop.train(plan_for(run, world), world))}"


@pytest.mark.parametrize("kind", ["master", "ema", "expert_threshold"])
def test_weights_that_are_not_finite_are_neither_saved_nor_resumed(kind: str, shards: Path, tmp_path: Path) -> None:
    run = make_run(shards, tmp_path, checkpoint={"resume": "auto"})
    (answer,) = run_ranks(resumed_from_broken, 1, run, kind)
    saving, resuming = answer.split("\n")
    assert saving.startswith(f"CheckpointError: {root(run)}: step 1 is not saved: ")
    assert resuming.startswith(f"CheckpointError: {root(run)}/step00000001/")
    assert "holds values that are not finite (NaN or infinity); resume from an earlier checkpoint" in resuming


def test_another_base_in_a_run_folder_needs_a_name(saved: RunConfig, tmp_path: Path) -> None:
    further, live = with_steps(saved, "run", 4), root(saved) / "step00000002" / "live.safetensors"
    other = changed(further, checkpoint={"init": str(live)})
    with pytest.raises(CheckpointError, match=r"give this one a --name of its own \(.*checkpoint\.init is None there"):
        plan_for(other, ALONE)
    named = changed(other, checkpoint={"resume": str(root(saved) / "step00000002")})
    with pytest.raises(CheckpointError, match="give this one a --name"):
        plan_for(named, ALONE)


def test_a_base_at_another_path_is_the_same_base(saved: RunConfig, tmp_path: Path) -> None:
    plan = plan_for(with_steps(saved, "run", 4), ALONE)
    assert plan.saved is not None
    first, same, other = (tmp_path / name for name in ("first", "same", "other"))
    for path, content in ((first, "a"), (same, "a"), (other, "b")):
        path.write_text(content)
    based = replace(plan.saved, settings={**plan.saved.settings, "checkpoint.init": str(first)})
    for init, fits in ((first, True), (same, True), (other, False), (None, False)):
        run = changed(plan.run, checkpoint={"init": None if init is None else str(init)})
        expected = nullcontext() if fits else pytest.raises(CheckpointError, match=r"checkpoint\.init is")
        with expected:
            setup._resume(based, replace(plan, run=run))
    first.unlink()  # nothing is known of it then
    setup._resume(based, replace(plan, run=changed(plan.run, checkpoint={"init": str(other)})))
