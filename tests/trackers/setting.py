"""A run that died and was resumed, written to a tracker with its real package in its offline mode, and read back."""

import io
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sharpmoe.trackers import registry
from sharpmoe.trackers.record import TrackedTable
from sharpmoe.train.runlog import RunLog
from tests.trackers.readers import Found

PICTURE = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
SETTINGS = {"seed": 3, "optim.lr": 0.5, "data.shards": "data/mine", "train.trainable": [], "checkpoint.init": None}

# Each part of a run has a process of its own, as trackers keep state of the process and end it with atexit. They are
# forked from one that has imported torch, before it starts a thread: only the tracker is imported by each.
PROCESSES = """
import os, sys
from tests.trackers.setting import write
for part in sys.argv[3:]:
    child = os.fork()
    if child == 0:
        print(write(sys.argv[1], sys.argv[2].split(","), *map(int, part.split("-"))))
        sys.exit()
    if os.waitpid(child, 0)[1]:
        sys.exit(f"part {part} failed")
"""


def write(place: str, trackers: list[str], first_step: int, last_step: int) -> str:
    """Log steps first to last of a run of nine, validation and pictures each third; return what was said."""
    stream = io.StringIO()
    log = RunLog(
        Path(place) / "runs" / "mine", 9, first_step, every=1, stream=stream, settings=SETTINGS, trackers=trackers
    )
    for step in range(first_step, last_step + 1):
        log.scalars(step, {"loss/total": 1 / step, "saliency_flipped_t > 0.65/layer_1": 0.5, "bad": float("nan")})
        if step % 3 == 0:
            log.scalars(step, {"validation/flow": 1 / step})
            log.image(step, "samples", PICTURE)
    if last_step == 9:
        log.table(
            9, "allocation", TrackedTable(("figure", "before", "after"), (("a", 1.0, 2.0), ("b", None, 3.0)), "a 1 2")
        )
        log.warn(9, "be <careful>")
    log.close()
    return stream.getvalue()


def write_in_processes(place: Path, tracker: str, *parts: str) -> str:
    """Call `write` for each of `parts`, such as "1-5", in a process of its own; return what was said."""
    environment = os.environ | {"WANDB_MODE": "offline", "TRACKIO_DIR": str(place / "trackio"), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", PROCESSES, str(place), tracker, *parts]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200, check=True).stdout


def check_resumed(
    place: Path, tracker: str, read: Callable[[str], Found], write_parts: Callable[[str, str], str]
) -> None:
    """Check what a tracker holds of a run that was saved after step 3, died after step 5, and went on from step 4."""
    assert "note" not in write_parts("1-5", "4-9")
    ids = registry.read_ids(place / "runs" / "mine")
    assert ids.keys() == {tracker}
    found = read(ids[tracker])
    by_tag = {tag.replace("_ 0.65", "> 0.65"): steps for tag, steps in found.figures.items()}
    assert by_tag["loss/total"] == list(range(1, 10))
    assert by_tag["saliency_flipped_t > 0.65/layer_1"] == list(range(1, 10))
    assert by_tag["validation/flow"] == [3, 6, 9]
    assert "bad" not in by_tag
    assert {"samples", "allocation", "warnings"} <= found.media
    assert str(found.settings["seed"]) == "3"
    assert found.settings["data.shards"] == "data/mine"
    assert str(place) not in found.text.replace(str(place / "runs" / "mlruns"), "")
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", found.text)  # "vm" is in random ids by chance
