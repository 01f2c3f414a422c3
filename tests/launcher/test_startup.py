"""A Python without the packages, as outside the virtual environment: one line instead of a traceback."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typing_extensions

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


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["launcher/submit.py", "--dry-run"], 0),
        (["launcher/hostfile.py", "--help"], 0),
        (["-m", "launcher", "submit", "--dry-run"], 0),
        (["launcher/plan.py", "--help"], 2),
        (["-m", "launcher", "plan", "--help"], 2),
    ],
)
def test_a_login_node_needs_no_torch(words: list[str], code: int, tmp_path: Path) -> None:
    """Of the installed packages only those that read a run file are there, and the checkout is not installed."""
    for name in ("pydantic", "pydantic_core", "annotated_types", "typing_inspection", "yaml", "_yaml", "tqdm"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        (tmp_path / name).symlink_to(Path(spec.origin).parent)
    (tmp_path / "typing_extensions.py").symlink_to(typing_extensions.__file__)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-S", *words], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stderr
    if code:
        assert done.stderr.startswith("error: sharpmoe is not installed for this Python")
