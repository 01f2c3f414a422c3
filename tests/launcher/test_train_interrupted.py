"""Ctrl-C as a terminal sends it, to the whole foreground process group: saved, one closing line, 130, no traceback."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from sharpmoe.checkpoint import manifest
from sharpmoe.config_io import dump_run_config
from sharpmoe.parallel.ranks import signals
from tests.distributed import free_port
from tests.fixtures_data import make_shards
from tests.selection import sweep
from tests.train.setting import make_run

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
HELD = [sys.executable, "launcher/hold_signals.py"]


class Form(NamedTuple):
    """A way of starting a run of two ranks, and what of its end is the launcher's own."""

    before: list[str]  # words before launcher/train.py
    code: int  # exit code: -2 is a process that SIGINT has killed, 130 for a shell
    own: str = ""  # words of the launcher's own traceback
    batch: tuple[int, int | None] = (8, None)  # images of a step, and of a micro-batch


def port() -> list[str]:
    return ["--master_port", str(free_port())]


# deepspeed's first process and torchrun let the exception of Ctrl-C pass, after the ranks have got the signal.
FORMS = {
    "python": Form([sys.executable], 130),
    "deepspeed": Form([str(BIN / "deepspeed"), "--quiet", "--num_accelerators", "2"], -2, "deepspeed/launcher/runner"),
    "deepspeed, held": Form([*HELD, str(BIN / "deepspeed"), "--quiet", "--num_accelerators", "2"], 130),
    "torchrun": Form([str(BIN / "torchrun"), "--nproc_per_node", "2"], 1, "torch/distributed/elastic"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data") / "shards")


def start(words: list[str], **options: object) -> "subprocess.Popen[str]":
    """Start a command in a process group of its own, as a shell does with a foreground job.

    SIGINT has its default there: tests that run in the background of a script inherit that it is ignored.
    """
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = kept | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{os.environ['PATH']}"}
    return subprocess.Popen(
        words, cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,  # type: ignore[call-overload]
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


@pytest.fixture
def training(form: Form, data: Path, tmp_path: Path) -> "Iterator[subprocess.Popen[str]]":
    checkpoint = {"resume": "auto"}
    train = {"steps": 100_000, "global_batch": form.batch[0], "micro_batch": form.batch[1]}
    run = make_run(data, tmp_path, stage="pretrain", train=train, checkpoint=checkpoint)
    (tmp_path / "run.yaml").write_text(dump_run_config(run))
    before = form.before if form.before[0] == sys.executable and len(form.before) == 1 else [*form.before, *port()]
    process = start([*before, "launcher/train.py", "--config", str(tmp_path / "run.yaml")])
    yield process
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def press(process: "subprocess.Popen[str]") -> None:
    os.killpg(process.pid, signal.SIGINT)


def read_to(process: "subprocess.Popen[str]", words: str) -> str:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(words, line):
            return "".join(lines)
    raise AssertionError("".join(lines))


def of_ours(text: str, form: Form) -> str:
    """The output without the traceback of a launcher, which must be of the launcher alone."""
    if form.own:
        assert form.own in text
        text = re.sub(r"(?ms)^Traceback .*?^(KeyboardInterrupt|\S*SignalException.*?)$\n", "", text)
    return text


@pytest.mark.dist
@pytest.mark.parametrize("form", sweep(FORMS.values(), [FORMS["python"]]), ids=FORMS)
def test_ctrl_c_saves_and_says_so_once(form: Form, training: "subprocess.Popen[str]", tmp_path: Path) -> None:
    read_to(training, r"step +2/")
    press(training)
    out, _ = training.communicate(timeout=120)
    assert training.returncode == form.code, out
    assert out.count("SIGINT: the run ends after this step and saves") == 1
    (closing,) = re.findall("^stopped by SIGINT after step .*", out, re.M)
    assert "Traceback" not in of_ours(out, form)
    latest = tmp_path / "run" / "checkpoints" / (tmp_path / "run" / "checkpoints" / "latest").read_text()
    assert str(latest) in closing
    assert manifest.verify_checkpoint(latest).progress.step >= 2
    assert json.loads((tmp_path / "run" / "stopped.json").read_text())["signal"] == "SIGINT"


LONG_STEPS = FORMS["python"]._replace(batch=(1024, 4))


@pytest.mark.dist
@pytest.mark.parametrize("form", [LONG_STEPS], ids=["python"])
def test_a_second_ctrl_c_ends_at_once(form: Form, training: "subprocess.Popen[str]", tmp_path: Path) -> None:
    read_to(training, r"threads")
    press(training)  # at once: the run must not have ended before the second
    read_to(training, "SIGINT: the run ends")
    time.sleep(signals._SAME_REQUEST + 0.1)
    press(training)
    out, _ = training.communicate(timeout=60)
    assert (out, training.returncode) == (
        "second signal, SIGINT: leaving at once, not saved since the last checkpoint\n",
        130,
    )
    assert not (tmp_path / "run" / "checkpoints" / "latest").exists()


SLOW_IMPORT = """
import launcher.startup, sys, time
print("importing", flush=True)
time.sleep(60)
"""


def test_ctrl_c_while_a_command_is_imported_is_one_line() -> None:
    process = start([sys.executable, "-c", SLOW_IMPORT])
    read_to(process, "importing")
    time.sleep(0.1)
    press(process)
    out, _ = process.communicate(timeout=60)
    assert (out, process.returncode) == ("interrupted\n", -signal.SIGINT)  # 130 for a shell


SLOW_STEPS = {name: FORMS[name]._replace(batch=(256, 4)) for name in ("python", "deepspeed", "torchrun")}


@pytest.mark.dist
@pytest.mark.parametrize("form", sweep(SLOW_STEPS.values(), []), ids=SLOW_STEPS)
def test_sigterm_to_the_group_saves(form: Form, training: "subprocess.Popen[str]", tmp_path: Path) -> None:
    """What `timeout` and schedulers send: the ranks get it, and once more from the launcher, which got it too."""
    read_to(training, r"step +1/")
    os.killpg(training.pid, signal.SIGTERM)
    out, _ = training.communicate(timeout=120)
    assert "leaving at once" not in out
    assert len(re.findall("^stopped by SIGTERM after step .*", out, re.M)) == 1, out
    latest = tmp_path / "run" / "checkpoints" / (tmp_path / "run" / "checkpoints" / "latest").read_text()
    assert manifest.verify_checkpoint(latest).progress.step >= 1
