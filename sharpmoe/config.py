"""The run configuration: strict, read once, without torch.

A run file (YAML) plus dotted overrides becomes one frozen `RunConfig`. DeepSpeed's own keys live in configs/zero*.json
and are owned by `sharpmoe.parallel.zero.config`; no key is in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError, core_schema

from data_pipeline.safety import has_secret
from data_pipeline.store.remote import RemoteOptions
from sharpmoe.families import FAMILIES, Family

# width, depth, num_heads of the published DiT sizes (arXiv 2212.09748) and of the shipped toy.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 128, "depth": 6, "num_heads": 4},
    "s": {"width": 384, "depth": 12, "num_heads": 6},
    "b": {"width": 768, "depth": 12, "num_heads": 12},
    "l": {"width": 1024, "depth": 24, "num_heads": 16},
    "xl": {"width": 1152, "depth": 28, "num_heads": 16},
}


_WIDEST = 2**20  # of sizes of a model: beyond it, products of sizes leave 64 bits, and no device holds one layer
_Beta = Annotated[float, Field(ge=0, lt=1)]
_Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what NumPy's and torch's generators take
_Factor = Annotated[float, Field(ge=0, le=1e6)]


@dataclass(frozen=True, eq=False)
class OneOf:
    """Annotation of a text field whose value is a key of `table`, looked up when a value is validated."""

    table: Mapping[str, Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __str__(self) -> str:
        return " | ".join(self.table)

    def _check(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.table:
            raise PydanticCustomError("one_of", "Input should be one of {choices}", {"choices": str(self)})
        return value


class _Section(BaseModel):
    """Base of every section: unknown keys are errors, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true where a number is expected: pydantic takes it for 1."""
        values = value if isinstance(value, list | tuple) else [value]
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, dict) and get_origin(kind) is dict:
            values = list(value.values())
        if any(isinstance(one, bool) for one in values) and kind is not bool:
            raise PydanticCustomError("not_bool", "Input should not be true or false")
        return value


class ModelConfig(_Section):
    """The architecture. Everything needed to rebuild a model from a weights file."""

    preset: Literal["tiny", "s", "b", "l", "xl"] | None = None  # fills width, depth, num_heads where they are not given
    width: int = Field(128, ge=8, le=_WIDEST)  # D, features of a token
    depth: int = Field(6, ge=1, le=10_000)  # blocks
    num_heads: int = Field(4, ge=1, le=_WIDEST)  # attention heads
    mlp_ratio: float = Field(4.0, gt=0, le=1024)  # hidden width of an MLP over width
    patch_size: int = Field(2, ge=1, le=_WIDEST)  # latent pixels of a token, each way
    latent_channels: int = Field(4, ge=1, le=_WIDEST)  # C
    latent_size: int = Field(32, ge=1, le=_WIDEST)  # side of the square latent; buckets may differ (docs/design/0011)
    learn_sigma: bool = False  # published checkpoints predict 2C channels, of which the first C are used
    router: Annotated[str, OneOf(FAMILIES)] = "diffmoe"  # a family of sharpmoe/families.py
    num_experts: int = Field(8, ge=1, le=_WIDEST)  # E, without the unconditional expert
    top_k: int = Field(1, ge=1, le=_WIDEST)  # experts per token (token choice: tc, promoe_tc, dsmoe, dit_moe)
    capacity: float = Field(1.0, gt=0)  # mean experts per token (ec, promoe_ec, diffmoe, race)
    capacity_selection: Literal["count", "mask"] = "count"  # inference of diffmoe: see moe/selection.py
    gate: Literal["linear", "prototypes", "mlp"] = "linear"  # prototypes: cosine to a centre per expert (ProMoE)
    score: Literal["softmax", "sigmoid", "identity", "token_softmax"] = "softmax"  # logits to scores
    renormalise: bool = False  # top_k > 1: the gates of a token's experts sum to routed_scale
    routed_scale: float = Field(1.0, gt=0)  # multiplies the gates (dsmoe)
    num_groups: int = Field(1, ge=1)  # dsmoe: experts are chosen inside the best top_groups of num_groups groups
    top_groups: int = Field(1, ge=1)  # see num_groups
    bias_balancing: bool = False  # token choice: a bias per expert, for the choice only, balances loads without a loss
    unconditional_expert: bool = False  # one more expert for all tokens of images without class, and only those
    unconditional_label: int | None = Field(None, ge=0)  # the label of such images; None: num_classes, "no class"
    expert: Literal["gelu", "swiglu"] = "gelu"  # kind of the routed experts
    expert_hidden: int | None = Field(None, ge=1, le=_WIDEST)  # None: width * mlp_ratio
    shared: Literal["none", "gelu", "swiglu", "identity"] = "none"  # added to the routed experts for every token
    shared_hidden: int | None = Field(None, ge=1, le=_WIDEST)  # None: as the routed experts
    layer_heads: bool = False  # race: each MoE layer predicts the target from its input, for its loss only
    mlp: Literal["gelu", "silu", "swiglu"] = "gelu"  # dense blocks
    moe_every: int = Field(2, ge=1)  # one MoE block in so many, the last of them: 2 is the odd indices, 1 is all
    dense_first: int = Field(0, ge=0)  # leading blocks that are dense in any case
    positions: Literal["sincos", "rope_2d", "rope_1d"] = "sincos"  # sincos: added to tokens; rope: turns q and k
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # of the blocks
    qk_norm: bool = False  # LayerNorm of queries and keys per head
    qk_norm_eps: float = Field(1e-5, gt=0)  # epsilon of that norm
    saliency_router: bool = True  # a second router in every MoE layer, which reads x0_prev
    conditioning: Literal["class", "text"] = "text"  # class labels, or text states
    num_classes: int = Field(1000, ge=1, le=2**31)  # classes of the label table
    class_dropout: bool = True  # an extra row of the label table stands for "no class"
    text_width: int = Field(384, ge=1, le=_WIDEST)  # features of a token state of the text encoder
    pooled_width: int = Field(384, ge=1, le=_WIDEST)  # features of its pooled state
    time_scale: float = 1000.0  # the time embedder reads time_scale * t + time_shift
    time_shift: float = 0.0  # see time_scale
    prediction: Literal["velocity", "ddpm_noise"] = "velocity"  # ddpm_noise: noise, converted to a velocity

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if isinstance(data.get("preset"), str):
            data = {**SIZES.get(data["preset"], {}), **data}
        router, width = (data.get(key, cls.model_fields[key].default) for key in ("router", "width"))
        family = FAMILIES.get(str(router))
        return {**family.model_fields(width), **data} if family and isinstance(width, int) else data

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.width % self.num_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must divide width ({self.width})")
        if self.width % 4:
            raise ValueError(f"width ({self.width}) must be a multiple of 4 for 2-D sin-cos positions")
        if self.latent_size % self.patch_size:
            raise ValueError(f"patch_size ({self.patch_size}) must divide latent_size ({self.latent_size})")
        if self.family.competition == "token" and self.top_k > self.num_experts:
            raise ValueError(f"top_k ({self.top_k}) must be at most num_experts ({self.num_experts})")
        if self.family.varies_compute and self.capacity > self.num_experts:
            raise ValueError(f"capacity ({self.capacity}) must be at most num_experts ({self.num_experts})")
        if self.num_groups > 1 and (self.num_experts % self.num_groups or self.num_experts < 2 * self.num_groups):
            raise ValueError(
                f"num_groups ({self.num_groups}) must cut num_experts ({self.num_experts}) into groups of 2 or more"
            )
        if self.top_groups > self.num_groups:
            raise ValueError(f"top_groups ({self.top_groups}) must be at most num_groups ({self.num_groups})")
        if self.layer_heads and self.gate != "mlp":
            raise ValueError("layer_heads needs gate: mlp")
        if self.unconditional_expert and self.conditioning != "class":
            raise ValueError("unconditional_expert needs conditioning: class")
        if self.positions == "rope_2d" and (self.width // self.num_heads) % 4:
            raise ValueError(f"rope_2d needs a head width ({self.width // self.num_heads}) that is a multiple of 4")
        return self

    @property
    def family(self) -> Family:
        """The record of the router family."""
        return FAMILIES[self.router]

    @property
    def router_loss(self) -> str | None:
        """Key in `losses.ROUTER_LOSSES` of the loss on the router, or None.

        A bias that balances the loads replaces the balance loss. The contrast is one between prototypes: a gate of
        prototypes is trained by it in place of balance, and a gate without them by balance.
        """
        loss = self.family.router_loss
        if loss == "balance" and self.bias_balancing:
            return None
        if loss in ("balance", "contrastive"):
            return "contrastive" if self.gate == "prototypes" else "balance"
        return loss

    @property
    def head_loss(self) -> str | None:
        """Key in `losses.HEAD_LOSSES` of the loss on heads beside the router, or None."""
        return self.family.head_loss or ("layers" if self.layer_heads else None)

    @property
    def counts_calls(self) -> bool:
        """Whether inference ranks the tokens of a call against each other: results then depend on how a batch is cut.

        That is DiffMoE's count. Its mask and Expert Race compare each token with a threshold, token choice a token's
        own scores, expert choice the tokens of an image.
        """
        if self.family.thresholds is None:
            return self.family.competition_in(training=False) in ("call", "all")
        return self.family.thresholds == "predicted" and self.capacity_selection == "count"

    @property
    def contrasts_calls(self) -> bool:
        """Whether the loss on the router compares the tokens of a whole call: the contrast with token choice."""
        return self.gate == "prototypes" and self.family.competition == "token"

    @property
    def num_moe_layers(self) -> int:
        return sum(self.is_moe(block) for block in range(self.depth))

    @property
    def num_tokens(self) -> int:
        """Tokens of the square of `latent_size`; images of other sizes have others."""
        return (self.latent_size // self.patch_size) ** 2

    @property
    def total_experts(self) -> int:
        """Experts of an MoE layer with the unconditional one."""
        return self.num_experts + int(self.unconditional_expert)

    @property
    def expert_width(self) -> int:
        """Hidden width of a routed expert."""
        return self.expert_hidden or int(self.width * self.mlp_ratio)

    @property
    def shared_width(self) -> int:
        """Hidden width of the shared expert."""
        return self.shared_hidden or self.expert_width

    def is_moe(self, block: int) -> bool:
        """Whether block `block` (0-based) holds an MoE layer."""
        in_turn = block % self.moe_every == self.moe_every - 1
        return self.family.has_experts and in_turn and block >= self.dense_first


class ShardSource(_Section):
    """One of several shard sets of a run."""

    path: str  # folder or URL
    weight: float = Field(gt=0)  # samples are taken from the sources in proportion to their weights


class RemoteConfig(_Section):
    """How shards at a URL are read."""

    cache: str | None = None  # folder on the local disk; None: ~/.cache/sharpmoe/shards
    cache_gib: float = Field(16.0, gt=0)  # largest size of that folder
    timeout_s: float = Field(30.0, gt=0)  # seconds without a byte before a request is given up
    retries: int = Field(6, ge=0)  # attempts after the first
    allow_hosts: tuple[str, ...] = ()  # hosts beside the given one that redirects may lead to

    def options(self) -> RemoteOptions:
        """Return the same settings as data_pipeline reads them."""
        cache = None if self.cache is None else Path(self.cache)
        return RemoteOptions(
            cache=cache,
            cache_bytes=int(self.cache_gib * 2**30),
            timeout_s=self.timeout_s,
            retries=self.retries,
            allow_hosts=self.allow_hosts,
        )


class DataConfig(_Section):
    """Prepared shards and how they are read."""

    shards: str | tuple[ShardSource, ...] = "data/fluent64"  # folder, URL, or a mixture of them
    train_split: str = "train"  # split that is trained on
    validation_split: str = "unseen"  # of a mixture: that of its first source
    num_workers: int = Field(0, ge=0)  # processes that read ahead; 0: one thread in the process of the run
    max_bad_fraction: float = Field(0.0, ge=0, lt=1)  # share of samples that may be damaged; they are replaced
    remote: RemoteConfig = RemoteConfig()

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if not self.places or not all(path for path, _ in self.places):
            raise ValueError("shards is empty: name a folder or URL, or a list of {path, weight}")
        if any(has_secret(path) for path, _ in self.places):
            raise ValueError("shards holds a password or key: write it as ${NAME}, which is read from the environment")
        return self

    @property
    def places(self) -> tuple[tuple[str, float], ...]:
        """(folder or URL, weight) of every source."""
        if isinstance(self.shards, str):
            return ((self.shards, 1.0),)
        return tuple((source.path, source.weight) for source in self.shards)

    @property
    def first_place(self) -> str:
        """The source of codec, text encoder and held-out samples."""
        return self.places[0][0]


SCHEDULE_SETTINGS: dict[str, tuple[str, ...]] = {  # settings of rollout schedules, with the schedules that have them
    "kept_steps": ("hybrid", "segments"),
    "segment_steps": ("segments",),
    "merged_steps": ("two_pass", "hybrid", "segments"),
}


class RolloutConfig(_Section):
    """The recursive denoising rollout (SharpMoE section 3)."""

    num_steps: int = Field(10, ge=1)  # T
    first_time: float = Field(0.999, gt=0, le=1)  # t_1
    # Which graphs are kept and which steps run a second time; all but segments are exact (docs/design/0003).
    schedule: Literal["auto", "plain", "checkpoint", "two_pass", "hybrid", "segments"] = "plain"
    kept_steps: int | None = Field(None, ge=0)  # hybrid: the last m steps; segments: of the block, None: all
    segment_steps: int = Field(1, ge=1)  # segments: one block of S of the T steps is trained, scaled by T/S
    merged_steps: int = Field(1, ge=1)  # two_pass, hybrid, segments: steps of the second pass per batch
    # fixed: one x1 per trajectory, as in the paper; fresh: a new one at each step, so that x_t and the x0_hat of the
    # step before do not tell more about x0 together than they do in sampling (docs/design/0010).
    noise: Literal["fixed", "fresh"] = "fixed"
    caption_dropout: float = Field(0.1, ge=0, lt=1)  # share of trajectories trained with the empty caption or class

    @model_validator(mode="after")
    def _check(self) -> RolloutConfig:
        if self.schedule == "segments" and self.num_steps % self.segment_steps:
            raise ValueError(f"segment_steps ({self.segment_steps}) must divide num_steps ({self.num_steps})")
        if self.schedule == "hybrid" and not 1 <= (self.kept_steps or 0) <= self.num_steps:
            raise ValueError(f"schedule: hybrid needs kept_steps from 1 to num_steps ({self.num_steps})")
        if self.schedule == "segments" and (self.kept_steps or 0) > self.segment_steps:
            raise ValueError(f"kept_steps ({self.kept_steps}) must be at most segment_steps ({self.segment_steps})")
        for key, schedules in SCHEDULE_SETTINGS.items():
            if getattr(self, key) not in (None, 1) and self.schedule not in schedules:
                raise ValueError(f"{key} needs schedule: {' | '.join(schedules)}")
        return self

    @property
    def steps_kept(self) -> int:
        """Number of trained steps whose graphs of the first pass are kept, in a schedule of two passes."""
        if self.schedule == "segments" and self.kept_steps is None:
            return self.segment_steps
        return self.kept_steps or 0


class LossConfig(_Section):
    """Weights and scales of the losses."""

    # The defaults are measured (docs/design/0004); the paper's values: configs/runs/posttrain-paper.yaml.
    routing_weight: float = Field(0.01, ge=0)
    routing_warmup_steps: int = Field(0, ge=0)  # optimizer steps over which that weight rises linearly from 0
    routing_mass: Literal["scores", "counts"] = "counts"  # what A sums: the paper's scores, or straight-through counts
    mass_reduction: Literal["sum", "mean"] = "mean"  # A summed over steps and MoE layers (paper), or its mean over them
    mass_scale: float = Field(3.0, gt=0)  # multiplies A before the softmax
    saliency_scale: float = Field(10.0, gt=0)  # multiplies M before the softmax
    # The two scales from the training split (docs/design/0010), found once when a run starts and kept by its resumes.
    # saliency_entropy replaces saliency_scale: entropy of softmax(scale * M) as a share of log N, mean over images.
    saliency_entropy: float | None = Field(None, gt=0, lt=1)
    # mass_spread replaces mass_scale, with counts: how much experts per token vary over the tokens of an image where A
    # matches M, as their standard deviation over their mean.
    mass_spread: float | None = Field(None, gt=0, le=10)
    # What the routing loss trains: all that its gradient reaches, or the saliency routers alone, without gates, trunk
    # and experts.
    routing_gradient: Literal["all", "saliency_routers"] = "all"
    # shuffled: every image of a micro-batch gets the map of its neighbour; a control, where saliency says nothing.
    saliency_map: Literal["own", "shuffled"] = "own"
    count_temperature: float = Field(0.05, gt=0)  # width of the sigmoid behind straight-through counts
    balance_weight: float = Field(0.01, ge=0)  # tc, dit_moe
    capacity_weight: float = Field(0.01, ge=0)  # diffmoe; 1 in the paper, 0.01 is what ProMoE's code applies
    contrastive_weight: float = Field(1.0, ge=0)  # promoe_tc, promoe_ec
    contrastive_temperature: float = Field(0.07, gt=0)  # of that loss
    similarity_weight: float = Field(0.01, ge=0)  # race
    layer_weight: float = Field(0.01, ge=0)  # race: flow loss of each MoE layer's own head

    @model_validator(mode="after")
    def _check(self) -> LossConfig:
        if self.mass_spread is not None and self.routing_mass != "counts":
            raise ValueError(f"mass_spread is about counts of experts; routing_mass is {self.routing_mass}: set counts")
        if self.routing_gradient != "all" and self.routing_mass != "counts":
            raise ValueError(
                f"routing_gradient: {self.routing_gradient} needs routing_mass: counts, it is {self.routing_mass}"
            )
        return self


class OptimConfig(_Section):
    """Optimizer, schedule, clipping, EMA."""

    name: Literal["adamw", "sgd"] = "adamw"  # optimizer
    impl: Literal["auto", "torch", "deepspeed", "apex"] = "auto"  # who implements adamw; auto compiles nothing
    lr: float = Field(1e-4, gt=0)  # learning rate after the warm-up
    # Factors on the learning rate, pattern: factor, at every step of the schedule. A pattern is one or more consecutive
    # parts of a parameter's name, such as saliency_router, moe.gate or blocks.*.attn; the most specific one counts.
    # 0 freezes: {"*": 0, saliency_router: 20} trains the saliency routers alone.
    lr_scale: dict[str, _Factor] = {}
    betas: tuple[_Beta, _Beta] = (0.9, 0.999)  # adamw
    eps: float = Field(1e-8, gt=0)  # adamw
    weight_decay: float = Field(0.0, ge=0)  # decoupled (AdamW)
    schedule: Literal["constant", "cosine"] = "constant"  # of the learning rate after the warm-up
    warmup_steps: int = Field(0, ge=0)  # linear warm-up
    final_lr: float = Field(0.0, ge=0)  # cosine: learning rate at the last step
    clip_norm: float = Field(1.0, ge=0)  # 0 turns clipping off
    ema_decay: float = Field(0.9999, ge=0, lt=1)  # of the averaged weights
    threshold_decay: float = Field(0.95, ge=0, lt=1)  # diffmoe capacity thresholds, race thresholds
    bias_rate: float = Field(0.001, ge=0)  # bias_balancing: step of an expert's bias per optimizer step

    def ema_start_share(self, steps: int) -> float:
        """Return the share of the averaged weights that is still the start after so many optimizer steps."""
        return self.ema_decay**steps


class TrainConfig(_Section):
    """How long, how many at once, in which precision."""

    steps: int = Field(100_000, ge=1)  # optimizer steps
    global_batch: int = Field(256, ge=1, le=2**24)  # images per optimizer step, all ranks
    micro_batch: int | None = Field(None, ge=1, le=2**24)  # per rank; None: global_batch / world size
    precision: Literal["fp32", "bf16"] = "fp32"  # of forward and backward; masters are float32


class ParallelConfig(_Section):
    """How experts are distributed over ranks (docs/design/0006). Everything else is data parallel under ZeRO."""

    ep_size: int = Field(1, ge=1)  # ranks that share a layer's experts; must divide the ranks and the experts
    dispatcher: Literal["native", "megatron"] = "native"  # who moves tokens between those ranks
    # Tokens that compete for an expert (diffmoe, race): those of the micro-batch of one rank, or of all ranks.
    pool_scope: Literal["rank", "world"] = "rank"


class GuardConfig(_Section):
    """How non-finite losses and gradient spikes are handled (docs/reliability.md)."""

    max_skipped: int = Field(5, ge=1)  # the run ends after this many skipped optimizer steps in a row
    spike_factor: float = Field(10.0, gt=1)  # a gradient norm above this multiple of its moving average is a spike
    spike_window: int = Field(100, ge=1)  # steps in that average; no spike is found before them
    skip_spikes: bool = False  # skip the step of a spike; it is logged in any case
    replicas_every: int = Field(0, ge=0)  # compare the replicated state of ranks every so many steps; 0: never


class PeersConfig(_Section):
    """After how many seconds a silent rank counts as failed (docs/reliability.md)."""

    dead_after: float = Field(60.0, gt=0)  # a rank whose heartbeat is older than this is dead or stopped
    # A rank is stuck if no rank's main thread has made progress for this long. Longer than the longest save or
    # sampling, and less than the ten minutes after which NCCL gives up by itself, without naming a rank.
    stuck_after: float = Field(540.0, gt=0)


class LogConfig(_Section):
    """What is logged and shown, and how often (in optimizer steps; 0 turns it off)."""

    every: int = Field(10, ge=1)  # figures to TensorBoard, log.jsonl and the console
    validate_every: int = Field(100, ge=0)  # held-out flow loss
    validation_images: int = Field(128, ge=1)  # held-out images of it
    sample_every: int = Field(0, ge=0)  # fixed samples and a routing sheet
    allocation: bool = True  # print the allocation table before and after
    allocation_images: int = Field(128, ge=1)  # held-out images of the table
    # Peak TFLOP/s of a device in the precision of the run, for its utilisation; None: by its name (train/flops.py).
    peak_tflops: float | None = Field(None, gt=0)


class SampleConfig(_Section):
    """Fixed samples drawn during a run, and the defaults of launcher/sample.py."""

    captions: tuple[str, ...] = ()  # fixed captions
    num_steps: int = Field(50, ge=1)  # denoising steps
    method: Literal["euler", "heun"] = "euler"  # heun takes two model calls a step
    cfg_scale: float = Field(1.5, ge=0)  # classifier-free guidance; 1 is none
    guidance_source: Literal["own", "guided"] = "own"  # which x0_hat each branch of classifier-free guidance reads
    seed: _Seed = 0  # of the noise


class CheckpointConfig(_Section):
    """When to save, what to keep, where to start."""

    every: int = Field(1000, ge=0)  # optimizer steps; the last one is always saved
    minutes: float = Field(0.0, ge=0)  # also save this long after the last save; 0: never
    keep: int = Field(2, ge=1)  # how many of the latest checkpoints are kept
    keep_every: int = Field(0, ge=0)  # checkpoints at multiples of so many steps are never deleted; 0: none
    asynchronous: bool = True  # a thread writes while training goes on; costs a second copy of the state in host memory
    resume: str = "auto"  # auto | none | PATH of a checkpoint
    init: str | None = None  # weights file the model starts from (a converged base for stage: posttrain)
    init_other_codec: bool = False  # accept data of another codec or text encoder than those of init


class RunConfig(_Section):
    """One experiment."""

    name: str = "run"  # name of the run folder below output
    output: str = "runs"  # folder of all runs
    seed: _Seed = 0  # keys the data order and all random draws
    stage: Literal["pretrain", "posttrain"] = "posttrain"  # one denoising step per image, or rollouts
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    guard: GuardConfig = GuardConfig()
    peers: PeersConfig = PeersConfig()
    log: LogConfig = LogConfig()
    sample: SampleConfig = SampleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        for key, text in (("name", self.name), ("output", self.output)):
            if not text.strip() or not text.isprintable() or (key == "name" and text in (".", "..")):
                raise ValueError(f"{key} is {text!r}, expected the name of a folder, without line breaks; change {key}")
        if "://" in self.output:
            raise ValueError(f"output is {self.output!r}, expected a local folder; copy finished checkpoints elsewhere")
        return self
