"""This rank's part of the float32 training state: flat partitions, and where each parameter's elements are in them.

ZeRO concatenates a rank's share of all parameters. With the map of `Piece`s a checkpoint knows the owner of every
element, and any other layout (ranks, experts per rank, ZeRO stage) can find its own. Reads inner names of DeepSpeed
0.19.8.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharpmoe.errors import CheckpointError
from sharpmoe.parallel.zero import eight_bits
from sharpmoe.parallel.zero.placement import is_expert, local_experts

MASTER, EMA = "master", "ema"  # kinds of partitions, beside those that the optimizer names itself

Partitions = dict[str, list[Tensor]]  # kind -> flat float32 tensors of this rank


class Piece(NamedTuple):
    """Consecutive elements of one parameter that this rank owns."""

    name: str  # of the parameter
    part: int  # index of the flat partition that holds them
    start: int  # index of the first element in that partition
    place: int  # index of the first element in the whole parameter, all experts together, flat
    numel: int


class SavedState(Protocol):
    """What `ShardedState.restore` reads: the state of all ranks of some other layout."""

    @property
    def kinds(self) -> set[str]:
        """Kinds of partitions that were saved."""

    @property
    def scalars(self) -> Mapping[str, float]:
        """What `ShardedState.scalars` returned when it was saved."""

    def piece(self, kind: str, name: str, place: int, count: int) -> Tensor:
        """Return elements [place, place + count) of a parameter. Raises CheckpointError."""


class ShardedState:
    """This rank's masters and optimizer states under ZeRO-2 or ZeRO-3. No two ranks share an element."""

    def __init__(self, zero: Any, stage: int) -> None:
        """`zero` is DeepSpeed's ZeRO optimizer."""
        self._zero, self._stage = zero, stage

    def masters(self) -> list[Tensor]:
        """Return this rank's float32 master weights, flat."""
        if self._stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._zero.single_partition_of_fp32_groups)

    def partitions(self) -> Partitions:
        """Return the masters and each tensor that the optimizer keeps beside them, of the same shapes.

        Of a kind that it keeps for some masters only, the tensors of the others are empty. States in 8 bits are copies,
        in float32 (`eight_bits`); all others are those of the optimizer.
        """
        masters = self.masters()
        found = {MASTER: masters}
        for index, master in enumerate(masters):
            state = self._zero.optimizer.state[master]
            for kind, value in (eight_bits.unpack(state) or state).items():
                if torch.is_tensor(value) and value.shape == master.shape:
                    found.setdefault(kind, [torch.empty(0)] * len(masters))[index] = value
        return found

    def scalars(self) -> dict[str, float]:
        """Return the optimizer's state that is one number for all elements: Adam's step count."""
        for state in self._zero.optimizer.state.values():
            if "step" in state:
                return {"step": float(state["step"])}
        return {}

    def pieces(self, module: nn.Module) -> list[Piece]:
        """Return where the parameters of `module` are in this rank's partitions. No communication.

        `module` is the wrapped module or a part of it, whose names are used. Over all ranks the pieces cover every
        element of every parameter that is trained once; padding belongs to no piece.
        """
        find = _piece_of_stage3 if self._stage == 3 else _piece_of_stage2
        pieces = []
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:  # frozen: no part of the training state
                continue
            found = find(name, parameter, self._zero)
            if found is not None and found.numel > 0:
                pieces.append(found._replace(place=found.place + _first_element(name, parameter, module)))
        return pieces

    def frozen(self, module: nn.Module, expert_group: Any) -> tuple[list[Tensor], list[Piece]]:
        """Return this rank's parts of what `module` does not train, flat, and where they are. No communication.

        They are those of the forward, in its dtype, and no copies. Over all ranks the pieces cover every element of
        every frozen parameter once. expert_group: the ranks that have the same experts.
        """
        parts, pieces = list[Tensor](), list[Piece]()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                continue
            part, place, numel = self._frozen_part(parameter, expert_group if is_expert(parameter) else None)
            if numel > 0:
                pieces.append(Piece(name, len(parts), 0, place + _first_element(name, parameter, module), numel))
                parts.append(part)
        return parts, pieces

    def _frozen_part(self, parameter: Any, group: Any) -> tuple[Tensor, int, int]:
        """Return this rank's part of a frozen parameter, its place in the parameter and its elements; 0: none."""
        if self._stage == 3:  # cut into equal parts over its group, the last one padded
            part = parameter.ds_tensor.detach().flatten()
            place = dist.get_rank(parameter.ds_process_group) * part.numel()
            return part, place, min(part.numel(), parameter.ds_numel - place)
        part = parameter.detach().flatten()  # whole on every rank of its group: the first one's is taken
        return part, 0, part.numel() if dist.get_rank(group) == 0 else 0

    @torch.no_grad()
    def restore(self, module: nn.Module, saved: SavedState) -> None:
        """Fill this rank's partitions from a state that any layout has saved. `refresh_weights` must follow.

        No communication. Raises CheckpointError where a part is missing or the optimizer is another.
        """
        if saved.kinds - {MASTER, EMA}:  # otherwise it was saved before the first step
            make_states(self._zero.optimizer, self.masters(), self._owners())
        partitions = self.partitions()
        if saved.kinds - {EMA} != partitions.keys():
            there, here = (", ".join(sorted(kinds)) for kinds in (saved.kinds - {EMA}, partitions.keys()))
            raise CheckpointError(
                f"the checkpoint holds {there}, the run's optimizer keeps {here}; set optim.name, optim.impl"
            )
        pieces = self.pieces(module)
        for kind, parts in partitions.items():
            fill_pieces(parts, kept_pieces(parts, pieces), partial(saved.piece, kind))
        for index, master in enumerate(self.masters()):
            eight_bits.pack(
                self._zero.optimizer.state[master], {kind: parts[index] for kind, parts in partitions.items()}
            )
        for state in self._zero.optimizer.state.values():
            if "step" in state:
                step = saved.scalars["step"]
                state["step"] = torch.full_like(state["step"], step) if torch.is_tensor(state["step"]) else int(step)

    def _owners(self) -> list[int]:
        """Return the index of the optimizer's parameter group of each master."""
        groups = range(len(self.masters()))
        return [self._zero.sub_group_to_group_id[index] for index in groups] if self._stage == 3 else [*groups]

    def refresh_weights(self) -> None:
        """Update the weights of the forward from the masters. Every rank calls it; communicates."""
        if self._stage == 2:
            self._zero.update_lp_params()
            return
        self._zero.checkpoint_event_prologue()
        for group in range(len(self.masters())):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        self._zero.checkpoint_event_epilogue()


