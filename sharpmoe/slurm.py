"""Slurm: batch files made from their templates, handed in, and the nodes of a job. No torch: login nodes run this.

A template is a batch file that can be handed in as it is: `#SBATCH --key=value` lines, then `NAME=value` lines, then
what is done with them. Making a batch file replaces such lines and nothing else.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sharpmoe.config import RunConfig
from sharpmoe.config_io import PROJECT_ROOT, load_run_config
from sharpmoe.errors import ConfigError

Setting = str | Sequence[str]  # a list becomes an array of the shell

TEMPLATES = {"posttrain": "posttrain.sbatch", "prepare": "prepare.sbatch", "sample": "sample_array.sbatch"}


class Job(NamedTuple):
    """What a job does."""

    kind: str  # a key of TEMPLATES
    run_file: Path
    ds_config: Path  # posttrain only
    words: tuple[str, ...]  # overrides of the run file (posttrain), options of the launcher (prepare, sample)
    ranks_per_node: int | None = None  # None: the GPUs of a node


class Batch(NamedTuple):
    """A batch file that can be handed in."""

    kind: str
    text: str
    path: Path  # where it is kept
    log: str  # its output; %j stands for the job's number, %A for that of an array, %a for the task's


class Resources(NamedTuple):
    """What a job asks of the cluster; None leaves the template's own line."""

    nodes: int | None = None
    gpus_per_node: int | None = None  # 0: none, on a cluster without
    cpus_per_node: int | None = None  # None for training: whole nodes
    time: str | None = None
    partition: str | None = None
    grace: int | None = None  # seconds before the time limit at which the job is asked to stop
    array: int | None = None  # tasks of a job array
    more: tuple[str, ...] = ()  # further options of sbatch, such as --account=x


def make_batch(job: Job, resources: Resources) -> Batch:
    """Make the batch file of a job from its template and its run file. Raises ConfigError."""
    run = load_run_config(job.run_file, job.words if job.kind == "posttrain" else ())
    if resources.array is not None and job.kind != "sample":
        raise ConfigError(f"--array: {job.kind} is one job; only --job sample is an array")
    for option, number in (("--nodes", resources.nodes), ("--array", resources.array)):
        if number is not None and number < 1:
            raise ConfigError(f"{option} is {number}, expected at least 1")
    folder = Path(run.output) / run.name / "slurm"
    log = f"{folder}/{job.kind}-{'%A_%a' if job.kind == 'sample' else '%j'}.log"
    own = {"job-name": run.name if job.kind == "posttrain" else f"{run.name}-{job.kind}", "output": log}
    template = (PROJECT_ROOT / "launcher" / "slurm" / TEMPLATES[job.kind]).read_text(encoding="utf-8")
    options = own | {"chdir": str(Path.cwd())} | directives(resources)
    settings = {"SOURCE": str(PROJECT_ROOT), "PYTHON": sys.executable} | _settings(job, run, resources)
    return Batch(job.kind, render(template, options, settings), folder / TEMPLATES[job.kind], log)


def _settings(job: Job, run: RunConfig, resources: Resources) -> dict[str, Setting]:
    if job.kind == "prepare":
        return {"ARGUMENTS": ["--out", run.data.first_place, *job.words]}
    folder = str(Path(run.output) / run.name)
    if job.kind == "sample":
        return {"ARGUMENTS": [folder, *job.words]}
    ranks = job.ranks_per_node or resources.gpus_per_node
    if ranks == 0:
        raise ConfigError("--gpus-per-node is 0: say how many ranks a node runs with --ranks-per-node N")
    words = ["--deepspeed", str(job.ds_config), "--config", str(job.run_file), *job.words]
    return {"RUN_FOLDER": folder, "ARGUMENTS": words} | ({"RANKS_PER_NODE": str(ranks)} if ranks else {})


def directives(resources: Resources) -> dict[str, str | None]:
    """Options of sbatch, by name; None takes a line away."""
    values: dict[str, str | None] = {}
    if resources.nodes is not None:
        values["nodes"] = str(resources.nodes)
    if resources.gpus_per_node is not None:
        values["gpus-per-node"] = str(resources.gpus_per_node) if resources.gpus_per_node else None
    if resources.cpus_per_node is not None:
        values |= {"cpus-per-task": str(resources.cpus_per_node), "exclusive": None, "mem": None}
    if resources.time is not None:
        values["time"] = resources.time
    if resources.partition is not None:
        values["partition"] = resources.partition
    if resources.grace is not None:
        values["signal"] = f"USR1@{resources.grace}"
    if resources.array is not None:
        values["array"] = f"0-{resources.array - 1}"
    return values | dict(_option(word) for word in resources.more)


