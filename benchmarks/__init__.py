"""Speed of what matters, beside a reference in the same process. Figures are printed, never asserted by tests."""

import os

# As the launchers do: a virtual machine may advertise AMX and end the process at its first product in half precision.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
