"""Start ranks of a launcher as plain processes, as `srun` would: nobody above them changes their exit codes."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.distributed import free_port

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def ranks_of(words: Sequence[str], count: int, folder: Path) -> "Iterator[list[subprocess.Popen[str]]]":
    """`python <words>` as `count` ranks; rank r writes to folder/out<r> and folder/err<r>. Ends what is left."""
    port = free_port()
    processes = [_start(words, rank, count, port, folder) for rank in range(count)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _start(words: Sequence[str], rank: int, count: int, port: int, folder: Path) -> "subprocess.Popen[str]":
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = os.environ | {key: str(value) for key, value in place.items()} | {"OMP_NUM_THREADS": "1"}
    with (folder / f"out{rank}").open("w") as out, (folder / f"err{rank}").open("w") as err:
        return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, stdout=out, stderr=err, text=True)
