"""What comes before the imports that take seconds: Ctrl-C is one line, and so is a Python without the packages.

Imported for its effect: by every launcher as a script, which has this folder and not the project on its path, and by
`launcher.command` otherwise. Imports nothing but the standard library.
"""

import importlib.util
import os
import sys
from types import TracebackType

_NEEDED = ("launcher", "sharpmoe", "torch", "deepspeed")


def _report_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print KeyboardInterrupt as one line, on rank 0, and any other exception as Python does."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    elif os.environ.get("RANK", "0") == "0":
        print("interrupted", file=sys.stderr, flush=True)


def _check_packages() -> None:
    """Exit with 2, after one line on stderr, where a package cannot be imported, as outside the environment."""
    if any(importlib.util.find_spec(name) is None for name in _NEEDED):
        fix = "`make setup`, then `. .venv/bin/activate`"
        print(f"error: sharpmoe is not installed for this Python ({sys.executable}): {fix}", file=sys.stderr)
        sys.exit(2)


sys.excepthook = _report_uncaught
_check_packages()