def make_states(optimizer: torch.optim.Optimizer, masters: Sequence[Tensor], owners: Sequence[int]) -> None:
    """Have an optimizer create the states that it creates at its first step, by a step with learning rate zero.

    owners: index of the parameter group of each master.
    """
    groups, gradients = optimizer.param_groups, [master.grad for master in masters]
    for master in masters:
        master.grad = torch.zeros_like(master)
    optimizer.param_groups = [
        {**groups[owner], "params": [master], "lr": 0.0} for master, owner in zip(masters, owners, strict=True)
    ]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient  # with offload DeepSpeed keeps the buffer of gradients here


def kept_pieces(parts: Sequence[Tensor], pieces: Sequence[Piece]) -> list[Piece]:
    """Return the pieces of which the partitions of a kind have elements: an optimizer may keep other states of some."""
    return [piece for piece in pieces if len(parts[piece.part])]


def fill_pieces(parts: Sequence[Tensor], pieces: Sequence[Piece], read: Callable[[str, int, int], Tensor]) -> None:
    """Fill flat partitions of one kind, in place, with what `read(parameter, place, number of elements)` returns."""
    for piece in pieces:
        parts[piece.part].narrow(0, piece.start, piece.numel).copy_(read(piece.name, piece.place, piece.numel))


def _first_element(name: str, parameter: Any, module: nn.Module) -> int:
    """Return the number of elements of the experts before this rank's."""
    experts = local_experts(name, module)
    if experts is None:
        return 0
    local = parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()
    return int(experts.start * (local // len(experts)))


def _piece_of_stage3(name: str, parameter: Any, zero: Any) -> Piece | None:
    """Every parameter is cut into equal parts over its group, the last one padded."""
    part, start, size = zero.grad_position[zero.get_param_id(parameter)]
    place = dist.get_rank(parameter.ds_process_group) * size
    return Piece(name, part, start, place, min(size, parameter.ds_numel - place))


def _piece_of_stage2(name: str, parameter: Any, zero: Any) -> Piece | None:
    """All parameters of a group, concatenated, are cut into equal parts: a rank owns a run of some of them."""
    owned = parameter._hp_mapping
    if owned is None:
        return None
    fragment = owned.lp_fragment_address
    return Piece(name, owned.param_group_index, owned.hp_fragment_address.start, fragment.start, fragment.numel)
