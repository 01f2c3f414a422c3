"""Read the DeepSpeed JSON: check every key, resolve "auto", fill in the keys that the run file owns. No communication.

DeepSpeed accepts an unknown top-level key and uses its defaults: `zero_optimisation` means stage 0, and a key that the
run file owns too could contradict it. So nothing reaches `deepspeed.initialize` that is not named here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from pydantic import ValidationError

from sharpmoe.config import RunConfig
from sharpmoe.config_io import batch_arithmetic, nearest
from sharpmoe.errors import ConfigError
from sharpmoe.shipped_files import find_shipped

_AUTO = "auto"

# Keys of the JSON that belong to the run file, and the run file's key for each.
_OWNED_BY_RUN: dict[str, str] = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim.name, optim.impl, optim.lr, ...",
    "scheduler": "optim.schedule, optim.warmup_steps",
    "steps_per_print": "log.every",
    "fp16": "train.precision (fp32 | bf16)",
    "torch_autocast": "train.precision",
    "tensorboard": "log.trackers (each run writes TensorBoard files, every log.every steps)",
}

# Sections with keys below them -> how they are checked: a DeepSpeed model (its fields are the allowed keys), or a
# pinned list where DeepSpeed reads a plain dict. tests/contract pins both against the installed DeepSpeed.
_SECTIONS: dict[str, type[DeepSpeedConfigModel] | frozenset[str]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "comms_logger": CommsLoggerConfig,
    "compile": CompileConfig,
    "aio": frozenset(
        {"block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"}
    ),
    "data_types": frozenset({"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"}),
    "flops_profiler": frozenset(
        {"enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed", "output_file"}
    ),
    "timers": frozenset({"throughput"}),
}
_NESTED_MODELS: dict[str, type[DeepSpeedConfigModel]] = {
    "offload_param": DeepSpeedZeroOffloadParamConfig,
    "offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "leaf_module": DeepSpeedZeroLeafModuleConfig,
}

_SCALARS: frozenset[str] = frozenset(
    {
        "communication_data_type",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "gradient_predivide_factor",
        "log_level",
        "memory_breakdown",
        "prescale_gradients",
        "wall_clock_breakdown",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
    }
)

# Keys of older DeepSpeed versions.
_REMOVED: tuple[str, ...] = (
    "amp",
    "compression_training",
    "curriculum_learning",
    "eigenvalue",
    "elasticity",
    "graph_harvesting",
    "nebula",
    "progressive_layer_drop",
    "quantize_training",
    "sparse_attention",
    "sparse_gradients",
)

# Known to DeepSpeed, now or before, not offered here, and why.
_REFUSED: dict[str, str] = dict.fromkeys(_REMOVED, "DeepSpeed 0.19 has removed it") | {
    "activation_checkpointing": "set rollout.schedule: checkpoint in the run file",
    "autotuning": "not supported",
    "bfloat16": "write bf16",
    "checkpoint": "checkpoint.* in the run file says how and where to save",
    "comet": "not supported; log.trackers in the run file names tensorboard, wandb, trackio or mlflow",
    "csv_monitor": "runs/<name>/log.jsonl holds the same",
    "data_efficiency": "data_pipeline orders and batches the samples",
    "dataloader_drop_last": "data_pipeline orders and batches the samples",
    "datastates_ckpt": "not supported",
    "expert_parallel": "parallel.ep_size distributes the experts",
    "gradient_allreduce_op": "losses are means over the global batch",
    "hybrid_engine": "not supported",
    "managed_gradient_accumulation": "the rollout sets the accumulation boundary itself",
    "pipeline": "not supported",
    "seq_parallel_communication_data_type": "not supported",
    "sequence_parallel_size": "not supported",
    "tensor_parallel": "not supported",
    "use_data_before_expert_parallelism": "consecutive ranks share the experts (parallel.ep_size)",
    "vocabulary_size": "a diffusion model has no vocabulary",
    "wandb": "set log.trackers: [wandb] in the run file",
    "weight_quantization": "not supported",
}

# Keys of a section that DeepSpeed knows and that conflict with experts over ranks, with checkpoints or with exactness:
# the value that is allowed, and why no other is.
_ONLY_ZERO: dict[str, tuple[Any, str]] = {
    "zero_hpz_partition_size": (1, "DeepSpeed cannot place experts under it"),
    "zero_quantized_gradients": (False, "DeepSpeed cannot place experts under it"),
    "mics_shard_size": (-1, "DeepSpeed cannot place experts under it"),
    "compute_grad_norm": (True, "clipping and the guard need the norm"),
    "zenflow": (None, "a second optimizer would hold states that checkpoints do not read"),
    "reduce_scatter": (True, "DeepSpeed's ZeRO-2 needs it for experts"),
}
_ONLY: dict[str, dict[str, tuple[Any, str]]] = {
    "zero_optimization": _ONLY_ZERO,
    "data_types": {"buffer_dtype": (None, "thresholds, biases and positions stay float32")},
}

# "auto" inside zero_optimization, by the rules of Hugging Face's integration with the model's width for hidden_size.
_AUTO_BY_WIDTH: dict[str, Callable[[int], int]] = {
    "reduce_bucket_size": lambda width: width * width,
    "stage3_prefetch_bucket_size": lambda width: int(0.9 * width * width),
    "stage3_param_persistence_threshold": lambda width: 10 * width,
}


def resolve_ds_config(path: str | Path, run: RunConfig, world: int) -> dict[str, Any]:
    """Read a DeepSpeed JSON and fill in what the run file owns, for `world` data-parallel ranks.

    Pure: no communication and the same result on every rank, so that all ranks fail before the first collective.

    Returns:
        A JSON-serialisable dict for `deepspeed.initialize(config=...)`.

    Raises:
        ConfigError: one line; missing file, JSON syntax, unknown or foreign key, bad value, impossible batch.
    """
    path = Path(path)
    raw = _read_ds_json(path)
    _check_top_level(raw, path)
    engine = {key: value for key, value in raw.items() if key not in _OWNED_BY_RUN}
    for name in engine.keys() & _SECTIONS.keys():
        engine[name] = _check_section(name, engine[name], run, path)
    _check_stage(engine, path)
    _check_only(engine, path)
    return {"zero_allow_untested_optimizer": True} | engine | _from_run(engine, run, world)


def _read_ds_json(path: Path) -> dict[str, Any]:
    """Parse the file as strict JSON: an object, no key twice.

    Raises:
        ConfigError: the file is missing, is not JSON, or is not an object.
    """
    path = find_shipped(path)
    if path.is_dir():
        raise ConfigError(f"DeepSpeed file {path} is a folder, expected a JSON file; add a file name")
    if not path.is_file():
        others = sorted(file.name for file in path.parent.glob("*.json")) if path.parent.is_dir() else []
        raise ConfigError(f"DeepSpeed file {path} does not exist; {path.parent} holds {', '.join(others) or 'no JSON'}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = {key for key, _ in pairs if sum(other == key for other, _ in pairs) > 1}
        if twice:
            raise ConfigError(f"{path}: key {sorted(twice)[0]} is given twice; keep one")
        return dict(pairs)

    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}; correct the syntax there") from None
    if not isinstance(data, dict):
        raise ConfigError(f'{path} holds a {type(data).__name__}, expected an object like {{"zero_optimization": ...}}')
    return data


def _check_top_level(raw: Mapping[str, Any], path: Path) -> None:
    allowed = _SCALARS | _SECTIONS.keys()
    for key, value in raw.items():
        if key in _OWNED_BY_RUN:
            _check_owned(key, value, path)
        elif key in _REFUSED:
            raise ConfigError(f"{path}: {key} cannot be set here: {_REFUSED[key]}; remove it")
        elif key not in allowed:
            hint = nearest(key, [*allowed, *_OWNED_BY_RUN]) or f"; allowed: {', '.join(sorted(allowed))}"
            raise ConfigError(f"{path}: unknown key {key}{hint}")
        elif value == _AUTO:
            raise ConfigError(f'{path}: {key} is "auto", which nothing resolves; write a value or remove the key')


def _check_owned(key: str, value: Any, path: Path) -> None:
    """Accept what does not contradict the run file: "auto", or an fp16 section that is off or "auto"."""
    silent = (
        value.get("enabled", False) in (_AUTO, False) if isinstance(value, dict) and key == "fp16" else value == _AUTO
    )
    if not silent:
        raise ConfigError(f"{path}: {key} belongs to the run file; remove it here and set {_OWNED_BY_RUN[key]} there")


def _check_section(name: str, section: Any, run: RunConfig, path: Path) -> dict[str, Any]:
    """Check one section's keys and values; return it with "auto" resolved."""
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: {name} is {section!r}, expected an object with keys like {_some_keys(name)}")
    kind = _SECTIONS[name]
    _check_names(name, section, kind if isinstance(kind, frozenset) else _field_names(kind), path)
    for key, model in _NESTED_MODELS.items():
        if name == "zero_optimization" and isinstance(section.get(key), dict):
            _check_names(f"{name}.{key}", section[key], _field_names(model), path)
    section = _resolve_auto(name, section, run, path)
    if not isinstance(kind, frozenset):
        _check_values(name, section, kind, path)
    return section


