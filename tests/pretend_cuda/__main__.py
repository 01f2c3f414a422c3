"""Run one group of work on a pretended device: `python -m tests.pretend_cuda GUARD GROUP`; prints JSON.

The guard (a shared library) is loaded before torch, and only in this process.
"""

import ctypes
import importlib
import json
import sys

if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
    work = importlib.import_module("tests.pretend_cuda.work")
    json.dump(dict(work.GROUPS[sys.argv[2]]()), sys.stdout)
