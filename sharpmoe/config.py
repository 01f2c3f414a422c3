"""The run configuration: strict, read once, without torch.

A run file (YAML) plus dotted overrides becomes one frozen `RunConfig`. DeepSpeed's own keys live in configs/zero*.json
and are owned by `sharpmoe.parallel.zero.config`; no key is in both. The section `model` is in `config_model.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from data_pipeline.safety import has_secret
from data_pipeline.store.remote import RemoteOptions
from sharpmoe.config_model import SIZES as SIZES
from sharpmoe.config_model import ModelConfig as ModelConfig
from sharpmoe.config_model import OneOf as OneOf
from sharpmoe.config_model import Section
from sharpmoe.errors import ConfigError

# Seconds after which a collective gives up by itself, without naming a rank: of every process group of the training
# (sharpmoe/parallel/ranks/launch.py). The watchdog of `peers` must have spoken before.
COLLECTIVE_SECONDS = 1800.0

_Beta = Annotated[float, Field(ge=0, lt=1)]
_Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what NumPy's and torch's generators take
_Factor = Annotated[float, Field(ge=0, le=1e6)]
_Time = Annotated[float, Field(ge=0, le=1)]
# Of names of parameters: sharpmoe/model/trainable.py
_Pattern = Annotated[str, Field(min_length=1)]


class ShardSource(Section):
    """One of several shard sets of a run."""

    path: str  # folder or URL
    weight: float = Field(gt=0)  # samples are taken from the sources in proportion to their weights


class RemoteConfig(Section):
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


class DataConfig(Section):
    """Prepared shards and how they are read."""

    shards: str | tuple[ShardSource, ...] = "data/fluent64"  # folder, URL, or a mixture of them
    train_split: str = "train"  # split that is trained on
    # SPLIT, or SPLIT:I/N for every N-th sample from the I-th on: choose on unseen:1/2, report on unseen:2/2. Of a
    # mixture: that of its first source.
    validation_split: str = "unseen"
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


_LARGEST_MU = 30.0  # e^30 is a sound float32; beyond it a shift leaves no time but the first in any case


class ShiftConfig(Section):
    """Shift of times towards noise, t' = s t / (1 + (s - 1) t), which images of more tokens need (arXiv 2403.03206)."""

    # s; 1: none; tokens: s = exp(mu) with mu linear in the tokens of an image (the dynamic shift of diffusers'
    # FlowMatchEulerDiscreteScheduler, whose defaults the other keys have), so that each resolution has its own.
    factor: Annotated[float, Field(gt=0, le=1e3)] | Literal["tokens"] = 1.0
    base_tokens: int = Field(256, ge=1)  # tokens: an image of so many has mu = base_shift
    max_tokens: int = Field(4096, ge=2)  # tokens: an image of so many has mu = max_shift; the line goes on beyond both
    base_shift: float = Field(0.5, ge=-10, le=10)  # see base_tokens
    max_shift: float = Field(1.15, ge=-10, le=10)  # see max_tokens

    @model_validator(mode="after")
    def _check(self) -> ShiftConfig:
        if self.max_tokens <= self.base_tokens:
            raise ValueError(f"max_tokens ({self.max_tokens}) must be above base_tokens ({self.base_tokens})")
        return self

    def mu(self, tokens: int) -> float:
        """Return mu for images of so many tokens. Raises ConfigError where exp(mu) is no use as a factor."""
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        mu = self.base_shift + slope * (tokens - self.base_tokens)
        if abs(mu) > _LARGEST_MU:
            raise ConfigError(
                f"shift: {tokens} tokens have mu {mu:.3g}, allowed: -{_LARGEST_MU:g} to {_LARGEST_MU:g}; correct "
                "base_tokens, max_tokens, base_shift, max_shift"
            )
        return mu


SCHEDULE_SETTINGS: dict[str, tuple[str, ...]] = {  # settings of rollout schedules, with the schedules that have them
    "kept_steps": ("hybrid", "segments"),
    "segment_steps": ("segments",),
    "merged_steps": ("two_pass", "hybrid", "segments"),
}


