"""The harness of the benchmarks: what it counts and prints; and that both readers read the same."""

import itertools
import json
from pathlib import Path

import pytest

from benchmarks import data
from benchmarks.harness import Case, main, measure
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


def test_ratios_are_of_rates_in_the_same_round() -> None:
    clock = Clock()
    result = measure(Case("reading", clock.work(0.5, 1, 2), clock.work(1.5, 3, 6), 2.5), 9, clock)
    assert (result.ours, result.ref, result.ratio, result.n, result.spread) == (100, pytest.approx(100 / 3), 3, 9, 0)
    assert result.met
    assert str(result) == "case=reading ours=100 ref=33.33 ratio=3 limit=2.5 n=9 spread=0"


def test_without_a_reference_seconds_are_compared() -> None:
    clock = Clock()
    result = measure(Case("resume", clock.work(0.5), None, 0.4), 5, clock)
    assert str(result) == "case=resume ours=0.5 ref=- ratio=- limit=0.4 n=5 spread=0"
    assert not result.met


def test_results_go_to_a_file_and_a_missed_goal_to_the_exit_code(tmp_path: Path, capsys) -> None:
    cases = [
        Case("fast", lambda: 1, None, 60.0),
        Case("slow", lambda: 1, None, 0.0),
        Case("other", lambda: 1, None, 0.0),
    ]
    argv = ["--rounds", "2", "--json", str(tmp_path / "a.json"), "--only", "s"]
    assert main(cases, "text", argv) == 0
    assert main(cases, "text", [*argv, "--check"]) == 1
    assert [entry["case"] for entry in json.loads((tmp_path / "a.json").read_text())] == ["fast", "slow"]
    assert "missed: slow" in capsys.readouterr().err


def test_both_readers_read_every_sample(tmp_path: Path) -> None:
    case = data._reading("reading", write_shards(tmp_path / "set", Text(4, 8), 2, 32))
    assert case.ours() == case.reference() == 64


def test_an_index_of_many_shards_on_a_small_disk(tmp_path: Path) -> None:
    shards = ShardSet.open(link_shards(tmp_path / "set", Text(4, 8), 50, 3), "train")
    assert shards.num_samples == 150
    assert shards.batch([0, 149]).keys == ("one-000000", "one-000002")
