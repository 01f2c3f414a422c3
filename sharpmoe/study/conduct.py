"""Conduct a study: what is left of it, as jobs; a rehearsal that changes nothing; the table at the end.

Folder of a study: classifier.safetensors and reference-SPLIT.npz, arms/ARM/seedN (the run), arms/ARM/seedN-SPLIT (its
figures), and the results on a split: table and curves (.md, .json, .png) and routing sheets (sheets-SPLIT). A part
whose arm has changed since it was trained is refused; figures under other settings are measured again.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from sharpmoe.config import RunConfig
from sharpmoe.config_io import dump_run_config, load_run_config
from sharpmoe.console import clock
from sharpmoe.devices import default_device
from sharpmoe.durable import check_folder, sha256_of, write_atomically
from sharpmoe.errors import CheckpointError, ConfigError, DataError
from sharpmoe.model.backbone import Backbone, ClassCondition, TextCondition
from sharpmoe.model.build import build_model
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.parallel.zero.config import resolve_ds_config
from sharpmoe.planning.rehearsal import Target, rehearse
from sharpmoe.study.jobs import Job, JobReport, run_jobs
from sharpmoe.study.measure import is_measured, is_trained, judging_files, measures_samples
from sharpmoe.study.plan import Part, Study, noisy_images_per_step
from sharpmoe.study.results import write_results
from sharpmoe.train.rollout_schedules import schedule_of

_RUN_FILE, _BASE_FILE = "seed{}.yaml", "seed{}.base"  # of a part: its run, and the sha256 of what it starts from
_TIMED = 8  # images of the call that the estimate times


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a call of a study is asked for."""

    split: str = "tuning"  # or "final"
    only: tuple[str, ...] = ()  # arms; all where none is named
    parallel: int = 1
    sheet_images: int = 4  # on the routing sheets; 0: no sheets
    minutes: float | None = None  # nothing runs longer; what is stopped goes on in the next call
    words: tuple[str, ...] = ()  # of `ablate`, with which a job reads the same study


def conduct(study: Study, wish: Wish, say: Callable[[str], object]) -> JobReport:
    """Train and measure what is left, several parts at a time, and write the table of what there is.

    Raises ConfigError where a part was trained under another definition, or another process conducts the study.
    """
    parts = study.only(wish.only)
    check_folder(study.folder)
    with _sole_owner(study.folder):
        for part in parts:
            _define(part)
        jobs = _jobs(study, parts, wish)
        outcome = run_jobs(jobs, wish.parallel, None if wish.minutes is None else 60 * wish.minutes, say)
        write_results(study, wish.split, wish.sheet_images, say)
    return outcome


def rehearse_study(study: Study, wish: Wish, device: str) -> str:
    """Check every arm as `train.py --dry-run` does; return what would run and about how long. Changes nothing.

    The time is that of one model call, forward and with backward, timed here on `device`. Raises what a start raises,
    with the name of the arm.
    """
    parts = study.only(wish.only)
    for part in parts:
        _check_definition(part)
    for part in (one for one in parts if one.seed == study.seeds[0]):
        try:
            _rehearse(part, study.deepspeed)
        except (ConfigError, CheckpointError, DataError) as error:
            raise type(error)(f"arm {part.arm.name}: {error}") from None
    jobs = _jobs(study, parts, wish)
    left = [job for job in jobs if not job.is_done()]
    lines = [f"{study.name}: {len(parts)} parts, {len(jobs)} jobs, {len(left)} left; folder {study.folder}"]
    lines += [f"  {job.name}" for job in left]
    return "\n".join([*lines, _estimate(study, parts, left, device), "ok"])


def _jobs(study: Study, parts: Sequence[Part], wish: Wish) -> list[Job]:
    """Return all jobs in their order: judging first, then part by part."""
    logs, jobs = study.folder / "logs", list[Job]()
    split, ask = wish.split, ("ablate", *wish.words, "--job")
    before: tuple[str, ...] = ()
    if measures_samples(study):
        files = judging_files(study, split)
        name = f"prepare judging on {split}"
        done = partial(_all_there, files)
        jobs.append(Job(name=name, words=(*ask, "judging"), log=logs / f"judging-{split}.log", is_done=done))
        before = (name,)
    for part in parts:
        train, measure = f"train {part.name}", f"measure {part.name} on {split}"
        log = logs / f"{part.arm.name}-seed{part.seed}.log"
        if part.arm.trained:
            file = part.folder / _RUN_FILE.format(part.seed)
            words = ("train", "--deepspeed", str(study.deepspeed), "--config", str(file))
            jobs.append(Job(name=train, words=words, log=log, is_done=partial(is_trained, part)))
        jobs.append(
            Job(
                name=measure,
                words=(*ask, part.name),
                log=log,
                is_done=partial(is_measured, study, part, split),
                after=(*before, train),
            )
        )
    return jobs


def _all_there(files: Sequence[Path]) -> bool:
    return all(path.is_file() for path in files)