class RolloutConfig(Section):
    """The recursive denoising rollout (SharpMoE section 3)."""

    num_steps: int = Field(10, ge=1)  # T
    first_time: float = Field(0.999, gt=0, le=1)  # t_1
    # Which graphs are kept and which steps run a second time; all but segments are exact (docs/design/0003).
    schedule: Literal["auto", "plain", "checkpoint", "two_pass", "hybrid", "segments"] = "plain"
    kept_steps: int | None = Field(None, ge=0)  # hybrid: the last m steps; segments: of the block, None: all
    segment_steps: int = Field(1, ge=1)  # segments: one block of S of the T steps is trained, scaled by T/S
    merged_steps: int = Field(1, ge=1)  # two_pass, hybrid, segments: steps of the second pass per batch
    # fixed: one x1 per trajectory, as in the paper; fresh: an independent one at each step; markov: each x_t is the
    # next less noisy one with noise added, so the step before tells nothing new about x0 (docs/design/0010).
    noise: Literal["fixed", "fresh", "markov"] = "fixed"
    # How many states in a row are the model's own Euler steps, after each that is made of x0 and noise; 0: none, as in
    # the paper; num_steps - 1: all but the first. 1 and 9 of T = 10 cost quality (docs/design/0010).
    own_steps: int = Field(0, ge=0)
    # diffmoe, race: with which tokens those of a call compete: of the same rollout step, or of all steps, as in the
    # base's training, where a call has all times in it (docs/design/0013). Other families and stage pretrain ignore it.
    pool: Literal["step", "trajectory"] = "step"
    caption_dropout: float = Field(0.1, ge=0, lt=1)  # share of trajectories trained with the empty caption or class
    shift: ShiftConfig = ShiftConfig()  # of the times that are trained, in stage pretrain too

    @model_validator(mode="after")
    def _check(self) -> RolloutConfig:
        if self.schedule == "segments" and self.num_steps % self.segment_steps:
            raise ValueError(f"segment_steps ({self.segment_steps}) must divide num_steps ({self.num_steps})")
        if self.own_steps >= self.num_steps:
            raise ValueError(f"own_steps ({self.own_steps}) must be below num_steps ({self.num_steps})")
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


class LossConfig(Section):
    """Weights and scales of the losses."""

    # Of the trajectory routing loss; not given, it is 0 where every token gets the same compute (by model.router). The
    # defaults are measured (docs/design/0004); the paper's values: configs/runs/posttrain-paper.yaml.
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


class OptimConfig(Section):
    """Optimizer, schedule, clipping, EMA."""

    # The optimizer. muon: matrices of attention, feed-forward networks and experts by Muon (arXiv 2502.16982), each
    # expert by itself, with the learning rate and weight decay of AdamW, which updates everything else.
    name: Literal["adamw", "muon", "sgd"] = "adamw"
    # Who implements adamw; auto compiles nothing. bitsandbytes keeps its two states in 8 bits each, in blocks of 256.
    impl: Literal["auto", "torch", "deepspeed", "apex", "bitsandbytes"] = "auto"
    lr: float = Field(1e-4, gt=0)  # learning rate after the warm-up
    # Factors on the learning rate, pattern: factor, at every step of the schedule. A pattern is one or more consecutive
    # parts of a parameter's name, such as saliency_router, moe.gate or blocks.*.attn; the most specific one counts.
    # Those of saliency routers do nothing where the model has none.
    # 0 leaves values as they are, at the cost of training them: train.trainable freezes.
    lr_scale: dict[str, _Factor] = Field({})
    betas: tuple[_Beta, _Beta] = (0.9, 0.999)  # adamw
    eps: float = Field(1e-8, gt=0)  # adamw
    momentum: _Beta = 0.95  # muon: of the average of gradients
    weight_decay: float = Field(0.0, ge=0)  # decoupled (AdamW)
    schedule: Literal["constant", "cosine"] = "constant"  # of the learning rate after the warm-up
    warmup_steps: int = Field(0, ge=0)  # linear warm-up
    final_lr: float = Field(0.0, ge=0)  # cosine: learning rate at the last step
    clip_norm: float = Field(1.0, ge=0)  # 0 turns clipping off
    ema_decay: float = Field(0.9999, ge=0, lt=1)  # of the averaged weights
    # Of the moving averages of diffmoe's and race's thresholds, and of the cutoffs of rollout.pool: trajectory.
    threshold_decay: float = Field(0.95, ge=0, lt=1)
    bias_rate: float = Field(0.001, ge=0)  # bias_balancing: step of an expert's bias per optimizer step

    def ema_start_share(self, steps: int) -> float:
        """Return the share of the averaged weights that is still the start after so many optimizer steps."""
        return self.ema_decay**steps


