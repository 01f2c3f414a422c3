"""Slurm: make batch files from templates, submit them, list the nodes of a job. No torch: login nodes run this.

A template is a complete batch file: `#SBATCH --key=value` lines, then `NAME=value` lines, then the commands that use
them. Making a batch file replaces lines of these two kinds and nothing else.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sharpmoe.config import RunConfig
from sharpmoe.config_io import PROJECT_ROOT, batch_arithmetic, load_run_config
from sharpmoe.durable import write_atomically
from sharpmoe.errors import ConfigError

TEMPLATES = {"posttrain": "posttrain.sbatch", "prepare": "prepare.sbatch", "sample": "sample_array.sbatch"}

LONGEST_GRACE = 65535  # seconds of --signal that Slurm accepts

_TIME_FORMS = "MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS[:MINUTES[:SECONDS]] or UNLIMITED"
_Setting = str | Sequence[str]  # a list becomes a shell array


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """What a job runs."""

    kind: str  # a key of TEMPLATES
    run_file: Path
    ds_config: Path  # posttrain only
    words: tuple[str, ...]  # overrides of the run file (posttrain), options of the launcher (prepare, sample)
    ranks_per_node: int | None = None  # None: the GPUs of a node
    setup: Path | None = None  # shell lines that the job sources before its command
    srun: tuple[str, ...] = ()  # further options of srun, such as --container-image=x
    device_memory: float | None = None  # GiB of a GPU, for the check before the job is submitted


class BatchFile(NamedTuple):
    """A batch file that can be submitted."""

    kind: str
    text: str
    path: Path  # where `submit` writes it
    log: str  # its output; Slurm replaces %j by the job number, %A by that of an array, %a by the task number
    check: tuple[str, ...] = ()  # command that checks the run (train.py --dry-run); empty: of another kind of job


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Resources of a job; None keeps the line of the template."""

    nodes: int | None = None
    gpus_per_node: int | None = None  # 0: on a cluster without GPUs
    cpus_per_node: int | None = None  # for shared nodes; the template of training takes whole nodes
    time: str | None = None
    partition: str | None = None
    grace: int | None = None  # seconds before the time limit at which the job gets SIGUSR1
    array: int | None = None  # tasks of a job array
    more: tuple[str, ...] = ()  # further options of sbatch, such as --account=x


def make_batch_file(job: SlurmJob, resources: Resources) -> BatchFile:
    """Make the batch file of a job from its template and its run file. Raises ConfigError."""
    run = load_run_config(job.run_file, job.words if job.kind == "posttrain" else ())
    if resources.array is not None and job.kind != "sample":
        raise ConfigError(f"--array: {job.kind} is one job; only --job sample is an array")
    folder = Path(run.output) / run.name / "slurm"
    log = f"{folder}/{job.kind}-{'%A_%a' if job.kind == 'sample' else '%j'}.log"
    own = {"job-name": run.name if job.kind == "posttrain" else f"{run.name}-{job.kind}", "output": log}
    template = (PROJECT_ROOT / "launcher" / "slurm" / TEMPLATES[job.kind]).read_text(encoding="utf-8")
    options = own | {"chdir": str(Path.cwd())} | _directives(resources)
    _check_time(template, options)
    settings = {"SOURCE": str(PROJECT_ROOT), "PYTHON": sys.executable} | _settings(job, run, resources)
    check: tuple[str, ...] = ()
    if job.kind == "posttrain":
        _check_ds_file(job.ds_config)
        ranks = settings.get("RANKS_PER_NODE") or _setting_of(template, "RANKS_PER_NODE")
        world = int(options.get("nodes") or _directive_of(template, "nodes") or 1) * int(str(ranks))
        batch_arithmetic(run, world)
        check = _check_command(job, world)
    return BatchFile(job.kind, _render(template, options, settings), folder / TEMPLATES[job.kind], log, check)


def _check_command(job: SlurmJob, world: int) -> tuple[str, ...]:
    """Return the command that checks a run for `world` ranks, in the environment that the job makes for itself."""
    words = [str(PROJECT_ROOT / "launcher" / "train.py"), *_train_words(job), "--dry-run", "--world", str(world)]
    words += [] if job.device_memory is None else ["--device-memory", f"{job.device_memory:g}"]
    if job.setup is None:
        return (sys.executable, *words)
    return ("bash", "-c", 'PYTHON=$1; . "$2"; exec "$PYTHON" "${@:3}"', "check", sys.executable, str(job.setup), *words)


def check_python(setup: Path | None) -> None:
    """Raise ConfigError where a job would run this Python and it has no torch, as on a login node may be.

    setup: shell lines that a job sources first, which may name another (`PYTHON=...`).
    """
    if setup is None and importlib.util.find_spec("torch") is None:
        raise ConfigError(
            f"the job would run {sys.executable}, which has no torch: name the Python of the jobs in a --setup FILE "
            "(PYTHON=...), with --no-check where it is not on this node"
        )


