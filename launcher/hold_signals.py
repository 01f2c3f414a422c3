"""Run a command with SIGTERM and SIGUSR1 held back: `python launcher/hold_signals.py COMMAND ...`.

They reach the processes that listen for them, which the ranks of a run do (sharpmoe/parallel/ranks/signals.py), even
if they were sent earlier. The other processes, such as torchrun, never see them.
"""

import os
import signal
import sys

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
    os.execvp(sys.argv[1], sys.argv[1:])
