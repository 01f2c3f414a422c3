"""Batch files made from the templates with the settings of a run file and of the options; nothing is submitted."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.submit import main
from sharpmoe.config_io import dump_run_config
from tests.fixtures_data import make_shards
from tests.train.setting import make_run

BIG = ["--nodes", "4", "--gpus-per-node", "8", "--time", "24:00:00", "--partition", "x", "--dry-run"]


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 0
    return capsys.readouterr().out


def settings(batch: str, tmp_path: Path) -> dict[str, list[str]]:
    """What the shell makes of the NAME=value lines."""
    assignments = [line for line in batch.splitlines() if line.split("=")[0].isupper() and "$" not in line]
    names = [line.split("=")[0] for line in assignments]
    tell = [f'printf "%s\\0" {name} "${{{name}[@]}}" ""' for name in names]
    (tmp_path / "tell").write_text("\n".join([*assignments, *tell]))
    shown = subprocess.run(["bash", str(tmp_path / "tell")], check=True, capture_output=True, text=True).stdout
    groups = [group.split("\0") for group in shown.split("\0\0") if group]
    return {group[0]: group[1:] for group in groups}


def test_a_run_becomes_a_batch_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    batch = printed([*BIG, "--name", "my run", "--sbatch=--account=a", "--sbatch=--hold", "--train.steps", "7"], capsys)
    lines = batch.splitlines()
    for line in (
        "#SBATCH --job-name='my run'",
        "#SBATCH --nodes=4",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --time=24:00:00",
        "#SBATCH --partition=x",
        "#SBATCH --signal=USR1@180",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --account=a",
        "#SBATCH --hold",
    ):
        assert lines.count(line) == 1
    assert max(i for i, line in enumerate(lines) if line.startswith("#SBATCH")) < lines.index("RANKS_PER_NODE=8")
    found = settings(batch, tmp_path)
    assert found["RUN_FOLDER"] == ["runs/my run"]
    assert found["ARGUMENTS"][-4:] == ["--name", "my run", "--train.steps", "7"]


def test_arrays_and_preparation(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    batch = printed(["--job", "sample", "--array", "3", "--dry-run", "--captions", "a red 'apple'", "b"], capsys)
    assert "#SBATCH --array=0-2" in batch.splitlines()
    assert settings(batch, tmp_path)["ARGUMENTS"] == ["runs/quickstart", "--captions", "a red 'apple'", "b"]
    batch = printed(["--job", "prepare", "--dry-run", "--limit", "9", "--cpus-per-node", "2"], capsys)
    assert "#SBATCH --cpus-per-task=2" in batch.splitlines()
    assert settings(batch, tmp_path)["ARGUMENTS"] == ["--out", "data/fluent64", "--limit", "9"]


def test_shared_nodes_and_nodes_without_gpus(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    few = ["--gpus-per-node", "0", "--ranks-per-node", "2", "--cpus-per-node", "4", "--grace", "60", "--dry-run"]
    batch = printed(few, capsys)
    assert "#SBATCH --cpus-per-task=4" in batch.splitlines()
    assert "#SBATCH --signal=USR1@60" in batch.splitlines()
    assert settings(batch, tmp_path)["RANKS_PER_NODE"] == ["2"]
    for absent in ("--gpus", "--exclusive", "--mem"):
        assert f"#SBATCH {absent}" not in batch


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus-per-node", "0"], "--ranks-per-node N"),
        (["--nodes", "0"], "--nodes: got '0', allowed: a whole number >= 1"),
        (["--gpus-per-node", "-2"], "--gpus-per-node: got '-2', allowed: a whole number >= 0"),
        (["--ranks-per-node", "0"], "--ranks-per-node: got '0', allowed: a whole number >= 1"),
        (["--ranks-per-node", "3"], "set train.global_batch to 33"),
        (["--cpus-per-node", "0"], "--cpus-per-node: got '0', allowed: a whole number >= 1"),
        (["--time", "abc"], "--time 'abc': expected MINUTES"),
        (["--time", "0:00"], "--time '0:00': a limit of nothing"),
        (["--time", "3"], "--grace is 180 seconds, not below the time limit 3 (180 seconds)"),
        (["--sbatch=--time=soon"], "--time 'soon': expected MINUTES"),
        (["--grace", "-5"], "--grace: got '-5', allowed: a whole number from 1 to 65535"),
        (["--grace", "70000"], "--grace: got '70000', allowed: a whole number from 1 to 65535"),
        (["--partition", ""], "--partition '': expected the name of a partition"),
        (["--deepspeed", "nothere.json"], "--deepspeed nothere.json: cannot be read as JSON (No such file"),
        (["--config", "nothere.yaml"], "run file nothere.yaml does not exist"),
        (["--array", "2"], "only --job sample is an array"),
        (["--train.stepz", "2"], "did you mean train.steps"),
        (["--sbatch=account"], "expected an option such as --account=NAME"),
        (["--srun=image"], "--srun 'image': expected an option such as --container-image=IMAGE"),
        (["--setup", "nothere.sh"], "--setup nothere.sh: no such file; expected shell lines"),
    ],
)
def test_mistakes_are_reported_before_anything_is_submitted(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize("time", ["4", "90:00", "24:00:00", "2-12", "2-12:30", "1-00:00:30", "UNLIMITED"])
def test_every_form_of_a_time_limit(time: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"#SBATCH --time={time}" in printed(["--time", time, "--dry-run"], capsys).splitlines()


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_setup_with_line_ends_of_windows_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup = tmp_path / "setup.sh"
    setup.write_bytes(b"module load cuda\r\n")
    assert main(["--dry-run", "--no-check", "--setup", str(setup)]) == 2
    error = capsys.readouterr().err
    assert "(CRLF)" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("kind", ["posttrain", "prepare", "sample"])
def test_a_job_sources_its_setup_and_hands_options_to_srun(
    kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    setup = tmp_path / "my setup.sh"
    setup.write_text('export SEEN="$UNSET by setup"\nPYTHON=/other/python\n')
    words = [
        "--setup",
        str(setup),
        "--srun=--container-image=a b.sqsh",
        "--srun=--mpi=none",
        "--job",
        kind,
        "--dry-run",
    ]
    (tmp_path / "job").write_text(printed(words, capsys))
    script(tmp_path / "srun", 'printf "%s\\n" "$@" "seen $SEEN"')
    for name in ("scontrol", "torchrun"):
        script(tmp_path / name, "echo NodeAddr=x")
    given = {"SLURM_JOB_NODELIST": "x", "SLURM_JOB_ID": "1", "SLURM_CPUS_ON_NODE": "2", "SLURM_ARRAY_TASK_ID": "0"}
    given |= {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "1", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    ran = subprocess.run(["bash", str(tmp_path / "job")], env=given, capture_output=True, text=True, check=True)
    lines = ran.stdout.splitlines()
    assert lines[-1] == "seen  by setup"
    first = lines.index("--container-image=a b.sqsh")
    assert lines[first + 1 : first + 3] == ["--mpi=none", "--cpus-per-task=2"]
    assert "/other/python" in lines
    assert ran.stderr == ""


@pytest.mark.slow
def test_a_run_is_checked_before_it_is_submitted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "sbatch", "echo 7")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("RANK", "3")  # of whatever this is started in
    run = make_run(make_shards(tmp_path / "shards"), tmp_path / "runs", stage="pretrain", train={"micro_batch": 2})
    (tmp_path / "run.yaml").write_text(dump_run_config(run))
    script(tmp_path / "python", f'echo ran >> {tmp_path}/ran; exec {sys.executable} "$@"')
    (tmp_path / "setup.sh").write_text(f"PYTHON={tmp_path}/python\n")
    words = ["--config", str(tmp_path / "run.yaml"), "--nodes", "2", "--gpus-per-node", "2"]
    assert main([*words, "--setup", str(tmp_path / "setup.sh")]) == 0
    said = capsys.readouterr().out
    assert "8 = 2 per rank x 1 accumulation x 4 rank(s)" in said
    assert said.index("\nok\n") < said.index("submitted job 7\n")
    assert (tmp_path / "ran").read_text() == "ran\n"
    shutil.rmtree(tmp_path / "runs")
    assert main([*words, "--data.shards", "nothere"]) == 2
    note, line = capsys.readouterr().err.splitlines()
    assert note.startswith("checking that the run will start")
    assert line.startswith("error: not submitted: nothere: no index.json; run `python launcher/prepare.py")
    assert not (tmp_path / "runs").exists()
    assert main([*words, "--data.shards", "nothere", "--no-check"]) == 0
    assert "submitted job 7" in capsys.readouterr().out


def test_a_job_without_torch_is_not_submitted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A login node may lack it; the jobs then run the Python that a setup names."""
    script(tmp_path / "sbatch", "echo 7")
    (tmp_path / "setup.sh").write_text("PYTHON=/images/python\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = ["--output", str(tmp_path / "runs"), "--name", "a", "--no-check"]
    assert main(words) == 2
    assert "which has no torch: name the Python of the jobs in a --setup FILE" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert main([*words, "--setup", str(tmp_path / "setup.sh")]) == 0


def test_a_refusal_of_slurm_names_the_batch_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "sbatch", "echo 'sbatch: error: invalid partition: x' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert main(["--output", str(tmp_path), "--name", "a", "--no-check"]) == 2
    line = capsys.readouterr().err
    file = tmp_path / "a" / "slurm" / "posttrain.sbatch"
    assert line == f"error: sbatch refused: sbatch: error: invalid partition: x; the batch file is {file}\n"
    assert file.is_file()


def test_a_machine_without_slurm(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["--output", str(tmp_path)]) == 2
    assert "sbatch not found" in capsys.readouterr().err
