"""Training from Python: the example of docs/callbacks.md runs and prints each call."""

import re
from pathlib import Path

import pytest

from sharpmoe.config_io import dump_run_config
from sharpmoe.errors import ConfigError
from sharpmoe.parallel.ranks import launch
from sharpmoe.training import train_run
from tests.train.setting import make_run

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_example_of_the_documentation_runs(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(shards.absolute(), tmp_path, stage="pretrain", checkpoint={"every": 1})
    (tmp_path / "run.yaml").write_text(dump_run_config(run))
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", (DOCS / "callbacks.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    scope: dict[str, object] = {}
    try:
        exec(compile(code, "callbacks.md", "exec"), scope)  # noqa: S102
    finally:
        launch.stop()
    folder = tmp_path / "run" / "checkpoints" / "step00000002"
    assert scope["checkpoint"] == folder
    said = capsys.readouterr().out
    assert re.search(r"^1 2 \d\.\d+ 0\.01$", said, re.MULTILINE)
    assert f"\n2 {folder}\n" in said
    assert f"2 finished  {folder}\n" in said


def test_a_wrong_run_file_is_one_line() -> None:
    try:
        with pytest.raises(ConfigError, match="no_such.yaml"):
            train_run("no_such.yaml")
    finally:
        launch.stop()
