"""Weights of a run folder, of a checkpoint folder and of a file, with the run they belong to."""

from pathlib import Path

import pytest

from sharpmoe.checkpoint.retention import folder_name
from sharpmoe.config import RunConfig
from sharpmoe.errors import CheckpointError
from sharpmoe.report.runs import SavedModel, average_note, find_saved_model
from tests.report.run_folder import make_run_folder

NAME = "step00000002"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run_folder(tmp_path_factory.mktemp("work"))


def test_a_run_folder_means_its_latest_checkpoint(run_folder: Path) -> None:
    found = find_saved_model(run_folder, "live")
    assert found.weights == run_folder / "checkpoints" / NAME / "live.safetensors"
    assert (found.folder, found.name) == (run_folder, f"toy, {NAME}, live")
    assert found.run is not None
    assert found.run.name == "toy"


def test_a_checkpoint_and_a_file_belong_to_their_run(run_folder: Path) -> None:
    checkpoint = run_folder / "checkpoints" / NAME
    assert find_saved_model(checkpoint) == find_saved_model(run_folder)
    found = find_saved_model(checkpoint / "ema.safetensors")
    assert (found.weights, found.folder, found.name) == (checkpoint / "ema.safetensors", checkpoint, "ema")
    assert found.run is not None


def test_a_file_outside_of_a_run_has_none(run_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    path.write_bytes((run_folder / "checkpoints" / NAME / "ema.safetensors").read_bytes())
    assert find_saved_model(path).run is None


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such weights file"):
        find_saved_model(tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match="neither a run folder with checkpoints/latest nor a .safetensors file"):
        find_saved_model(tmp_path)
    (tmp_path / "checkpoints" / NAME).mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").write_text(NAME)
    with pytest.raises(CheckpointError, match=r"ema.safetensors: no such weights file"):
        find_saved_model(tmp_path)


def test_a_run_without_its_pointer_names_the_checkpoints_that_it_has(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for step in (10, 20):
        (root / folder_name(step)).mkdir(parents=True)
    there = f"give the checkpoint itself: {root / folder_name(20)} | {root / folder_name(10)}"
    for pointer in (None, "", "../.."):
        if pointer is not None:
            (root / "latest").write_text(pointer)
        with pytest.raises(CheckpointError, match="checkpoints/latest is missing or damaged") as caught:
            find_saved_model(tmp_path)
        assert str(caught.value).endswith(there)
    (root / "latest").write_text(folder_name(30))
    with pytest.raises(CheckpointError, match="latest names step00000030, which is not there") as caught:
        find_saved_model(tmp_path)
    assert str(caught.value).endswith(there)
    for step in (10, 20):
        (root / folder_name(step)).rmdir()
    with pytest.raises(CheckpointError, match="which is not there; the run has no other checkpoint"):
        find_saved_model(tmp_path)


@pytest.mark.parametrize(
    ("decay", "step", "kind", "share"),
    [
        (0.9999, 100, "ema", "99.0%"),
        (0.9999, 20_000, "ema", "13.5%"),
        (0.9999, 30_000, "ema", ""),
        (0.95, 100, "ema", ""),  # the quickstart
        (0.9999, 100, "live", ""),
    ],
)
def test_averaged_weights_that_are_still_the_start_are_said_to_be(
    decay: float, step: int, kind: str, share: str
) -> None:
    run = RunConfig(stage="pretrain")
    run = run.model_copy(update={"optim": run.optim.model_copy(update={"ema_decay": decay})})
    weights = Path(f"run/checkpoints/step{step:08}/{kind}.safetensors")
    note = average_note(SavedModel(weights, run, Path("run"), "run"))
    assert bool(note) == bool(share)
    assert f"{share} of the averaged weights is still what the run started from" in note or not share


def test_weights_outside_of_a_run_get_no_note(tmp_path: Path) -> None:
    assert average_note(SavedModel(tmp_path / "ema.safetensors", None, tmp_path, "ema")) == ""
