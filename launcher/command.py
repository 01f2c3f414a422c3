"""What every launcher shares: parse the words, act, report an error as one line, return an exit code."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from sharpmoe.errors import SharpMoEError

OVERRIDES_HELP = "Any key of the run file can be overridden: --section.key VALUE or --section.key=VALUE (YAML values)."

_ERROR = 2  # argparse ends with the same code
_BROKEN_PIPE = 128 + 13  # as of a process that SIGPIPE killed


@dataclass(frozen=True, kw_only=True)
class Command:
    """One launcher. `main = Command(...)`: `main(words)` returns the exit code, `main.run()` ends the process with it.

    Exit codes: what `act` returns (None is 0), 2 after wrong words or a SharpMoEError, which is printed as one line,
    141 where nobody reads standard output any more (`... | head`). Other exceptions are bugs and keep their traceback.
    """

    text: str | None  # help text: __doc__ of the launcher
    arguments: Callable[[argparse.ArgumentParser], object]  # adds the arguments to a parser
    act: Callable[[argparse.Namespace], int | None]
    overrides: bool = False  # put words that are not options in `arguments.overrides`; abbreviate no options
    epilog: str | None = None
    reports: Callable[[], bool] = lambda: True  # whether this process prints an error; False on all ranks but one
    cleanup: Callable[[], object] = lambda: None  # called at the end, after an error has been printed
    leave: Callable[[int], NoReturn] = sys.exit

    def __call__(self, words: Sequence[str], name: str | None = None) -> int:
        """Run with these command-line words and return the exit code; `name` is the program's name in its help."""
        try:
            code = self.act(self.parse(words, name)) or 0
            sys.stdout.flush()
            return code
        except SharpMoEError as error:
            if self.reports():
                print(f"error: {error}", file=sys.stderr, flush=True)
            return _ERROR
        except BrokenPipeError:
            if not _nobody_reads():
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at exit
            return _BROKEN_PIPE
        finally:
            self.cleanup()

    def run(self) -> NoReturn:
        """Run with the words of this process and end it."""
        self.leave(self(sys.argv[1:]))

    def parse(self, words: Sequence[str], name: str | None = None) -> argparse.Namespace:
        """Parse command-line words; wrong ones end the process with 2, as argparse does."""
        parser = self.parser(name)
        if not self.overrides:
            return parser.parse_args(words)
        known, rest = parser.parse_known_args(words)
        known.overrides = tuple(rest)
        return known

    def parser(self, name: str | None = None) -> argparse.ArgumentParser:
        """Return a parser with the arguments of this launcher."""
        parser = argparse.ArgumentParser(
            prog=name,
            description=self.text,
            epilog=self.epilog,
            allow_abbrev=not self.overrides,
            formatter_class=_HelpFormatter,
        )
        self.arguments(parser)
        return parser


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help with the lines of the docstring as they are, and with the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default not in (None, argparse.SUPPRESS, (), []) and action.default is not False
        if not (action.help and action.option_strings and has_default) or "default" in action.help:
            return action.help
        return f"{action.help} (default: %(default)s)"


def _nobody_reads() -> bool:
    """Whether standard output is a pipe that nobody reads; a BrokenPipeError may also come from a network."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
