"""Every shipped run file passes a dry run as it stands, before its data are prepared."""

from pathlib import Path

import pytest

from launcher.train import main
from sharpmoe.errors import CheckpointError, DataError
from sharpmoe.model.attach import attach
from sharpmoe.model.weights import save_weights
from sharpmoe.parallel.zero.config import resolve_ds_config
from sharpmoe.train.rehearsal import rehearse
from tests.fixtures_data import make_shards
from tests.toys import toy_model
from tests.train.setting import ALONE, CONFIGS, make_run

RUNS = sorted((CONFIGS / "runs").rglob("*.yaml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_shipped_run_file_passes_a_dry_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # neither data nor weights are here
    assert main(["--deepspeed", str(CONFIGS / "zero3.json"), "--config", str(path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "M active per token" in said
    assert "is not prepared yet" in said


def test_what_is_there_must_fit(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards")

    def rehearsed(**sections: object) -> str:
        run = make_run(shards, tmp_path, "ec", **sections)
        return rehearse(run, resolve_ds_config(CONFIGS / "zero3.json", run, 1), ALONE)

    assert "note" not in rehearsed()
    with pytest.raises(DataError, match=r"made for model\.latent_size 8"):
        rehearsed(model={"latent_size": 16})
    path = tmp_path / "base.safetensors"
    model = attach(toy_model("ec", text_width=32, pooled_width=32))
    save_weights(path, model.state_dict(), model.config)
    assert "note" not in rehearsed(checkpoint={"init": str(path)})
    with pytest.raises(CheckpointError, match=r"model\.num_experts is 4 there, 2 in the run"):
        rehearsed(checkpoint={"init": str(path)}, model={"num_experts": 2})
    assert "is not there yet" in rehearsed(checkpoint={"init": str(tmp_path / "none.safetensors")})
