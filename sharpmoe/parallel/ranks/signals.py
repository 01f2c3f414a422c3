"""Signals that ask a run to stop: the first is stored until all ranks can act on it, a second ends the process.

Python runs a signal handler between two of its own instructions, so not while the main thread waits in a collective.
Here the signal's number is written to a socket, which a thread of its own reads.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_CLEARED = "\r\x1b[K"  # a terminal: the line that the cursor is in, with ^C in it, is written anew
_SAME_REQUEST = 1.0  # seconds: a scheduler, or Ctrl-C, may reach a process twice, itself and through its launcher
_FORWARDED = 30.0  # seconds in which a launcher may forward SIGTERM again: as long it waits before SIGKILL

_asked: signal.Signals | None = None


class StopAskedError(Exception):
    """A signal asked the run to stop; raised on every rank at the same place. The message is the signal's name."""


def asked() -> int:
    """Return the number of the signal that asked this process to stop, 0 if there was none."""
    return 0 if _asked is None else int(_asked)


@contextmanager
def listening(announce: bool = False) -> Iterator[None]:
    """Within the context, store SIGTERM, SIGUSR1 and SIGINT (`asked`); a second ends the process with 128 + its number.

    For the main thread. Signals within a second of the first count as the same request, SIGTERM and SIGUSR1 within 30
    seconds: `timeout` and schedulers signal a whole process group, and a launcher in it forwards what it got when the
    machine lets it. A signal that was blocked before (launcher/hold_signals.py) counts as the first.
    announce: print one line on stderr when the first arrives.
    """
    global _asked
    _asked = None
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    reader = threading.Thread(target=_read, args=(ours, announce), name="signals", daemon=True)
    reader.start()
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, _ignore) for number in _STOPPING}
    for number in _STOPPING:
        signal.siginterrupt(number, False)  # system calls of other libraries go on
    held = signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
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
        _asked = None  # of this context: the next run of the process starts without it


def _ignore(number: int, frame: object) -> None:
    """Handle a signal by doing nothing: the default action would end the process. `_read` gets its number."""


def _read(pipe: socket.socket, announce: bool) -> None:
    global _asked
    first = 0.0
    while numbers := pipe.recv(16):
        # Of several at once Ctrl-C counts: a launcher answers it with SIGTERM, which another thread may take first.
        for number in sorted(numbers):
            if number not in _STOPPING:
                continue
            if _asked is None:
                _asked, first = signal.Signals(number), time.monotonic()
                if announce:
                    again = "" if _asked == signal.SIGINT else f" after {_FORWARDED:.0f} s"
                    _write_line(
                        f"{_asked.name}: the run ends after this step and saves; a second one{again} ends it at once"
                    )
            elif time.monotonic() - first > (_SAME_REQUEST if number == signal.SIGINT else _FORWARDED):
                name = signal.Signals(number).name
                _write_line(f"second signal, {name}: leaving at once, not saved since the last checkpoint")
                os._exit(128 + number)


def _write_line(text: str) -> None:
    """Write to stderr past Python's buffers, whose lock the main thread may hold; on a terminal over its last line."""
    with suppress(OSError):  # stderr may be closed
        os.write(2, f"{_CLEARED if os.isatty(2) else ''}{text}\n".encode())
