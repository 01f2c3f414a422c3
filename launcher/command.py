"""What every launcher shares: parse the words, act, report an error as one line, return an exit code."""

from __future__ import annotations

import argparse
import os
import select
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import launcher.startup  # noqa: F401 - before the imports that take seconds
from launcher.bounds import Real, Whole
from sharpmoe.config_io import nearest
from sharpmoe.console import print_note
from sharpmoe.errors import ConfigError, SharpMoEError, outside_error
from sharpmoe.invocation import spell_text

OVERRIDES_HELP = (
    "Any key of the run file can be overridden: --section.key VALUE or --section.key=VALUE. Text is taken as it is; "
    "lists and maps are written as [0.9, 0.95] and {key: value}."
)

_BUG = 1  # as Python ends after an exception
_ERROR = 2  # as argparse ends
INTERRUPTED = 128 + 2  # as of a process that SIGINT killed
BROKEN_PIPE = 128 + 13  # as of a process that SIGPIPE killed


class Unread(NamedTuple):
    """Options that a call does not read, and why: "with --metrics". Given all the same, they end the launcher."""

    why: str
    options: Sequence[str]  # in their long spelling


@dataclass(frozen=True, kw_only=True)
class Command:
    """One launcher. `main = Command(...)`: `main(words)` returns the exit code, `main.run()` ends the process with it.

    Exit codes: what `act` returns (None is 0), 2 after wrong words or an error that is printed as one line (a
    SharpMoEError, or one of the system, torch or safetensors: see `outside_error`), 141 where nobody reads standard
    output any more (`... | head`), 130 after Ctrl-C, 1 after a bug: any other exception, with its traceback and a line
    that says so.
    With --debug every error shows its traceback.
    """

    text: str | None  # help text: __doc__ of the launcher
    arguments: Callable[[argparse.ArgumentParser], object]  # adds the arguments to a parser
    act: Callable[[argparse.Namespace], int | None]
    unread: Callable[[argparse.Namespace], Iterable[Unread]] = lambda arguments: ()  # what this call would ignore
    overrides: bool = False  # put words that are not options in `arguments.overrides`; abbreviate no options
    epilog: str | None = None
    reports: Callable[[], bool] = lambda: True  # whether this process prints an error; False on all ranks but one
    cleanup: Callable[[bool], object] = lambda clean: None  # called at the end with whether `act` returned
    leave: Callable[[int], NoReturn] = sys.exit

    def __call__(self, words: Sequence[str], name: str | None = None) -> int:
        """Run with these command-line words and return the exit code; `name` is the program's name in its help."""
        debug = clean = False
        try:
            arguments = self.parse(words, name)
            debug = getattr(arguments, "debug", False)
            code = self.act(arguments) or 0
            sys.stdout.flush()
            clean = True
            return code
        except SharpMoEError as error:
            if self.reports() or error.lone:
                _print_error(error, debug, (_of_rank() if error.lone else "") + str(error))
            return _ERROR
        except KeyboardInterrupt:
            if self.reports() and os.environ.get("RANK", "0") == "0":
                print("interrupted", file=sys.stderr, flush=True)
            return INTERRUPTED
        except Exception as error:  # noqa: BLE001 - the last place where an exception can become a line
            if isinstance(error, BrokenPipeError) and _nobody_reads():
                leave_broken_pipe()
                return BROKEN_PIPE
            known = outside_error(error)
            text = str(known) if known else f"this is a bug ({type(error).__name__}): report it with the lines above"
            _print_error(error, debug or known is None, _of_rank() + text)
            return _ERROR if known else _BUG
        finally:
            self.cleanup(clean)

    def run(self) -> NoReturn:
        """Run with the words of this process and end it."""
        self.leave(self(sys.argv[1:]))

    def parse(self, words: Sequence[str], name: str | None = None) -> argparse.Namespace:
        """Parse command-line words. Raises ConfigError for wrong or ignored ones; --help ends the process."""
        parser = self.parser(name)
        if not self.overrides:
            known = parser.parse_args(words)
        else:
            known, rest = parser.parse_known_args(words)
            known.overrides = tuple(rest)
        unread = tuple(self.unread(known))
        if unread:
            _refuse_unread(unread, self._given(words))
        return known

    def _given(self, words: Sequence[str]) -> set[str]:
        """Return the long spellings of the options among correct words, whatever their values."""
        parser = self.parser(None)
        for action in parser._actions:
            action.default = argparse.SUPPRESS
        given, _ = parser.parse_known_args(words)
        return {_long(action) for action in parser._actions if hasattr(given, action.dest)}

    def parser(self, name: str | None = None) -> argparse.ArgumentParser:
        """Return a parser with the arguments of this launcher."""
        parser = _Parser(
            prog=name,
            description=self.text and spell_text(self.text),
            epilog=self.epilog,
            allow_abbrev=not self.overrides,
            formatter_class=_HelpFormatter,
        )
        self.arguments(parser)
        _add_debug(parser)
        return parser


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage, and name the nearest option."""

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]  # overloaded in argparse
        known, rest = self.parse_known_args(args, namespace)
        if rest:
            options = [word for action in self._actions for word in action.option_strings]
            named = next((word.partition("=")[0] for word in rest if word.startswith("-")), "")
            self.error(f"unrecognized arguments: {' '.join(rest)}{nearest(named, options) if named else ''}")
        return known

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"{' '.join(message.removeprefix('argument ').split())} (see --help)")


def _refuse_unread(unread: Iterable[Unread], given: set[str]) -> None:
    """Raise a ConfigError that names the first of the given options that would be ignored, all that are so for it."""
    for why, options in unread:
        ignored = [option for option in options if option in given]
        if ignored:
            has, it = ("has", "it") if len(ignored) == 1 else ("have", "them")
            raise ConfigError(f"{', '.join(ignored)} {has} no effect {why}; leave {it} out")


def _long(action: argparse.Action) -> str:
    return action.option_strings[-1] if action.option_strings else action.dest


def _add_debug(parser: argparse.ArgumentParser) -> None:
    """Add --debug to a parser and to those of its subcommands."""
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                _add_debug(below)


class _HelpFormatter(argparse.HelpFormatter):
    """Help with paragraphs as wide as the terminal, the default of every option that has one, and short metavars."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Wrap every paragraph; one with indented lines, such as a table, stays as it is."""
        blocks = [
            block if "\n " in f"\n{block}" else "\n".join(self._wrapped(block, width)) for block in text.split("\n\n")
        ]
        return textwrap.indent("\n\n".join(blocks), indent)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return self._wrapped(text, width)

    def _wrapped(self, text: str, width: int) -> list[str]:
        """Wrap between words only: an option or a name is never broken at a hyphen."""
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        """Name what an option takes by its type, where the name of the option would only be said twice."""
        if isinstance(action.type, Whole):
            return "N"
        if isinstance(action.type, Real):
            return "X"
        return "PATH" if action.type is Path else "VALUE"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default not in (None, argparse.SUPPRESS, (), [], "") and action.default is not False
        if not (action.help and action.option_strings and has_default) or "default" in action.help:
            return action.help
        return f"{action.help} (default: %(default)s)"


def leave_broken_pipe() -> None:
    """Send what standard output still holds nowhere, so that Python's own flush at exit succeeds."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _nobody_reads() -> bool:
    """Whether standard output is a pipe that nobody reads; a BrokenPipeError may also come from a network."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _print_error(error: BaseException, with_traceback: bool, text: str) -> None:
    """Print an error as one line, after its traceback where that is wanted."""
    if with_traceback:
        traceback.print_exception(error, file=sys.stderr)
    print_note(f"error: {text}")


def _of_rank() -> str:
    """Return "rank N: " where there are several; every rank prints an error that it alone may have."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return f"rank {os.environ['RANK']}: " if several and "RANK" in os.environ else ""
