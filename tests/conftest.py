"""What every test gets: CPU, one thread, no compiler, and a skip for what this machine lacks."""

import os
import shutil

import pytest
import torch

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")  # as the launchers do: AMX is not always there
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lacking = {
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
        "slurm": None if shutil.which("sbatch") else "needs the slurm commands",
    }
    for item in items:
        for marker, reason in lacking.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="session")
def private_extensions_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A build killed elsewhere leaves a lock in torch's extension folder, on which DeepSpeed waits for ever."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(tmp_path_factory.mktemp("torch_extensions"))
