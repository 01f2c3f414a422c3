"""Losses against their definitions."""

import pytest
import torch
from torch.nn import functional

from sharpmoe.config import LossConfig, ModelConfig
from sharpmoe.losses import HEAD_LOSSES, ROUTER_LOSSES, flow_matching, routing_mass, trajectory_routing
from sharpmoe.moe.routing import Routing
from sharpmoe.moe.selection import RULES, RuleInput, lowest_accepted

COUNTS = LossConfig(routing_mass="counts", count_temperature=0.05)
EC, TC = ModelConfig(router="ec"), ModelConfig(router="tc")


def record(scores: torch.Tensor, chosen: torch.Tensor) -> Routing:
    logits = scores.log()
    return Routing(logits, logits, scores, scores * chosen, chosen, lowest_accepted(scores, chosen, EC))


def router_loss(name: str, of: Routing, **config: float) -> torch.Tensor:
    return ROUTER_LOSSES[name].function([of], LossConfig(**config))


def test_kl_is_the_definition_and_zero_at_equality() -> None:
    mass, saliency = torch.randn(3, 8).double(), torch.rand(3, 8).double()
    config = LossConfig(mass_scale=0.5, saliency_scale=4.0, mass_reduction="sum")
    p, q = (0.5 * mass).softmax(-1), (4.0 * saliency).softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(trajectory_routing(mass, saliency, config, 7), expected)
    same = trajectory_routing(saliency * 8.0, saliency, config, 7)
    assert same.abs() < 1e-15
    mean = LossConfig(mass_scale=3.5, saliency_scale=4.0, mass_reduction="mean")
    torch.testing.assert_close(trajectory_routing(mass, saliency, mean, 7), expected)


def test_masses_sum_what_the_paper_says() -> None:
    scores = torch.rand(2, 8, 4).softmax(-1).requires_grad_()
    chosen = RULES["ec"].train(RuleInput(scores.detach()), EC)
    records = [record(scores, chosen), record(scores, chosen)]
    torch.testing.assert_close(routing_mass(records, LossConfig(routing_mass="scores")), 2 * (scores * chosen).sum(-1))
    counts = routing_mass(records, COUNTS)
    assert torch.equal(counts.detach(), 2.0 * chosen.sum(-1))
    counts[0, 0].backward()
    assert (scores.grad[0, 0] > 0).all()  # a higher score brings a token nearer to every expert
    assert scores.grad[1].abs().sum() == 0


def test_counts_that_steer_saliency_routers_alone_have_no_other_gradient() -> None:
    scores = torch.rand(2, 4, 3, dtype=torch.float64, requires_grad=True)
    of = record(scores, scores.detach() > 0.5)
    for gradient, reaches in (("all", True), ("saliency_routers", False)):
        mass = routing_mass([of], LossConfig(routing_mass="counts", routing_gradient=gradient))
        assert torch.equal(mass.detach(), of.routing_map.sum(-1).double())
        assert mass.requires_grad == reaches


def test_an_expert_without_tokens_gives_no_count_gradient() -> None:
    scores = torch.rand(1, 8, 4).softmax(-1).requires_grad_()
    chosen = torch.zeros(1, 8, 4, dtype=torch.bool)
    routing_mass([record(scores, chosen)], COUNTS).sum().backward()
    assert torch.isfinite(scores.grad).all()
    assert scores.grad.abs().sum() == 0


@pytest.mark.parametrize("top_k", [1, 2])
def test_balance_is_one_when_even_and_e_when_collapsed(top_k: int) -> None:
    even = torch.full((1, 4, 4), 0.25)
    chosen = torch.stack([torch.eye(4).roll(shift, 1) for shift in range(top_k)]).sum(0).bool()[None]
    torch.testing.assert_close(router_loss("balance", record(even, chosen)), torch.tensor(1.0))
    collapsed = torch.zeros(1, 4, 4)
    collapsed[..., 0] = 1.0
    torch.testing.assert_close(
        router_loss("balance", record(collapsed, RULES["tc"].train(RuleInput(collapsed), TC))), torch.tensor(4.0)
    )


def test_router_similarity_is_one_where_balanced_and_grows_with_collapse() -> None:
    even = torch.full((1, 12, 3), 1 / 3)
    rounds = torch.nn.functional.one_hot(torch.arange(12) % 3, 3).bool()[None]
    balanced = record(even, rounds)
    assert router_loss("similarity", balanced).item() == pytest.approx(1 / 3)  # no pairs: the diagonal alone
    pairs = ~rounds
    assert router_loss("similarity", record(even, pairs)).item() == pytest.approx(1.0)
    sharp = torch.tensor([0.98, 0.01, 0.01]).expand(1, 12, 3)
    alone = torch.zeros(1, 12, 3, dtype=torch.bool)
    alone[..., 0] = True
    assert router_loss("similarity", record(sharp, alone)) > 2.5


def test_contrast_of_centres_that_fit_their_tokens_is_small() -> None:
    similarity = torch.eye(3).unsqueeze(0)
    fits = record(torch.full((1, 3, 3), 1 / 3), torch.eye(3, dtype=torch.bool)[None])._replace(similarity=similarity)
    assert router_loss("contrastive", fits, contrastive_temperature=0.07) < 1e-5
    idle = similarity.clone()
    idle[:, :, 2] = torch.nan  # an expert without tokens takes no part
    found = router_loss("contrastive", fits._replace(similarity=idle), contrastive_temperature=1.0)
    assert found.item() == pytest.approx(-torch.tensor([1.0, 0.0]).log_softmax(0)[0].item())


@pytest.mark.parametrize(
    ("value", "target"), [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float32,) * 2]
)
def test_targets_of_another_dtype_train(
    value: torch.dtype, target: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under torch 2.11 too, whose mean squared error of a mixture has no backward ("Found dtype Double ...")."""
    mean_squared_error = functional.mse_loss

    def of_one_dtype(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.dtype == b.dtype
        return mean_squared_error(a, b)

    v, v_target = torch.randn(2, 4, 4, 4, dtype=value), torch.randn(2, 4, 4, 4, dtype=target)
    expected = mean_squared_error(v, v_target)
    monkeypatch.setattr(functional, "mse_loss", of_one_dtype)
    v.requires_grad_()
    loss = flow_matching(v, v_target)
    loss.backward()
    assert torch.equal(loss, expected)
    assert v.grad is not None
    tokens = torch.randn(2, 4, 16, dtype=value, requires_grad=True)
    heads = record(torch.rand(2, 4, 3), torch.ones(2, 4, 3, dtype=torch.bool))._replace(prediction=tokens)
    HEAD_LOSSES["layers"].function([heads], v_target, 2).backward()
    assert tokens.grad is not None
