"""Callbacks of the training loop: objects whose methods are called after a step, a measurement, a save, and at the end.

They are called on rank 0 alone, in the main thread, while the other ranks wait in their next exchange. They only
watch: what they get are figures and files, the random generators are put back after each call, and nothing of what is
trained is passed. What a callback raises ends the run, but only where all ranks can save the state first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from sharpmoe.checkpoint.rng import generators_kept
from sharpmoe.errors import ConfigError, TrainingError, first_line

_METHODS = ("on_step", "on_look", "on_save", "on_end")
_EXPECTED = "expected PACKAGE.MODULE:NAME of a class, or of an object, with methods such as on_step"


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """One optimizer step that was taken."""

    step: int  # from 1
    steps: int  # of the whole run
    figures: Mapping[str, float]  # tag -> value, as in log.jsonl; those of routing only where `is_logged`
    lr: float  # before the factors of `optim.lr_scale`
    images: int  # over all ranks
    seconds: float  # wall time; without waiting for the device where not `is_logged`
    is_logged: bool  # whether the figures were written to log.jsonl and the trackers


@dataclass(frozen=True, kw_only=True)
class TrainingLook:
    """Something that was measured or drawn of the averaged weights on held-out images."""

    step: int  # optimizer steps done before it; 0: the model that the run started from
    kind: Literal["validation", "allocation", "samples", "routing", "metrics"]
    figures: Mapping[str, float]  # tag -> value, as in log.jsonl; empty for pictures
    pixels: np.ndarray | None = None  # (H, W, 3) uint8, read-only
    path: Path | None = None  # the same picture as PNG


@dataclass(frozen=True, kw_only=True)
class TrainingSave:
    """A checkpoint that is complete on the disk; by `checkpoint.keep` it is deleted after later ones."""

    step: int  # optimizer steps that it holds
    checkpoint: Path  # folder


@dataclass(frozen=True, kw_only=True)
class TrainingEnd:
    """How a process of the run ended; the last call."""

    step: int  # optimizer steps done
    why: Literal["finished", "stopped", "failed"]  # stopped: by a signal, to be started again
    message: str  # the signal of a stop, the error of a failure
    checkpoint: Path | None  # the last one; None where a failed run saved nothing at its end


class TrainingCallback:
    """Base of callbacks, which override what they need. Any other object with some of the methods will do.

    Calls are on rank 0 alone: communicating would wait for ever. Training waits for them, and other ranks give up after
    `peers.stuck_after` seconds, so that what takes long, such as an upload, belongs in a thread.
    `signal.raise_signal(signal.SIGTERM)` lets the run save and end after this step or the next.
    """

    def on_step(self, step: TrainingStep) -> object:
        """Read the figures of an optimizer step."""

    def on_look(self, look: TrainingLook) -> object:
        """Read what was measured or drawn."""

    def on_save(self, save: TrainingSave) -> object:
        """Act on a checkpoint, such as copying it."""

    def on_end(self, end: TrainingEnd) -> object:
        """Act on the end of the run, after its last save."""


class CallbackError(TrainingError):
    """A callback raised an error, which ends the run after a save."""


class CallbackCalls:
    """The callbacks of a run, which call themselves one after the other; empty on all ranks but the first.

    What one raises is kept until `check`, and then it is not called again.
    """

    def __init__(self, callbacks: Mapping[str, object]) -> None:
        """Take callbacks by name. Raises ConfigError where one has no method to call, or one of an unknown name."""
        for name, each in callbacks.items():
            _check_methods(name, each)
        self._callbacks = dict(callbacks)
        self._error: CallbackError | None = None

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def on_step(self, step: TrainingStep) -> None:
        self._call("on_step", step, step.step)

    def on_look(self, look: TrainingLook) -> None:
        self._call("on_look", look, look.step)

    def on_save(self, save: TrainingSave) -> None:
        self._call("on_save", save, save.step)

    def on_end(self, end: TrainingEnd) -> None:
        self._call("on_end", end, end.step)

    def check(self) -> None:
        """Raise what the first failing callback raised, as CallbackError, once. No communication."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _call(self, method: str, record: object, step: int) -> None:
        for name, each in list(self._callbacks.items()):
            call = getattr(each, method, None)
            if call is None:
                continue
            try:
                with generators_kept(), torch.no_grad():
                    call(record)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - the state is saved first
                del self._callbacks[name]
                self._error = self._error or _error_of(name, method, step, error)


def open_callbacks(references: Sequence[str], given: Sequence[object] = ()) -> CallbackCalls:
    """Make the callbacks of `log.callbacks`, and add those `given` as objects. Raises ConfigError."""
    found: dict[str, object] = {}
    for reference in references:
        found[f"log.callbacks: {reference}"] = _made(reference)
    for number, each in enumerate(given, 1):
        found[f"callback {number} ({type(each).__module__}:{type(each).__qualname__})"] = each
    return CallbackCalls(found)


def check_callbacks(references: Sequence[str]) -> None:
    """Raise ConfigError where a callback of `log.callbacks` cannot be found; makes none. No communication."""
    for reference in references:
        _check_methods(f"log.callbacks: {reference}", _found(reference))


def _found(reference: str) -> Any:
    """Return what a reference names, looking in the working folder too, after all other places."""
    module, _, name = reference.partition(":")
    if not module or not name:
        raise ConfigError(f"log.callbacks: {reference!r}: {_EXPECTED}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        place: Any = import_module(module)
    except (Exception, SystemExit) as error:  # the user's module may raise anything
        raise ConfigError(
            f"log.callbacks: {reference}: {module} cannot be imported ({type(error).__name__}: {first_line(error)}); "
            "install it, or put it in a folder of PYTHONPATH or in the working folder"
        ) from error
    for part in name.split("."):
        if not hasattr(place, part):
            raise ConfigError(f"log.callbacks: {reference}: {module} has no {name}; {_EXPECTED}")
        place = getattr(place, part)
    return place


def _made(reference: str) -> object:
    found = _found(reference)
    if not isinstance(found, type):
        return found
    try:
        return found()
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"log.callbacks: {reference}() failed ({type(error).__name__}: {first_line(error)}); a class is called "
            "without arguments: name an object of the module where it needs some"
        ) from error


def _check_methods(name: str, callback: object) -> None:
    methods = [each for each in dir(callback) if each.startswith("on_") and callable(getattr(callback, each, None))]
    unknown = [each for each in methods if each not in _METHODS]
    if unknown or not methods:
        wrong = f"method {unknown[0]} is never called" if unknown else "has no method that is called"
        raise ConfigError(f"{name}: {wrong}; expected some of {', '.join(_METHODS)}")


def _error_of(name: str, method: str, step: int, error: BaseException) -> CallbackError:
    said = " ".join(f"{type(error).__name__}: {first_line(error)}".split())
    if first_line(error) == type(error).__name__:
        said = type(error).__name__
    told = CallbackError(f"{name}: {method} after step {step} raised {said}; correct it, or leave the callback out")
    told.__cause__ = error
    return told
