"""The description of rollout schedules: what `Objective` really calls is what it says."""

import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from sharpmoe.config import RunConfig
from sharpmoe.errors import ConfigError
from sharpmoe.flow import descending_times
from sharpmoe.model.backbone import TextCondition
from sharpmoe.rollout import StepOutput, TrajectoryBatch
from sharpmoe.train import objective as objective_module
from sharpmoe.train.local_gradients import LocalGradients
from sharpmoe.train.objective import Objective, StepRequest
from sharpmoe.train.rollout_schedules import (
    SCHEDULES,
    RolloutSchedule,
    check_schedule,
    exact_schedules,
    num_segments,
    schedule_of,
    schedule_overrides,
)
from tests.train.setting import make_run, stirred_model

CASES = 60


class Seen(NamedTuple):
    """A call of the model, and a backward where `steps` is empty."""

    steps: tuple[int, ...]
    graph: bool = False
    first_of_two: bool = False
    second_of_two: bool = False
    recompute: bool = False


def expected(schedule: RolloutSchedule) -> list[Seen]:
    """Calls and backwards in the order of the description, the last backward left out: it is the engine's."""
    seen = []
    for each in schedule.passes:
        seen += [Seen(tuple(c.steps), c.graph, c.first_of_two, c.second_of_two, c.recompute) for c in each.calls]
        seen.append(Seen(()))
    return seen[:-1]


def executed(run: RunConfig, segment: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Seen], int]:
    """What an optimizer step of one micro-batch calls, and how often a block runs, in backwards too."""
    objective, seen, blocks = Objective(stirred_model(run), run).train(), list[Seen](), list[int]()
    objective.model.blocks[0].register_forward_pre_hook(lambda *_: blocks.append(1))
    step, replay, add = objective_module.rollout_step, objective_module.replay_steps, LocalGradients.add

    def rollout_step(*args: Any) -> StepOutput:
        output, mode = step(*args), args[4]
        seen.append(Seen((args[2],), output.flow.requires_grad, not mode.for_losses, False, mode.recompute))
        return output

    def replay_steps(*args: Any) -> list[StepOutput]:
        outputs = replay(*args)
        seen.append(Seen(tuple(args[2]), all(output.flow.requires_grad for output in outputs), second_of_two=True))
        return outputs

    def backward(local: LocalGradients, loss: Tensor) -> None:
        seen.append(Seen(()))
        add(local, loss)

    with monkeypatch.context() as patch:
        patch.setattr(objective_module, "rollout_step", rollout_step)
        patch.setattr(objective_module, "replay_steps", replay_steps)
        patch.setattr(LocalGradients, "add", backward)
        objective(StepRequest((an_item(run),), segment)).loss.backward()
    return seen, len(blocks)


def an_item(run: RunConfig) -> TrajectoryBatch:
    x0, x1 = torch.randn(2, 2, 4, 4, 4)
    steps = 1 if run.stage == "pretrain" else run.rollout.num_steps
    condition = TextCondition(torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool), torch.randn(2, 8))
    return TrajectoryBatch(x0, x1, descending_times(torch.rand(steps - 1, 2), 0.999), condition, torch.rand(2, 4))


def random_run(draw: random.Random) -> RunConfig:
    """A valid run of one of all schedules, with and without a routing loss."""
    router, steps = draw.choice(["tc", "ec", "diffmoe"]), draw.randint(1, 6)
    rollout: dict[str, Any] = {"num_steps": steps, "schedule": draw.choice(list(SCHEDULES))}
    rollout |= {"kept_steps": draw.choice([None, *range(steps + 1)])} if draw.random() < 0.7 else {}
    rollout |= {"segment_steps": draw.randint(1, steps)} if rollout["schedule"] == "segments" else {}
    rollout |= {"merged_steps": draw.randint(1, steps)} if draw.random() < 0.4 else {}
    model = {"width": 8, "depth": 2, "num_heads": 1, "latent_size": 4, "num_experts": 2, "text_width": 8}
    stage = draw.choice(["posttrain", "posttrain", "posttrain", "pretrain"])
    try:
        return make_run(
            Path("none"), Path("none"), router, stage=stage, rollout=rollout, model=model | {"pooled_width": 8}
        )
    except ValidationError:
        return random_run(draw)


