"""Batch files: made from templates that a shell accepts, with what the run and the options say; nothing handed in."""

import shlex
import subprocess
from pathlib import Path

import pytest

from launcher import hostfile, submit
from sharpmoe import slurm
from sharpmoe.config_io import PROJECT_ROOT
from sharpmoe.errors import ConfigError

FOLDER = PROJECT_ROOT / "launcher" / "slurm"
BIG = ["--nodes", "4", "--gpus-per-node", "8", "--time", "24:00:00", "--partition", "x", "--dry-run"]


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert submit.main(words) == 0
    return capsys.readouterr().out


def settings(batch: str, tmp_path: Path) -> dict[str, list[str]]:
    """What the shell makes of the NAME=value lines."""
    assignments = [line for line in batch.splitlines() if line.split("=")[0].isupper() and "$" not in line]
    names = [line.split("=")[0] for line in assignments]
    tell = [f'printf "%s\\0" {name} "${{{name}[@]}}" ""' for name in names]
    (tmp_path / "tell").write_text("\n".join([*assignments, *tell]))
    told = subprocess.run(["bash", str(tmp_path / "tell")], check=True, capture_output=True, text=True).stdout
    groups = [group.split("\0") for group in told.split("\0\0") if group]
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


@pytest.mark.parametrize("kind", slurm.TEMPLATES)
def test_templates_are_batch_files_by_themselves(kind: str) -> None:
    path = FOLDER / slurm.TEMPLATES[kind]
    subprocess.run(["bash", "-n", str(path)], check=True)
    words = {word for line in path.read_text().splitlines() if line.startswith("#SBATCH") for word in shlex.split(line)}
    assert {"--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= words


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
    ("words", "told"),
    [
        (["--gpus-per-node", "0"], "--ranks-per-node N"),
        (["--nodes", "0"], "--nodes is 0"),
        (["--array", "2"], "only --job sample is an array"),
        (["--train.stepz", "2"], "did you mean train.steps"),
        (["--sbatch=account"], "expected an option such as --account=NAME"),
    ],
)
def test_mistakes_are_told_before_anything_is_handed_in(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.main([*words, "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert told in line


def test_a_machine_without_slurm_is_told_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit.main(["--output", str(tmp_path)]) == 2
    assert "sbatch not found" in capsys.readouterr().err


def test_a_hostfile_has_a_line_per_node(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert slurm.hostfile(["a", "b"], 2) == "a slots=2\nb slots=2\n"
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    assert slurm.hostfile(["a"], None) == "a slots=8\n"
    monkeypatch.delenv("SLURM_GPUS_ON_NODE")
    with pytest.raises(ConfigError, match="--slots N"):
        slurm.hostfile(["a"], None)
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    assert hostfile.main(["--slots", "2"]) == 2
    assert "inside a Slurm job" in capsys.readouterr().err
