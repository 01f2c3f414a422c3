"""The inner names of DeepSpeed that sharpmoe.parallel leans on. An upgrade that moves one fails here, by name."""

import inspect
from types import ModuleType
from typing import Any

import deepspeed
import pytest
from deepspeed.checkpoint import autoep_affine, constants
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import partition_parameters, stage3, stage_1_and_2
from deepspeed.utils import groups

WHERE = "docs/design/0006-expert-parallelism.md says what leans on it"
STAGE3 = stage3.DeepSpeedZeroOptimizer_Stage3
STAGE2 = stage_1_and_2.DeepSpeedZeroOptimizer


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (groups, "_create_expert_and_data_parallel"),
        (groups, "_get_expert_parallel_group"),
        (groups, "_get_expert_data_parallel_group"),
        (autoep_affine, "legacy_uniform_autoep_placement_descriptor"),
        (autoep_affine, "autoep_placement_to_affine_map"),
        (autoep_affine, "autoep_experts_for_rank"),
        (constants, "DS_AUTOEP_UC_META"),
        (AutoEPMoELayer, "set_deepspeed_parallelism"),
        (DeepSpeedEngine, "_validate_zero3_moe_compatibility"),
        (DeepSpeedEngine, "_resolve_zero3_param_placement"),
        (DeepSpeedEngine, "set_gradient_accumulation_boundary"),
        (DeepSpeedEngine, "was_step_applied"),
        (deepspeed.zero.Init, "_convert_to_zero_parameters"),
        (STAGE3, "create_reduce_and_remove_grad_hooks"),
        (STAGE3, "checkpoint_event_prologue"),
        (STAGE3, "checkpoint_event_epilogue"),
        (STAGE3, "_reassign_or_swap_out_partitioned_parameters"),
        (STAGE3, "_gradient_averaging_world_size"),
        (STAGE3, "get_grad_norm_direct"),
        (STAGE3, "_prepare_fp32_grad_for_sub_group"),
        (STAGE3, "unscale_and_clip_grads"),
        (STAGE2, "update_lp_params"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_name_is_there(owner: Any, name: str) -> None:
    place = owner.__name__ if isinstance(owner, ModuleType) else owner.__qualname__
    assert hasattr(owner, name), f"DeepSpeed {deepspeed.__version__} has no {place}.{name}; {WHERE}"


@pytest.mark.parametrize(
    ("owner", "words"),
    [
        (DeepSpeedEngine._resolve_zero3_param_placement, ("ds_zero_placement_family", "autoep_expert")),
        (DeepSpeedEngine._resolve_zero3_param_placement, ("ds_zero_partition_group_name",)),
        (DeepSpeedEngine._validate_zero3_moe_compatibility, ("AutoEPMoELayer",)),
        (partition_parameters.Init._convert_to_deepspeed_param, ("ds_zero_partition_process_group",)),
        (partition_parameters.Init._convert_to_deepspeed_param, ("params_by_group",)),  # parts may mix groups
        (STAGE3.__init__, ("fp32_partitioned_groups_flat", "_leaf_module_hooks", "_grad_acc_hooks")),
        (STAGE3, ("grad_position", "get_param_id")),
        (STAGE3, ("self._prepare_fp32_grad_for_sub_group(", "self.unscale_and_clip_grads(", "averaged_gradients")),
        (STAGE3, ("self.get_grad_norm_direct(", "grad_partitions_flat_buffer.narrow(")),
        (STAGE2, ("single_partition_of_fp32_groups", "real_dp_process_group")),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, tuple) else "",
)
def test_a_place_still_speaks_of_what_is_used(owner: Any, words: tuple[str, ...]) -> None:
    source = inspect.getsource(owner)
    for word in words:
        assert word in source, f"DeepSpeed {deepspeed.__version__}: {owner.__qualname__} knows no {word}; {WHERE}"


def test_nothing_of_the_layer_itself_is_called() -> None:
    """The engine asks an AutoEPMoELayer for these attributes; more of them would have to be set."""
    used = ("num_experts", "num_local_experts", "ep_group_name", "ep_rank", "expert_placement_descriptor", "experts")
    source = inspect.getsource(DeepSpeedEngine)
    assert all(f"module.{name}" in source for name in used), f"{WHERE}"
