"""Both ways of starting every launcher: `sharpmoe NAME ...` and `python launcher/NAME.py ...`."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sharpmoe
from launcher.main import _LAUNCHERS, main, run
from sharpmoe.config_io import PROJECT_ROOT

# Modules of launcher/ that are no launchers; hold_signals wraps any command inside a batch file.
INNER = {
    "__init__",
    "__main__",
    "bounds",
    "command",
    "devices",
    "main",
    "hold_signals",
    "published",
    "startup",
}


def file_of(name: str) -> str:
    return name.replace("-", "_")


def test_every_launcher_is_a_command() -> None:
    files = {path.stem for path in (PROJECT_ROOT / "launcher").glob("*.py")}
    assert files - INNER == {file_of(name) for name in _LAUNCHERS}


def test_the_console_command_is_installed_under_its_name() -> None:
    project = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"sharpmoe": f"{run.__module__}:{run.__name__}"}


@pytest.mark.parametrize("name", _LAUNCHERS)
def test_help_of_every_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: sharpmoe {name} ")
    assert f"launcher/{file_of(name)}.py" in said  # the docstring names the other way


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("name", [*_LAUNCHERS, "shards verify", "shards stats", "shards show", "shards merge"])
def test_help_fits_the_terminal_and_describes_every_option(
    name: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    said = capsys.readouterr().out
    usage, _, rest = said.partition("\n\n")
    assert [line for line in rest.splitlines() if len(line) > columns] == []
    assert "(default: )" not in rest
    assert not re.match(r"(options|positional arguments):", rest)  # a description comes first
    assert not re.search(r"--([a-z-]+) \1\b", usage.lower().replace("_", "-"))  # as in --batch-size BATCH_SIZE


def test_the_list_of_commands_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch is imported')")
    environment = {"PYTHONPATH": f"{tmp_path}:{PROJECT_ROOT}"}
    words = [sys.executable, "-m", "launcher", "--help"]
    said = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in said.splitlines() if line.startswith("  ")] == list(_LAUNCHERS)
    tasks = ["start:", "data:", "training:", "results:", "weights:", "machine:"]
    assert [line for line in said.splitlines() if line.endswith(":")] == tasks
    assert max(map(len, said.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ([], "no command given; expected one of quickstart, prepare,"),
        (["prepair"], "unknown command 'prepair'; did you mean prepare?"),
        (["--config", "x"], "unknown command '--config'; expected one of quickstart, prepare,"),
    ],
)
def test_no_or_a_wrong_command_is_one_line(words: list[str], shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: sharpmoe: ")
    assert shown in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_both_ways_give_the_same_error_and_exit_code(tmp_path: Path) -> None:
    for first in (["-m", "launcher", "report"], [str(PROJECT_ROOT / "launcher" / "report.py")]):
        words = [sys.executable, *first, str(tmp_path)]
        done = subprocess.run(words, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


def test_main_runs_as_a_file_and_tells_its_version() -> None:
    environment = os.environ | {"PYTHONPATH": str(PROJECT_ROOT)}
    words = [sys.executable, str(PROJECT_ROOT / "launcher" / "main.py"), "--version"]
    said = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
    assert said == f"sharpmoe {sharpmoe.__version__}\n"


def test_help_that_nobody_reads_ends_in_silence() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONPATH": str(PROJECT_ROOT)}
    words = [sys.executable, "-m", "launcher", "--help"]
    done = subprocess.run(words, env=environment, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
