"""Ctrl-C as one line, from the import of this module on: imports take seconds, before a `Command` can catch it."""

import os
import sys
from types import TracebackType


def _report_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print KeyboardInterrupt as one line, on rank 0, and any other exception as Python does."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    elif os.environ.get("RANK", "0") == "0":
        print("interrupted", file=sys.stderr, flush=True)


sys.excepthook = _report_uncaught
