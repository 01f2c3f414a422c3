"""The form of a launcher: errors are one line, exit codes are kept, a closed pipe is no error, bugs stay visible."""

import argparse
import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from launcher.command import Command
from sharpmoe.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]


def command(act: Any, **fields: Any) -> Command:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--count", type=int, default=3, help="how many")
        parser.add_argument("--none", help="nothing")
        parser.add_argument("--flag", action="store_true", help="a flag")
        parser.add_argument("--seed", type=int, default=0, help="a seed")
        parser.add_argument("--other", default=4, help="another (default: four)")

    return Command(text="A test:\n    two lines", arguments=arguments, act=act, **fields)


def fail(arguments: argparse.Namespace) -> None:
    raise DataError("no such folder")


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_the_exit_code_is_what_act_returns(returned: int | None, code: int) -> None:
    assert command(lambda arguments: returned)([]) == code


def test_an_error_is_one_line_and_cleaned_up_after(capsys: pytest.CaptureFixture[str]) -> None:
    ended: list[str] = []
    assert command(fail, cleanup=lambda clean: ended.append(capsys.readouterr().err))([]) == 2
    assert ended == ["error: no such folder\n"]  # printed before the clean-up, which may hang


def test_a_rank_that_does_not_report_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(fail, reports=lambda: False)([]) == 2
    assert capsys.readouterr() == ("", "")


def test_a_bug_keeps_its_traceback_and_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    def bug(arguments: argparse.Namespace) -> None:
        raise KeyError("x")

    ended: list[str] = []
    assert command(bug, cleanup=lambda clean: ended.append(capsys.readouterr().err))([]) == 1
    lines = ended[0].splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "error: this is a bug (KeyError): report it with the lines above"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FileExistsError(errno.EEXIST, "File exists", "a"), "a: exists already and is no folder; choose another place"),
        (IsADirectoryError(errno.EISDIR, "x", "a", None, "b"), "b: is a folder, expected a file; add a file name"),
        (PermissionError(errno.EACCES, "x", "a"), "a: permission denied; choose another place"),
        (OSError(errno.ENOSPC, "x", "a"), "a: no space left on this disk; free some"),
        (OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left on device"),
        (BrokenPipeError("a server hung up"), "a server hung up"),
        (SafetensorError("Error while serializing:\nmore"), "safetensors: Error while serializing: (at tests/"),
        (RuntimeError("Invalid device string: 'gpu'\nmore"), "torch: Invalid device string: 'gpu' (at tests/"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "torch: CUDA out of memory. Tried (at tests/"),
        (NotImplementedError("'neg_cpu' not implemented"), "torch: 'neg_cpu' not implemented (at tests/"),
        (MemoryError(), "out of memory on this host (at tests/"),
    ],
)
def test_errors_of_the_system_and_of_torch_are_one_line(
    error: Exception, line: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(arguments: argparse.Namespace) -> None:
        raise error

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert command(act)([]) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"error: {line}")
    assert said.count("\n") == 1
    assert command(act)(["--debug"]) == 2
    said = capfd.readouterr().err
    assert said.startswith("Traceback (most recent call last):")
    assert said.splitlines()[-1].startswith(f"error: {line}")


def test_a_rank_names_itself_where_it_alone_may_have_failed(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(arguments: argparse.Namespace) -> None:
        raise OSError(errno.ENOSPC, "x", "a")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert command(act, reports=lambda: False)([]) == 2
    assert capfd.readouterr().err.startswith("error: rank 1: a: no space left")

    def start(arguments: argparse.Namespace) -> None:
        error = ConfigError("environment: x")
        error.lone = arguments.count == 3
        raise error

    assert command(start, reports=lambda: False)([]) == command(start, reports=lambda: False)(["--count", "4"]) == 2
    assert capfd.readouterr().err == "error: rank 1: environment: x\n"


def test_words_that_are_no_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(fail)(["--section.key", "1"]) == 2
    assert "error: unrecognized arguments: --section.key 1" in capsys.readouterr().err
    assert command(fail)(["--cuont", "1"]) == 2
    assert "error: unrecognized arguments: --cuont 1; did you mean --count?" in capsys.readouterr().err
    assert command(fail).parse(["--cou", "5"]).count == 5  # argparse's abbreviations
    known = command(fail, overrides=True).parse(["--section.key", "1", "--cou", "5", "--count=7"])
    assert (known.overrides, known.count) == (("--section.key", "1", "--cou", "5"), 7)


def test_help_shows_the_lines_of_the_docstring_and_each_default_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command(fail)(["--help"], "sharpmoe toy")
    said = capsys.readouterr().out
    assert "usage: sharpmoe toy " in said
    assert "A test:\n    two lines\n" in said
    assert said.count("(default: 3)") == said.count("(default: four)") == 1
    assert "a seed (default: 0)" in said
    assert said.count("default") == 3


WRITER = """
from launcher.command import Command
def act(arguments):
    for line in range(100_000):
        print(line)
Command(text="", arguments=lambda parser: None, act=act).run()
"""


def test_a_closed_pipe_ends_quietly() -> None:
    words = ["bash", "-c", '"$0" -c "$1" | head -n 1; echo "${PIPESTATUS[0]}"', sys.executable, WRITER]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["0", "141"]
    assert done.stderr == ""


def _interrupt(_: argparse.Namespace) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_is_one_word_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert Command(text=None, arguments=lambda _: None, act=_interrupt)([]) == 130
    assert capsys.readouterr().err == "interrupted\n"
