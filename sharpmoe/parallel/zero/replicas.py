"""Check that data-parallel ranks hold equal copies where they should, to detect silent memory and network faults.

ZeRO-2 keeps the weights of the forward whole on every rank. ZeRO-3 partitions them and keeps whole only parameters of
at most stage3_param_persistence_threshold elements (biases, norms, heads). Both keep whole the buffers (thresholds,
balancing biases) and the optimizer's step counts. Masters, moments, the EMA and partitioned weights exist once in the
world: there is nothing to compare them with. Experts of an expert-parallel layer are left out, as ranks differ there.
"""

import hashlib
import socket
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from sharpmoe.errors import TrainingError
from sharpmoe.parallel.ranks.launch import World, gather_objects
from sharpmoe.parallel.zero.placement import is_expert

_DIGEST_BYTES = 7  # a digest and its negative fit a signed 64-bit integer


def check_replicas(module: nn.Module, optimizer: Any, step: int, world: World) -> int:
    """Compare the tensors that every rank holds a copy of; return their number. Call it right after an update.

    Communicates: one all-reduce of 16 bytes per tensor. Raises TrainingError on every rank where copies differ.
    """
    if world.size == 1:
        return 0
    digests = {name: _digest(values) for name, values in _replicated(module, optimizer)}
    own = torch.tensor(list(digests.values()), dtype=torch.int64, device=world.device)
    widest = torch.cat([own, -own])
    dist.all_reduce(widest, op=dist.ReduceOp.MAX)
    highest, lowest = widest[: len(own)], -widest[len(own) :]
    differing = [name for name, differs in zip(digests, (highest != lowest).tolist(), strict=True) if differs]
    if differing:
        first = gather_objects((digests[differing[0]], socket.gethostname()), world)
        raise TrainingError(_message(differing, step, first))
    return len(digests)


def _replicated(module: nn.Module, optimizer: Any) -> Iterator[tuple[str, Iterable[Tensor]]]:
    """Yield names and values of the tensors that all ranks hold copies of, in the same order on each."""
    for name, parameter in module.named_parameters():
        partitioned = getattr(parameter, "ds_status", ZeroParamStatus.AVAILABLE) != ZeroParamStatus.AVAILABLE
        if not partitioned and (not is_expert(parameter) or getattr(parameter, "group_name", "") == "ep_size_1"):
            yield name, [parameter]
    for name, buffer in module.named_buffers():
        yield name, [buffer]
    steps = [torch.as_tensor(state["step"]) for state in optimizer.state.values() if "step" in state]
    if steps:
        yield "the optimizer's step count", steps


def _digest(values: Iterable[Tensor]) -> int:
    """Return the first bytes of the sha256 of the values' bytes, as an integer; one tensor at a time on the host."""
    sha = hashlib.sha256()
    for value in values:
        sha.update(value.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().data)
    return int.from_bytes(sha.digest()[:_DIGEST_BYTES], "big")


def _message(differing: list[str], step: int, first: list[tuple[int, str]]) -> str:
    counts = [sum(digest == other for other, _ in first) for digest, _ in first]
    odd = [f"rank {rank} ({host})" for rank, (_, host) in enumerate(first) if counts[rank] < max(counts)]
    who = ", ".join(odd) if odd else ", ".join(f"rank {rank} ({host})" for rank, (_, host) in enumerate(first))
    more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
    return (
        f"step {step}: ranks that should hold equal copies differ in {differing[0]}{more}; suspect {who}: check the "
        "memory of its host, and resume the last checkpoint before this step with --checkpoint.resume"
    )
