"""The only door to DeepSpeed's engine: run configuration + engine JSON + module -> Engine.

DeepSpeed owns partitioning, gradient reduction, clipping and the optimizer step. Everything that touches its inner
names (pinned: 0.19.8) is in this file, so that an upgrade is a change of one file.
"""

import copy
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.z3_leaf_module import set_z3_leaf_module
from torch import Tensor, nn

from sharpmoe.checkpoint.state import StateReader, fill_partitions
from sharpmoe.config import OptimConfig, RunConfig
from sharpmoe.errors import CheckpointError, ConfigError
from sharpmoe.parallel.experts.dispatch import make_dispatcher
from sharpmoe.parallel.experts.groups import expert_groups
from sharpmoe.parallel.experts.pool import make_pool
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.parallel.zero.build import Values, is_planned, materialise, whole_parts
from sharpmoe.parallel.zero.gradients import Admit, NormGate, Update
from sharpmoe.parallel.zero.partitions import Piece, owned_pieces
from sharpmoe.parallel.zero.patches import spare_copies
from sharpmoe.parallel.zero.placement import gather_experts, is_expert, optimizer_groups, place_experts
from sharpmoe.parallel.zero.replicas import check_replicas

OptimizerFactory = Callable[[Any], torch.optim.Optimizer]

MASTER, EMA = "master", "ema"  # kinds of partitions, beside those that the optimizer names itself


