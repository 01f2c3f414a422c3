"""The only door to DeepSpeed's engine: run configuration + engine JSON + module -> Engine.

DeepSpeed owns partitioning, gradient reduction, clipping and the optimizer step. Everything that touches its inner names
(pinned: 0.19.8) is in this file, so that an upgrade is a change of one file.
"""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn

from sharpmoe.config import OptimConfig, RunConfig
from sharpmoe.errors import CheckpointError, ConfigError, TrainingError
from sharpmoe.parallel.launch import World

OptimizerFactory = Callable[[Any], torch.optim.Optimizer]

# What an optimizer shard of DeepSpeed 0.19.8 holds beside tensors; everything else is refused when it is read.
_SAFE_CLASSES = [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]
_TAG = "engine"


class Engine:
    """A module under ZeRO-2 or ZeRO-3. Call it like the module; `backward` and `step` as the train step needs them."""

    def __init__(self, module: nn.Module, run: RunConfig, ds_config: dict[str, Any], world: World) -> None:
        """Wrap `module` (moved to the device, partitioned in place). Communicates: parameters are broadcast from rank 0.

        ds_config is complete (see sharpmoe.parallel.ds_config): batch triple, clipping, precision and stage are set.
        Raises ConfigError where the optimizer cannot be had.
        """
        self.world = world
        self.stage = int(ds_config["zero_optimization"]["stage"])
        self.module = module
        self.num_parameters = sum(p.numel() for p in module.parameters())
        buffers = {name: b.detach().clone() for name, b in module.named_buffers() if b.dtype == torch.float32}
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer_factory(run.optim, world.device), config=copy.deepcopy(ds_config)
        )
        self._engine.checkpoint_engine = _SafeCheckpointEngine()
        _restore_buffers(module, buffers)
        for message in regather_warnings(ds_config, self.num_parameters):
            if world.is_main:
                warnings.warn(message, stacklevel=2)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward through the engine."""
        return self._engine(*args, **kwargs)

    def train(self, mode: bool = True) -> None:
        """Training or evaluation mode of the module."""
        self._engine.train(mode)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradients of `loss`, divided by the number of micro-batches. `last`: of this optimizer step.

        Communicates: gradients are averaged over the data-parallel ranks (ZeRO-3 after each call, ZeRO-2 likewise).
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def step(self, lr: float) -> float:
        """Clip, update with learning rate `lr`, clear gradients; return the gradient norm before clipping.

        The norm is the same on every rank. Raises TrainingError where it is not finite; the weights are then unchanged.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        if not self._engine.was_step_applied():
            raise TrainingError("gradient norm is not finite; lower optim.lr, or train with precision fp32")
        return float(self._engine.get_global_grad_norm())

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

        Filled on rank 0 or, for evaluation, `everywhere`; empty elsewhere. Communicates: one parameter at a time.
        """
        keep = everywhere or self.world.is_main
        state: dict[str, Tensor] = {}
        for name, parameter in module.named_parameters():
            whole = safe_get_full_fp32_param(parameter)
            if keep:
                state[name] = whole.detach().clone()
        if keep:
            state.update({name: buffer.detach().clone() for name, buffer in module.named_buffers()})
        return state

    def save(self, folder: Path) -> None:
        """Write this engine's shards under `folder`. Every rank calls it. Raises CheckpointError on every rank."""
        writer = self._engine.checkpoint_engine
        writer.failure = None
        self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)
        if writer.failure is not None:
            raise CheckpointError(f"{folder}: cannot be written: {writer.failure}; free space or change output")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote for the same module, stage and world size. Every rank calls it."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=_TAG)
        if path is None:
            raise CheckpointError(f"{folder}: holds no engine state; choose another with --checkpoint.resume")
        for state in self._optimizer.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()  # loaders may share one counter between sub-groups


class _SafeCheckpointEngine(TorchCheckpointEngine):  # type: ignore[misc]
    """torch.save / torch.load that read tensors and named classes only, and keep ranks in step when a disk is full."""

    failure: str | None = None

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file. A failure is recorded, not raised: the other ranks are on their way to a barrier."""
        try:
            torch.save(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file without executing anything in it."""
        try:
            with torch.serialization.safe_globals(_SAFE_CLASSES):
                return torch.load(path, map_location=map_location, weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{path}: cannot be read ({reason}); resume from another checkpoint") from error


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
    settings = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    if optim.impl in ("auto", "torch"):
        # One fused kernel per flat partition on CUDA; on the host the plain loop is the same and needs no build.
        return lambda params: torch.optim.AdamW(params, fused=device.type == "cuda", **settings)
    if optim.impl == "apex":
        fused = _apex_fused_adam(device)
        return lambda params: fused(params, adam_w_mode=True, **settings)
    return _deepspeed_adam(device, settings)


def _apex_fused_adam(device: torch.device) -> Any:
    try:
        import amp_C  # noqa: F401
        from apex.optimizers import FusedAdam
    except ImportError:
        raise ConfigError(
            "optim.impl: apex is not NVIDIA's here (PyPI's 'apex' is an unrelated package); build it from "
            "github.com/NVIDIA/apex with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or use optim.impl: auto"
        ) from None
    if device.type != "cuda":
        raise ConfigError("optim.impl: apex needs a CUDA device; use optim.impl: auto")
    return FusedAdam


def _deepspeed_adam(device: torch.device, settings: dict[str, Any]) -> OptimizerFactory:
    """DeepSpeed's own Adam: it builds its kernel with a compiler at first use (about a minute)."""
    if device.type == "cuda":
        from deepspeed.ops.adam import FusedAdam

        return lambda params: FusedAdam(params, adam_w_mode=True, **settings)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return lambda params: DeepSpeedCPUAdam(params, adamw_mode=True, **settings)


def regather_warnings(ds_config: dict[str, Any], num_parameters: int) -> list[str]:
    """Say which ZeRO-3 limits make a rollout gather the model again at every step instead of once."""
    zero = ds_config["zero_optimization"]
    if int(zero["stage"]) != 3:
        return []
    return [
        f"zero_optimization.{key} is {zero[key]}, below the model's {num_parameters} parameters: each rollout step "
        f"gathers the model again; set it to at least {num_parameters}"
        for key in ("stage3_max_reuse_distance", "stage3_max_live_parameters")
        if key in zero and float(zero[key]) < num_parameters
    ]
