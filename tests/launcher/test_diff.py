"""The tables and JSON of diff; tests/report/test_weights_difference.py has what they hold."""

import json
from pathlib import Path

import pytest

from launcher.convert import main as convert
from launcher.diff import main
from sharpmoe.model.weights import save_weights
from tests.model.nucleus_reference import reference
from tests.report.run_folder import make_run_folder
from tests.toys import toy_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run_folder(tmp_path_factory.mktemp("runs"))


def test_averaged_and_live_weights_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live = run / "checkpoints" / "step00000002" / "live.safetensors"
    assert main([str(run), str(live), "--experts"]) == 0
    said = capsys.readouterr().out
    assert "(toy, step00000002, ema)" in said
    assert "0 only in B, 0 only in A, 0 of another shape" in said
    assert "every one is most like the one in its own place" in said
    assert sum(line.startswith("block 3  ") for line in said.splitlines()) == 1 + 4


def test_swapped_experts_are_a_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = toy_model("diffmoe", text_width=32, pooled_width=32)
    state = model.state_dict()
    for name in [name for name in state if name.startswith("blocks.1.moe.") and len(state[name]) == 4]:
        state[name] = state[name].flip(0)
    save_weights(tmp_path / "swapped.safetensors", state, model.config)
    assert main([str(run), str(tmp_path / "swapped.safetensors")]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("block 1: "))
    assert line.startswith("block 1: experts have other places in B: 0 -> 3, 1 -> 2, 2 -> 1, 3 -> 0")
    assert "gate 0.0000, was 1." in line


def test_json_has_every_expert(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["whole"]["relative_change"] == 0
    assert [(layer["block"], len(layer["experts"])) for layer in found["layers"]] == [(1, 4), (3, 4)]
    assert found["layers"][0]["experts"][2]["matched"] == 2


def test_a_mistake_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"\0" * 64)
    for other in ("/no/such/run", str(tmp_path / "broken.safetensors"), str(tmp_path)):
        assert main([str(run), other]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {other}: ")
        assert error.count("\n") == 1


def test_a_folder_of_diffusers_equals_its_conversion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference().bfloat16().save_pretrained(tmp_path / "nucleus")
    converted = str(tmp_path / "ours.safetensors")
    assert convert([str(tmp_path / "nucleus"), converted, "--family", "nucleus"]) == 0
    capsys.readouterr()
    assert main([str(tmp_path / "nucleus"), converted, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["whole"]["relative_change"] == 0
    assert found["equal_tensors"] == found["whole"]["tensors"]
    assert found["layers"]
