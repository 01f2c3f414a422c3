"""A study file: arms that differ from one run file, the seeds of each, and how they are measured.

Every arm is trained on the same number of noisy images (steps x global_batch x rollout steps), from which its optimizer
steps follow. A part is one arm with one seed: a run of its own below the folder of the study.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from data_pipeline.read.shards import SplitPart
from sharpmoe.config import DataConfig, RunConfig
from sharpmoe.config_io import load_run_config, merge_settings, nearest
from sharpmoe.errors import ConfigError
from sharpmoe.evaluation.classifier import ClassifierSettings
from sharpmoe.overrides import StrictLoader, parse_overrides, yaml_problem
from sharpmoe.shipped_files import find_shipped

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._+-]*$"
_FOLLOWS = ("name", "output", "seed", "train.steps", "checkpoint.resume")  # keys of a run that the study sets


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Arm(_Strict):
    """What one arm of a study changes."""

    name: str = Field(pattern=_NAME)
    about: str = ""  # one line below the table
    overrides: dict[str, Any] = {}  # sections and keys of a run file, over those of the study
    trained: bool = True  # false: the weights of checkpoint.init as they are
    line: str | None = None  # arms of one line are joined in the curves, in the order of the file


class EvaluateConfig(_Strict):
    """How every part is measured."""

    tuning: str = "unseen:1/2"  # SPLIT or SPLIT:I/N, every N-th sample from the I-th on: settings are chosen on it
    final: str = "unseen:2/2"  # nothing is chosen on it
    weights: str = Field("ema", pattern="^(ema|live)$")  # of a checkpoint
    seed: int = Field(0, ge=0)  # of the noise of held-out images
    images: int = Field(512, ge=2)  # held-out images of flow loss and allocation
    chunk: int = Field(16, ge=1)  # images per model call: the pool of DiffMoE
    samples: int = Field(0, ge=0)  # images drawn per part, for class-conditional models; 0: none
    sample_batch: int = Field(100, ge=1)  # images per model call there
    cfg_scales: tuple[Annotated[float, Field(ge=0)], ...] = (1.0,)  # classifier-free guidance, one set of images each
    metrics: tuple[str, ...] = ("fd", "kid", "accuracy")  # as evaluate.py --metrics
    extractor: str = "classifier"  # as evaluate.py --extractor
    extractor_weights: str | None = None  # None with `classifier`: the study trains one


class _StudyFile(_Strict):
    name: str = Field(pattern=_NAME)  # folder below output
    output: str = "runs/studies"
    base: str  # run file
    deepspeed: str = "configs/zero2.json"  # a job is one process: nothing is partitioned, and ZeRO-3 would gather it
    overrides: dict[str, Any] = {}  # of every arm, over the run file
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0, 1, 2)
    trained_images: int = Field(ge=1)  # noisy images of every trained arm: steps x global_batch x rollout steps
    control: str  # the arm that all others are compared with
    arms: tuple[Arm, ...]
    evaluate: EvaluateConfig = EvaluateConfig()
    classifier: ClassifierSettings = ClassifierSettings()

    @field_validator("seeds", "arms")
    @classmethod
    def _several(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [one.name if isinstance(one, Arm) else one for one in value]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"expected one or more, each once, got {', '.join(map(str, names)) or 'none'}")
        return value

    @model_validator(mode="after")
    def _check(self) -> _StudyFile:
        names = [arm.name for arm in self.arms]
        if self.control not in names:
            raise ValueError(f"control is {self.control!r}, expected one of the arms: {', '.join(names)}")
        for split in (self.evaluate.tuning, self.evaluate.final):
            SplitPart.read(split)
        return self


@dataclass(frozen=True, kw_only=True)
class Part:
    """One arm with one seed."""

    arm: Arm
    seed: int
    run: RunConfig  # its run folder is output/name
    folder: Path  # of all that belongs to this part

    @property
    def name(self) -> str:
        return f"{self.arm.name}/seed{self.seed}"

    @property
    def run_folder(self) -> Path:
        return Path(self.run.output) / self.run.name


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study file, with all its parts."""

    file: Path
    name: str
    folder: Path
    deepspeed: Path
    trained_images: int
    control: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    parts: tuple[Part, ...]  # seed by seed, so that a study that is stopped has whole pairs
    evaluate: EvaluateConfig
    classifier: ClassifierSettings

    @property
    def measured_data(self) -> DataConfig:
        """The data on which all arms are measured: those of the control, whatever data an arm is trained on."""
        return next(part.run.data for part in self.parts if part.arm.name == self.control)

    def part(self, name: str) -> Part:
        """Return the part ARM/seedN. Raises ConfigError."""
        for part in self.parts:
            if part.name == name:
                return part
        raise ConfigError(f"{self.file}: no part {name!r}; there are {', '.join(part.name for part in self.parts)}")

    def only(self, names: Sequence[str]) -> tuple[Part, ...]:
        """Return the parts of these arms; of all where none is named. Raises ConfigError for an unknown one."""
        known = [arm.name for arm in self.arms]
        for name in names:
            if name not in known:
                raise ConfigError(f"--only {name}: no such arm{nearest(name, known)}; there are {', '.join(known)}")
        return tuple(part for part in self.parts if not names or part.arm.name in names)


