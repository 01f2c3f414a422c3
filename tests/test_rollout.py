"""The rollout and its exact forms, in float64 on one process."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sharpmoe.config import LossConfig, ModelConfig, RolloutConfig, RunConfig
from sharpmoe.flow import descending_times
from sharpmoe.model.dit import DiT
from sharpmoe.model.embed import TextCondition
from sharpmoe.rollout import Item, rollout
from sharpmoe.train.objective import Objective, StepRecord, run_schedule

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
    model = DiT(run.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Objective(model, run).train()


def make_item() -> Item:
    g = torch.Generator().manual_seed(3)
    x0, x1 = torch.randn(2, BATCH, 4, 8, 8, generator=g)
    times = descending_times(torch.rand(STEPS - 1, BATCH, generator=g), 0.999)
    text = torch.randn(BATCH, 5, 6, generator=g)
    condition = TextCondition(text, torch.ones(BATCH, 5, dtype=torch.bool), torch.randn(BATCH, 4, generator=g))
    return Item(x0, x1, times, condition, torch.rand(BATCH, 16, generator=g))


def gradients(run: RunConfig, block: int = 0) -> tuple[Tensor, StepRecord, list[bool]]:
    objective = make_objective(run)
    ends: list[bool] = []

    def backward(loss: Tensor, last: bool) -> None:
        ends.append(last)
        loss.backward()

    record = run_schedule(objective, make_item(), run, backward, guided=objective.guided, block=block)
    flat = [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in objective.parameters()]
    return torch.cat(flat), record, ends


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("mass", ["scores", "counts"])
@pytest.mark.parametrize("router", ROUTERS)
def test_plain_recomputed_two_pass_and_mean_segment_agree(router: str, mass: str) -> None:
    plain, record, ends = gradients(make_run(router, mass))
    assert ends == [True]
    recomputed, _, _ = gradients(make_run(router, mass, checkpoint_blocks=True))
    two_pass, two_record, two_ends = gradients(make_run(router, mass, schedule="two_pass"))
    assert two_ends == [False] * (STEPS - 1) + [True]
    assert distance(recomputed, plain) < 1e-10
    assert distance(two_pass, plain) < 1e-10
    for ours, theirs in zip(two_record.terms, record.terms, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for size in (1, 2, 3):
        run = make_run(router, mass, schedule="two_pass", segment_steps=size)
        draws = [gradients(run, block)[0] for block in range(STEPS // size)]
        assert distance(torch.stack(draws).mean(0), plain) < 1e-10
        assert distance(draws[0], plain) > 1e-3  # a single segment is an estimate


@pytest.mark.parametrize("router", ["ec", "diffmoe"])
@pytest.mark.parametrize("mass", ["scores", "counts"])
def test_routing_loss_moves_the_gradient(router: str, mass: str) -> None:
    with_loss, record, _ = gradients(make_run(router, mass))
    without, _, _ = gradients(make_run(router, mass, weight=0.0))
    assert record.terms.routing > 0
    assert distance(with_loss, without) > 1e-4


def test_token_choice_trains_with_the_flow_loss_only() -> None:
    _, record, _ = gradients(make_run("tc"))
    assert record.terms.routing == 0
    assert record.terms.balance > 0


def test_two_pass_without_routing_loss_needs_one_forward_per_step() -> None:
    run = make_run("ec", weight=0.0, schedule="two_pass")
    objective = make_objective(run)
    calls: list[object] = []

    def call(request: object) -> object:
        calls.append(request)
        return objective(request)

    run_schedule(call, make_item(), run, lambda loss, last: loss.backward(), guided=True)
    assert len(calls) == STEPS
    single = torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None])
    plain, _, _ = gradients(make_run("ec", weight=0.0))
    assert abs(float(single.norm() / plain.norm()) - 1) < 1e-10


def test_guidance_is_the_former_clean_prediction_and_detached() -> None:
    objective = make_objective(make_run("ec"))
    item, seen = make_item(), []
    forward = objective.model.forward

    def spy(x_t: Tensor, t: Tensor, condition: object, guidance: Tensor, *rest: object) -> object:
        seen.append((x_t, guidance))
        return forward(x_t, t, condition, guidance, *rest)

    objective.model.forward = spy
    outputs = rollout(objective.model, item, guided=True)
    assert torch.equal(seen[0][1], seen[0][0])  # step 1 is guided by x_{t_1} itself
    for (_, guidance), before in zip(seen[1:], outputs[:-1], strict=True):
        assert torch.equal(guidance, before.x0_hat)
        assert not guidance.requires_grad


def test_times_descend_from_the_first() -> None:
    times = descending_times(torch.rand(9, 100), 0.999)
    assert times.shape == (10, 100)
    assert (times[0] == 0.999).all()
    assert (times[1:] <= times[:-1]).all()
    assert torch.equal(descending_times(torch.rand(0, 4), 0.999), torch.full((1, 4), 0.999))
