"""Templates are batch files that a shell accepts; hostfiles."""

import shlex
import subprocess

import pytest

from sharpmoe import slurm
from sharpmoe.config_io import PROJECT_ROOT
from sharpmoe.errors import ConfigError

FOLDER = PROJECT_ROOT / "launcher" / "slurm"


@pytest.mark.parametrize("kind", slurm.TEMPLATES)
def test_templates_are_batch_files_by_themselves(kind: str) -> None:
    path = FOLDER / slurm.TEMPLATES[kind]
    subprocess.run(["bash", "-n", str(path)], check=True)
    words = {word for line in path.read_text().splitlines() if line.startswith("#SBATCH") for word in shlex.split(line)}
    assert {"--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= words


def test_a_hostfile_has_a_line_per_node(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slurm.hostfile(["a", "b"], 2) == "a slots=2\nb slots=2\n"
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    assert slurm.hostfile(["a"], None) == "a slots=8\n"
    monkeypatch.delenv("SLURM_GPUS_ON_NODE")
    with pytest.raises(ConfigError, match="--slots N"):
        slurm.hostfile(["a"], None)
    with pytest.raises(ConfigError, match="--slots is 0, expected at least 1"):
        slurm.hostfile(["a"], 0)