def load_study(path: Path, overrides: Sequence[str] = (), name: str | None = None) -> Study:
    """Read a study file and resolve the run of every part.

    overrides: command-line words for the runs of all arms, `--section.key value`, over what study and arms say.
    Raises ConfigError naming the file, the arm and the key.
    """
    data = _read(path)
    try:
        given = _StudyFile.model_validate(data if name is None else {**data, "name": name})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = str(first.get("ctx", {}).get("error", first["msg"]))
        raise ConfigError(f"{path}: {where + ': ' if where else ''}{reason}; correct it there") from None
    if wrong := [key for key in parse_overrides(overrides) if key in _FOLLOWS]:
        raise ConfigError(f"--{wrong[0]}: a study sets this itself; change name, seeds or trained_images of {path}")
    folder = Path(given.output) / given.name
    parts = [_part(path, given, arm, seed, folder, overrides) for seed in given.seeds for arm in given.arms]
    return Study(
        file=path,
        name=given.name,
        folder=folder,
        deepspeed=find_shipped(given.deepspeed),
        trained_images=given.trained_images,
        control=given.control,
        arms=given.arms,
        seeds=given.seeds,
        parts=tuple(parts),
        evaluate=given.evaluate,
        classifier=given.classifier,
    )


def noisy_images_per_step(run: RunConfig) -> int:
    """Return how many noisy images an optimizer step trains on."""
    return run.train.global_batch * (run.rollout.num_steps if run.stage == "posttrain" else 1)


def _read(path: Path) -> dict[str, Any]:
    path = find_shipped(path)
    if not path.is_file():
        raise ConfigError(f"study file {path} does not exist; examples are in configs/studies/")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {yaml_problem(error)}; fix the syntax there") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: no study; expected keys such as name, base, arms")
    return data


def _part(path: Path, given: _StudyFile, arm: Arm, seed: int, folder: Path, overrides: Sequence[str]) -> Part:
    own = folder / "arms" / arm.name
    try:
        run = load_run_config(given.base, overrides, merge_settings(given.overrides, arm.overrides))
        per_step = noisy_images_per_step(run)
        steps, rest = divmod(given.trained_images, per_step)
        if rest or not steps:
            raise ConfigError(
                f"trained_images is {given.trained_images}, no multiple of the {per_step} noisy images of a step "
                "(train.global_batch x rollout.num_steps in post-training)"
            )
    except ConfigError as error:
        raise ConfigError(f"{path}: arm {arm.name}: {error}") from None
    if not arm.trained and run.checkpoint.init is None:
        raise ConfigError(f"{path}: arm {arm.name}: trained is false and checkpoint.init missing: nothing to measure")
    changed = {
        "name": f"seed{seed}",
        "output": str(own),
        "seed": seed,
        "train": run.train.model_copy(update={"steps": steps}),
        "checkpoint": run.checkpoint.model_copy(update={"resume": "auto"}),
    }
    return Part(arm=arm, seed=seed, run=run.model_copy(update=changed), folder=own)
