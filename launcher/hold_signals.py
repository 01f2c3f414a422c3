"""Run a command with SIGTERM, SIGUSR1 and SIGINT blocked: `python launcher/hold_signals.py COMMAND ...`.

Processes inherit the block. A blocked signal stays pending until a process unblocks it, which the ranks of a run do
(sharpmoe/parallel/ranks/signals.py); other processes, such as torchrun or deepspeed, never receive it.
"""

import os
import signal
import sys

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
    os.execvp(sys.argv[1], sys.argv[1:])
