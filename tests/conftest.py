"""What every test gets: CPU, one thread, no compiler, and a skip for what this machine lacks."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.fixtures_data import make_shards

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")  # as the launchers do: AMX is not always there
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault(
        "ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16"
    )  # as sharpmoe.parallel.ranks.launch, which may come later


def _without_slurm() -> str | None:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [name for name in ("sbatch", "munged", "slurmctld", "slurmd") if not shutil.which(name, path=path)]
    if absent:
        return f"needs {', '.join(absent)} (Debian: apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "starts the daemons of Slurm, as root"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lacking = {
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
        "slurm": _without_slurm(),
    }
    for item in items:
        for marker, reason in lacking.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="session")
def private_extensions_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A build killed elsewhere leaves a lock in torch's extension folder, on which DeepSpeed waits for ever."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(tmp_path_factory.mktemp("torch_extensions"))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn shapes as shards, 20 training images."""
    return make_shards(tmp_path_factory.mktemp("shards") / "shapes")
