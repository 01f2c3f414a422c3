from pathlib import Path

import pytest

from launcher.export import main
from sharpmoe.checkpoint.manifest import MANIFEST
from sharpmoe.model.build import build_model
from sharpmoe.model.weights import load_model, save_weights
from tests.toys import toy_config


def test_export_writes_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step00000003"
    model = build_model(toy_config())
    for name in ("ema", "live"):
        save_weights(folder / f"{name}.safetensors", model.state_dict(), model.config, {"step": "3", "weights": name})
    (folder.parent / "latest").write_text(folder.name)
    out = tmp_path / "out.safetensors"
    assert main([str(tmp_path / "run"), str(out), "--weights", "live"]) == 0
    assert load_model(out)[1] == {"step": "3", "weights": "live"}
    assert "step 3" in capsys.readouterr().out
    live = folder / "live.safetensors"
    content = live.read_bytes()
    assert main([str(tmp_path / "run"), str(live), "--weights", "live", "--dtype", "bfloat16"]) == 2
    assert "is the file that is read, which would be lost" in capsys.readouterr().err
    (folder / MANIFEST).write_text("{}")
    assert main([str(tmp_path / "run"), str(live)]) == 2
    assert "is a checkpoint, which could not be resumed" in capsys.readouterr().err
    assert live.read_bytes() == content
    assert main([str(tmp_path / "nothing"), str(out)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