@pytest.mark.parametrize("seed", range(CASES))
def test_what_is_called_is_what_is_described(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    run = random_run(draw)
    segment = draw.randrange(num_segments(run))
    schedule = schedule_of(run, segment=segment)
    seen, blocks = executed(run, segment, monkeypatch)
    assert seen == expected(schedule)
    assert blocks == len(list(schedule.calls)) + schedule.recomputed
    trained = [step for call in seen for step in call.steps if call.graph]
    assert sorted(trained) == sorted(set(trained))  # each once
    assert len(trained) == schedule.num_trained


def test_random_runs_cover_every_schedule() -> None:
    runs = [random_run(random.Random(seed)) for seed in range(CASES)]
    assert {run.rollout.schedule for run in runs if run.stage == "posttrain"} == set(SCHEDULES)
    calls = [call for run in runs for call in schedule_of(run).calls]
    assert {call.second_of_two for call in calls} == {call.recompute for call in calls} == {True, False}
    assert any(call.second_of_two and len(call.steps) > 1 for call in calls)


def test_a_segment_changes_where_graphs_are_and_no_count() -> None:
    run = a_run(rollout={"num_steps": 6, "schedule": "segments", "segment_steps": 2, "kept_steps": 1})
    first, last = schedule_of(run, segment=0), schedule_of(run)
    assert [call.steps for call in first.calls if call.graph] == [range(1, 2), range(1)]
    assert [call.steps for call in last.calls if call.graph] == [range(5, 6), range(4, 5)]
    assert (first.forwards, first.num_trained, first.cost) == (last.forwards, last.num_trained, last.cost) == (7, 2, 11)


def test_uses_of_the_model() -> None:
    assert schedule_of(a_run(rollout={"num_steps": 3, "schedule": "two_pass"})).model_uses == 9  # 3 + 3 and 3 backwards
    assert schedule_of(a_run("tc", rollout={"num_steps": 3, "schedule": "two_pass"})).model_uses == 6
    assert schedule_of(a_run(rollout={"num_steps": 3, "schedule": "plain"})).model_uses == 6


def cost_of(run: RunConfig) -> int:
    return schedule_of(run).cost


def a_run(router: str = "diffmoe", rollout: dict[str, object] | None = None, **sections: object) -> RunConfig:
    steps = {"num_steps": 10, "schedule": "auto"} | (rollout or {})
    return make_run(Path("none"), Path("none"), router, rollout=steps, **sections)


def test_costs_rise_along_the_exact_schedules() -> None:
    costs = [cost_of(run) for run in exact_schedules(a_run())]
    assert costs == [30, *range(31, 40), 40]
    segments = a_run(rollout={"schedule": "segments", "segment_steps": 5})
    assert cost_of(segments) == 20
    assert cost_of(a_run(rollout={"schedule": "segments", "segment_steps": 5, "kept_steps": 0})) == 25
    assert cost_of(a_run(rollout={"schedule": "two_pass"})) == 40
    assert cost_of(a_run("tc", rollout={"schedule": "two_pass"})) == 30
    assert [run.rollout.schedule for run in exact_schedules(a_run(stage="pretrain"))] == ["plain", "checkpoint"]


def test_what_cannot_run_is_named() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.schedule is auto"):
        check_schedule(a_run(), 4, (16,))
    merged = {"schedule": "two_pass", "merged_steps": 3}
    with pytest.raises(ConfigError, match="promoe_tc compares the tokens of a whole call"):
        check_schedule(a_run("promoe_tc", merged, model={"conditioning": "class"}), 4, (16,))
    uneven = a_run("diffmoe", merged, model={"num_experts": 3})
    with pytest.raises(ConfigError, match=r"16 tokens \* capacity 1\.0 do not split evenly over 3 experts"):
        check_schedule(uneven, 1, (12, 16))
    check_schedule(uneven, 3, (12, 16))
    check_schedule(uneven, 1, (12,))
    check_schedule(a_run("ec", merged, model={"num_experts": 3}), 1, (16,))


@pytest.mark.parametrize("name", ["auto", *SCHEDULES])
def test_overrides_that_select_a_schedule_reset_what_it_does_not_have(name: str) -> None:
    words = schedule_overrides(name)
    kept = {"hybrid": {"kept_steps"}, "segments": {"kept_steps", "segment_steps"}}.get(name, set())
    reset = {"--rollout.kept_steps=null", "--rollout.segment_steps=1", "--rollout.merged_steps=1"}
    assert words[0] == f"--rollout.schedule={name}"
    assert set(words[1:]) == {word for word in reset if word.split(".")[1].split("=")[0] not in kept}
