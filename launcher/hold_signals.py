"""Run a command with SIGTERM and SIGUSR1 held back: `python launcher/hold_signals.py COMMAND ...`.

They reach those of its processes that ask for them, as the ranks of a run do (sharpmoe.parallel.signals), also where
they were sent before that; the others, such as torchrun, never see them.
"""

import os
import signal
import sys

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
    os.execvp(sys.argv[1], sys.argv[1:])
