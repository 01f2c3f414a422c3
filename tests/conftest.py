"""Set up every test: CPU, one thread, a skip for what the machine lacks, and which tests each make target selects."""

import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import hypothesis
import pytest
import torch

from sharpmoe.devices import device_count
from tests.fixtures_data import make_shards

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
# As sharpmoe.parallel.ranks.launch, which may be imported later: not every machine has AMX.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
# The suite runs on the host, on a machine with GPUs too; tests marked `gpu` have processes of their own, with
# DS_ACCELERATOR=cuda: `make test-gpu`.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

# The same examples in every run; a failure comes back. No deadline: the machine may be busy.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("suite")

NOT_FAST = ("dist", "slow", "sweep", "slurm")  # markers that keep a test out of `make test-fast`


def _without_slurm() -> str | None:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [name for name in ("sbatch", "munged", "slurmctld", "slurmd") if not shutil.which(name, path=path)]
    if absent:
        return f"needs {', '.join(absent)} (Debian: apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "starts the daemons of Slurm, as root"


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _mark(items)
    _long_files_first(items)


def _mark(items: list[pytest.Item]) -> None:
    lacking = {
        "gpu": None if device_count() else "needs a CUDA device, in processes of their own: make test-gpu",
        "slurm": _without_slurm(),
    }
    for item in items:
        if device_count() and not item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="runs on the host: unset DS_ACCELERATOR"))
        for marker, reason in lacking.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("slurm"):
            item.add_marker("sweep")
        if not any(item.get_closest_marker(marker) for marker in NOT_FAST):
            item.add_marker("fast")


def _long_files_first(items: list[pytest.Item]) -> None:
    """Order whole files by how many slow tests they hold, so that no process ends long after the others.

    pytest-xdist hands out files in this order (--dist loadfile --no-loadscope-reorder). A file's tests stay together:
    they share what its fixtures trained.
    """
    weights = Counter[Path]()
    for item in items:
        weights[item.path] += sum(10 for marker in NOT_FAST if item.get_closest_marker(marker)) or 0.01
    items.sort(key=lambda item: (-weights[item.path], str(item.path)))


@pytest.fixture(autouse=True, scope="session")
def private_extensions_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A build killed elsewhere leaves a lock in torch's extension folder, on which DeepSpeed waits for ever."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(tmp_path_factory.mktemp("torch_extensions"))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn shapes as shards, 20 training images."""
    return make_shards(tmp_path_factory.mktemp("shards") / "shapes")


@pytest.fixture(autouse=True)
def no_groups_of_an_earlier_test() -> None:
    """Forget process groups that an earlier test has destroyed (launch.stop): DeepSpeed and the project keep theirs."""
    groups = sys.modules.get("deepspeed.utils.groups")
    if groups is None or torch.distributed.is_initialized():
        return
    groups._WORLD_GROUP = None
    for kept in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP"):
        getattr(groups, kept).clear()
        getattr(groups, f"{kept}_RANKS").clear()
    ours = sys.modules.get("sharpmoe.parallel.experts.groups")
    if ours is not None:
        ours._built.cache_clear()
