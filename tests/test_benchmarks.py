"""The harness of the benchmarks: what it counts and prints; and that both readers read the same."""

import itertools
import json
import weakref
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks import block, ceilings, data, moe_layer, optimizer, rollout, sampling, train_step, utilisation
from benchmarks.harness import Case, Failure, Goals, Options, Planned, attempt, main, measure, sizes_for
from benchmarks.synthetic import Text, link_shards, write_shards
from data_pipeline.read.shards import ShardSet

CPU = Options(torch.device("cpu"), torch.float32, "fp32")


class Clock:
    """A clock that advances only by what works say they take."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, *seconds: float):
        turns = itertools.cycle(seconds)

        def act() -> int:
            self.now += next(turns)
            return 100

        return act


def test_ratios_are_of_times_in_the_same_round() -> None:
    clock = Clock()
    case = Case("reading", clock.work(0.5, 1, 2), clock.work(1.5, 3, 6), clock.work(0.25, 0.5, 1), Goals(2.5, 0.6))
    result = measure(case, 9, clock)
    expected = (
        "case=reading ours=10ms ref=30ms ratio=3 limit=5ms of_limit=0.5 goal=ratio>=2.5,of_limit>=0.6 n=9 spread=0"
    )
    assert str(result) == expected
    assert not result.met
    assert result._replace(goals=Goals(2.5, 0.5)).met


def test_without_a_reference_times_are_compared() -> None:
    clock = Clock()
    result = measure(Case("resume", clock.work(0.5), goals=Goals(ms=4), facts={"calls": 3}), 5, clock)
    assert str(result) == "case=resume ours=5ms ref=- ratio=- limit=- of_limit=- goal=ms<=4 n=5 spread=0 calls=3"
    assert not result.met
    assert not result._replace(goals=Goals(ratio=1)).met  # nothing to compare with


def test_outcomes_are_compared_before_anything_is_timed() -> None:
    def differs() -> None:
        raise AssertionError("outputs differ")

    clock = Clock()
    with pytest.raises(AssertionError, match="outputs differ"):
        measure(Case("a", clock.work(1), check=differs), 5, clock)
    assert clock.now == 0


def test_results_go_to_a_file_and_a_missed_goal_to_the_exit_code(tmp_path: Path, capsys) -> None:
    cases = [
        planned(Case("fast", lambda: 1, goals=Goals(ms=60_000))),
        planned(Case("slow", lambda: 1, goals=Goals(ms=0))),
        Planned("other", pytest.fail),  # not built: --only does not name it
    ]
    argv = ["--rounds", "2", "--json", str(tmp_path / "a.json"), "--only", "s"]
    assert main(lambda _: cases, "text", argv) == 0
    assert main(lambda _: cases, "text", [*argv, "--check"]) == 1
    assert [entry["case"] for entry in json.loads((tmp_path / "a.json").read_text())] == ["fast", "slow"]
    assert "missed: slow" in capsys.readouterr().err


def planned(case: Case) -> Planned:
    return Planned(case.name, lambda: case)


def test_a_case_without_room_is_a_line_and_not_the_end(tmp_path: Path, capsys) -> None:
    file = tmp_path / "a.json"

    def too_large() -> Case:
        seen.append([row["case"] for row in json.loads(file.read_text())])
        torch.empty(2**60)  # torch's own error
        raise AssertionError

    def no_room_on_cuda() -> Case:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")

    seen: list[list[str]] = []
    cases = [
        planned(Case("first", lambda: 1)),
        Planned("large", too_large),
        Planned("device", no_room_on_cuda),
        planned(Case("last", lambda: 1)),
    ]
    assert main(lambda _: cases, "text", ["--rounds", "2", "--json", str(file)]) == 0
    assert seen == [["first"]]  # what was measured before is in the file already
    rows = {row["case"]: row for row in json.loads(file.read_text())}
    assert [name for name, row in rows.items() if row.get("out_of_memory")] == ["large", "device"]
    assert rows["last"]["n"] == 2
    assert "case=device error=out of memory: CUDA out of memory. Tried" in capsys.readouterr().out
    assert main(lambda _: cases, "text", ["--rounds", "2", "--check"]) == 1


def test_outcomes_that_differ_are_a_line_and_the_exit_code(capsys) -> None:
    def differs() -> None:
        raise AssertionError("outputs\ndiffer")

    cases = [planned(Case("wrong", lambda: 1, check=differs)), planned(Case("right", lambda: 1))]
    assert main(lambda _: cases, "text", ["--rounds", "2"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "case=wrong error=outputs differ"
    assert out[1].startswith("case=right ours=")


def test_nothing_of_a_case_is_alive_when_the_next_is_built() -> None:
    class Model:
        pass

    alive: list[weakref.ref[Model]] = []

    def build(name: str) -> Case:
        assert not any(ref() for ref in alive)
        model = Model()
        alive.append(weakref.ref(model))

        def work() -> int:
            return int(model is not None)

        def check() -> None:
            assert name != "fails", model

        return Case(name, work, check=check)

    names = ["one", "fails", "three"]
    results = [attempt(Planned(name, partial(build, name)), CPU, 2) for name in names]
    assert [isinstance(result, Failure) for result in results] == [False, True, False]
    assert len(alive) == 3


class _Device(NamedTuple):
    total_memory: int


@pytest.mark.parametrize(("gib", "expected"), [(8, "small"), (23.6, "small"), (39.4, "middle"), (79.6, "large")])
def test_sizes_follow_the_memory_of_the_device(monkeypatch: pytest.MonkeyPatch, gib: float, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: _Device(int(gib * 2**30)))
    table = {"cuda": {16: "small", 36: "middle", 72: "large"}, "cpu": {0: "host"}, "tiny": {0: "toy"}}
    options = Options(torch.device("cuda"), torch.bfloat16, "bf16")
    assert sizes_for(table, options) == expected
    assert sizes_for(table, options._replace(tiny=True)) == "toy"
    assert sizes_for(table, CPU) == "host"


TABLES = [block.SIZES, ceilings.SHAPES, ceilings.COPIED, moe_layer.DIFFMOE, moe_layer.EXPERT_CHOICE, optimizer.SIZES]
TABLES += [rollout.SIZES, sampling.SIZES, train_step.SIZES, utilisation.SIZES]


def test_every_table_has_sizes_for_every_device() -> None:
    for table in TABLES:
        assert {kind: min(by_memory) for kind, by_memory in table.items()} == {"tiny": 0, "cpu": 0, "cuda": 0}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_planned_cases_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """And the list of them builds nothing: no device is needed."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: _Device(80 * 2**30))
    options = Options(torch.device(kind), torch.bfloat16, "bf16")
    modules = (block, ceilings, moe_layer, optimizer, rollout, sampling, train_step, utilisation)
    names = [planned.name for module in modules for planned in module.cases(options)]
    assert len(names) == len(set(names)) > 30


def test_both_readers_read_every_sample(tmp_path: Path) -> None:
    case = data._reading("reading", write_shards(tmp_path / "set", Text(4, 8), 2, 32))
    assert case.ours() == case.reference() == 64


def test_an_index_of_many_shards_on_a_small_disk(tmp_path: Path) -> None:
    shards = ShardSet.open(link_shards(tmp_path / "set", Text(4, 8), 50, 3), "train")
    assert shards.num_samples == 150
    assert shards.batch([0, 149]).keys == ("one-000000", "one-000002")