def render(template: str, options: Mapping[str, str | None], settings: Mapping[str, Setting]) -> str:
    """Make a batch file from a template: replace, add or take away directives, replace settings."""
    lines = template.splitlines()
    for name, value in options.items():
        lines = _with_directive(lines, name, value)
    for name, setting in settings.items():
        lines = _with_setting(lines, name, setting)
    return "\n".join(lines) + "\n"


def submit(batch: Batch) -> int:
    """Keep a batch file in its run folder and hand it in; returns the job's number. Raises ConfigError."""
    batch.path.parent.mkdir(parents=True, exist_ok=True)  # Slurm does not make the folder of its log
    batch.path.write_text(batch.text, encoding="utf-8")
    return int(_ask(["sbatch", "--parsable", str(batch.path)]).split(";")[0])


def follow(batch: Batch, job: int) -> str:
    """Say how a job that was handed in is followed, stopped and ended."""
    log = batch.log.replace("%j", str(job)).replace("%A", str(job)).replace("%a", "*")
    rows = {"follow": f"tail -F {log}", "state": f"squeue --jobs {job}", "batch file": str(batch.path)}
    if batch.kind == "posttrain":
        rows["save, queue again"] = f"scancel --signal=USR1 {job}"
    rows["end"] = f"scancel {job}"
    return "\n".join([f"submitted job {job}", *(f"  {name:<19}{text}" for name, text in rows.items())])


def nodes_of_job() -> list[str]:
    """Names of the nodes of the job that this process is part of. Raises ConfigError outside of one."""
    listed = os.environ.get("SLURM_JOB_NODELIST")
    if not listed:
        raise ConfigError("SLURM_JOB_NODELIST is not set; run this inside a Slurm job (sbatch or salloc)")
    return _ask(["scontrol", "show", "hostnames", listed]).split()


def hostfile(nodes: Sequence[str], slots: int | None) -> str:
    """Lay out `NODE slots=N` lines; without `slots`, as many as the GPUs that Slurm gave the job on each node."""
    if slots is None:
        gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
        if not gpus.isdigit() or gpus == "0":
            raise ConfigError("SLURM_GPUS_ON_NODE is not set: the job has no GPUs; say how many ranks with --slots N")
        slots = int(gpus)
    if slots < 1:
        raise ConfigError(f"--slots is {slots}, expected at least 1")
    return "".join(f"{node} slots={slots}\n" for node in nodes)


def _ask(words: Sequence[str]) -> str:
    try:
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        raise ConfigError(f"{words[0]} not found; run this on a machine with the Slurm commands") from None
    except subprocess.CalledProcessError as error:
        said = " ".join(error.stderr.split()) or f"exit code {error.returncode}"
        raise ConfigError(f"{words[0]} refused: {said}") from None


def _option(word: str) -> tuple[str, str | None]:
    match = re.fullmatch(r"--([a-z][a-z-]*)(?:=(.+))?", word)
    if match is None:
        raise ConfigError(f"--sbatch {word!r}: expected an option such as --account=NAME")
    return match[1], match[2] or ""


def _with_directive(lines: Sequence[str], name: str, value: str | None) -> list[str]:
    line = f"#SBATCH --{name}" + (f"={shlex.quote(value)}" if value else "")
    found = [i for i, text in enumerate(lines) if re.match(rf"#SBATCH --{name}(=|\s|$)", text)]
    kept = [text for i, text in enumerate(lines) if i not in found]
    if value is None:
        return kept
    last = max(i for i, text in enumerate(kept) if text.startswith("#SBATCH"))
    place = found[0] if found else last + 1
    return [*kept[:place], line, *kept[place:]]


def _with_setting(lines: Sequence[str], name: str, setting: Setting) -> list[str]:
    value = shlex.quote(setting) if isinstance(setting, str) else f"({shlex.join(setting)})"
    found = [i for i, text in enumerate(lines) if text.startswith(f"{name}=")]
    if len(found) != 1:
        raise ValueError(f"the template has {len(found)} lines {name}=")
    return [f"{name}={value}" if i == found[0] else text for i, text in enumerate(lines)]
