"""What of a resolved DeepSpeed configuration decides memory and traffic, with DeepSpeed's own defaults filled in."""

from dataclasses import dataclass
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class ZeroSettings:
    """ZeRO as a plan sees it; sizes of buckets and limits in elements, types in bytes per element."""

    stage: int
    reduce_bucket: int  # gradients that are reduced at once
    prefetch_bucket: int  # stage 3: parameters gathered ahead
    persistence: int  # stage 3: a parameter of at most so many elements stays whole on every rank
    max_live: int  # stage 3: no gathering ahead beyond so many gathered elements
    max_reuse: int  # stage 3: a parameter needed again within so many elements stays gathered
    sub_group: int  # stage 3: elements of a rank's part that one optimizer call updates
    contiguous: bool  # gradients are copied into one buffer before they are reduced
    double_buffer: bool  # stage 2 with overlap_comm: two such buffers
    reduce_scatter: bool  # stage 3: gradients are reduce-scattered, otherwise all-reduced
    whole_buckets: bool  # stage 2: a bucket is all-reduced, otherwise each part is reduced to its owner
    compute_bytes: int  # weights in forward and backward
    gradient_bytes: int  # accumulated gradients
    wire_bytes: int  # gradients on the wire
    host_optimizer: bool  # masters, EMA, optimizer states and gradients live in host memory
    host_weights: bool  # stage 3: a rank's part of the weights lives in host memory

    @classmethod
    def of(cls, ds_config: dict[str, Any]) -> "ZeroSettings":
        """Read the settings out of what `config.resolve_ds_config` returned. Pure."""
        zero = DeepSpeedZeroConfig(**ds_config["zero_optimization"])
        stage, is_half = int(zero.stage), ds_config["bf16"]["enabled"]
        compute = 2 if is_half else 4
        accumulated = ds_config.get("data_types", {}).get("grad_accum_dtype", "fp32")  # the engine's default
        return cls(
            stage=stage,
            reduce_bucket=int(zero.reduce_bucket_size),
            prefetch_bucket=int(zero.prefetch_bucket_size),
            persistence=int(zero.param_persistence_threshold),
            max_live=int(zero.max_live_parameters),
            max_reuse=int(zero.max_reuse_distance),
            sub_group=int(zero.sub_group_size),
            contiguous=zero.contiguous_gradients or (stage == 2 and _is_on_host(zero.offload_optimizer)),
            double_buffer=stage == 2 and bool(zero.overlap_comm),
            reduce_scatter=zero.reduce_scatter,
            whole_buckets=zero.use_multi_rank_bucket_allreduce,
            compute_bytes=compute,
            gradient_bytes=_BYTES[accumulated] if is_half else 4,
            wire_bytes=_BYTES.get(ds_config.get("communication_data_type") or "", compute),
            host_optimizer=_is_on_host(zero.offload_optimizer),
            host_weights=stage == 3 and _is_on_host(zero.offload_param),
        )


def _is_on_host(offload: Any) -> bool:
    return offload is not None and str(getattr(offload.device, "value", offload.device)) == "cpu"


def zero_title(ds_config: dict[str, Any]) -> str:
    """Return the stage, and what is offloaded, in a few words."""
    zero = ZeroSettings.of(ds_config)
    parts = (("optimizer", zero.host_optimizer), ("parameters", zero.host_weights))
    moved = [name for name, is_moved in parts if is_moved]
    return f"ZeRO-{zero.stage}" + (f" ({' and '.join(moved)} in host memory)" if moved else "")


def regather_warnings(ds_config: dict[str, Any], num_parameters: int, uses: int) -> list[str]:
    """Say which ZeRO-3 limits make a step gather parameters again, and how often at the most.

    num_parameters: that a rank computes with, of the experts its own. uses: forwards and backwards through the model in
    an optimizer step. Both limits at the model's size are enough:
    what is gathered is then needed again before it would be released, and DeepSpeed looks ahead to the end of the step.
    Without looking ahead four times the size are needed (counted).
    """
    zero = ds_config["zero_optimization"]
    if int(zero["stage"]) != 3:
        return []
    limits = {key: float(zero.get(key, 1e9)) for key in ("stage3_max_reuse_distance", "stage3_max_live_parameters")}
    reuse, live = limits.values()
    if reuse >= 4 * num_parameters or min(reuse, live) >= num_parameters:
        return []
    width = 2 if ds_config["bf16"]["enabled"] else 4
    return [
        f"zero_optimization.{key} is {int(limit)}, below the {num_parameters} parameters of a rank: an optimizer step "
        f"gathers {width * num_parameters / 2**20:.0f} MiB up to {uses} times instead of once; set it to at least "
        f"{num_parameters}"
        for key, limit in limits.items()
        if limit < num_parameters
    ]
