"""Compile the blocks of a model with torch.compile, one by one, in place.

Compiled is a block's own forward: hooks on it (those of ZeRO-3, which gathers and releases whole blocks), recomputation
and the names of parameters stay outside and as they are. Blocks that are alike share one graph. A graph belongs to one
set of shapes and one way of calling (`CallMode`, training or not, with gradients or without); within it nothing is read
back from the device: experts whose row counts only the device knows, and experts on other ranks, run as they are.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import Callable

import torch

from sharpmoe.console import clock
from sharpmoe.errors import ConfigError
from sharpmoe.model.backbone import Backbone

# Graphs of one function that torch keeps before it gives up and runs it as it is; its own limit is 8. Needed are, of
# each kind of block, one per resolution, caption length and way of calling.
_MOST_GRAPHS = 256

_BETWEEN_LINES = 30.0  # seconds

_Tell = Callable[[str], object]


def compile_blocks(
    model: Backbone,
    tell: _Tell | None = None,
    *,
    backend: str | Callable[..., object] = "inductor",
    fullgraph: bool = False,
) -> Backbone:
    """Compile every block's forward, in place; returns the model. Nothing is compiled before the first call.

    Equal to rounding: torch's "inductor" fuses operators and orders float32 sums anew. tell: gets a line before the
    first compilation, and one every half minute while there are more. backend, fullgraph: as of torch.compile; with
    fullgraph a part that cannot be traced is an error instead of running as it is. Raises ConfigError where the device
    has no compiler. No communication.
    """
    if backend == "inductor":
        check_compiler(next(model.parameters()).device)
    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, _MOST_GRAPHS)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, 8 * _MOST_GRAPHS)
    for layer in model.moe_layers():
        setattr(layer, "serve_untraced", torch.compiler.disable(layer.serve))  # noqa: B010 (mypy: it is a method)
    for block in model.blocks:
        compiled = torch.compile(block.forward, backend=backend, fullgraph=fullgraph, dynamic=False)
        setattr(block, "forward", compiled)  # noqa: B010
    if tell is not None:
        _Announcement(tell).register()
    return model


def check_compiler(device: torch.device) -> None:
    """Raise ConfigError where torch.compile has no compiler for a device: C++ for a CPU, Triton for a GPU."""
    if device.type == "cpu":
        if not any(shutil.which(tool) for tool in (os.environ.get("CXX", "c++"), "g++", "clang++")):
            raise ConfigError("compiling blocks on a CPU needs a C++ compiler; install g++, or do not compile")
    elif importlib.util.find_spec("triton") is None:
        raise ConfigError("compiling blocks on a GPU needs the package triton; install it, or do not compile")


class _Announcement:
    """Says that blocks are being compiled when that begins, and then every half minute how long it has taken."""

    def __init__(self, tell: _Tell) -> None:
        self._tell = tell
        self._graphs, self._seconds = 0, 0.0
        self._started = self._told = time.monotonic()

    def register(self) -> None:
        """Hear of every compilation of this process from now on."""
        handler = torch._dynamo.callback.callback_handler
        handler.register_start_callback(self._start)
        handler.register_end_callback(self._end)

    def _start(self, _: object) -> None:
        self._started = time.monotonic()
        if not self._graphs:
            self._told = self._started
            self._tell("note: compiling blocks: the first calls take a minute or more, as do those of a new image size")

    def _end(self, _: object) -> None:
        now = time.monotonic()
        self._graphs += 1
        self._seconds += now - self._started
        if now - self._told >= _BETWEEN_LINES:
            self._told = now
            self._tell(f"compiling blocks: graphs so far {self._graphs}, time {clock(self._seconds)}")
