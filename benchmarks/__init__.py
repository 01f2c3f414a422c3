"""Benchmarks against a reference in the same process. They print their figures; no test asserts them."""

import os

# As the launchers do: some virtual machines advertise AMX and kill a process at its first half-precision product.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
