"""Recorded routing on ranks: numbers worked out by hand, and what a record of a model holds."""

import json
from pathlib import Path

import pytest
import torch

from launcher.plan import main
from sharpmoe.errors import ConfigError, DataError
from sharpmoe.evaluation.allocation import ALLOCATION_TIMES
from sharpmoe.evaluation.routing_record import RoutingRecord, record_routing
from sharpmoe.planning.replay import replay_routing
from tests.toys import ToySamples, toy_model


def record(loads: list[list[list[list[int]]]]) -> RoutingRecord:
    values = torch.tensor(loads)
    times, blocks = tuple(range(values.shape[1])), tuple(range(values.shape[2]))
    return RoutingRecord(model="m", router="ec", width=10, times=times, blocks=blocks, loads=values)


HAND = record([[[[3, 3, 0, 0]]], [[[1, 0, 2, 1]]]])  # two images, one step, one layer, four experts


def test_two_ranks_by_hand() -> None:
    """Rank 0 holds experts 0 and 1: 7 rows, and rank 1 three. One row of image 1 goes to rank 0, and back.

    Placed by load (4, 3, 2, 1): experts 0 and 3 on rank 0, five rows each; five rows pass in either direction.
    """
    found = replay_routing(HAND, 2, 1, "fp32")
    (layer,) = found.layers
    assert (found.groups, layer.placement) == (1, ((0, 3), (1, 2)))
    assert (found.imbalance, layer.mean, layer.worst) == pytest.approx((1.4, 1.4, 1.4))
    assert (found.placed_imbalance, layer.placed_mean, layer.placed_worst) == pytest.approx((1, 1, 1))
    assert (found.bytes_mean, found.bytes_worst) == (1 * 10 * 4, 1 * 10 * 4)
    assert (found.placed_bytes_mean, found.placed_bytes_worst) == (5 * 10 * 4, 5 * 10 * 4)
    assert replay_routing(HAND, 2, 1, "bf16").bytes_mean == 1 * 10 * 2


def test_one_rank_is_balanced_and_sends_nothing() -> None:
    found = replay_routing(HAND, 1, 2, "fp32")
    assert (found.imbalance, found.bytes_worst) == (1, 0)


def test_groups_and_steps_are_kept_apart() -> None:
    """Loads that cancel between two groups or steps are as uneven as each of them."""
    first, second = [[2, 0]], [[0, 2]]
    found = replay_routing(record([[first, second], [first, second]] * 2), 2, 1, "fp32")
    assert found.groups == 2
    assert (found.imbalance, found.layers[0].worst) == (2, 2)


@pytest.mark.parametrize(("ep_size", "micro_batch", "shown"), [(3, 1, "allowed: 1 | 2 | 4"), (2, 2, "has 2; record")])
def test_what_cannot_be_replayed(ep_size: int, micro_batch: int, shown: str) -> None:
    with pytest.raises(ConfigError, match=shown.replace("|", r"\|")):
        replay_routing(HAND, ep_size, micro_batch, "fp32")


@pytest.mark.parametrize("router", ["ec", "diffmoe"])
def test_a_recorded_model_has_every_row_once(router: str, tmp_path: Path) -> None:
    found = record_routing(toy_model(router), ToySamples(), name="toy", images=4, chunk=2)
    assert found.loads.shape == (4, len(ALLOCATION_TIMES), 2, 4)
    assert found.blocks == (1, 3)
    if router == "ec":
        assert (found.loads == 4).all()  # every expert takes 4 of the 16 tokens of an image
    again = RoutingRecord.load(found.save(tmp_path / "routing.json"))
    assert torch.equal(again.loads, found.loads)
    assert (again.model, again.times, again.ep_sizes) == ("toy", found.times, [2, 4])


def test_plan_prints_every_ep_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(record([[[[3, 3, 0, 0]]], [[[1, 0, 2, 1]]]] * 2).save(tmp_path / "routing.json"))
    assert main(["--replay", file, "--micro-batch", "1"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert next(row[:5] for row in rows if row and row[0] in ("2", "4")) == ["2", "2", "1.400", "1.000", "1.400"]
    assert main(["--replay", file, "--micro-batch", "1", "--ep", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["replays"][0]["imbalance"] == 1.4
    assert main(["--replay", file, "--micro-batch", "1", "--ep", "2"]) == 0
    assert "block 0      1.400   1.400   1.000   1.000  0 3 | 1 2" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": "other"}', '{"format": "sharpmoe-routing-1"}'])
def test_a_file_that_is_no_record_is_one_line(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "routing.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match="not a record of routing"):
        RoutingRecord.load(path)
    assert main(["--replay", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