def _check_names(name: str, section: Mapping[str, Any], known: Iterable[str], path: Path) -> None:
    known = sorted(known)
    for key in section:
        if key not in known:
            hint = nearest(key, known) or f"; known here: {', '.join(known)}"
            raise ConfigError(f"{path}: unknown key {name}.{key}{hint}")


def _resolve_auto(name: str, section: Mapping[str, Any], run: RunConfig, path: Path) -> dict[str, Any]:
    resolved = dict(section)
    if name == "bf16" and resolved.pop("enabled", _AUTO) != _AUTO:
        raise ConfigError(f"{path}: bf16.enabled belongs to the run file; remove it here and set train.precision there")
    for key, value in section.items():
        if value != _AUTO or key not in resolved:
            continue
        rule = _AUTO_BY_WIDTH.get(key) if name == "zero_optimization" else None
        if rule is None:
            raise ConfigError(
                f'{path}: {name}.{key} is "auto", which nothing resolves; write a value or remove the key '
                f"(auto is understood for {', '.join(_AUTO_BY_WIDTH)})"
            )
        resolved[key] = rule(run.model.width)
    return resolved


def _check_values(name: str, section: Mapping[str, Any], kind: type[DeepSpeedConfigModel], path: Path) -> None:
    try:
        kind(**section)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in (name, *first["loc"]))
        raise ConfigError(f"{path}: {key} is {first['input']!r}: {first['msg']}; change it") from None


