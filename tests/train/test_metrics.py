import io
import json
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sharpmoe.evaluation.held_out import held_out_item
from sharpmoe.moe.routing import Routing
from sharpmoe.rollout import rollout
from sharpmoe.train.metrics import RunLog, StepStats, clock, due, read_log, routing_scalars, routing_sums, step_scalars
from tests.toys import ToySamples, toy_config, toy_model


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def stats(step: int, seconds: float = 0.5) -> StepStats:
    return StepStats(step, {"total": 1.0 / step, "routing": 0.0}, 0.25, 1e-4, 32, 32 * 64, seconds, 0.1)


def records(router: str, untrained: bool) -> tuple[tuple[Routing, ...], ...]:
    model = toy_model(router).train()
    if untrained:
        with torch.no_grad():
            for layer in model.moe_layers():
                layer.saliency_router.out.weight.zero_()
                layer.saliency_router.out.bias.zero_()
    item = held_out_item(ToySamples().batch([0, 1, 2]), [0, 1, 2], (0.999, 0.4), model.config, 0, torch.device("cpu"))
    return tuple(output.routing for output in rollout(model, item, guided=True))


@pytest.mark.parametrize("router", ["tc", "ec", "diffmoe"])
def test_a_saliency_router_that_adds_nothing_flips_nothing(router: str) -> None:
    named = routing_scalars(routing_sums(records(router, untrained=True), toy_config(router)))
    assert named["routing_flipped/layer0"] == 0
    assert named["routing_flipped/layer1"] == 0


@pytest.mark.parametrize("router", ["tc", "ec", "diffmoe"])
def test_flips_are_counted_under_the_same_rule_and_pool(router: str) -> None:
    named = routing_scalars(routing_sums(records(router, untrained=False), toy_config(router)))
    assert 0 < named["routing_flipped/layer0"] < 1
    assert 0 < named["routing_entropy/layer0"] <= 1
    if router != "tc":
        assert named["routing_load_min/layer0"] == named["routing_load_max/layer0"] == 1  # equal by construction


def test_sums_are_additive_over_steps_and_micro_batches() -> None:
    config, steps = toy_config("tc"), records("tc", untrained=False)
    parts = [routing_sums([step], config) for step in steps]
    torch.testing.assert_close(routing_sums(steps, config), sum(parts))


def test_loads_and_dead_experts_by_hand() -> None:
    scores = torch.tensor([[[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1]]])
    chosen = torch.tensor([[[1, 0, 0], [1, 0, 0], [0, 1, 0]]], dtype=torch.bool)
    record = Routing(scores.log(), scores.log(), scores, scores * chosen, chosen, scores[:, :1], None)
    config = toy_config("tc", num_experts=3)
    named = routing_scalars(routing_sums([(record,)], config))
    assert named["routing_load_max/layer0"] == pytest.approx(2.0)
    assert named["routing_load_min/layer0"] == 0
    assert named["routing_dead_experts/layer0"] == 1
    entropy = -(scores * scores.log()).sum(-1).mean() / math.log(3)
    assert named["routing_entropy/layer0"] == pytest.approx(entropy.item())
    assert named["routing_flipped/layer0"] == 0


def test_a_dense_model_has_nothing_to_tell() -> None:
    assert routing_scalars(routing_sums([(), ()], toy_config("dense"))) == {}


def test_step_figures_are_grouped_and_per_second() -> None:
    named = step_scalars(stats(2))
    assert named["loss/total"] == 0.5
    assert named["throughput/images_per_second"] == 64
    assert named["throughput/tokens_per_second"] == 64 * 64
    assert named["throughput/data_wait_share"] == pytest.approx(0.2)
    assert named["memory/peak_mib"] > 10
    assert {tag.split("/")[0] for tag in named} == {"loss", "optim", "throughput", "memory"}


def test_the_log_starts_at_step_one_and_goes_to_tensorboard_and_jsonl(tmp_path: Path) -> None:
    log = RunLog(tmp_path, total_steps=12, every=5, stream=io.StringIO())
    for step in range(1, 13):
        log.step(stats(step), {"routing_flipped/layer0": 0.0})
    log.image(12, "samples", torch.zeros(4, 6, 3, dtype=torch.uint8).numpy())
    log.text(12, "allocation", "a  b\n1  2")
    log.close()
    curve = read_log(tmp_path / "log.jsonl")["loss/total"]
    assert list(curve) == [1, 5, 10, 12]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/total")] == [1, 5, 10, 12]
    assert events.Scalars("routing_flipped/layer0")[0].value == 0
    assert events.Tags()["images"] == ["samples"]


def test_a_resumed_log_replaces_what_a_killed_run_left(tmp_path: Path) -> None:
    first = RunLog(tmp_path, 6, every=1, stream=io.StringIO())
    for step in range(1, 5):
        first.step(stats(step))
    first.close()
    path = tmp_path / "log.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "loss/to')  # cut short
    second = RunLog(tmp_path, 6, first_step=3, every=1, stream=io.StringIO())
    for step in range(3, 7):
        second.step(stats(step)._replace(losses={"total": 9.0}))
    second.close()
    assert read_log(path)["loss/total"] == {1: 1.0, 2: 0.5, 3: 9.0, 4: 9.0, 5: 9.0, 6: 9.0}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/total")] == [1, 2, 3, 4, 5, 6]


def test_a_file_gets_one_line_per_written_step(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = RunLog(tmp_path, 20, every=10, stream=stream)
    for step in range(1, 21):
        log.step(stats(step))
    log.say("saved")
    log.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert "\r" not in stream.getvalue()
    assert lines[0].startswith("step  1/20  total 1  grad 0.25  lr 1.00e-04  64.0 images/s  data 20%  left ")
    assert lines[-1] == "saved"


def test_a_terminal_gets_one_line_that_moves(tmp_path: Path) -> None:
    stream = Terminal()
    log = RunLog(tmp_path, 3, every=10, stream=stream)
    for step in range(1, 4):
        log.step(stats(step))
    log.say("saved")
    log.close()
    assert stream.getvalue().count("\n") == 2  # after what was said, and at the end
    assert stream.getvalue().count("\r\x1b[K") == 4


def test_due_and_clock() -> None:
    assert [step for step in range(1, 12) if due(step, 5)] == [1, 5, 10]
    assert not due(1, 0)
    assert (clock(61), clock(3725)) == ("1:01", "1:02:05")


def test_every_line_of_the_log_is_json(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 2, stream=io.StringIO())
    log.step(stats(1))
    log.scalars(1, {"validation/flow": 0.5})
    log.close()
    parsed = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in parsed] == [1, 1]
