"""Replay calls of a model without gradients as CUDA graphs: one launch per call instead of one per kernel.

For sampling where kernels are so short that launching them takes longer (sizes S and B, few images). A graph belongs to
one set of shapes and one `CallMode`, and works on memory of its own: inputs are copied into it, outputs out of it. Only
calls in which the host reads nothing from the device can be replayed, so the rule must fix how many rows experts get.
Training is not captured: a rollout has many forwards before its backward, and ZeRO-3 moves its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.cuda import CUDAGraph
from torch.utils._pytree import tree_flatten, tree_unflatten

from sharpmoe.errors import ConfigError
from sharpmoe.model.backbone import Backbone, ModelOutput
from sharpmoe.moe.routing import CallMode


class Recorded(NamedTuple):
    """A call that can be made again on the same memory."""

    output: ModelOutput  # in the memory that each replay writes
    replay: Callable[[], object]


_Record = Callable[[Callable[[], ModelOutput], torch.device], Recorded]


def record_cuda_graph(call: Callable[[], ModelOutput], device: torch.device) -> Recorded:
    """Run a call on `device` twice, then capture it. Raises RuntimeError where a graph cannot hold what it does."""
    with torch.cuda.device(device):
        current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):  # what is allocated or compiled at the first calls is not captured
            for _ in range(2):
                call()
        current.wait_stream(side)
        graph = CUDAGraph()
        with torch.cuda.graph(graph):
            output = call()
    return Recorded(output, graph.replay)


def capture_calls(model: Backbone, record: _Record = record_cuda_graph) -> Backbone:
    """Replay the model's calls in eval mode without gradients as CUDA graphs, in place; returns the model.

    The first call of each shape records its graph, which takes as long as a few calls and keeps the memory of one.
    Other calls (training, replayed or given choices) run as before. Weights may change in place; a model that is moved
    or cast records anew. Raises ConfigError as `check_capture`; the first call does where it cannot be captured. No
    communication.
    """
    check_capture(model)
    return _replace_forward(model, record)


def check_capture(model: Backbone) -> None:
    """Raise ConfigError where a model is not on a GPU, or the host would have to know how many rows its experts get."""
    weight, config = next(model.parameters()), model.config
    leave_out = "leave out CUDA graphs (--cuda-graphs), or compile the blocks (--compile)"
    if weight.device.type != "cuda":
        raise ConfigError(f"CUDA graphs: the model is on the {weight.device.type}, expected cuda; {leave_out}")
    if not model.moe_layers():
        return
    fixed = config.family.fixed_rows(training=False)
    if fixed is None or (fixed == "each" and config.unconditional_expert):
        raise ConfigError(
            f"CUDA graphs: how many tokens each expert takes in sampling is known on the device alone with "
            f"model.router {config.router}, and a graph cannot read it; {leave_out}"
        )
    if fixed == "total" and weight.dtype != torch.bfloat16:
        raise ConfigError(
            f"CUDA graphs: with model.router {config.router} they need bfloat16, in which products of experts need no "
            f"row counts on the host (--dtype bfloat16); {leave_out}"
        )


def _replace_forward(model: Backbone, record: _Record) -> Backbone:
    original, graphs = model.forward, dict[Hashable, _Graph]()

    def forward(
        x_t: Tensor, t: Tensor, condition: Any, x0_prev: Tensor | None = None, mode: CallMode = CallMode()
    ) -> ModelOutput:
        given = mode.routing_maps is not None or mode.cutoffs is not None
        if given or model.training or torch.is_grad_enabled():
            return original(x_t, t, condition, x0_prev, mode)
        leaves, structure = tree_flatten((x_t, t, condition, x0_prev))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        shapes = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
        kinds = tuple(isinstance(leaf, Tensor) for leaf in leaves)
        key = (str(structure), kinds, shapes, mode, _place(model), torch.is_inference_mode_enabled())
        if key not in graphs:
            inside = [tensor.clone() for tensor in tensors]
            filled = iter(inside)
            kept = tree_unflatten([next(filled) if isinstance(x, Tensor) else x for x in leaves], structure)
            call = partial(original, kept[0], kept[1], kept[2], kept[3], mode)
            graphs[key] = _Graph(inside, _recorded(record, call, x_t.device))
        return graphs[key].run(tensors)

    # In place, as `compile_blocks` does, so that it stays a Backbone, whose conditions `sampling` prepares once.
    setattr(model, "forward", forward)  # noqa: B010 (mypy: it is a method)
    return model


def _place(model: Backbone) -> int:
    """Return what changes when a model's weights get other memory."""
    return next(model.parameters()).data_ptr()


def _recorded(record: _Record, call: Callable[[], ModelOutput], device: torch.device) -> Recorded:
    try:
        return record(call, device)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"CUDA graphs: a call of the model could not be captured ({reason}); leave them out"
        ) from error


class _Graph:
    """A recorded call with its memory."""

    def __init__(self, inputs: Sequence[Tensor], recorded: Recorded) -> None:
        self._inputs, self._recorded = list(inputs), recorded
        leaves, self._structure = tree_flatten(recorded.output)
        self._outputs: list[Any] = leaves
        self._last: list[tuple[Tensor, int]] = []  # what the inputs hold, and its version

    def run(self, tensors: Sequence[Tensor]) -> ModelOutput:
        """Return the output for inputs of these shapes, in memory of its own."""
        # A prepared condition is the same at each step of sampling.
        known = self._last or [(torch.empty(0), 0)] * len(tensors)
        for kept, tensor, (last, version) in zip(self._inputs, tensors, known, strict=True):
            if tensor is not last or tensor.is_inference() or tensor._version != version:
                kept.copy_(tensor)
        self._last = [(tensor, 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
        self._recorded.replay()
        fresh = [torch.empty_like(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self._outputs]
        written = [(new, leaf) for new, leaf in zip(fresh, self._outputs, strict=True) if isinstance(leaf, Tensor)]
        for dtype in dict.fromkeys(leaf.dtype for _, leaf in written):  # one launch for many
            alike = [pair for pair in written if pair[1].dtype == dtype]
            torch._foreach_copy_([new for new, _ in alike], [leaf for _, leaf in alike])
        output: ModelOutput = tree_unflatten(fresh, self._structure)
        return output
