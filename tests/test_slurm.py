"""Templates are batch files that a shell accepts; hostfiles."""

import shlex
import subprocess

import pytest

from sharpmoe import slurm
from sharpmoe.config_io import PROJECT_ROOT
from sharpmoe.errors import ConfigError
from sharpmoe.parallel.ranks.cpus import CPU_BINDING

FOLDER = PROJECT_ROOT / "launcher" / "slurm"


@pytest.mark.parametrize("kind", slurm.TEMPLATES)
def test_templates_are_batch_files_by_themselves(kind: str) -> None:
    path = FOLDER / slurm.TEMPLATES[kind]
    subprocess.run(["bash", "-n", str(path)], check=True)
    words = {word for line in path.read_text().splitlines() if line.startswith("#SBATCH") for word in shlex.split(line)}
    assert {"--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= words


@pytest.mark.parametrize("kind", ["posttrain", "sample"])
def test_memory_of_the_device_grows_unless_told_otherwise(kind: str) -> None:
    lines = (FOLDER / slurm.TEMPLATES[kind]).read_text().splitlines()
    (export,) = (line for line in lines if line.startswith("export PYTORCH_ALLOC_CONF="))
    given = [{}, {"PYTORCH_ALLOC_CONF": "a:1"}, {"PYTORCH_CUDA_ALLOC_CONF": "b:1"}]  # the last is its older name
    words = ["bash", "-uc", f"{export}; echo $PYTORCH_ALLOC_CONF"]
    found = [subprocess.run(words, env=each, check=True, capture_output=True, text=True).stdout for each in given]
    assert found == ["expandable_segments:True\n", "a:1\n", "b:1\n"]


def test_ranks_stay_near_their_gpu_unless_told_otherwise() -> None:
    lines = (FOLDER / slurm.TEMPLATES["posttrain"]).read_text().splitlines()
    (export,) = (line for line in lines if line.startswith(f"export {CPU_BINDING}="))
    words = ["bash", "-uc", f"{export}; echo ${CPU_BINDING}"]
    given: list[dict[str, str]] = [{}, {CPU_BINDING: "none"}]
    found = [subprocess.run(words, env=each, check=True, capture_output=True, text=True).stdout for each in given]
    assert found == ["gpu\n", "none\n"]
    assert [line for line in lines if line.startswith(("[[ -z $SETUP", export))][
        -1
    ] == export  # a setup file may set it


def test_a_hostfile_has_a_line_per_node(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slurm.hostfile(["a", "b"], 2) == "a slots=2\nb slots=2\n"
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    assert slurm.hostfile(["a"], None) == "a slots=8\n"
    monkeypatch.delenv("SLURM_GPUS_ON_NODE")
    with pytest.raises(ConfigError, match="--slots N"):
        slurm.hostfile(["a"], None)
    with pytest.raises(ConfigError, match="--slots is 0, expected at least 1"):
        slurm.hostfile(["a"], 0)
