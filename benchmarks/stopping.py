"""Time to stop a run: from SIGTERM on one rank, at each kind of work, to the end of all ranks, checkpoint verified.

python -m benchmarks.stopping --ranks 2 [--section.key value ...]
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sharpmoe.checkpoint import manifest
from sharpmoe.log_file import read_log
from tests.launcher.ranks import ranks_of

# Settings that make each kind of work long, so that a signal right after a step's figures arrives during it.
PLACES: dict[str, list[str]] = {
    "step": ["--checkpoint.every", "0"],
    "save": ["--checkpoint.every", "1", "--checkpoint.asynchronous", "false"],
    "validation": ["--log.validate_every", "1", "--log.validation_images", "143"],
    "sampling": ["--log.sample_every", "1", "--sample.num_steps", "100"],
}
QUIET = ["--log.every", "1", "--log.allocation", "false", "--log.validate_every", "0", "--log.sample_every", "0"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    arguments, overrides = parser.parse_known_args(argv)
    for place in arguments.places:
        words = PLACES[place]
        with tempfile.TemporaryDirectory() as folder:
            print(f"{place:<12}{measure(place, Path(folder), arguments.ranks, [*words, *overrides])}", flush=True)


def measure(place: str, folder: Path, count: int, words: Sequence[str]) -> str:
    quiet = [word for pair in zip(QUIET[::2], QUIET[1::2], strict=True) if pair[0] not in words for word in pair]
    command = ["launcher/train.py", *quiet, *words, "--output", str(folder)]
    with ranks_of(command, count, folder) as ranks:
        wait_for(lambda: steps(folder) >= 2, ranks, folder)
        if place == "save":
            wait_for(lambda: any(folder.glob("quickstart/checkpoints/.step*")), ranks, folder)
        time.sleep(0.2)
        began = time.monotonic()
        ranks[-1].send_signal(signal.SIGTERM)
        codes = [rank.wait(120) for rank in ranks]
        took = time.monotonic() - began
    checkpoints = folder / "quickstart" / "checkpoints"
    manifest.verify_checkpoint(checkpoints / (checkpoints / "latest").read_text().strip())
    stopped = json.loads((folder / "quickstart" / "stopped.json").read_text())
    step = statistics.median(read_log(folder / "quickstart" / "log.jsonl")["throughput/seconds_per_step"].values())
    return f"{took:5.1f} s (a step takes {step:.1f} s)  exit codes {codes}  {stopped}"


def steps(folder: Path) -> int:
    log = folder / "quickstart" / "log.jsonl"
    return log.read_text().count('"loss/total"') if log.exists() else 0


def wait_for(holds: Callable[[], bool], ranks: "Sequence[subprocess.Popen[str]]", folder: Path) -> None:
    deadline = time.monotonic() + 300
    while not holds():
        if time.monotonic() > deadline or any(rank.poll() is not None for rank in ranks):
            sys.exit((folder / "err0").read_text())
        time.sleep(0.02)


if __name__ == "__main__":
    main()