class TrainConfig(Section):
    """How long, how many at once, in which precision."""

    steps: int = Field(100_000, ge=1)  # optimizer steps
    global_batch: int = Field(256, ge=1, le=2**24)  # images per optimizer step, all ranks
    micro_batch: int | None = Field(None, ge=1, le=2**24)  # per rank; None: global_batch / world size
    precision: Literal["fp32", "bf16"] = "fp32"  # of forward and backward; masters are float32
    times: Literal["logit_normal", "uniform"] = "logit_normal"  # of stage pretrain; those of rollouts are uniform
    # The same bits each time on the same devices, so that a resumed run equals one without a stop on CUDA too; slower.
    # Without it that holds on the host only (docs/reliability.md).
    deterministic: bool = False
    # Blocks compiled with torch.compile: fewer kernels and fewer passes over memory, equal to rounding. The first step
    # of every image size takes a minute or more (docs/performance.md).
    compile: bool = False
    # Which parameters are trained: patterns as in optim.lr_scale, such as [saliency_router], [saliency_router, gate] or
    # [moe.experts]; empty: all. All others are frozen: without gradient, optimizer state, average (docs/trainable.md).
    trainable: tuple[_Pattern, ...] = ()
    frozen: tuple[_Pattern, ...] = ()  # patterns of parameters that are not trained; the most specific of both counts

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if both := sorted({*self.trainable} & {*self.frozen}):
            raise ValueError(f"{both[0]!r} is in train.trainable and in train.frozen; remove it from one of them")
        return self


class LoraConfig(Section):
    """Low-rank adapters on linear layers, by the package peft (docs/trainable.md)."""

    rank: int = Field(0, ge=0, le=2**20)  # rows of A and columns of B in y = W x + alpha / rank B A x; 0: no adapters
    alpha: float | None = Field(None, gt=0)  # null: rank
    # Which linear layers are adapted: patterns of their names, as in optim.lr_scale, such as [attn.qkv, moe.shared];
    # empty: those of attention and of shared experts.
    targets: tuple[_Pattern, ...] = ()


class ParallelConfig(Section):
    """How experts are distributed over ranks (docs/design/0006). Everything else is data parallel under ZeRO."""

    ep_size: int = Field(1, ge=1)  # ranks that share a layer's experts; must divide the ranks and the experts
    dispatcher: Literal["native", "megatron"] = "native"  # who moves tokens between those ranks
    # Tokens that compete for an expert (diffmoe, race): those of the micro-batch of one rank, or of all ranks.
    pool_scope: Literal["rank", "world"] = "rank"


class GuardConfig(Section):
    """How non-finite losses and gradient spikes are handled (docs/reliability.md)."""

    max_skipped: int = Field(5, ge=1)  # the run ends after this many skipped optimizer steps in a row
    spike_factor: float = Field(10.0, gt=1)  # a gradient norm above this multiple of its moving average is a spike
    spike_window: int = Field(100, ge=1)  # steps in that average; no spike is found before them
    skip_spikes: bool = False  # skip the step of a spike; it is logged in any case
    replicas_every: int = Field(0, ge=0)  # compare the replicated state of ranks every so many steps; 0: never


