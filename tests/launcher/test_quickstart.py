"""The words that `sharpmoe quickstart` gives to the other launchers; tests/contract/test_wheel.py runs it."""

import os
import time
from pathlib import Path

import pytest

from launcher import quickstart
from launcher.sample import main as draw
from tests.report.run_folder import make_run_folder


@pytest.mark.parametrize(
    ("words", "overrides", "prepare"),
    [
        ([], (), ["--source", "fluent", "--out", "OUT"]),
        (
            ["--images", "9"],
            (),
            [
                *[
                    "--source",
                    "fluent",
                    "--out",
                    "OUT",
                    "--limit",
                    "9",
                    "--like",
                    "assets/base.safetensors",
                    "--size",
                    "64",
                ]
            ],
        ),
        (
            ["--source", "in/my.tar", "--train.steps", "3"],
            ("--train.steps", "3", "--name=my", "--data.shards=data/my"),
            [*["--source", "in/my.tar", "--out", "OUT", "--like", "assets/base.safetensors", "--size", "64"]],
        ),
        (
            ["--source", "mine", "--name", "x"],
            ("--name", "x", "--data.shards=data/mine"),
            [*["--source", "mine", "--out", "OUT", "--like", "assets/base.safetensors", "--size", "64"]],
        ),
        (["--allow-missing"], (), ["--source", "fluent", "--out", "OUT", "--allow-missing"]),
    ],
)
def test_words(words: list[str], overrides: tuple[str, ...], prepare: list[str]) -> None:
    given = quickstart.main.parse(words)
    assert quickstart._overrides(given) == overrides
    assert quickstart._prepare_words(given, "OUT") == prepare


def test_a_failed_step_ends_it(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(quickstart, "_train", lambda overrides: pytest.fail("trained without data"))
    assert quickstart.main(["--source", "nowhere"]) == 2
    assert "nowhere" in capfd.readouterr().err


def test_a_second_call_draws_again_only_after_more_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Preparing and training go on by themselves where they were; what they would write is written here."""
    monkeypatch.chdir(tmp_path)
    run, pictures, drawn = make_run_folder(tmp_path / "runs"), tmp_path / "runs/toy/samples/drawn", list[list[str]]()
    latest = run / "checkpoints" / "latest"

    def sample(words: list[str]) -> int:
        drawn.append(words)
        return draw([*words, "--steps", "1"])

    monkeypatch.setattr(quickstart.prepare, "main", lambda words: 0)
    monkeypatch.setattr(quickstart, "_train", lambda overrides: 0)
    monkeypatch.setattr(quickstart.sample, "main", sample)

    def shown() -> str:
        assert quickstart.main(["--name", "toy", "--output", str(tmp_path / "runs")]) == 0
        return next(line.split()[-1] for line in capfd.readouterr().out.splitlines() if line.startswith("samples "))

    assert [shown(), shown()] == [str(pictures / "grid.png")] * 2
    assert drawn == [[str(run)]]
    before = (pictures / "grid.png").read_bytes()
    checkpoint = run / "checkpoints" / "step00000002"
    (checkpoint / "live.safetensors").replace(checkpoint / "ema.safetensors")  # more training: other weights
    os.utime(latest, (time.time() + 5, time.time() + 5))
    again = shown()
    assert again == str(pictures / "grid_2.png")
    os.utime(again, (time.time() + 9, time.time() + 9))
    assert (shown(), len(drawn)) == (again, 2)
    assert (pictures / "grid.png").read_bytes() == before
