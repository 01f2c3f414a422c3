"""Command lines: parse, wire, call. No logic lives here."""

import os
import sys
from types import TracebackType


def _report_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print Ctrl-C as one line: it may come while a launcher still imports, before its `Command` can catch it."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    elif os.environ.get("RANK", "0") == "0":
        print("interrupted", file=sys.stderr, flush=True)


sys.excepthook = _report_uncaught
