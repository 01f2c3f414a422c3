"""The guard, compiled once per torch and source, and the outcomes of a group of work, run in a process of its own."""

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SOURCE, ROOT = Path(__file__).with_name("guard.cpp"), Path(__file__).resolve().parents[2]
Outcomes = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def pretended() -> Callable[[str], Outcomes]:
    """Return a function from the name of a group (`work.GROUPS`) to its outcomes by case; a group is run once."""
    return _outcomes


@functools.cache
def _outcomes(group: str) -> Outcomes:
    command = [sys.executable, "-m", "tests.pretend_cuda", str(_guard()), group]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: Outcomes = json.loads(done.stdout)
    return found


@functools.cache
def _guard() -> Path:
    """Compile the guard, or find it compiled: a few seconds, once per machine and torch."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler (Debian: apt-get install g++)")
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode() + torch.__file__.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"sharpmoe-pretended-device-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{key}.so"
    if not library.is_file():
        home = Path(torch.__file__).parent
        made = library.with_suffix(f".{os.getpid()}")
        include = [f"-I{home}/include", f"-I{home}/include/torch/csrc/api/include"]
        link = [f"-L{home}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{home}/lib"]
        options = ("-shared", "-fPIC", "-O0", "-w", "-std=c++17")
        command = [compiler, *options, *include, str(SOURCE), "-o", str(made), *link]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:3000]
        made.rename(library)  # another process may do the same at the same time
    return library
