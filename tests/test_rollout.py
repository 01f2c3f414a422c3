"""The rollout and its exact forms, in float64 on one process."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sharpmoe.config import LossConfig, ModelConfig, RolloutConfig, RunConfig
from sharpmoe.flow import advance, descending_times
from sharpmoe.model.backbone import TextCondition
from sharpmoe.model.build import build_model
from sharpmoe.moe.routing import CallMode, Routing
from sharpmoe.moe.selection import RULES, RuleInput
from sharpmoe.moe.thresholds import TrajectoryPool
from sharpmoe.rollout import TrajectoryBatch, rollout, rollout_step, with_own_state
from sharpmoe.train import objective as objective_module
from sharpmoe.train.objective import Objective, StepRequest
from sharpmoe.train.tally import StepRecord

BATCH, STEPS = 3, 6
ROUTERS = ("tc", "ec", "diffmoe")


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_run(router: str, mass: str = "scores", weight: float = 0.5, **rollout_fields: object) -> RunConfig:
    model = ModelConfig(
        width=24, depth=4, num_heads=2, latent_size=8, router=router, num_experts=4, text_width=6, pooled_width=4
    )
    return RunConfig(
        model=model,
        rollout=RolloutConfig(num_steps=STEPS, **rollout_fields),
        loss=LossConfig(routing_mass=mass, routing_weight=weight, count_temperature=0.1, capacity_weight=0.3),
    )


def make_objective(run: RunConfig) -> Objective:
    torch.manual_seed(0)
    model = build_model(run.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Objective(model, run).train()


def make_item(seed: int = 3, fresh: bool = False) -> TrajectoryBatch:
    g = torch.Generator().manual_seed(seed)
    x0, *noise = torch.randn(1 + (STEPS if fresh else 1), BATCH, 4, 8, 8, generator=g)
    x1 = torch.stack(noise) if fresh else noise[0]
    times = descending_times(torch.rand(STEPS - 1, BATCH, generator=g), 0.999)
    text = torch.randn(BATCH, 5, 6, generator=g)
    condition = TextCondition(text, torch.ones(BATCH, 5, dtype=torch.bool), torch.randn(BATCH, 4, generator=g))
    return TrajectoryBatch(x0, x1, times, condition, torch.rand(BATCH, 16, generator=g))


def gradients(
    run: RunConfig, block: int = 0, items: int = 1, fresh: bool = False, cutoffs: Tensor | None = None
) -> tuple[Tensor, StepRecord]:
    """Gradient of the mean over `items` micro-batches, and the record of the first."""
    objective = make_objective(run)
    given = tuple(make_item(3 + i, fresh) for i in range(items))
    answer = objective(StepRequest(given, block, cutoffs=cutoffs))
    assert all(p.grad is None for p in objective.parameters())
    answer.loss.backward()
    flat = [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in objective.parameters()]
    return torch.cat(flat), answer.records[0]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


SCHEDULES: dict[str, dict[str, object]] = {
    "checkpoint": {"schedule": "checkpoint"},
    "two_pass": {"schedule": "two_pass"},
    "two_pass, merged": {"schedule": "two_pass", "merged_steps": 4},  # 4 and 2 of 6 steps
    "hybrid of one": {"schedule": "hybrid", "kept_steps": 1},
    "hybrid, merged": {"schedule": "hybrid", "kept_steps": 3, "merged_steps": 3},
    "hybrid of all": {"schedule": "hybrid", "kept_steps": STEPS},
    "segment of all": {"schedule": "segments", "segment_steps": STEPS},
}


@pytest.mark.parametrize("mass", ["scores", "counts"])
@pytest.mark.parametrize("router", [*ROUTERS, "race"])
def test_every_schedule_has_the_gradient_of_plain(router: str, mass: str) -> None:
    plain, record = gradients(make_run(router, mass))
    for name, fields in SCHEDULES.items():
        other, other_record = gradients(make_run(router, mass, **fields))
        assert distance(other, plain) < 1e-10, name
        told, expected = ((*each.terms, each.thresholds) for each in (other_record, record))
        for ours, theirs in zip(told, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("router", ["diffmoe", "race"])
def test_steps_that_are_one_pool_have_the_gradient_of_plain_in_every_schedule(router: str) -> None:
    run = make_run(router, "counts", pool="trajectory")
    first = gradients(run)[1]
    assert first.cutoffs is not None
    plain, record = gradients(run, cutoffs=first.cutoffs)
    assert distance(plain, gradients(make_run(router, "counts"))[0]) > 1e-2, "other tokens are served"
    for name, fields in SCHEDULES.items():
        other, told = gradients(make_run(router, "counts", pool="trajectory", **fields), cutoffs=first.cutoffs)
        assert distance(other, plain) < 1e-10, name
        for ours, theirs in ((told.cutoffs, record.cutoffs), (told.thresholds, record.thresholds)):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(torch.stack(told.terms), torch.stack(record.terms), rtol=1e-10, atol=1e-12)
    for block in range(STEPS // 2):  # a segment sees the scores of all steps, so its cutoffs are those of all
        segments = make_run(router, "counts", pool="trajectory", schedule="segments", segment_steps=2)
        part = gradients(segments, block, cutoffs=first.cutoffs)[1]
        torch.testing.assert_close(part.cutoffs, record.cutoffs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("router", ["diffmoe", "race"])
def test_cutoffs_of_the_same_trajectory_choose_as_one_pool(router: str) -> None:
    """With the very cutoffs of its tokens a rollout serves, over all its steps, what one pool of them would."""
    run = make_run(router, "counts", pool="trajectory")
    model, item = make_objective(run).model, make_item()
    pool = TrajectoryPool(run.model)
    with torch.no_grad():
        steps = rollout(model, item, uses_x0_prev=True)
        for step in steps:
            pool.add_scores(step.routing)
        cutoffs = pool.cutoffs()
        again = rollout_step(model, item, 0, item.x_t(0), CallMode(cutoffs=tuple(cutoffs))).routing
    for record, cutoff in zip(again, cutoffs, strict=True):
        assert torch.equal(record.routing_map, record.scores >= cutoff)
        assert torch.equal(record.cutoff.flatten(), cutoff)
    whole = torch.cat([step.routing[0].scores for step in steps])
    expected = RULES[router].train(RuleInput(whole), run.model.moe_blocks[0])
    assert torch.equal(whole >= cutoffs[0], expected)
    loads = [(step.routing[0].scores >= cutoffs[0]).sum() for step in steps]
    assert len(set(map(int, loads))) > 1, "steps get unequal shares"


@pytest.mark.parametrize("router", ["ec", "diffmoe", "race"])
def test_the_routing_loss_can_train_the_saliency_routers_alone(router: str) -> None:
    """Other parameters get the gradient of a run without the loss, saliency routers that of a hand-made cut."""

    def gradient(weight: float, cut: bool, **fields: object) -> tuple[dict[str, Tensor], StepRecord]:
        run = make_run(router, "counts", weight, **fields)
        loss = run.loss.model_copy(update={"routing_gradient": "saliency_routers" if cut else "all"})
        objective = make_objective(run.model_copy(update={"loss": loss}))
        answer = objective(StepRequest((make_item(),)))
        answer.loss.backward()
        found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in objective.named_parameters()}
        return found, answer.records[0]

    cut, record = gradient(0.5, cut=True)
    without, whole = gradient(0.0, cut=False)[0], gradient(0.5, cut=False)
    torch.testing.assert_close(record.terms.total, whole[1].terms.total)
    for name, value in cut.items():
        if "saliency_router" not in name:
            torch.testing.assert_close(value, without[name], rtol=1e-9, atol=1e-12)
        elif "out.bias" in name:
            assert distance(value, without[name]) > 1e-3
    gates = [name for name in cut if ".gate." in name]
    assert max(distance(whole[0][name], without[name]) for name in gates) > 1e-3
    # The last MoE layer is before nothing: there its own router has the whole gradient of the loss in either form.
    last = max(name.rpartition(".moe.")[0] for name in cut if ".moe." in name)
    steps = [gradient(0.5, cut=True, **fields)[0] for fields in SCHEDULES.values()]
    for other in steps:
        for name, value in cut.items():
            torch.testing.assert_close(other[name], value, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(
        cut[f"{last}.moe.saliency_router.out.weight"],
        whole[0][f"{last}.moe.saliency_router.out.weight"],
        rtol=1e-9,
        atol=1e-12,
    )


def test_the_weight_of_a_step_is_that_of_a_run_in_every_schedule() -> None:
    """The warm-up gives each step a weight of its own; 0 is training without the loss, which is still measured."""
    item = make_item()

    def gradient(run: RunConfig, weight: float | None) -> tuple[Tensor, StepRecord]:
        objective = make_objective(run)
        answer = objective(StepRequest((item,), routing_weight=weight))
        answer.loss.backward()
        flat = [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in objective.parameters()]
        return torch.cat(flat), answer.records[0]

    for fields in ({}, {"schedule": "two_pass"}, {"schedule": "hybrid", "kept_steps": 2}):
        for weight in (0.2, 0.0):
            ours, record = gradient(make_run("ec", "counts", 0.5, **fields), weight)
            theirs, other = gradient(make_run("ec", "counts", weight), None)
            assert distance(ours, theirs) < 1e-10
            torch.testing.assert_close(record.terms.total, other.terms.total)
            assert record.terms.routing > 0


@pytest.mark.parametrize("router", ["ec", "diffmoe"])
def test_noise_drawn_anew_is_that_of_each_step_in_every_schedule(router: str) -> None:
    plain, record = gradients(make_run(router, "counts"), fresh=True)
    assert distance(plain, gradients(make_run(router, "counts"))[0]) > 1e-2
    for name, fields in SCHEDULES.items():
        other, other_record = gradients(make_run(router, "counts", **fields), fresh=True)
        assert distance(other, plain) < 1e-10, name
        for ours, theirs in zip(other_record.terms, record.terms, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    run = make_run(router, "counts", schedule="segments", segment_steps=2)
    blocks = [gradients(run, block, fresh=True)[0] for block in range(STEPS // 2)]
    assert distance(torch.stack(blocks).mean(0), plain) < 1e-10
    again = make_item(fresh=True)
    same = again._replace(x1=again.x1[:1].expand_as(again.x1))  # the same noise at each step is fixed noise
    one = again._replace(x1=again.x1[0])
    model = make_objective(make_run(router)).model
    for ours, theirs in zip(rollout(model, same, True), rollout(model, one, True), strict=True):
        assert torch.equal(ours.x0_hat, theirs.x0_hat)
        assert torch.equal(ours.v_target, theirs.v_target)


@pytest.mark.parametrize("own_steps", [1, 2, STEPS - 1])
def test_own_states_are_those_of_plain_in_every_schedule(own_steps: int) -> None:
    plain, record = gradients(make_run("diffmoe", "counts", own_steps=own_steps))
    assert distance(plain, gradients(make_run("diffmoe", "counts"))[0]) > 1e-2
    for name, fields in SCHEDULES.items():
        other, other_record = gradients(make_run("diffmoe", "counts", own_steps=own_steps, **fields))
        assert distance(other, plain) < 1e-10, name
        for ours, theirs in zip(other_record.terms, record.terms, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    run = make_run("diffmoe", "counts", own_steps=own_steps, schedule="segments", segment_steps=2)
    blocks = [gradients(run, block)[0] for block in range(STEPS // 2)]
    assert distance(torch.stack(blocks).mean(0), plain) < 1e-10


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("own_steps", [0, 1, 2, STEPS - 1])
def test_own_states_are_euler_steps_and_lead_to_the_image(
    own_steps: int, fresh: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call of the model is recorded; the states that are not the data's follow from the call before."""
    objective, item = make_objective(make_run("ec", "counts", own_steps=own_steps)), make_item(fresh=fresh)
    item.times[-1] = 0.05  # nearer to the data than the noise of an own state is scaled
    states, velocities = list[Tensor](), list[Tensor]()

    def recorded(model: Any, args: tuple[Tensor, ...], output: Any) -> None:
        states.append(args[0])
        velocities.append(output.v.detach())

    objective.model.register_forward_hook(recorded)
    seen = list[Tensor]()
    losses = objective_module.step_terms
    monkeypatch.setattr(
        objective_module, "step_terms", lambda output, run: (seen.append(output.v_target), losses(output, run))[1]
    )
    objective(StepRequest((item,)))
    assert len(states) == len(seen) == STEPS
    for step in range(STEPS):
        s = item.times[step].reshape(-1, 1, 1, 1)
        if step % (own_steps + 1) == 0:
            torch.testing.assert_close(states[step], item.x_t(step), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(seen[step], item.noise(step) - item.x0, rtol=1e-12, atol=1e-12)
            continue
        euler = advance(states[step - 1], velocities[step - 1], item.times[step - 1], item.times[step])
        share = s / s.clamp_min(0.1)  # near the data towards x0
        torch.testing.assert_close(states[step], item.x0 + share * (euler - item.x0), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(states[step] - s * seen[step], item.x0, rtol=1e-9, atol=1e-9)
        assert distance(states[step], item.x_t(step)) > 1e-2


def test_own_states_of_a_perfect_model_are_those_of_the_data() -> None:
    item = make_item()
    for step in range(STEPS - 1):
        own = with_own_state(item, step, item.x0)
        assert own.noise(step) is not item.x1
        kept = item.times[step + 1] >= 0.1
        torch.testing.assert_close(own.noise(step + 1)[kept], item.x1[kept], rtol=1e-9, atol=1e-9)
        for other in range(STEPS):
            if other != step + 1:
                assert torch.equal(own.noise(other), item.noise(other))
    still = item._replace(times=torch.zeros_like(item.times))  # uniform draws may be 0
    assert with_own_state(still, 0, item.x0).x_t(1).isfinite().all()


@pytest.mark.parametrize(("name", "calls"), [("two_pass", STEPS), ("hybrid, merged", 3 + 1), ("checkpoint", 2 * STEPS)])
def test_a_first_pass_leaves_out_what_only_losses_read(name: str, calls: int) -> None:
    run = make_run("diffmoe", **SCHEDULES[name])
    objective, seen = make_objective(run), list[bool]()
    predictor = objective.model.moe_layers()[0].capacity_predictor
    assert predictor is not None
    predictor.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    objective(StepRequest((make_item(),))).loss.backward()
    assert seen == [True] * calls


@pytest.mark.parametrize("mass", ["scores", "counts"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.slow
def test_segments_are_unbiased(router: str, mass: str) -> None:
    plain, _ = gradients(make_run(router, mass))
    for size, kept, merged in ((1, None, 1), (2, 0, 1), (3, 0, 2), (3, 1, 1), (2, None, 1)):
        fields = {"segment_steps": size, "kept_steps": kept, "merged_steps": merged}
        run = make_run(router, mass, schedule="segments", **fields)
        draws = [gradients(run, block)[0] for block in range(STEPS // size)]
        assert distance(torch.stack(draws).mean(0), plain) < 1e-10
        assert distance(draws[0], plain) > 1e-3  # a single segment is an estimate


@pytest.mark.parametrize("fields", [{}, *SCHEDULES.values()], ids=["plain", *SCHEDULES])
def test_micro_batches_give_the_mean_of_their_gradients(fields: dict[str, object]) -> None:
    run = make_run("ec", **fields)
    whole, _ = gradients(run, items=3)
    objective = make_objective(run)
    for seed in (3, 4, 5):
        (objective(StepRequest((make_item(seed),))).loss / 3).backward()
    by_hand = torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None])
    used = torch.cat([torch.full((p.numel(),), p.grad is not None) for p in objective.parameters()])
    assert distance(whole[used], by_hand) < 1e-12
    assert (whole[~used] == 0).all()


def test_a_parameter_that_no_graph_has_gets_no_gradient() -> None:
    """ZeRO's hooks must not be called for it."""
    objective = make_objective(make_run("ec").model_copy(update={"stage": "pretrain"}))
    item = make_item()
    item = item._replace(times=item.times[:1])
    reached = list[str]()
    for name, parameter in objective.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: reached.append(name))
    objective(StepRequest((item, item))).loss.backward()
    names = {name for name, _ in objective.named_parameters()}
    assert set(reached) == {name for name in names if "saliency_router" not in name}
    assert len(reached) == len(set(reached))


@pytest.mark.parametrize("router", ["ec", "diffmoe"])
@pytest.mark.parametrize("mass", ["scores", "counts"])
def test_routing_loss_moves_the_gradient(router: str, mass: str) -> None:
    with_loss, record = gradients(make_run(router, mass))
    without, _ = gradients(make_run(router, mass, weight=0.0))
    assert record.terms.routing > 0
    assert distance(with_loss, without) > 1e-4


def test_token_choice_trains_with_the_flow_loss_only() -> None:
    _, record = gradients(make_run("tc"))
    assert record.terms.routing == 0
    assert record.terms.router > 0


FORWARDS = {  # schedule -> calls with gradient, calls without, images in all of them; T = 6, 3 images
    "plain": ({}, 6, 0, 6),
    "checkpoint": ({"schedule": "checkpoint"}, 6, 0, 6),
    "two_pass": ({"schedule": "two_pass"}, 6, 6, 12),
    "merged": ({"schedule": "two_pass", "merged_steps": 3}, 2, 6, 12),
    "hybrid": ({"schedule": "hybrid", "kept_steps": 4}, 6, 2, 8),
    "hybrid of all": ({"schedule": "hybrid", "kept_steps": 6}, 6, 0, 6),
    "segments": ({"schedule": "segments", "segment_steps": 2}, 2, 4, 6),
    "segments run again": ({"schedule": "segments", "segment_steps": 2, "kept_steps": 0}, 2, 6, 8),
}


def forwards(run: RunConfig) -> tuple[int, int, int]:
    """Model calls of one micro-batch and its backward: with gradient, without, images of all over those of one."""
    objective, calls = make_objective(run), list[tuple[bool, int]]()
    objective.model.register_forward_pre_hook(lambda _, inputs: calls.append((torch.is_grad_enabled(), len(inputs[0]))))
    objective(StepRequest((make_item(),))).loss.backward()
    trained = sum(graph for graph, _ in calls)
    return trained, len(calls) - trained, sum(images for _, images in calls) // BATCH


@pytest.mark.parametrize("name", FORWARDS)
def test_forward_calls(name: str) -> None:
    fields, *expected = FORWARDS[name]
    assert forwards(make_run("ec", **fields)) == tuple(expected)


@pytest.mark.parametrize("fields", [{"schedule": "two_pass"}, {"schedule": "hybrid", "kept_steps": 2}])
def test_without_routing_loss_there_is_no_first_pass(fields: dict[str, object]) -> None:
    run = make_run("ec", weight=0.0, **fields)
    assert forwards(run) == (STEPS, 0, STEPS)
    assert distance(gradients(run)[0], gradients(make_run("ec", weight=0.0))[0]) < 1e-10


@pytest.mark.parametrize("merged", [1, 3])
def test_half_precision_replays_the_routing_of_the_first_pass(merged: int) -> None:
    """Each image is routed anew in the first pass only, and the second is handed just that."""
    run = make_run("diffmoe", schedule="two_pass", merged_steps=merged)
    objective = make_objective(run).to(torch.bfloat16)
    first, second = list[Tensor](), list[Tensor]()
    layer = objective.model.moe_layers()[0]

    def see(_: object, inputs: tuple[Any, ...], output: tuple[Tensor, Routing]) -> None:
        replayed = inputs[3].replayed
        (first if replayed is None else second).append(output[1].routing_map)
        assert replayed is None or torch.equal(replayed, output[1].routing_map)

    layer.register_forward_hook(see)
    objective(StepRequest((make_item(),))).loss.backward()
    assert len(first) == STEPS
    assert torch.equal(torch.cat(first), torch.cat(second))
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)


def test_x0_prev_is_the_former_clean_prediction_and_detached() -> None:
    objective = make_objective(make_run("ec"))
    item, seen = make_item(), []
    forward = objective.model.forward

    def spy(x_t: Tensor, t: Tensor, condition: object, x0_prev: Tensor, *rest: object) -> object:
        seen.append((x_t, x0_prev))
        return forward(x_t, t, condition, x0_prev, *rest)

    objective.model.forward = spy
    outputs = rollout(objective.model, item, uses_x0_prev=True)
    assert torch.equal(seen[0][1], seen[0][0])  # step 1 is guided by x_{t_1} itself
    for (_, x0_prev), before in zip(seen[1:], outputs[:-1], strict=True):
        assert torch.equal(x0_prev, before.x0_hat)
        assert not x0_prev.requires_grad


def test_times_descend_from_the_first() -> None:
    times = descending_times(torch.rand(9, 100), 0.999)
    assert times.shape == (10, 100)
    assert (times[0] == 0.999).all()
    assert (times[1:] <= times[:-1]).all()
    assert torch.equal(descending_times(torch.rand(0, 4), 0.999), torch.full((1, 4), 0.999))