def _define(part: Part) -> None:
    """Write the run file of a part, where it has none; raise ConfigError where it has another."""
    _check_definition(part)
    path = part.folder / _RUN_FILE.format(part.seed)
    if not path.is_file():
        init = part.run.checkpoint.init
        if init is not None and Path(init).is_file():
            write_atomically(part.folder / _BASE_FILE.format(part.seed), sha256_of(Path(init)) + "\n")
        write_atomically(path, dump_run_config(part.run))


def _check_definition(part: Part) -> None:
    path, base = (part.folder / name.format(part.seed) for name in (_RUN_FILE, _BASE_FILE))
    if not path.is_file():
        return
    changed = _changed(load_run_config(path), part.run)
    init = part.run.checkpoint.init
    if base.is_file() and init is not None and Path(init).is_file():
        same = base.read_text(encoding="utf-8").strip() == sha256_of(Path(init))
        changed += [] if same else [f"the content of {init}"]
    if changed:
        raise ConfigError(
            f"{path}: arm {part.arm.name} was begun with {'; '.join(changed[:3])}; give the changed arm another name, "
            f"or delete {part.folder}"
        )


def _changed(before: RunConfig, now: RunConfig) -> list[str]:
    """Return the keys in which two runs differ, with both values."""
    old, new = (
        {f"{section}.{key}" if key else section: value for section, key, value in _flat(run)} for run in (before, now)
    )
    return [f"{key} {old[key]!r}, the study has {new[key]!r}" for key in new if old[key] != new[key]]


def _flat(run: RunConfig) -> Iterator[tuple[str, str, object]]:
    for section, values in run.model_dump(mode="json").items():
        if isinstance(values, dict):
            yield from ((section, key, value) for key, value in values.items())
        else:
            yield section, "", values


def _rehearse(part: Part, deepspeed: Path) -> None:
    world = World(0, 1, 0, default_device())
    if part.arm.trained:
        ds_config = resolve_ds_config(deepspeed, part.run, 1)
        rehearse(part.run, ds_config, world, Target(1, None, True))
    elif not Path(part.run.checkpoint.init or "").is_file():
        raise ConfigError(f"checkpoint.init {part.run.checkpoint.init} does not exist; train the base first")


def _estimate(study: Study, parts: Sequence[Part], left: Sequence[Job], device: str) -> str:
    """Return how long the jobs that are left take, one after the other, from the time of a model call here."""
    training = [part for part in parts if part.arm.trained and not is_trained(part)]
    to_measure = sum(job.name.startswith("measure ") for job in left)
    if not left:
        return "nothing is left to do"
    model = build_model(parts[0].run.model).to(device)
    with _one_thread():
        forward, both = (_seconds_per_image(model, parts[0].run, device, graph) for graph in (False, True))
    images = sum(part.run.train.steps * noisy_images_per_step(part.run) for part in training)
    settings = study.evaluate
    branches = sum(1 if scale == 1 else 2 for scale in settings.cfg_scales)
    calls = 20 * settings.images + settings.samples * branches * parts[0].run.sample.num_steps
    again = sum(_forwards_again(part.run) * part.run.train.steps * part.run.train.global_batch for part in training)
    seconds = images * both + again * forward, to_measure * calls * forward
    return (
        f"about {clock(seconds[0])} of training ({seconds[0] / max(images, 1) * 1e3:.2f} ms per noisy image) and "
        f"{clock(seconds[1])} of measuring ({forward * 1e3:.2f} ms per image and call), one after the other on "
        f"{device}, without starts and saves"
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Within the context torch has one thread on the CPU, as the processes of a study have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _forwards_again(run: RunConfig) -> int:
    """Return the forwards that the schedule of a run makes beside one of every trained rollout step."""
    schedule = schedule_of(run)
    return schedule.forwards - schedule.num_trained + schedule.recomputed


def _seconds_per_image(model: Backbone, run: RunConfig, device: str, graph: bool) -> float:
    """Return the time of a model call per image, with backward where `graph`, the shortest of three.

    On the CPU that of this process alone, so that other work on the machine does not count.
    """
    config, now = run.model, time.process_time if torch.device(device).type == "cpu" else time.perf_counter
    x = torch.randn(_TIMED, *config.shape_of_latent(), device=device)
    if config.conditioning == "class":
        condition: ClassCondition | TextCondition = ClassCondition(torch.zeros(_TIMED, dtype=torch.long, device=device))
    else:
        condition = TextCondition(
            torch.randn(_TIMED, 16, config.text_width, device=device),
            torch.ones(_TIMED, 16, dtype=torch.bool, device=device),
            torch.randn(_TIMED, config.pooled_width, device=device),
        )
    times = []
    model.train(graph)
    for _ in range(3):
        began = now()
        with torch.set_grad_enabled(graph):
            v = model(x, torch.full((_TIMED,), 0.5, device=device), condition, x if config.saliency_router else None).v
        if graph:
            v.square().mean().backward()
        float(v.detach().sum())  # waits for the device
        times.append(now() - began)
    return min(times) / _TIMED


@contextmanager
def _sole_owner(folder: Path) -> Iterator[None]:
    """Hold the lock of a study. Raises ConfigError where another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{folder}: another process conducts this study; wait for it, or give --name") from None
        yield
