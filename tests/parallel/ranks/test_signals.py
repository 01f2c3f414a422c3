"""A first signal is remembered, also while the main thread is busy in C; a second one ends the process."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sharpmoe.parallel.ranks import signals

# The main thread waits in one C call that Python's own handlers cannot interrupt.
BUSY = """
import ctypes, sys, threading
from sharpmoe.parallel.ranks import signals
signals._FORWARDED = float(sys.argv[1])
with signals.listening():
    print("listening", flush=True)
    def tell():
        while not signals.asked():
            threading.Event().wait(0.01)
        print("asked", signals.asked(), flush=True)
    threading.Thread(target=tell, daemon=True).start()
    libc = ctypes.CDLL(None)
    for _ in range(60):
        libc.usleep(999_999)
"""


@contextmanager
def _busy(forwarded: float) -> "Iterator[subprocess.Popen[str]]":
    words = [sys.executable, "-c", BUSY, str(forwarded)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_the_first_signal_is_remembered_and_the_second_ends(second: signal.Signals) -> None:
    with _busy(forwarded=signals._SAME_REQUEST) as busy:
        assert busy.stdout is not None
        busy.send_signal(signal.SIGUSR1)
        assert busy.stdout.readline() == f"asked {int(signal.SIGUSR1)}\n"
        busy.send_signal(signal.SIGTERM)  # the same request by another way
        time.sleep(signals._SAME_REQUEST + 0.3)
        assert busy.poll() is None
        busy.send_signal(second)
        assert busy.wait(20) == 128 + second
        _, err = busy.communicate()
        assert err == f"second signal, {second.name}: leaving at once, not saved since the last checkpoint\n"


def test_what_a_launcher_forwards_late_is_the_same_request() -> None:
    with _busy(forwarded=signals._FORWARDED) as busy:
        assert busy.stdout is not None
        busy.send_signal(signal.SIGTERM)  # `timeout` signals the group: the rank, and the launcher, which forwards it
        assert busy.stdout.readline() == f"asked {int(signal.SIGTERM)}\n"
        time.sleep(signals._SAME_REQUEST + 0.5)
        busy.send_signal(signal.SIGTERM)
        busy.send_signal(signal.SIGUSR1)
        time.sleep(0.5)
        assert busy.poll() is None
        busy.send_signal(signal.SIGINT)  # Ctrl-C by hand is meant
        assert busy.wait(20) == 128 + signal.SIGINT


def test_a_request_ends_with_its_context() -> None:
    with signals.listening():
        signal.raise_signal(signal.SIGUSR1)
        while not signals.asked():  # a thread reads it
            time.sleep(0.01)
        assert signals.asked() == signal.SIGUSR1
    assert signals.asked() == 0


def test_other_signals_are_not_requests_and_handlers_come_back() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: seen.append(number))
    handlers = [signal.getsignal(number) for number in signals._STOPPING]
    try:
        with signals.listening():
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(0.1)
            assert seen == [signal.SIGUSR2]
            assert signals.asked() == 0
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert [signal.getsignal(number) for number in signals._STOPPING] == handlers


def test_of_a_ctrl_c_and_the_sigterm_of_a_launcher_read_together_ctrl_c_is_told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signals, "_asked", None)
    ours, theirs = socket.socketpair()
    theirs.send(bytes([signal.SIGTERM, signal.SIGINT]))
    theirs.close()
    signals._read(ours, True)
    ours.close()
    assert signals.asked() == signal.SIGINT
    assert capfd.readouterr().err.startswith("SIGINT: the run ends after this step and saves")
    monkeypatch.undo()
    assert signals.asked() == 0
