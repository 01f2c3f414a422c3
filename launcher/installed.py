"""End with one line where this Python lacks the packages, as outside the virtual environment. Imports none of them."""

import importlib.util
import sys

_NEEDED = ("launcher", "sharpmoe", "torch", "deepspeed")


def _check(names: tuple[str, ...] = _NEEDED) -> None:
    """Exit with 2, after one line on stderr, where one of these packages cannot be imported."""
    if any(importlib.util.find_spec(name) is None for name in names):
        fix = "`make setup`, then `. .venv/bin/activate`"
        print(f"error: sharpmoe is not installed for this Python ({sys.executable}): {fix}", file=sys.stderr)
        sys.exit(2)


_check()
