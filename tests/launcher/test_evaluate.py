import re
from pathlib import Path

import pytest

from launcher.evaluate import main
from sharpmoe.evaluation.allocation import Allocation
from tests.report.run_folder import make_run_folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run_folder(tmp_path_factory.mktemp("work"))


@pytest.mark.slow
def test_evaluate_compares_two_models(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live = run_folder / "checkpoints" / "step00000002" / "live.safetensors"
    argv = [str(run_folder), str(live), "--images", "3", "--sheet-images", "2", "--out", str(tmp_path)]
    assert main([*argv, "--split", "unseen:2/2", "--sheet-blocks", "3", "--sheet-scale", "6"]) == 0
    said = capsys.readouterr()
    assert "Allocation on 2 held-out images of unseen:2/2, 10 times" in said.out
    assert "change (paired)" in said.out
    measured = [line for line in said.err.splitlines() if line.startswith("measuring ")]
    assert [line.split(": ")[0] for line in measured] == ["measuring before", "measuring after"]
    assert all(re.search(r": \d+ images, 10 times, with fixed and with Markov noise$", line) for line in measured)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "after.json",
        "allocation.png",
        "before.json",
        "compute.png",
        "flops_after.json",
        "flops_after.png",
        "flops_before.json",
        "flops_before.png",
        "routing_after.png",
        "routing_after_block3.png",
        "routing_before.png",
        "routing_before_block3.png",
        "routing_difference.png",
        "routing_difference_block3.png",
    ]
    assert Allocation.load(tmp_path / "after.json").flow != Allocation.load(tmp_path / "before.json").flow


def test_a_sheet_of_a_block_without_experts_is_refused(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run_folder), "--sheet-blocks", "2", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "error: --sheet-blocks: block 2 has no MoE layer, allowed: 1 3"


def test_names_must_differ(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(run_folder), str(run_folder), "--names", "a", "a", "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    *notes, error = capsys.readouterr().err.splitlines()
    assert error == "error: --names: 2 models need as many different names, got a, a"
    assert all(note.startswith("note: ") for note in notes)
    assert not (tmp_path / "out").exists()
