"""The harness of the benchmarks: what it counts and prints; and that both readers read the same."""

import itertools
import json
from pathlib import Path

import pytest

from benchmarks import data
from benchmarks.harness import Case, Goals, main, measure
from benchmarks.synthetic import Text, link_shards, write_shards
from data_pipeline.read.shards import ShardSet


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
        Case("fast", lambda: 1, goals=Goals(ms=60_000)),
        Case("slow", lambda: 1, goals=Goals(ms=0)),
        Case("other", lambda: 1, goals=Goals(ms=0)),
    ]
    argv = ["--rounds", "2", "--json", str(tmp_path / "a.json"), "--only", "s"]
    assert main(lambda _: cases, "text", argv) == 0
    assert main(lambda _: cases, "text", [*argv, "--check"]) == 1
    assert [entry["case"] for entry in json.loads((tmp_path / "a.json").read_text())] == ["fast", "slow"]
    assert "missed: slow" in capsys.readouterr().err


def test_both_readers_read_every_sample(tmp_path: Path) -> None:
    case = data._reading("reading", write_shards(tmp_path / "set", Text(4, 8), 2, 32))
    assert case.ours() == case.reference() == 64


def test_an_index_of_many_shards_on_a_small_disk(tmp_path: Path) -> None:
    shards = ShardSet.open(link_shards(tmp_path / "set", Text(4, 8), 50, 3), "train")
    assert shards.num_samples == 150
    assert shards.batch([0, 149]).keys == ("one-000000", "one-000002")
