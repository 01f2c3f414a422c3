"""The noise of trajectories: what the latents of two steps tell about the image together."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sharpmoe.flow import descending_times, interpolate, markov_noise


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
