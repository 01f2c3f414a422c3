"""The rollout's benchmark at toy size: what it compares, and what it counts."""

import pytest
import torch

from benchmarks import rollout
from benchmarks.harness import Case, Options
from benchmarks.rollout import STEPS, Size

CPU = torch.device("cpu")
TOY = Size("toy", {"width": 24, "depth": 2, "num_heads": 2, "latent_size": 8, "num_experts": 4, "num_classes": 5}, 4)
# Model calls with a graph and without one.
CALLS = {
    "plain": (STEPS, 0),
    "checkpoint": (STEPS, 0),
    "two_pass": (STEPS, STEPS),
    "two_pass_merged_5": (STEPS // 5, STEPS),
    "hybrid_1": (STEPS, STEPS - 1),
    "hybrid_5": (STEPS, 5),
    "segments_5": (5, 5),
}


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def cases(request: pytest.FixtureRequest) -> dict[str, Case]:
    dtype = torch.bfloat16 if request.param == "bf16" else torch.float32
    return {each.name: each.build() for each in rollout.cases_of(TOY, Options(CPU, dtype, request.param))}


def test_forward_calls_and_graphs(cases: dict[str, Case]) -> None:
    facts = {name.removeprefix("rollout.toy_"): case.facts for name, case in cases.items()}
    assert {name: (f["forwards"], f["forwards_without_graph"]) for name, f in facts.items()} == CALLS
    kept = {name: f["of_a_step"] for name, f in facts.items()}
    assert max(kept["two_pass"], kept["hybrid_1"]) <= 1.05
    assert kept["plain"] == pytest.approx(STEPS, rel=0.05)
    assert kept["hybrid_5"] == pytest.approx(5, rel=0.05)
    assert kept["segments_5"] == pytest.approx(5, rel=0.05)
    assert kept["checkpoint"] < 0.4 * STEPS


@pytest.mark.slow
def test_every_case_runs_and_its_gradients_agree(cases: dict[str, Case]) -> None:
    for case in cases.values():
        assert case.ours() == STEPS * TOY.images
        assert case.reference is not None
        assert case.reference() % TOY.images == 0
        assert case.check is not None
        case.check()


def test_a_gradient_that_differs_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    check = rollout.checking({"schedule": "segments", "segment_steps": 5}, TOY, CPU)
    monkeypatch.setattr(rollout, "SEGMENT", STEPS)  # one segment in place of the mean of both
    with pytest.raises(AssertionError, match="gradients differ from those of plain by"):
        check()


def test_what_two_pass_keeps_does_not_grow_with_the_steps() -> None:
    model = rollout.make_model(TOY, CPU, torch.float32)
    few, many = (
        rollout.counted(rollout.make_rollout(model, TOY, steps).under(schedule="two_pass")) for steps in (2, 12)
    )
    assert few["saved_bytes"] == many["saved_bytes"]
    assert (many["forwards"], many["forwards_without_graph"]) == (12, 12)
