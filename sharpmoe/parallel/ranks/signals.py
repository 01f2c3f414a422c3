"""Signals that ask a run to stop: the first is remembered until all ranks can act on it, a second ends the process.

Python runs a signal's handler between two of its own instructions, so not while the main thread waits in a collective.
Here the signal's number goes through a pipe to a thread that is always free to read it.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

STOPPING = (signal.SIGTERM, signal.SIGUSR1)
SAME_REQUEST = 1.0  # seconds: a scheduler may reach a process twice, itself and through torchrun

_asked: signal.Signals | None = None


class StopAskedError(Exception):
    """A signal asked the run to stop; raised on every rank at the same place. The text is the signal's name."""


def asked() -> int:
    """Number of the signal that has asked this process to stop; 0 where none has."""
    return 0 if _asked is None else int(_asked)


@contextmanager
def listening() -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 are remembered (`asked`); a second one ends the process with 128 + its number.

    For the main thread. Signals that reach a process within a second of the first count as the same request; one that
    was held back before (launcher/hold_signals.py) counts as the first.
    """
    global _asked
    _asked = None
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    reader = threading.Thread(target=_read, args=(ours,), name="signals", daemon=True)
    reader.start()
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, _pass) for number in STOPPING}
    for number in STOPPING:
        signal.siginterrupt(number, False)  # system calls of other libraries go on
    held = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        theirs.close()
        reader.join()
        ours.close()


def _pass(number: int, frame: object) -> None:
    """Take a signal: its default action would end the process. What counts is the number in the pipe."""


def _read(pipe: socket.socket) -> None:
    global _asked
    first = 0.0
    while numbers := pipe.recv(16):
        for number in numbers:
            if number not in STOPPING:
                continue
            if _asked is None:
                _asked, first = signal.Signals(number), time.monotonic()
            elif time.monotonic() - first > SAME_REQUEST:
                os.write(2, f"second signal, {signal.Signals(number).name}: leaving at once\n".encode())
                os._exit(128 + number)
