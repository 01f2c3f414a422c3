"""The inner names of DeepSpeed that sharpmoe.parallel relies on, where they are used, and that they still exist."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import deepspeed
import pytest
from deepspeed.checkpoint import autoep_affine, constants
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import partition_parameters, stage3, stage_1_and_2
from deepspeed.utils import groups

from sharpmoe.errors import ConfigError
from sharpmoe.parallel.zero import patches

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("sharpmoe", "data_pipeline", "launcher")
# Files that may use inner names of DeepSpeed; the first one alone may replace or set anything in it.
PATCHES = "sharpmoe/parallel/zero/patches.py"
INSIDE = ("sharpmoe/parallel/zero/", "sharpmoe/parallel/experts/groups.py")
# Attributes of DeepSpeed's optimizers and of the parameters that it manages, by which inner use is recognised.
INNER_NAMES = {
    *("averaged_gradients", "clip_grad", "fp16_groups", "fp32_partitioned_groups_flat", "get_param_id"),
    *("grad_position", "single_partition_of_fp32_groups", "update_lp_params", "unscale_and_clip_grads"),
    *("checkpoint_event_prologue", "checkpoint_event_epilogue", "create_reduce_and_remove_grad_hooks"),
    *(
        "get_grad_norm_direct",
        "check_grad_overflow",
        "scaled_global_norm",
        "lp_fragment_address",
        "hp_fragment_address",
    ),
    *("set_gradient_accumulation_boundary", "was_step_applied", "bf16_groups", "real_dp_process_group"),
}

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
        (STAGE2, ("self.average_tensor(", "self.extra_large_param_to_reduce[comm_dtype] = param", "reduction_stream")),
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


SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TABLE_OF_OTHERS = ROOT / "sharpmoe" / "config_names.py"  # how other trainers call their settings: words, not attributes
OUTSIDE = [
    path for path in SOURCES if path != TABLE_OF_OTHERS and not path.relative_to(ROOT).as_posix().startswith(INSIDE)
]


def from_deepspeed(tree: ast.AST) -> set[str]:
    """Names that a module binds by importing from DeepSpeed."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deepspeed":
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names if "deepspeed" in alias.name}
    return names


def root_of(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def inner_uses(text: str) -> Iterator[str]:
    """Inner names of DeepSpeed in a source: known ones, ds_*, and private attributes of what is imported from it."""
    tree = ast.parse(text)
    imported = from_deepspeed(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            known = node.attr in INNER_NAMES or re.match(r"ds_(?!config$)", node.attr)  # ds_config is a field of ours
            if known or (is_private(node.attr) and root_of(node.value) in imported):
                yield f"line {node.lineno}: {node.attr}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deepspeed":
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from (f"line {node.lineno}: {part}" for part in parts if is_private(part))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in INNER_NAMES:
            yield f"line {node.lineno}: {node.value!r}"


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_inner_names_are_used_in_two_places_only(path: Path) -> None:
    found = list(inner_uses(path.read_text(encoding="utf-8")))
    assert found == [], f"{path}: inner names of DeepSpeed belong to {' and '.join(INSIDE)}"


@pytest.mark.parametrize("path", [ROOT / "sharpmoe/parallel/zero" / name for name in ("patches.py", "partitions.py")])
def test_inner_names_are_recognised(path: Path) -> None:
    assert len(list(inner_uses(path.read_text(encoding="utf-8")))) > 5
    assert list(inner_uses("import deepspeed\ndeepspeed.zero._x()")) == ["line 2: _x"]
    assert list(inner_uses("from deepspeed.utils import groups as g\ng._y = 1")) == ["line 2: _y"]


def assigned(text: str) -> Iterator[str]:
    """Assignments to parts of what is imported from DeepSpeed or is called zero, optimizer or _engine."""
    tree = ast.parse(text)
    foreign = from_deepspeed(tree)
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else []
        targets += [node.target] if isinstance(node, ast.AugAssign | ast.AnnAssign) else []
        for target in targets:
            if isinstance(target, ast.Attribute | ast.Subscript) and is_foreign(target.value, foreign):
                yield ast.unparse(target)
        is_call = isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr")
        if is_call and is_foreign(node.args[0], foreign):
            yield ast.unparse(node)


def is_foreign(node: ast.expr, imported: set[str]) -> bool:
    text = ast.unparse(node)
    return root_of(node) in imported or bool(re.match(r"(self\.)?(_engine|_?zero|_?optimizer)\b", text))


# A learning rate is set in torch's own `param_groups`, a step count in torch's own state: no change of DeepSpeed.
ALLOWED = {
    "sharpmoe/parallel/ranks/launch.py": ["deepspeed.ops.__compatible_ops__['deepspeed_shm_comm']"],
    "sharpmoe/parallel/zero/partitions.py": ["optimizer.param_groups", "optimizer.param_groups"],
}


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if path != ROOT / PATCHES], ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_deepspeed_is_changed_in_one_file_only(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    assert list(assigned(path.read_text(encoding="utf-8"))) == ALLOWED.get(name, []), f"{name}: belongs to {PATCHES}"


def test_changes_are_recognised() -> None:
    assert len(list(assigned((ROOT / PATCHES).read_text(encoding="utf-8")))) >= 6
    assert list(assigned("import deepspeed\ndeepspeed.comm.x = 1")) == ["deepspeed.comm.x"]


def test_another_version_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    patches.check_version()
    monkeypatch.setattr(deepspeed, "__version__", "0.20.0+cu13")
    with pytest.raises(
        ConfigError, match=r"^DeepSpeed 0\.20\.0 is installed, .*0\.19\.8; install deepspeed==0\.19\.8$"
    ):
        patches.check_version()
