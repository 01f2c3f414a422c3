"""DeepSpeed's engine behind one class: run configuration + engine JSON + module -> Engine.

DeepSpeed does partitioning, gradient reduction, clipping and the optimizer step. What this project changes in it is in
`patches`; its inner names are used in this folder and in `parallel.experts.groups` only (tests/contract), so that an
upgrade of DeepSpeed changes nothing else.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from sharpmoe.config import RunConfig
from sharpmoe.model.matrices import check_matrices, hidden_matrices
from sharpmoe.model.trainable import freeze
from sharpmoe.parallel.experts.dispatch import check_dispatcher, make_dispatcher
from sharpmoe.parallel.experts.groups import ExpertGroups
from sharpmoe.parallel.experts.pool import make_pool
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.parallel.zero.build import Values, materialise
from sharpmoe.parallel.zero.optimizers import optimizer_factory, optimizer_groups, set_learning_rate
from sharpmoe.parallel.zero.partitions import Piece, ShardedState
from sharpmoe.parallel.zero.patches import (
    Admit,
    Update,
    check_version,
    frozen_experts_allowed,
    gather_parts_whole,
    patch_optimizer,
)
from sharpmoe.parallel.zero.placement import gather_experts, is_expert, place_experts
from sharpmoe.parallel.zero.replicas import check_replicas
from sharpmoe.parallel.zero.settings import ZeroSettings

_CHUNK = 1 << 22  # elements that are exchanged at a time


class Engine:
    """A module under ZeRO-2 or ZeRO-3. Call it like the module; `backward` and `step` once per optimizer step."""

    def __init__(
        self,
        module: nn.Module,
        run: RunConfig,
        ds_config: dict[str, Any],
        world: World,
        values: Values | None = None,
    ) -> None:
        """Wrap `module`: give each rank its experts, fill and partition it in place, on the device.

        A module on the meta device is filled from `values`, part by part; a real one must be the same on every rank.
        ds_config is complete (see sharpmoe.parallel.zero.config): batch triple, clipping, precision and stage are set.
        Communicates: rank 0's weights are broadcast. Raises ConfigError where the optimizer cannot be built, a pattern
        of optim.lr_scale matches nothing, or another version of DeepSpeed is installed.
        """
        check_version()
        self.world = world
        self.stage = int(ds_config["zero_optimization"]["stage"])
        self.module = module
        self.num_parameters = sum(p.numel() for p in module.parameters())
        freeze(module, run)
        check_matrices(module, run)
        self._experts = ExpertGroups.of(run.parallel.ep_size, world)
        place_experts(module, self._experts, make_dispatcher(run, self._experts), make_pool(run, world))
        self.held_parameters = sum(p.numel() for p in module.parameters())  # that this rank computes with
        materialise(module, values, ds_config, world)
        matrices = hidden_matrices(module) if run.optim.name == "muon" else {}
        parts_whole = self.stage == 3 and gather_parts_whole(module)
        with frozen_experts_allowed():
            self._engine, self._zero, _, _ = deepspeed.initialize(
                model=module,
                model_parameters=optimizer_groups(module, run.learning_rate_factors, matrices),
                optimizer=optimizer_factory(run.optim, _update_device(ds_config, world.device)),
                config=_with_defaults(ds_config),
            )
        self._gate = patch_optimizer(self._zero, self.stage, parts_whole)
        self.state = ShardedState(self._zero, self.stage)
        if matrices:
            dtype = torch.bfloat16 if ds_config["bf16"]["enabled"] else torch.float32
            groups = {
                name: self._experts.edp_group if is_expert(each) else None for name, each in module.named_parameters()
            }
            self._zero.optimizer.find_matrices(
                self.state.masters(), self.state.pieces(module), matrices, groups, dtype, world
            )

    @staticmethod
    def check(run: RunConfig, ds_config: dict[str, Any], device: torch.device) -> None:
        """Raise ConfigError where an engine of this run cannot be made in this environment. No communication."""
        check_version()
        check_dispatcher(run)
        optimizer_factory(run.optim, _update_device(ds_config, device))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward through the engine."""
        return self._engine(*args, **kwargs)

    def train(self, mode: bool = True) -> None:
        """Set the module to training or evaluation mode."""
        self._engine.train(mode)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradient of `loss`, the only backward of this optimizer step.

        Communicates: gradients are averaged over the data-parallel ranks.
        """
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float, admit: Admit) -> Update:
        """Clip and update with learning rate `lr` where the gradient is finite and `admit(norm)`; clear gradients.

        `optim.lr_scale` multiplies `lr`. The norm is the one before clipping, over all groups and the same on every
        rank, so that all ranks decide alike. Communicates.
        """
        set_learning_rate(self._zero.param_groups, lr)
        norm = self._gate.take(self._engine.step, admit)
        return Update(norm, bool(self._engine.was_step_applied()))

    def check_replicas(self, step: int) -> int:
        """Compare the ranks' copies after an update: see `replicas`. Communicates; raises TrainingError."""
        return check_replicas(self.module, self._zero.optimizer, step, self.world)

    @contextmanager
    def masters_replaced(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Within the context the masters and `values` hold each other's numbers, afterwards their own, bit for bit.

        No communication, and no second set of masters: they are exchanged a few megabytes at a time. The weights of the
        forward do not change: this is for `full_weights`, not for running the module.
        """
        masters = [part.data for part in self.state.masters()]
        _exchange(masters, values)
        try:
            yield
        finally:
            _exchange(masters, values)

    def full_weights(
        self, module: nn.Module, everywhere: bool = False, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Return masters in `dtype`, and buffers, of `module` (the wrapped one or a part), whole, on their device.

        Of frozen parameters, which have no master, the weights of the forward (under bf16 rounded), as float32.
        Filled on rank 0 or, for evaluation, `everywhere`; empty on other ranks. Communicates one parameter at a time.
        Checkpoints do not use it: see sharpmoe.checkpoint.weights.
        """
        keep = everywhere or self.world.is_main
        state: dict[str, Tensor] = {}
        for name, parameter in module.named_parameters():
            whole = safe_get_full_fp32_param(parameter) if parameter.requires_grad else _whole_frozen(parameter)
            if is_expert(parameter):
                whole = gather_experts(whole, self._experts)
            if keep:
                state[name] = whole.detach().to(dtype, copy=True)
        if keep:
            state.update({name: buffer.detach().clone() for name, buffer in module.named_buffers()})
        return state

    def with_frozen(self, module: nn.Module, shards: Sequence[Tensor]) -> tuple[list[Tensor], list[Piece]]:
        """Return `shards` (the masters or values like them), beside this rank's parts of what `module` does not train.

        With them, where the elements of the parameters are; each is on one rank. No communication, and no copies.
        """
        parts, pieces = self.state.frozen(module, self._experts.edp_group)
        moved = [piece._replace(part=piece.part + len(shards)) for piece in pieces]
        return [*shards, *parts], [*self.state.pieces(module), *moved]


def _whole_frozen(parameter: nn.Parameter) -> Tensor:
    """Return a frozen parameter, whole, float32; of experts this rank's only. Communicates under ZeRO-3."""
    partitioned = [parameter] if hasattr(parameter, "ds_id") else []
    with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
        return parameter.detach().float().clone()


def _update_device(ds_config: dict[str, Any], device: torch.device) -> torch.device:
    """Return where the optimizer finds its partitions."""
    return torch.device("cpu") if ZeroSettings.of(ds_config).host_optimizer else device


def _with_defaults(ds_config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy in which torch's optimizer may step offloaded partitions and bf16 gradients add up in float32."""
    config = {"zero_force_ds_cpu_optimizer": False} | copy.deepcopy(ds_config)
    if config["bf16"]["enabled"]:
        config["data_types"] = {"grad_accum_dtype": "fp32"} | config.get("data_types", {})
    return config


def _exchange(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    """Exchange the numbers of flat tensors in place. All memory is taken before any number moves, so none is lost."""
    size = min(_CHUNK, max((len(part) for part in first), default=0))
    spares = [part.new_empty(size) for part in first[:1]]
    for one, other in zip(first, second, strict=True):
        for ours, theirs in zip(one.split(_CHUNK), other.split(_CHUNK), strict=True):
            spare = spares[0][: len(ours)]
            spare.copy_(ours)
            ours.copy_(theirs)
            theirs.copy_(spare)
