"""From nothing to pictures of a post-trained model: `python launcher/quickstart.py [--source FOLDER] [KEYS]`.

Prepares images, post-trains the shipped base with the shipped run file, draws samples, and prints where the model
spends its experts before and after. Works in any folder and writes below data/ and runs/ there. What is done already
is not done again. The default images are an npm package of 16 MB. KEYS: `--section.key VALUE`, keys of the run file.
"""

if not __package__:  # run as a script, which has this folder on its path
    import startup  # noqa: F401 - Ctrl-C or missing packages are one line

import argparse
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from launcher import prepare, sample
from launcher.bounds import POSITIVE
from launcher.command import OVERRIDES_HELP, Command
from sharpmoe.config_io import DEFAULT_DS_CONFIG, DEFAULT_RUN_CONFIG, PROJECT_ROOT, load_run_config
from sharpmoe.invocation import spell_command
from sharpmoe.log_file import LOG_FILE
from sharpmoe.overrides import parse_overrides
from sharpmoe.report.run_set import describe_runs
from sharpmoe.report.run_table import verdict_text

_BASE = "assets/base.safetensors"


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--source", default="fluent", help="images with captions instead of the default ones, as `prepare` takes them")
    add("--images", type=POSITIVE, metavar="N", help="take only so many images")
    add("--tarball", type=Path, metavar="FILE", help="npm package of the default images, where npm cannot download it")
    add("--allow-missing", action="store_true", help="leave out images that a table names and that do not exist")


def _act(arguments: argparse.Namespace) -> int:
    overrides = _overrides(arguments)
    run = load_run_config(DEFAULT_RUN_CONFIG, overrides)
    folder = Path(run.output) / run.name
    latest = folder / "checkpoints" / "latest"
    print("== 1/3 data: images and captions to shards", flush=True)
    code = prepare.main(_prepare_words(arguments, run.data.first_place))
    if code:
        return code
    print(f"== 2/3 post-training of {run.checkpoint.init}", flush=True)
    code = _train(overrides)
    if code:
        return code
    print("== 3/3 samples", flush=True)
    drawn = _last_drawn(folder)
    if drawn is None or drawn.stat().st_mtime < latest.stat().st_mtime:
        code = sample.main([str(folder)])
        if code:
            return code
    print(_places(folder, run.data.first_place, latest, _last_drawn(folder)))
    return 0


def _last_drawn(folder: Path) -> Path | None:
    """Return the newest grid of samples of a run: a call after more training is numbered, as it overwrites nothing."""
    grids = sorted((folder / "samples" / "drawn").glob("grid*.png"), key=lambda grid: grid.stat().st_mtime)
    return grids[-1] if grids else None


def _overrides(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Return the keys given; a source of one's own has shards and a run under its own name unless they are given."""
    name = Path(arguments.source).stem
    own = {} if arguments.source == "fluent" else {"name": name, "data.shards": f"data/{name}"}
    given = parse_overrides(arguments.overrides)
    return (*arguments.overrides, *(f"--{key}={value}" for key, value in own.items() if key not in given))


def _prepare_words(arguments: argparse.Namespace, out: str) -> list[str]:
    """Return the options of `prepare`; other images than all of the default ones are encoded as the base's were."""
    words = ["--source", arguments.source, "--out", out]
    words += ["--tarball", str(arguments.tarball)] if arguments.tarball else []
    words += ["--limit", str(arguments.images)] if arguments.images else []
    words += ["--allow-missing"] if arguments.allow_missing else []
    other = arguments.source != "fluent" or arguments.images
    return words + (["--like", _BASE, "--size", "64"] if other else [])


def _train(overrides: tuple[str, ...]) -> int:
    """Train under DeepSpeed on every device of this machine and return the exit code."""
    with socket.socket() as free:  # another training of this machine may have DeepSpeed's default port
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "deepspeed.launcher.runner", "--quiet", "--master_port", str(port)]
    words += [str(PROJECT_ROOT / "launcher" / "train.py")]
    words += ["--deepspeed", str(DEFAULT_DS_CONFIG), "--config", str(DEFAULT_RUN_CONFIG), *overrides]
    environment = dict(os.environ)
    if shutil.which("nvidia-smi") is None:  # each process of DeepSpeed would warn that it found no accelerator
        environment.setdefault("DS_ACCELERATOR", "cpu")
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    return subprocess.run([sys.executable, *words], env=environment, check=False).returncode


def _places(folder: Path, shards: str, latest: Path, grid: Path | None) -> str:
    """Return the table of the run, what it shows, where its results are, and what to do next."""
    figures = folder / "allocation"
    table = next((each for each in (figures / "summary.txt", figures / "table.txt") if each.is_file()), None)
    checkpoint = latest.parent / latest.read_text(encoding="utf-8").strip()
    lines = ["", table.read_text(encoding="utf-8"), ""] if table else [""]
    if (folder / LOG_FILE).is_file():
        (run,) = describe_runs([folder])["runs"]
        lines += ["Verdict:", *verdict_text(run["verdict"]), ""]
    lines += [
        f"data          {shards}",
        f"weights       {checkpoint / 'ema.safetensors'} (live.safetensors beside it)",
        f"samples       {grid}",
        f"allocation    {figures}/ (table, curves, JSON)",
        f"report        {folder / 'report.html'}",
        f"curves        tensorboard --logdir {folder.parent}/",
        f'more samples  {spell_command("sample")} {folder} --captions "a caption" "another one"',
    ]
    return "\n".join(lines)


main = Command(text=__doc__, arguments=_arguments, act=_act, overrides=True, epilog=OVERRIDES_HELP)

if __name__ == "__main__":
    main.run()