class PeersConfig(Section):
    """After how many seconds a silent rank counts as failed (docs/reliability.md)."""

    # A rank whose heartbeat is older than this is dead or stopped.
    dead_after: float = Field(60.0, gt=0, lt=COLLECTIVE_SECONDS)
    # A rank is stuck if no rank's main thread has made progress for this long. Longer than the longest save or
    # sampling, and less than the half hour after which a collective gives up by itself, without naming a rank.
    stuck_after: float = Field(540.0, gt=0, lt=COLLECTIVE_SECONDS)


class LogConfig(Section):
    """What is logged and shown, and how often (in optimizer steps; 0 turns it off)."""

    every: int = Field(10, ge=1)  # figures to the trackers, log.jsonl and the console
    # Where figures, pictures, tables and the configuration go beside log.jsonl (docs/trackers.md): a list of
    # tensorboard, wandb, trackio, mlflow.
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ("tensorboard",)
    project: str = Field("sharpmoe", min_length=1)  # project of wandb and trackio, experiment of mlflow
    # Classes or objects of your own with methods on_step, on_look, on_save, on_end (docs/callbacks.md): a list of
    # package.module:NAME.
    callbacks: tuple[str, ...] = ()
    validate_every: int = Field(100, ge=0)  # held-out flow loss
    validation_images: int = Field(128, ge=1)  # held-out images of it
    sample_every: int = Field(0, ge=0)  # fixed samples and a routing sheet
    metrics_every: int = Field(0, ge=0)  # judge samples of held-out captions or classes (docs/evaluation.md)
    # What of them, against the images of those captions: a list of fd, kid, pr, cmmd; also the accuracy where
    # metrics_extractor is a classifier of the classes.
    metrics: tuple[Literal["fd", "kid", "pr", "cmmd"], ...] = Field(("fd", "kid"), min_length=1)
    metrics_images: int = Field(64, ge=4)  # samples, each of another held-out image
    metrics_steps: int | None = Field(None, ge=1)  # denoising steps of them; null: sample.num_steps
    # The network whose features are compared; on every rank for the whole run.
    metrics_extractor: Literal["efficientnet-lite0", "inception", "clip", "dinov2", "classifier"] = "efficientnet-lite0"
    metrics_weights: str | None = None  # its weights, where they come in no package: a file or folder
    allocation: bool = True  # print the allocation table before and after
    allocation_images: int = Field(128, ge=1)  # held-out images of the table
    report: bool = True  # write report.html and report.json after the last step (docs/report.md)
    # What measurements run: the whole model on every rank, or one block at a time, summed from the ranks' shards at
    # every call; the same numbers. auto: blocks above 2^29 parameters. With lora.rank the whole model, float32, into
    # which adapters are merged: blocks is refused there.
    look_weights: Literal["auto", "whole", "blocks"] = "auto"
    # Of the weights of measurements, in which they compute: bf16 takes half the memory (with lora.rank only after
    # adapters are merged in float32, so that the peak stays). Rounding changes some choices
    # of experts, so figures of runs are compared in one precision.
    look_precision: Literal["fp32", "bf16"] = "fp32"
    # Peak TFLOP/s of a device in the precision of the run, for its utilisation; None: by its name (train/flops.py).
    peak_tflops: float | None = Field(None, gt=0)


class SampleConfig(Section):
    """Fixed samples drawn during a run, and the defaults of launcher/sample.py."""

    captions: tuple[str, ...] = ()  # fixed captions
    num_steps: int = Field(50, ge=1)  # denoising steps
    method: Literal["euler", "heun"] = "euler"  # heun takes two model calls a step
    cfg_scale: float = Field(1.5, ge=0)  # classifier-free guidance; 1 is none
    guidance_source: Literal["own", "guided"] = "own"  # which x0_hat each branch of classifier-free guidance reads
    # tokens: the guided velocity of each token gets the norm of its conditional one, so that a high scale does not
    # oversaturate.
    cfg_norm: Literal["none", "tokens"] = "none"
    # Guidance acts at times from lower to upper, and the conditional velocity counts elsewhere (arXiv 2404.07724). The
    # unguided branch is computed all the same: its x0_hat is that of its own steps.
    cfg_interval: tuple[_Time, _Time] = (0.0, 1.0)
    shift: ShiftConfig = ShiftConfig()  # of the times of the steps
    seed: _Seed = 0  # of the noise

    @model_validator(mode="after")
    def _check(self) -> SampleConfig:
        lower, upper = self.cfg_interval
        if lower > upper:
            raise ValueError(f"cfg_interval ({lower}, {upper}) must be two times, the lower one first")
        return self


