"""Real jobs on a real Slurm: stopped by hand and by the time limit, queued again, with the same losses at the end."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from sharpmoe.checkpoint import manifest
from sharpmoe.config_io import DEFAULT_DS_CONFIG, DEFAULT_RUN_CONFIG, PROJECT_ROOT
from sharpmoe.log_file import read_log
from sharpmoe.model.weights import load_model, save_weights
from sharpmoe.slurm import Resources, SlurmJob, make_batch_file
from tests.fixtures_data import make_shards
from tests.slurm.cluster import NODES, Cluster, asleep, is_untold, running, until
from tests.train.setting import identical

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 16
TWO_NODES = ["--nodes", "2", "--gpus-per-node", "0", "--ranks-per-node", "1", "--cpus-per-node", "1", "--grace", "60"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The quickstart, its model and its base, on a few drawn shapes and with short steps."""
    folder = tmp_path_factory.mktemp("quick")
    make_shards(folder / "shards", size=64, channels=16, text_width=384)
    model, _ = load_model(PROJECT_ROOT / "assets" / "base.safetensors")
    save_weights(folder / "base.safetensors", model.state_dict(), model.config)  # without a word about other data
    given = {
        "data.shards": folder / "shards",
        "checkpoint.init": folder / "base.safetensors",
        "checkpoint.every": 7,
        "train.steps": STEPS,
        "train.global_batch": 8,
        "rollout.num_steps": 8,  # a step has to last while the test looks
        "log.every": 1,
        "log.validate_every": 6,
        "log.validation_images": 4,
        "log.sample_every": 0,
        "log.allocation": "false",
        "output": folder,
    }
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def submit(cluster: Cluster, *words: str) -> str:
    """`launcher/submit.py`; the number of the job."""
    told = cluster.ask(sys.executable, str(PROJECT_ROOT / "launcher" / "submit.py"), *words)
    found = re.search(r"^submitted job (\d+)$", told, re.MULTILINE)
    assert found, told
    return found[1]


def steps_of(run: Path) -> list[int]:
    """Optimizer steps on record so far, in order, repeated ones too."""
    if not (run / "log.jsonl").exists():
        return []
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [record["step"] for record in records if "loss/total" in record]


def outcome(run: Path) -> tuple[dict[str, dict[int, float]], dict[str, Any]]:
    curves = {
        tag: curve for tag, curve in read_log(run / "log.jsonl").items() if tag.startswith(("loss/", "validation/"))
    }
    folder = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    manifest.verify_checkpoint(folder)
    return curves, load_file(folder / "live.safetensors")


def log_of(run: Path, job: str) -> str:
    path = run / "slurm" / f"posttrain-{job}.log"
    return path.read_text() if path.exists() else "no log"


def test_a_stopped_job_is_queued_again_and_ends_the_same(cluster: Cluster, words: list[str]) -> None:
    folder = Path(words[-1])
    whole, broken = folder / "whole", folder / "broken"
    straight = submit(cluster, *TWO_NODES, "--time", "30", "--name", "whole", *words)
    job = submit(cluster, *TWO_NODES, "--time", "30", "--name", "broken", *words)
    told = lambda: log_of(broken, job) + cluster.logs()  # noqa: E731

    until("two steps", lambda: len(steps_of(broken)) >= 2, 240, told)
    ranks = cluster.ranks(job)
    with asleep(ranks):
        cluster.ask("scancel", "--signal=TERM", job)
        until("SIGTERM", lambda: not any(is_untold(rank, signal.SIGTERM) for rank in ranks), 60, told)
    until("the first return to the queue", lambda: cluster.restarts(job) == 1, 60, told)
    before = json.loads((broken / "stopped.json").read_text())
    assert (before["signal"], before["step"]) == ("SIGTERM", max(steps_of(broken)))

    until("steps after the return", lambda: max(steps_of(broken)) > before["step"], 240, told)
    ranks = cluster.ranks(job)
    with asleep(ranks):  # while the controller takes its time
        # The controller looks at limits every 30 s. It sends the signal from 90 s before the end, the 60 s of grace
        # and one of its periods; with 60 to 120 s left that look is never also the one that finds the time over.
        minutes = (cluster.seconds(job) + 60) // 60 + 1
        cluster.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
        until("SIGUSR1", lambda: not any(is_untold(rank, signal.SIGUSR1) for rank in ranks), 120, told)
    until("the second return to the queue", lambda: cluster.restarts(job) == 2, 60, told)
    again = json.loads((broken / "stopped.json").read_text())
    assert (again["signal"], again["step"]) == ("SIGUSR1", max(steps_of(broken)))
    assert before["step"] < again["step"] < STEPS
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=30")

    for number in (straight, job):
        until(f"end of job {number}", lambda number=number: cluster.state(number) == "COMPLETED", 300, told)
    assert cluster.restarts(straight) == 0
    assert not (broken / "stopped.json").exists()
    starts = re.findall(r"^job \d+, start (\d+), (\S+),", log_of(broken, job), re.MULTILINE)
    assert [start for start, _ in starts] == ["1", "2", "3"]
    curves, weights = outcome(whole)
    after, same = outcome(broken)
    assert set(curves["loss/total"]) == set(range(1, STEPS + 1))
    assert after == curves
    assert identical(same, weights)


