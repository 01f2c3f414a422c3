"""Times and their shift against diffusers; noise: what the latents of two steps tell about the image together."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal

from sharpmoe import flow
from sharpmoe.config import ShiftConfig
from sharpmoe.errors import ConfigError
from sharpmoe.flow import descending_times, interpolate, markov_noise

PUBLISHED = ShiftConfig(factor="tokens")  # of Nucleus-Image, FLUX and Qwen-Image


@pytest.mark.parametrize("tokens", [100, 256, 1024, 2304, 4096, 6400])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_the_shift_by_tokens_is_that_of_diffusers(tokens: int, steps: int) -> None:
    schedulers = pytest.importorskip("diffusers.schedulers.scheduling_flow_match_euler_discrete")
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)  # what pipelines give it
    scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)], mu=mu)
    factor = flow.shift_factor(PUBLISHED, tokens)
    assert factor == pytest.approx(math.exp(mu), rel=1e-12)
    torch.testing.assert_close(flow.sampling_times(steps, factor), scheduler.sigmas, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_a_fixed_shift_is_that_of_diffusers(factor: float) -> None:
    schedulers = pytest.importorskip("diffusers.schedulers.scheduling_flow_match_euler_discrete")
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler(shift=factor)
    scheduler.set_timesteps(sigmas=[1 - k / 20 for k in range(20)])
    assert flow.shift_factor(ShiftConfig(factor=factor), 77) == factor
    torch.testing.assert_close(flow.sampling_times(20, factor), scheduler.sigmas, rtol=1e-6, atol=1e-6)


def test_the_line_of_mu_has_the_given_points() -> None:
    shift = ShiftConfig(factor="tokens", base_tokens=16, max_tokens=64, base_shift=0.0, max_shift=1.0)
    logarithms = [math.log(flow.shift_factor(shift, tokens)) for tokens in (16, 40, 64, 112)]
    assert logarithms == pytest.approx([0, 0.5, 1, 2])


def test_keys_that_shift_beyond_all_times_are_one_line() -> None:
    shift = ShiftConfig(factor="tokens", base_tokens=1, max_tokens=2, base_shift=-10.0, max_shift=10.0)
    assert flow.shift_factor(shift, 3) == pytest.approx(math.exp(30))
    with pytest.raises(ConfigError, match="4096 tokens have mu 8.19e\\+04, allowed: -30 to 30; correct base_tokens"):
        flow.shift_factor(shift, 4096)
    assert flow.shift_factor(ShiftConfig(factor="tokens"), 2**16) > 1e4  # 4096 pixels a side


def test_no_shift_changes_no_bit() -> None:
    t = torch.rand(1000)
    assert flow.shift_factor(ShiftConfig(), 4096) == 1
    assert flow.shift_times(t, 1.0) is t
    assert torch.equal(flow.sampling_times(50), torch.linspace(1, 0, 51))


def test_rollout_times_keep_their_first_and_their_order() -> None:
    uniform = torch.rand(9, 1000, generator=torch.Generator().manual_seed(0)).clamp(0.001, 0.999)
    plain, shifted = (flow.descending_times(uniform, 0.999, factor) for factor in (1.0, 3.0))
    assert torch.equal(plain[0], shifted[0])
    assert (shifted.diff(dim=0) <= 0).all()
    assert (shifted[1:] > plain[1:]).all()
    odds, shifted_odds = (t / (1 - t) for t in (plain[1:].double() / 0.999, shifted[1:].double() / 0.999))
    torch.testing.assert_close(shifted_odds, 3 * odds, rtol=1e-3, atol=0)  # a shift multiplies t / (1 - t)


def test_pretraining_times_move_by_the_logarithm() -> None:
    normal = torch.linspace(-3, 3, 601)
    share = Normal(math.log(3), 1.0).cdf(flow.logit_normal_times(normal, 3.0).logit())
    torch.testing.assert_close(share, Normal(0.0, 1.0).cdf(normal), rtol=1e-4, atol=1e-5)


def coefficients(times: Tensor) -> Tensor:
    """Return the factors (T, T) of the independent draws in the noise of each step; times (T,) float64."""
    steps = len(times)
    basis = torch.eye(steps, dtype=torch.float64)[:, None]  # (T, B = 1, T): draw k is the k-th unit vector
    return markov_noise(basis, times[:, None])[:, 0]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=8))
def test_each_step_has_standard_normal_noise_and_the_noisier_one_tells_nothing_more(drawn: list[float]) -> None:
    times = torch.tensor(sorted(drawn, reverse=True), dtype=torch.float64)
    factors = coefficients(times)
    torch.testing.assert_close(factors.square().sum(1), torch.ones(len(times), dtype=torch.float64))
    # x0 ~ N(0, 1): the best estimate of x0 from (x_s, x_t), s > t, gives x_s no weight
    for first in range(len(times) - 1):
        s, t = times[first], times[first + 1]
        if not 1e-3 < t < s < 1 - 1e-3:
            continue
        signal = 1 - torch.stack([s, t])
        noise = torch.stack([s, t])[:, None] * factors[first : first + 2]
        covariance = signal[:, None] * signal + noise @ noise.T
        if torch.linalg.cond(covariance) < 1e6:
            weights = torch.linalg.solve(covariance, signal)
            torch.testing.assert_close(weights[0], torch.zeros_like(weights[0]), atol=1e-8, rtol=0)


def test_one_noise_and_independent_noise_tell_more_than_the_last_latent() -> None:
    """Why there is a third kind: x_s adds to what x_t tells with the noise of the paper, and with fresh noise too."""
    s, t = torch.tensor([0.7, 0.4], dtype=torch.float64)
    signal = 1 - torch.stack([s, t])
    for factors in (torch.ones(2, 1, dtype=torch.float64), torch.eye(2, dtype=torch.float64)):
        noise = torch.stack([s, t])[:, None] * factors
        weights = torch.linalg.solve(signal[:, None] * signal + noise @ noise.T, signal)
        assert abs(weights[0]) > 0.1


def test_the_chain_has_its_ends_right() -> None:
    independent = torch.randn(4, 2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([[1.0, 1.0], [1.0, 0.5], [0.5, 0.5], [0.0, 0.5]])  # pure noise, equal times, data
    noises = markov_noise(independent, times)
    assert noises.isfinite().all()
    assert noises.dtype == independent.dtype
    assert torch.equal(noises[3], independent[3])
    assert torch.equal(noises[1, 1], noises[2, 1])  # equal times: one latent
    assert torch.equal(noises[2, 1], noises[3, 1])
    assert torch.equal(noises[2, 0], independent[2, 0])  # x_0 is data, whose noise is not seen
    assert torch.equal(noises[0, 1], independent[0, 1])  # pure noise after t = 0.5
    assert torch.equal(noises[0, 0], noises[1, 0])


def test_in_a_trajectory_the_noisier_latent_is_the_less_noisy_one_with_noise_added() -> None:
    generator = torch.Generator().manual_seed(1)
    times = descending_times(torch.rand(5, 4, generator=generator), 0.999)
    independent = torch.randn(6, 4, 3000, generator=generator)
    noises = markov_noise(independent, times)
    x0 = torch.randn(4, 3000, generator=generator)
    for step in range(5):
        s, t = times[step], times[step + 1]
        x_s, x_t = interpolate(x0, noises[step], s), interpolate(x0, noises[step + 1], t)
        added = x_s - ((1 - s) / (1 - t))[:, None] * x_t
        for other in (x0, x_t):  # independent of both: correlations of 3,000 draws
            assert (
                torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(added, other, strict=True)])
                .abs()
                .max()
                < 0.08
            )
