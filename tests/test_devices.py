"""Which devices a process has, and that DS_ACCELERATOR=cpu keeps everything away from them."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from sharpmoe.devices import default_device, deterministic_algorithms, device_count, device_of_rank, send
from sharpmoe.errors import ConfigError
from sharpmoe.parallel.ranks import launch
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.train import loop
from tests.distributed import run_ranks
from tests.train.setting import make_run, plan_for


def machine_with(monkeypatch: pytest.MonkeyPatch, count: int, accelerator: str | None = None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    if accelerator:
        monkeypatch.setenv("DS_ACCELERATOR", accelerator)


@pytest.mark.parametrize(
    ("count", "accelerator", "used"),
    [(2, None, 2), (2, "cuda", 2), (2, "cpu", 0), (0, None, 0), (0, "cpu", 0), (1, "xpu", 0)],
)
def test_devices_that_may_be_used(
    count: int, accelerator: str | None, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_with(monkeypatch, count, accelerator)
    assert device_count() == used
    assert default_device().type == ("cuda" if used else "cpu")


def test_a_rank_has_a_device_whether_it_sees_one_or_all(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(monkeypatch, 4)
    assert [device_of_rank(local).index for local in range(4)] == [0, 1, 2, 3]
    machine_with(monkeypatch, 1)  # one visible device per task
    assert [device_of_rank(local).index for local in range(4)] == [0, 0, 0, 0]
    machine_with(monkeypatch, 4, "cpu")
    assert device_of_rank(3) == torch.device("cpu")


@pytest.mark.parametrize("accelerator", ["cuda", "xpu"])
def test_an_accelerator_that_is_not_here_is_one_line(accelerator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(monkeypatch, 0, accelerator)
    with pytest.raises(ConfigError, match=f"DS_ACCELERATOR is '{accelerator}', allowed: cpu, or cuda where"):
        device_of_rank(0)


def test_a_copy_to_a_device_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: done.append("pinned") or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *given, **more: done.append((*given, more)) or x)
    host, device = torch.device("cpu"), torch.device("cuda", 0)
    send(torch.ones(2), host)
    send(torch.ones(0), device)  # nothing to pin
    send(torch.ones(2), device)
    assert done == [(host, {}), (device, {}), "pinned", (device, {"non_blocking": True})]


def refuse(*_: object) -> None:
    raise AssertionError("CUDA was started under DS_ACCELERATOR=cpu")


def train_beside_gpus(world: World, shards: Path, output: Path) -> tuple[str, float]:
    """Train, measure, draw and save with Megatron's dispatcher, on a machine that pretends to have two GPUs."""
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 2)
    torch.cuda._lazy_init = refuse
    here = launch.start()
    run = make_run(
        shards,
        output,
        train={"steps": 1},
        parallel={"ep_size": 2, "dispatcher": "megatron"},
        log={"validate_every": 1, "sample_every": 1},
    )
    loop.train(plan_for(run, here), here)
    return here.device.type, launch.least_memory(here)


@pytest.mark.dist
def test_a_machine_with_gpus_computes_on_the_host_when_it_is_told_to(shards: Path, tmp_path: Path) -> None:
    for device, memory in run_ranks(train_beside_gpus, 2, shards, tmp_path):
        assert device == "cpu"
        assert memory > 0


def flags() -> tuple[bool, ...]:
    cudnn = torch.backends.cudnn
    memory: Any = torch.utils.deterministic
    on = torch.are_deterministic_algorithms_enabled()
    return on, cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory


def test_strict_mode_lasts_as_long_as_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = flags()
    with deterministic_algorithms(strict=False):
        assert flags() == before
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    inside = []

    def fail() -> None:
        with deterministic_algorithms(strict=True):
            inside.append((flags(), os.environ["CUBLAS_WORKSPACE_CONFIG"]))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [((True, True, False, False), ":4096:8")]
    assert flags() == before
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ  # nor in the processes that are started afterwards
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    with (
        pytest.raises(ConfigError, match="but train.deterministic needs :4096:8 or :16:8; unset it"),
        deterministic_algorithms(strict=True),
    ):
        pass