def test_an_array_draws_what_one_process_draws(cluster: Cluster, words: list[str]) -> None:
    folder = Path(words[-1])
    run = folder / "whole"
    captions = ["a red circle", "a blue cross", "a green square", "an orange triangle"]
    drawn = ["--steps", "4", "--batch-size", "2", "--captions", *captions]
    job = submit(
        cluster,
        *("--job", "sample", "--array", "2", "--gpus-per-node", "0", "--cpus-per-node", "1", "--time", "10"),
        *("--config", str(run / "config.yaml"), "--out", str(folder / "parts"), *drawn),
    )
    alone = [sys.executable, str(PROJECT_ROOT / "launcher" / "sample.py"), str(run), "--out", str(folder / "alone")]
    subprocess.run([*alone, *drawn], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=200)
    until("end of the array", lambda: cluster.state(job) == "COMPLETED", 200, cluster.logs)
    pictures = {path.name: path.read_bytes() for path in (folder / "alone").glob("00*.png")}
    assert len(pictures) == len(captions)
    assert {path.name: path.read_bytes() for path in (folder / "parts").glob("00*.png")} == pictures


def test_images_are_prepared(cluster: Cluster, tmp_path: Path) -> None:
    images, shards = tmp_path / "images", tmp_path / "shards"
    images.mkdir()
    for number in range(24):
        Image.new("RGB", (32, 32), (10 * number, 99, 0)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"number {number}")
    text = DEFAULT_RUN_CONFIG.read_text().replace("shards: data/fluent64", f"shards: {shards}\noutput: {tmp_path}")
    (tmp_path / "run.yaml").write_text(text)
    job = submit(
        cluster,
        *("--job", "prepare", "--cpus-per-node", "1", "--time", "10", "--config", str(tmp_path / "run.yaml")),
        *("--source", str(images), "--size", "32", "--pca-channels", "2", "--encoder", "hash"),
    )
    until("end of the preparation", lambda: cluster.state(job) in ("COMPLETED", "FAILED"), 200, cluster.logs)
    assert ": prepared: " in (tmp_path / "quickstart" / "slurm" / f"prepare-{job}.log").read_text()
    assert (shards / "index.json").is_file()


RANK = """
import json, os, sys
from pathlib import Path
import pytest, torch
from sharpmoe.parallel.ranks.cpus import bind_cpus
from tests.parallel.ranks.test_cpus import pretend
rank, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
given = sorted(os.sched_getaffinity(0))
with pytest.MonkeyPatch.context() as patch:
    nodes = tuple((str(cpu), number) for number, cpu in enumerate(given))  # a NUMA node with a GPU for each CPU
    pretend(Path(sys.argv[-1]) / str(rank), nodes, patch, os.environ["SHARPMOE_CPU_BINDING"])
    bind_cpus(torch.device("cuda", rank % len(nodes)), ranks)
Path(sys.argv[-1], f"{rank}.json").write_text(json.dumps([given, sorted(os.sched_getaffinity(0))]))
"""


def test_ranks_are_bound_to_cpus_of_the_job_near_their_gpu(cluster: Cluster, tmp_path: Path) -> None:
    """The batch file of a training whose ranks pretend to have GPUs: the CPUs that Slurm and torchrun leave them."""
    launcher = tmp_path / "launcher"
    launcher.mkdir()
    (launcher / "train.py").write_text(RANK)
    shutil.copy(PROJECT_ROOT / "launcher" / "hold_signals.py", launcher)
    job = SlurmJob(
        kind="posttrain", run_file=DEFAULT_RUN_CONFIG, ds_config=DEFAULT_DS_CONFIG, words=(), ranks_per_node=2
    )
    text = make_batch_file(job, Resources(gpus_per_node=0, cpus_per_node=2, time="10")).text
    settings = {"SOURCE": tmp_path, "ARGUMENTS": f"({tmp_path})", "RUN_FOLDER": tmp_path}
    settings |= {"#SBATCH --output": tmp_path / "log", "#SBATCH --chdir": tmp_path}
    for name, value in settings.items():
        text = re.sub(rf"^{name}=.*$", f"{name}={value}", text, flags=re.MULTILINE)
    (tmp_path / "job.sbatch").write_text(text)
    number = cluster.ask(
        "sbatch", "--parsable", f"--export=ALL,PYTHONPATH={PROJECT_ROOT}", str(tmp_path / "job.sbatch")
    )
    until("end of the job", lambda: cluster.state(number.strip()) == "COMPLETED", 200, cluster.logs)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    given = found[0][0]
    assert found == [[given, [given[rank]] if len(given) > 1 else given] for rank in range(2)]


def test_a_hostfile_of_a_job(cluster: Cluster) -> None:
    launcher = str(PROJECT_ROOT / "launcher" / "hostfile.py")
    told = cluster.ask("salloc", "--nodes=2", "--ntasks=2", sys.executable, launcher, "--slots", "2")
    assert sorted(told.splitlines()) == [f"{node} slots=2" for node in sorted(NODES)]
