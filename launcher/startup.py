"""What comes before the imports that take seconds: Ctrl-C is one line, and so is a Python without the packages.

Imported for its effect: by every launcher as a script, which has this folder and not the project on its path, and by
`launcher.command` otherwise. Imports nothing but the standard library.
"""

import importlib.util
import os
import sys
from pathlib import Path
from types import TracebackType

_ALWAYS = ("launcher", "sharpmoe", "pydantic", "yaml", "tqdm")
_COMPUTING = ("torch", "deepspeed")
_ON_LOGIN_NODES = ("submit", "hostfile")  # need neither of these: they hand work to Slurm


def _report_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print KeyboardInterrupt as one line, on rank 0, and any other exception as Python does."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    elif os.environ.get("RANK", "0") == "0":
        print("interrupted", file=sys.stderr, flush=True)


def _check_packages() -> None:
    """Exit with 2, after one line on stderr, where a package cannot be imported, as outside the environment.

    A script of a checkout that is not installed for this Python finds the checkout itself.
    """
    root = Path(__file__).resolve().parents[1]
    if importlib.util.find_spec("launcher") is None and (root / "sharpmoe").is_dir():
        sys.path.append(str(root))
    words = [Path(sys.argv[0]).stem, *sys.argv[1:2]]  # of `launcher/NAME.py` or `sharpmoe NAME`
    is_light = words[0] in _ON_LOGIN_NODES or (words[0] in ("sharpmoe", "__main__") and words[-1] in _ON_LOGIN_NODES)
    if any(importlib.util.find_spec(name) is None for name in (*_ALWAYS, *(() if is_light else _COMPUTING))):
        fix = "`make setup`, then `. .venv/bin/activate`"
        print(f"error: sharpmoe is not installed for this Python ({sys.executable}): {fix}", file=sys.stderr)
        sys.exit(2)


sys.excepthook = _report_uncaught
_check_packages()
