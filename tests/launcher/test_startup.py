"""A Python without the packages, as outside the virtual environment: one line instead of a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from launcher.main import _LAUNCHERS

ROOT = Path(__file__).resolve().parents[2]
BARE = [sys.executable, "-I", "-S"]  # neither PYTHONPATH nor site-packages


@pytest.mark.parametrize("name", sorted(_LAUNCHERS))
def test_every_script_says_what_is_missing(name: str) -> None:
    start = "import runpy, sys; sys.path.insert(0, 'launcher'); runpy.run_path(sys.argv[1], run_name='__main__')"
    done = subprocess.run(
        [*BARE, "-c", start, f"launcher/{name.replace('-', '_')}.py"], cwd=ROOT, capture_output=True, text=True
    )
    line = f"error: sharpmoe is not installed for this Python ({sys.executable}): `make setup`, then `. .venv/bin/ac"
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(line)


def test_a_python_that_has_them_goes_on() -> None:
    words = [sys.executable, "launcher/hostfile.py", "--help"]
    assert subprocess.run(words, cwd=ROOT, capture_output=True).returncode == 0