class Engine:
    """A module under ZeRO-2 or ZeRO-3. Call it like the module; `backward` and `step` as the train step needs them."""

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
        Communicates: rank 0's weights go to all. Raises ConfigError where the optimizer cannot be had.
        """
        self.world = world
        self.stage = int(ds_config["zero_optimization"]["stage"])
        self.module = module
        self.num_parameters = sum(p.numel() for p in module.parameters())
        self._experts = expert_groups(run.parallel.ep_size, world)
        place_experts(module, self._experts, make_dispatcher(run, self._experts), make_pool(run, world))
        if is_planned(module):
            assert values is not None
            materialise(module, values, ds_config, world)
        hooked_whole = _mark_whole_modules(module) if self.stage == 3 else []
        buffers = {name: b.detach().clone() for name, b in module.named_buffers() if b.dtype == torch.float32}
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module,
            model_parameters=optimizer_groups(module),
            optimizer=optimizer_factory(run.optim, world.device),
            config=_with_defaults(ds_config),
        )
        if hooked_whole:
            _reduce_per_parameter(self._optimizer)
        self._gate = NormGate(self._optimizer, self.stage)
        if self.stage == 3:
            spare_copies(self._optimizer, lambda: self._gate.norm)
        _restore_buffers(module, buffers)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward through the engine."""
        return self._engine(*args, **kwargs)

    def train(self, mode: bool = True) -> None:
        """Training or evaluation mode of the module."""
        self._engine.train(mode)

    def backward(self, loss: Tensor) -> None:
        """Take the gradient of `loss`, the only one of this optimizer step.

        Communicates: gradients are averaged over the data-parallel ranks.
        """
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float, admit: Admit) -> Update:
        """Clip and update with learning rate `lr` where the gradient is finite and `admit(norm)`; clear gradients.

        The norm is the one before clipping, the same on every rank, so that all decide alike. Communicates.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        norm = self._gate.take(self._engine.step, admit)
        return Update(norm, bool(self._engine.was_step_applied()))

    def check_replicas(self, step: int) -> int:
        """Compare what ranks hold in common after an update; see `replicas`. Communicates; raises TrainingError."""
        return check_replicas(self.module, self._optimizer.optimizer, step, self.world)

    def master_partitions(self) -> list[Tensor]:
        """This rank's float32 master weights: flat tensors, no two ranks share an element."""
        if self.stage == 3:
            return list(self._optimizer.fp32_partitioned_groups_flat)
        return list(self._optimizer.single_partition_of_fp32_groups)

    @contextmanager
    def masters_replaced(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the masters hold `values`; afterwards their own again, bit for bit. No communication.

        The weights of the forward do not change: this is for `full_weights`, not for running the module.
        """
        masters = [part.data for part in self.master_partitions()]
        own = [part.clone() for part in masters]
        _copy_all(masters, values)
        try:
            yield
        finally:
            _copy_all(masters, own)

    def full_weights(self, module: nn.Module, everywhere: bool = False) -> dict[str, Tensor]:
        """Float32 masters and buffers of `module` (the wrapped one or a part of it), whole, on their device.

        Filled on rank 0 or, for evaluation, `everywhere` (4 bytes per parameter); empty elsewhere. Communicates: one
        parameter at a time. Checkpoints go another way (sharpmoe.checkpoint.weights).
        """
        keep = everywhere or self.world.is_main
        state: dict[str, Tensor] = {}
        for name, parameter in module.named_parameters():
            whole = safe_get_full_fp32_param(parameter)
            if is_expert(parameter):
                whole = gather_experts(whole, self._experts)
            if keep:
                state[name] = whole.detach().clone()
        if keep:
            state.update({name: buffer.detach().clone() for name, buffer in module.named_buffers()})
        return state

    def owned_pieces(self, module: nn.Module) -> list[Piece]:
        """Where the parameters of `module` (the wrapped one or a part of it) lie in this rank's partitions."""
        return owned_pieces(module, self._optimizer, self.stage)

    def partitions(self) -> dict[str, list[Tensor]]:
        """This rank's flat float32 partitions: the masters and each tensor of the optimizer beside them."""
        masters = self.master_partitions()
        found = {MASTER: masters}
        for index, master in enumerate(masters):
            for kind, value in self._optimizer.optimizer.state[master].items():
                if torch.is_tensor(value) and value.shape == master.shape:
                    found.setdefault(kind, [torch.empty(0)] * len(masters))[index] = value
        return found

    def facts(self) -> dict[str, float]:
        """What of the optimizer is one number for all: Adam's step count."""
        for state in self._optimizer.optimizer.state.values():
            if "step" in state:
                return {"step": float(state["step"])}
        return {}

    @torch.no_grad()
    def restore(self, module: nn.Module, reader: StateReader) -> None:
        """Fill this rank's part from a checkpoint of any layout, and the weights of the forward from it.

        Every rank calls it; communicates. Raises CheckpointError, before the first collective, where a part is missing.
        """
        if reader.kinds - {MASTER, EMA}:  # else it was saved before the first step
            make_states(self._optimizer.optimizer, self.master_partitions())
        partitions = self.partitions()
        if reader.kinds - {EMA} != partitions.keys():
            there, here = (", ".join(sorted(kinds)) for kinds in (reader.kinds - {EMA}, partitions.keys()))
            raise CheckpointError(f"the checkpoint holds {there}, the run's optimizer keeps {here}; set optim.name")
        fill_partitions(partitions, self.owned_pieces(module), reader)
        for state in self._optimizer.optimizer.state.values():
            if "step" in state:
                step = reader.facts["step"]
                state["step"] = torch.full_like(state["step"], step) if torch.is_tensor(state["step"]) else int(step)

    def refresh(self) -> None:
        """Make the weights of the forward from the masters. Every rank calls it; communicates."""
        if self.stage == 2:
            self._optimizer.update_lp_params()
            return
        self._optimizer.checkpoint_event_prologue()
        for group in range(len(self.master_partitions())):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
        self._optimizer.checkpoint_event_epilogue()


def make_states(optimizer: torch.optim.Optimizer, masters: Sequence[Tensor]) -> None:
    """Have an optimizer make the states that it makes at its first step, by a step of length zero."""
    groups = optimizer.param_groups
    for master in masters:
        master.grad = torch.zeros_like(master)
    optimizer.param_groups = [{**groups[0], "params": list(masters), "lr": 0.0}]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups
        for master in masters:
            master.grad = None


def _mark_whole_modules(module: nn.Module) -> list[nn.Module]:
    """Have ZeRO-3 gather embedders, blocks and the final layer each as a whole instead of linear by linear.

    Hooks cost the host about a quarter of a millisecond per module and call, and a rollout makes T calls.
    """
    whole = [part for _, part in whole_parts(module)]
    for part in whole:
        set_z3_leaf_module(part, True)
    return whole


def _reduce_per_parameter(optimizer: Any) -> None:
    """Reduce each gradient when it is complete, once per backward, also in modules that are gathered whole.

    DeepSpeed reduces a leaf module's gradients at each of its calls, which is wrong for T calls in one graph.
    """
    for hook in [*optimizer._leaf_module_hooks, *optimizer._grad_acc_hooks]:
        hook.remove()
    optimizer._leaf_module_hooks.clear()
    optimizer._grad_acc_hooks.clear()
    for group in optimizer.fp16_groups:
        for parameter in group:
            if hasattr(parameter, "ds_z3_leaf_module"):
                del parameter.ds_z3_leaf_module
    optimizer.create_reduce_and_remove_grad_hooks()


def _with_defaults(ds_config: dict[str, Any]) -> dict[str, Any]:
    """A copy in which torch's own optimizer may step offloaded partitions, and half precision adds up in float32."""
    config = {"zero_force_ds_cpu_optimizer": False} | copy.deepcopy(ds_config)
    if config["bf16"]["enabled"]:
        config["data_types"] = {"grad_accum_dtype": "fp32"} | config.get("data_types", {})
    return config


def _copy_all(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def _restore_buffers(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Float32 buffers (thresholds, positions) keep their precision under bf16."""
    for name, buffer in module.named_buffers():
        if name in buffers and buffer.dtype != torch.float32:
            buffer.data = buffers[name].to(buffer.device)


def optimizer_factory(optim: OptimConfig, device: torch.device) -> OptimizerFactory:
    """The optimizer as a function of the parameters DeepSpeed gives it. `auto` compiles nothing.

    Raises ConfigError where an implementation is asked for that this machine cannot run.
    """
    if optim.name == "sgd":
        return lambda params: torch.optim.SGD(params, lr=optim.lr, weight_decay=optim.weight_decay)
    if optim.impl in ("auto", "torch"):
        return partial(_torch_adamw, optim=optim)
    settings = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    if optim.impl == "apex":
        return partial(_apex_fused_adam(device), adam_w_mode=True, **settings)
    return _deepspeed_adam(device, settings)


def _torch_adamw(params: Any, optim: OptimConfig) -> torch.optim.Optimizer:
    """Torch's AdamW, fused: one pass over each flat partition, on CUDA and CPU, as fast as those that need a build."""
    return torch.optim.AdamW(params, optim.lr, optim.betas, optim.eps, weight_decay=optim.weight_decay, fused=True)


def _apex_fused_adam(device: torch.device) -> Any:
    try:
        import amp_C  # noqa: F401, PLC0415 (optional package)
        from apex.optimizers import FusedAdam  # noqa: PLC0415
    except ImportError:
        raise ConfigError(
            "optim.impl: apex is not NVIDIA's here (PyPI's 'apex' is an unrelated package); build it from "
            "github.com/NVIDIA/apex with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or use optim.impl: auto"
        ) from None
    if device.type != "cuda":
        raise ConfigError("optim.impl: apex needs a CUDA device; use optim.impl: auto")
    return FusedAdam


def _deepspeed_adam(device: torch.device, settings: dict[str, Any]) -> OptimizerFactory:
    """DeepSpeed's own Adam: it builds its kernel at first use, about a minute."""
    for tool in (os.environ.get("CXX", "c++"), "ninja"):
        if shutil.which(tool) is None:
            raise ConfigError(f"optim.impl: deepspeed builds its kernel with {tool}, not found; use optim.impl: auto")
    if device.type == "cuda":
        return partial(FusedAdam, adam_w_mode=True, **settings)
    return partial(DeepSpeedCPUAdam, adamw_mode=True, **settings)