def check_start(batch: BatchFile) -> str:
    """Run the check of a batch file and return what it says, nothing where there is none. Raises ConfigError."""
    _program("sbatch")  # before the seconds that the check takes
    if not batch.check:
        return ""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in ranks}
    ended = subprocess.run(batch.check, capture_output=True, text=True, env=environment, check=False)
    if ended.returncode == 0:
        return ended.stdout.strip()
    said = [line.removeprefix("error: ") for line in ended.stderr.splitlines() if line.startswith("error: ")]
    reason = said[-1] if said else (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
    hint = "" if said else "; --no-check submits without this check"
    raise ConfigError(f"not submitted: {reason}{hint}")


def _check_time(template: str, options: Mapping[str, str | None]) -> None:
    """Check the time limit, and that the signal before it comes after the start. Raises ConfigError."""
    time, signal = (options.get(name) or _directive_of(template, name) for name in ("time", "signal"))
    limit = _seconds_of(time) if time else None
    if limit is None or not signal:
        return
    match = re.search(r"@([0-9]+)", signal)
    grace = int(match[1]) if match else 0
    if grace >= limit:
        raise ConfigError(
            f"--grace is {grace} seconds, not below the time limit {time} ({limit} seconds); give a longer --time, or "
            "a shorter --grace"
        )


def _seconds_of(time: str) -> int | None:
    """Return the seconds of a time limit in a form that Slurm knows, None where there is no limit."""
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return None
    match = re.fullmatch(r"(?:([0-9]+)-)?([0-9]+)(?::([0-9]+))?(?::([0-9]+))?", time)
    if match is None:
        raise ConfigError(f"--time {time!r}: expected {_TIME_FORMS}, such as 24:00:00")
    days, *parts = match.groups()
    first, second, third = (int(part or 0) for part in parts)
    if days is not None or parts[2] is not None:
        seconds = int(days or 0) * 86400 + first * 3600 + second * 60 + third
    else:
        seconds = first * 60 + second
    if seconds == 0:
        raise ConfigError(f"--time {time!r}: a limit of nothing; give one above 0, or UNLIMITED")
    return seconds


def _check_ds_file(path: Path) -> None:
    """Check that the DeepSpeed file is there and JSON; train.py checks its keys. Raises ConfigError."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"--deepspeed {path}: cannot be read as JSON ({reason}); correct the path or the file"
        ) from None


def _directive_of(template: str, name: str) -> str | None:
    found = re.search(rf"^#SBATCH --{name}=(\S+)", template, re.MULTILINE)
    return found[1] if found else None


def _setting_of(template: str, name: str) -> str | None:
    found = re.search(rf"^{name}=(\S+)", template, re.MULTILINE)
    return found[1] if found else None


def _settings(job: SlurmJob, run: RunConfig, resources: Resources) -> dict[str, _Setting]:
    environment: dict[str, _Setting] = {"SRUN_OPTIONS": [_srun_option(word) for word in job.srun]}
    if job.setup is not None:
        if not job.setup.is_file():
            raise ConfigError(f"--setup {job.setup}: no such file; expected shell lines such as `module load cuda`")
        if b"\r\n" in job.setup.read_bytes():
            raise ConfigError(
                f"--setup {job.setup}: its lines end as on Windows (CRLF), and bash would take the \\r as part of the "
                "words; save it with Unix line ends (dos2unix)"
            )
        environment["SETUP"] = str(job.setup.absolute())
    return environment | _settings_of_kind(job, run, resources)


def _settings_of_kind(job: SlurmJob, run: RunConfig, resources: Resources) -> dict[str, _Setting]:
    if job.kind == "prepare":
        return {"ARGUMENTS": ["--out", run.data.first_place, *job.words]}
    folder = str(Path(run.output) / run.name)
    if job.kind == "sample":
        return {"ARGUMENTS": [folder, *job.words]}
    ranks = job.ranks_per_node or resources.gpus_per_node
    if ranks == 0:
        raise ConfigError("--gpus-per-node is 0: give the number of ranks per node with --ranks-per-node N")
    return {"RUN_FOLDER": folder, "ARGUMENTS": _train_words(job)} | ({"RANKS_PER_NODE": str(ranks)} if ranks else {})


def _train_words(job: SlurmJob) -> list[str]:
    return ["--deepspeed", str(job.ds_config), "--config", str(job.run_file), *job.words]


def _directives(resources: Resources) -> dict[str, str | None]:
    """Return options of sbatch by name; None removes a line."""
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
        if not re.fullmatch(r"[^\s]+", resources.partition):
            raise ConfigError(
                f"--partition {resources.partition!r}: expected the name of a partition (sinfo lists them)"
            )
        values["partition"] = resources.partition
    if resources.grace is not None:
        values["signal"] = f"USR1@{resources.grace}"
    if resources.array is not None:
        values["array"] = f"0-{resources.array - 1}"
    return values | dict(_option(word) for word in resources.more)


def _render(template: str, options: Mapping[str, str | None], settings: Mapping[str, _Setting]) -> str:
    """Return a template with directives replaced, added or removed, and settings replaced."""
    lines = template.splitlines()
    for name, value in options.items():
        lines = _with_directive(lines, name, value)
    for name, setting in settings.items():
        lines = _with_setting(lines, name, setting)
    return "\n".join(lines) + "\n"


def submit(batch: BatchFile) -> int:
    """Write a batch file to its run folder, submit it and return the job number. Raises ConfigError."""
    write_atomically(batch.path, batch.text)  # creates the folder, which Slurm does not do for its log
    try:
        return int(_output_of(["sbatch", "--parsable", str(batch.path)]).split(";")[0])
    except ConfigError as error:
        raise ConfigError(f"{error}; the batch file is {batch.path}") from None


def commands_for(batch: BatchFile, job: int) -> str:
    """Return the commands that follow, stop and end a submitted job, one per line."""
    log = batch.log.replace("%j", str(job)).replace("%A", str(job)).replace("%a", "*")
    rows = {"follow": f"tail -F {log}", "state": f"squeue --jobs {job}", "batch file": str(batch.path)}
    if batch.kind == "posttrain":
        rows["save, queue again"] = f"scancel --signal=USR1 {job}"
    rows["end"] = f"scancel {job}"
    return "\n".join([f"submitted job {job}", *(f"  {name:<19}{text}" for name, text in rows.items())])


def nodes_of_job() -> list[str]:
    """Return the names of the nodes of the job that this process belongs to. Raises ConfigError outside of a job."""
    listed = os.environ.get("SLURM_JOB_NODELIST")
    if not listed:
        raise ConfigError("SLURM_JOB_NODELIST is not set; run this inside a Slurm job (sbatch or salloc)")
    return _output_of(["scontrol", "show", "hostnames", listed]).split()


def hostfile(nodes: Sequence[str], slots: int | None) -> str:
    """Return `NODE slots=N` lines; `slots` defaults to the GPUs that Slurm gave the job on each node."""
    if slots is None:
        gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
        if not gpus.isdigit() or gpus == "0":
            raise ConfigError(
                "SLURM_GPUS_ON_NODE is not set: the job has no GPUs; give the number of ranks with --slots N"
            )
        slots = int(gpus)
    if slots < 1:
        raise ConfigError(f"--slots is {slots}, expected at least 1")
    return "".join(f"{node} slots={slots}\n" for node in nodes)


def _program(name: str) -> str:
    """Return the path of a command of Slurm. Raises ConfigError where it is not there."""
    found = shutil.which(name)
    if found is None:
        raise ConfigError(f"{name} not found; run this on a machine with the Slurm commands")
    return found


def _output_of(words: Sequence[str]) -> str:
    try:
        told = subprocess.run([_program(words[0]), *words[1:]], check=True, capture_output=True, text=True)
        return told.stdout.strip()
    except subprocess.CalledProcessError as error:
        said = " ".join(error.stderr.split()) or f"exit code {error.returncode}"
        raise ConfigError(f"{words[0]} refused: {said}") from None


def _option(word: str) -> tuple[str, str | None]:
    match = re.fullmatch(r"--([a-z][a-z-]*)(?:=(.+))?", word)
    if match is None:
        raise ConfigError(f"--sbatch {word!r}: expected an option such as --account=NAME")
    return match[1], match[2] or ""


def _srun_option(word: str) -> str:
    if not re.fullmatch(r"-(-[a-z][a-z-]*(=.*)?|[A-Za-z].*)", word):
        raise ConfigError(f"--srun {word!r}: expected an option such as --container-image=IMAGE")
    return word


def _with_directive(lines: Sequence[str], name: str, value: str | None) -> list[str]:
    line = f"#SBATCH --{name}" + (f"={shlex.quote(value)}" if value else "")
    found = [i for i, text in enumerate(lines) if re.match(rf"#SBATCH --{name}(=|\s|$)", text)]
    kept = [text for i, text in enumerate(lines) if i not in found]
    if value is None:
        return kept
    last = max(i for i, text in enumerate(kept) if text.startswith("#SBATCH"))
    place = found[0] if found else last + 1
    return [*kept[:place], line, *kept[place:]]


def _with_setting(lines: Sequence[str], name: str, setting: _Setting) -> list[str]:
    value = shlex.quote(setting) if isinstance(setting, str) else f"({shlex.join(setting)})"
    found = [i for i, text in enumerate(lines) if text.startswith(f"{name}=")]
    if len(found) != 1:
        raise ValueError(f"the template has {len(found)} lines {name}=")
    return [f"{name}={value}" if i == found[0] else text for i, text in enumerate(lines)]
