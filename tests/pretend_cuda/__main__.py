"""Run one group of work on a pretended device: `python -m tests.pretend_cuda GUARD GROUP`; prints JSON.

The guard (a shared library) is loaded before torch, and only in this process.
"""

import ctypes
import importlib
import json
import sys

if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
    name = "lowered" if sys.argv[2].startswith("compiled") else "work"
    work = importlib.import_module(f"tests.pretend_cuda.{name}")
    json.dump(dict(work.GROUPS[sys.argv[2]]()), sys.stdout)