def _check_stage(engine: Mapping[str, Any], path: Path) -> None:
    stage = engine.get("zero_optimization", {}).get("stage")
    if stage not in (2, 3):
        given = "missing, which DeepSpeed takes for 0" if stage is None else stage
        raise ConfigError(
            f"{path}: zero_optimization.stage is {given}, allowed: 2 | 3 (EMA and checkpoints read ZeRO's shards); "
            "write 2 or 3"
        )


def _check_only(engine: Mapping[str, Any], path: Path) -> None:
    for name, only in _ONLY.items():
        section = engine.get(name, {})
        for key, (allowed, why) in only.items():
            if section.get(key, allowed) != allowed:
                raise ConfigError(f"{path}: {name}.{key} is {section[key]!r}, allowed: {allowed!r} ({why})")
    zero = engine["zero_optimization"]
    for key in ("offload_param", "offload_optimizer"):
        _check_offload(key, zero.get(key) or {}, int(zero["stage"]), path)


def _check_offload(key: str, section: Mapping[str, Any], stage: int, path: Path) -> None:
    """Raise ConfigError where DeepSpeed cannot offload so, does something else, or hides states from checkpoints."""
    where, device = f"{path}: zero_optimization.{key}", section.get("device", "none")
    if device == "nvme":
        raise ConfigError(
            f"{where}.device is 'nvme', allowed: 'cpu' | 'none' (EMA and checkpoints read ZeRO's partitions in memory)"
        )
    if device == "cpu" and key == "offload_param" and stage != 3:
        raise ConfigError(
            f"{where} is for stage 3 (stage {stage} keeps whole weights on every device); set stage to 3, or remove it"
        )
    for name, allowed in (("ratio", 1.0), ("super_offload", False)):
        if section.get(name, allowed) != allowed:
            raise ConfigError(
                f"{where}.{name} is {section[name]!r}, allowed: {allowed!r} (a second optimizer would hold states that "
                "checkpoints do not read); remove it"
            )


def _from_run(engine: Mapping[str, Any], run: RunConfig, world: int) -> dict[str, Any]:
    layout = batch_arithmetic(run, world)
    return {
        "train_batch_size": layout.global_batch,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": run.optim.clip_norm,
        "bf16": {**engine.get("bf16", {}), "enabled": run.train.precision == "bf16"},
    }


def _field_names(model: type[DeepSpeedConfigModel]) -> list[str]:
    """Return every spelling that a DeepSpeed model accepts: field names and their aliases."""
    fields = model.model_fields
    return [*fields, *(field.alias for field in fields.values() if field.alias)]


def _some_keys(name: str) -> str:
    kind = _SECTIONS[name]
    return ", ".join(sorted(kind if isinstance(kind, frozenset) else _field_names(kind))[:4])
