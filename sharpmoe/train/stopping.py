"""What a run that a signal has stopped leaves behind: one small file, which says that it wants to be started again."""

import json
from pathlib import Path
from typing import NamedTuple

from sharpmoe import durable

FILE = "stopped.json"


class Stopped(NamedTuple):
    """How a run was stopped."""

    signal: str
    step: int  # optimizer steps done and saved
    looked: bool  # False: validation and pictures that were due after that step are still to be made


def write(folder: Path, stopped: Stopped) -> None:
    """Leave the file in a run folder, durably. Rank 0 calls it, after the checkpoint is on the disk."""
    durable.write_atomically(folder / FILE, json.dumps(stopped._asdict()))


def clear(folder: Path) -> None:
    """Take the file away: the run goes on, or is finished."""
    (folder / FILE).unlink(missing_ok=True)


def unfinished_look(folder: Path, step: int) -> bool:
    """Whether a run that goes on from `step` owes what was due after it. No communication."""
    try:
        stopped = Stopped(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return False
    return stopped.step == step and not stopped.looked