class CheckpointConfig(Section):
    """When to save, what to keep, where to start."""

    every: int = Field(1000, ge=0)  # optimizer steps; the last one is always saved
    minutes: float = Field(0.0, ge=0)  # also save this long after the last save; 0: never
    keep: int = Field(2, ge=1)  # how many of the latest checkpoints are kept
    keep_every: int = Field(0, ge=0)  # checkpoints at multiples of so many steps are never deleted; 0: none
    # Also keep the one with the lowest held-out flow loss (averaged weights), of those whose step was measured; file
    # checkpoints/best names it.
    keep_best: bool = False
    asynchronous: bool = True  # a thread writes while training goes on; costs a second copy of the state in host memory
    resume: str = "auto"  # auto | none | PATH of a checkpoint
    init: str | None = None  # weights file the model starts from (a converged base for stage: posttrain)
    init_other_codec: bool = False  # accept data of another codec or text encoder than those of init


class RunConfig(Section):
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
    lora: LoraConfig = LoraConfig()
    parallel: ParallelConfig = ParallelConfig()
    guard: GuardConfig = GuardConfig()
    peers: PeersConfig = PeersConfig()
    log: LogConfig = LogConfig()
    sample: SampleConfig = SampleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        for key, text in (("name", self.name), ("output", self.output)):
            if not text.strip() or not text.isprintable() or (key == "name" and text == "."):
                raise ValueError(f"{key} is {text!r}, expected the name of a folder, without line breaks; change {key}")
        if Path(self.name).is_absolute() or ".." in Path(self.name).parts:
            raise ValueError(
                f"name is {self.name!r}, expected a folder below output; set output to where runs are to be"
            )
        if "://" in self.output:
            raise ValueError(f"output is {self.output!r}, expected a local folder; copy finished checkpoints elsewhere")
        if self.rollout.pool == "trajectory" and self.parallel.pool_scope == "world":
            raise ValueError(
                "rollout.pool: trajectory compares each token with an expert's cutoff, so that tokens of other ranks "
                "do not compete, as parallel.pool_scope: world asks; set that to rank, or rollout.pool to step"
            )
        every, measured = self.checkpoint.every, self.log.validate_every
        if self.checkpoint.keep_best and not (every and measured and (every % measured == 0 or measured % every == 0)):
            raise ValueError(
                f"checkpoint.keep_best needs checkpoints that are measured, and checkpoint.every is {every}, "
                f"log.validate_every {measured}; make one a multiple of the other, and neither 0"
            )
        if self.train.compile and self.parallel.pool_scope == "world":
            raise ValueError(
                "train.compile is true and parallel.pool_scope world, which exchanges scores between ranks in the "
                "middle of a block; set train.compile to false, or parallel.pool_scope to rank"
            )
        return self

    @property
    def learning_rate_factors(self) -> dict[str, float]:
        """`optim.lr_scale` without the patterns of saliency routers and capacity predictors where the model has none.

        The recipes scale the rate of saliency routers, and the same recipe trains a base or a control without them, or
        another family.
        """
        has = {
            "saliency_router": self.model.saliency_router and self.model.family.has_experts,
            "capacity_predictor": self.model.family.thresholds == "predicted",
        }
        missing = {part for part, is_there in has.items() if not is_there}
        return {name: factor for name, factor in self.optim.lr_scale.items() if not missing & set(name.split("."))}
