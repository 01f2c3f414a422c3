"""Progress on a terminal and in a file, durations, and when there are colours."""

import io
import time

import pytest

from sharpmoe import console
from sharpmoe.console import clock, coloured_note, progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def minutes(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test moves: its last number."""
    times = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: times[-1])
    return times


def test_a_file_gets_a_line_with_the_time_left_every_half_minute(minutes: list[float]) -> None:
    stream = io.StringIO()
    with progress_bar("sampling", 10, stream=stream) as advance:
        for seconds in (10, 20, 31, 40, 62, 100):
            minutes.append(seconds)
            advance(1)
    assert stream.getvalue().splitlines() == [
        "sampling: 30% done, 1:12 left",
        "sampling: 50% done, 1:02 left",
        "sampling: 60% done, 1:06 left",
    ]


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_what_is_short_prints_nothing(stream: io.StringIO) -> None:
    with progress_bar("sampling", 3, stream=stream) as advance:
        for _ in range(3):
            advance(1)
    assert "sampling" not in stream.getvalue()


def test_a_terminal_gets_a_bar_that_vanishes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_BEFORE_BAR", 0)
    stream = Terminal()
    with progress_bar("sampling", 2, "model call", stream) as advance:
        advance(1)
    assert "sampling" in stream.getvalue()
    assert "model call" in stream.getvalue()
    assert "\n" not in stream.getvalue()


@pytest.mark.parametrize("quiet", ["rank", "asked", "within"])
def test_what_shows_nothing(quiet: str, monkeypatch: pytest.MonkeyPatch, minutes: list[float]) -> None:
    monkeypatch.setenv("RANK", "1" if quiet == "rank" else "0")
    outer, inner = io.StringIO(), io.StringIO()
    with (
        progress_bar("outer", 2, stream=outer, quiet=quiet != "within"),
        progress_bar("inner", 2, stream=inner, quiet=quiet == "asked") as advance,
    ):
        minutes.append(100)
        advance(1)
    assert (outer.getvalue(), inner.getvalue()) == ("", "")
    with progress_bar("after", 2, stream=inner) as advance:
        minutes.append(200)
        advance(1)
    assert bool(inner.getvalue()) == (quiet != "rank")  # what was within is over


def test_durations_as_clocks() -> None:
    assert (clock(61), clock(3725)) == ("1:01", "1:02:05")


RED = "\x1b[31merror:\x1b[0m no"


@pytest.mark.parametrize(
    ("stream", "variables", "shown"),
    [
        (Terminal, {}, RED),
        (io.StringIO, {}, "error: no"),
        (Terminal, {"TERM": "dumb"}, "error: no"),
        (Terminal, {"NO_COLOR": "1"}, "error: no"),
        (Terminal, {"NO_COLOR": ""}, RED),
        (io.StringIO, {"FORCE_COLOR": "1"}, RED),
        (io.StringIO, {"FORCE_COLOR": "0"}, "error: no"),
        (io.StringIO, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, "error: no"),
    ],
)
def test_when_there_are_colours(
    stream: type[io.StringIO], variables: dict[str, str], shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert coloured_note("error: no", stream()) == shown
    assert coloured_note("step 1: no", stream()) == "step 1: no"
