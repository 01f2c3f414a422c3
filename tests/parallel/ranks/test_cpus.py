"""Which CPUs a rank, its threads and its processes run on, on a machine that pretends to have GPUs."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sharpmoe.errors import ConfigError
from sharpmoe.parallel.ranks import cpus
from sharpmoe.parallel.ranks.cpus import CPU_BINDING, _cpus_in, bind_cpus
from sharpmoe.parallel.ranks.launch import World
from tests.distributed import run_ranks

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to CPUs")
GPU = torch.device("cuda", 0)
Nodes = tuple[tuple[str, int], ...]
FOUR: Nodes = (("0-3", 0), ("4-7", 1))  # CPUs of two NUMA nodes, and the node of GPU 0 and GPU 1


def address(device: torch.device) -> SimpleNamespace:
    return SimpleNamespace(pci_domain_id=1, pci_bus_id=0xA0 + device.index, pci_device_id=0)


def pretend(root: Path, nodes: Nodes, patch: pytest.MonkeyPatch, asked: str | None = "gpu") -> None:
    """Write what the system says of the GPUs and nodes: `nodes` of (CPUs of node N, node of GPU N)."""
    for number, (ranges, node_of_gpu) in enumerate(nodes):
        gpu, node = root / f"bus/pci/devices/0001:{0xA0 + number:x}:00.0", root / f"devices/system/node/node{number}"
        gpu.mkdir(parents=True)
        node.mkdir(parents=True)
        (gpu / "numa_node").write_text(f"{node_of_gpu}\n")
        (node / "cpulist").write_text(f"{ranges}\n")
    patch.setattr(cpus, "_SYSTEM", root)
    patch.setattr(cpus, "device_count", lambda: len(nodes))
    patch.setattr(torch.cuda, "get_device_properties", address)
    patch.delenv(CPU_BINDING, raising=False)
    if asked is not None:
        patch.setenv(CPU_BINDING, asked)


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> dict[int, set[int]]:
    """Threads that would have been bound, and to what; the process may use CPUs 0 to 7."""
    done: dict[int, set[int]] = {}
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: done.get(thread, set(range(8))))
    monkeypatch.setattr(os, "sched_setaffinity", done.__setitem__)
    return done


@pytest.mark.parametrize(
    ("nodes", "index", "ranks", "expected"),
    [
        (FOUR, 0, 8, {0, 1, 2, 3}),
        (FOUR, 1, 8, {4, 5, 6, 7}),
        ((("0-1,6", 0), ("2-5,7", 1)), 0, 8, {0, 1, 6}),
        ((("0-2,8-63", 0), ("3-7", 1)), 0, 2, {0, 1, 2}),  # the job has only some CPUs of the node
        ((("0-1,8-63", 0), ("2-7", 1)), 0, 2, None),  # a quarter of them for one of two ranks
        ((("0-3", 0), ("4-7", 0)), 0, 2, None),  # two GPUs on a node with half of the CPUs
        ((("0-3", 0), ("4-7", 1), ("8-9", 0), ("10-11", 1)), 2, 4, {0, 1, 2, 3}),  # two ranks on each node
        ((("0-1", 0), ("2-3", 0), ("4-5", 0), ("6-7", 1)), 0, 4, None),  # three ranks on two CPUs of eight
        ((("0", 0), ("1-7", 1)), 0, 4, None),  # two ranks on one CPU, six CPUs idle
        ((("8-15", 0), ("0-7", 1)), 0, 8, None),  # the job has none near this GPU
        ((("0-7", -1),), 0, 8, None),  # one node, and the system does not say which
    ],
)
def test_a_rank_stays_near_its_gpu_where_it_has_its_share(
    nodes: Nodes,
    index: int,
    ranks: int,
    expected: set[int] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bound: dict[int, set[int]],
) -> None:
    pretend(tmp_path, nodes, monkeypatch)
    bind_cpus(torch.device("cuda", index), ranks)
    assert bound.get(0) == expected


@pytest.mark.parametrize("asked", ["none", None])
def test_only_where_it_is_asked_for(
    asked: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: dict[int, set[int]]
) -> None:
    pretend(tmp_path, FOUR, monkeypatch, asked)
    bind_cpus(GPU, 2)
    assert bound == {}


def test_a_rank_on_the_host_and_a_system_that_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: dict[int, set[int]]
) -> None:
    pretend(tmp_path, FOUR, monkeypatch)
    bind_cpus(torch.device("cpu"), 2)
    monkeypatch.setattr(cpus, "_SYSTEM", tmp_path / "elsewhere")
    bind_cpus(GPU, 2)
    assert bound == {}


def test_a_word_that_means_nothing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CPU_BINDING, "cores")
    with pytest.raises(ConfigError, match="SHARPMOE_CPU_BINDING is 'cores', allowed: gpu or none"):
        bind_cpus(torch.device("cpu"), 1)


@pytest.mark.parametrize(("text", "numbers"), [("0-2,8\n", {0, 1, 2, 8}), ("3", {3}), ("\n", set())])
def test_ranges_of_cpus(text: str, numbers: set[int]) -> None:
    assert _cpus_in(text) == numbers


def affinities(world: World, root: Path) -> list[set[int]]:
    """CPUs of a rank, of a thread from before it was bound, of one from after, of a process that it starts."""
    allowed = sorted(os.sched_getaffinity(0))
    halves = (",".join(map(str, allowed[: len(allowed) // 2])), ",".join(map(str, allowed[len(allowed) // 2 :])))
    found: list[set[int]] = []

    def note() -> None:
        found.append(os.sched_getaffinity(0))

    go_on = threading.Event()
    early = threading.Thread(target=lambda: (go_on.wait(), note()))
    early.start()
    with pytest.MonkeyPatch.context() as patch:
        pretend(root / str(world.rank), ((halves[0], 0), (halves[1], 1)), patch)
        bind_cpus(torch.device("cuda", world.rank), world.size)
    note()
    go_on.set()
    early.join()
    late = threading.Thread(target=note)
    late.start()
    late.join()
    asked = "import os, json; print(json.dumps(list(os.sched_getaffinity(0))))"
    told = subprocess.run([sys.executable, "-c", asked], check=True, capture_output=True, text=True).stdout
    return [*found, set(json.loads(told))]


@pytest.mark.dist
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one CPU")
def test_threads_and_processes_of_a_rank_are_where_it_is(tmp_path: Path) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    first, second = run_ranks(affinities, 2, tmp_path)
    assert first == [set(allowed[: len(allowed) // 2])] * 4
    assert second == [set(allowed[len(allowed) // 2 :])] * 4
