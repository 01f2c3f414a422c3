"""The words that `sharpmoe quickstart` gives to the other launchers; tests/contract/test_wheel.py runs it."""

import pytest

from launcher import quickstart


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
