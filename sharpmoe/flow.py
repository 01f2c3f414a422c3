"""Flow matching. The only file that knows the direction of time: t = 0 is data, t = 1 is noise.

x_t = (1 - t) x0 + t x1 with x1 ~ N(0, I); the target is v = x1 - x0 and the clean prediction x0_hat = x_t - t v
(SharpMoE, arXiv 2606.26938, section 3; rectified flow). Checkpoints of other conventions are converted where they are
loaded (`sharpmoe.model.weights`), never here.
A network trained to predict the noise of a DDPM is asked for its velocity here, by equal signal-to-noise ratio.
"""

import math

import torch
from torch import Tensor

from sharpmoe.config import ShiftConfig

# Ranges of t by which figures are grouped, highest noise first: lower < t <= upper.
TIME_RANGES: dict[str, tuple[float, float]] = {
    "t > 0.65": (0.65, 1.0),
    "t 0.35-0.65": (0.35, 0.65),
    "t < 0.35": (0.0, 0.35),
}


def _per_sample(t: Tensor, like: Tensor) -> Tensor:
    """Shape t (B,) as (B, 1, ...) so that it broadcasts over `like` (B, ...)."""
    return t.reshape(-1, *([1] * (like.ndim - 1))).to(like.dtype)


def interpolate(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """Noisy latent x_t (B, ...) of data x0 and noise x1 (both (B, ...)) at times t (B,) in [0, 1]."""
    t = _per_sample(t, x0)
    return (1 - t) * x0 + t * x1


def velocity_target(x0: Tensor, x1: Tensor) -> Tensor:
    """Velocity v = x1 - x0 that the model learns, shape of x0."""
    return x1 - x0


def clean_prediction(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Predicted clean latent x0_hat = x_t - t v; x_t, v (B, ...), t (B,). Not detached."""
    return x_t - _per_sample(t, x_t) * v


def shift_factor(shift: ShiftConfig, tokens: int) -> float:
    """Return the factor s of `shift_times` for images of so many tokens; 1 is no shift. Raises ConfigError."""
    return math.exp(shift.mu(tokens)) if shift.factor == "tokens" else shift.factor


def shift_times(t: Tensor, factor: float) -> Tensor:
    """Shift times t in [0, 1], any shape, towards noise: s t / (1 + (s - 1) t) with s = `factor`; 0 and 1 stay.

    An image of more pixels needs more noise for the same uncertainty about its content: with s = sqrt(m / n), an image
    of m pixels at t' is as uncertain as one of n pixels at t (arXiv 2403.03206, section 5.3.2). A factor of 1 returns
    t itself.
    """
    return t if factor == 1 else factor * t / (1 + (factor - 1) * t)


def sampling_times(num_steps: int, factor: float = 1.0) -> Tensor:
    """Times of a sampler with `num_steps` steps, from noise (1) to data (0): (num_steps + 1,) float32.

    They are evenly spaced before they are shifted by `factor` (`shift_times`).
    """
    return shift_times(torch.linspace(1, 0, num_steps + 1), factor)


def advance(x_t: Tensor, v: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """Euler step of dx/dt = v from time t to t_next (0-d tensors or (B,)); x_t, v (B, ...)."""
    return x_t + _per_sample(t_next - t, x_t) * v


def descending_times(uniform: Tensor, first_time: float, factor: float = 1.0) -> Tensor:
    """Rollout times (T, B), descending in T, from uniform draws (T - 1, B): t_1 = first_time, the rest below it.

    The others are uniform in (0, first_time), shifted by `factor` inside of it (`shift_times`): no later step is
    noisier than the first, and the first is the same whatever the shift.
    """
    rest = (shift_times(uniform, factor) * first_time).sort(dim=0, descending=True).values
    return torch.cat(
        [torch.full_like(rest[:1] if len(rest) else uniform.new_zeros(1, uniform.shape[1]), first_time), rest]
    )


def markov_noise(independent: Tensor, times: Tensor) -> Tensor:
    """Return noise (T, B, ...) with which the x_t of a trajectory are a Markov chain x0 -> x_{t_T} -> ... -> x_{t_1}.

    independent: (T, B, ...) standard normal, times: (T, B) descending. Each x_t has the marginal of `interpolate` with
    independent noise, and each noisier latent is the next less noisy one with more noise added, as in the forward
    process of a DDPM (arXiv 2006.11239, eq. 2): eps_s = r eps_t + sqrt(1 - r^2) z, r = (1 - s) t / ((1 - t) s) for
    s > t. So x_s, and any prediction from it, tells nothing about x0 that x_t does not.
    """
    s, t = times[:-1].double(), times[1:].double()
    ratio = torch.where(s == t, 1.0, (1 - s) * t / ((1 - t) * s).clamp_min(1e-300)).clamp(0, 1)
    noises = [independent[-1]]
    for r, z in zip(ratio.flip(0), independent[:-1].flip(0), strict=True):
        noises.append(_per_sample(r, z) * noises[-1] + _per_sample((1 - r * r).sqrt(), z) * z)
    return torch.stack(noises[::-1])


_LEAST_OWN_TIME = 0.1


def own_noise(x0: Tensor, x_t: Tensor, x0_hat: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Return the noise (B, ...) that makes, from x0 at times s (B,) < t (B,), the Euler step from x_t towards x0_hat.

    A state x_s of the model's own was not made of x0 and noise, so the velocity to learn there has to be chosen: the
    one that leads to the image, (x_s - x0) / s. Hence the noise x0 + (x_s - x0) / max(s, 0.1); below 0.1, where it
    would grow without limit, the state is moved towards x0 instead.
    """
    t, s = _per_sample(t, x0), _per_sample(s, x0)
    x_s = x0_hat + s / t.clamp_min(torch.finfo(t.dtype).tiny) * (x_t - x0_hat)
    return x0 + (x_s - x0) / s.clamp_min(_LEAST_OWN_TIME)


def logit_normal_times(normal: Tensor, factor: float = 1.0) -> Tensor:
    """Pretraining times in (0, 1) from standard normal draws of any shape: t = sigmoid(n), logit-normal(0, 1).

    Shifted by `factor` they are logit-normal(log factor, 1).
    """
    return shift_times(normal.sigmoid(), factor)


DDPM_STEPS = 1000
DDPM_BETAS = (1e-4, 0.02)  # linear, as in DiT (arXiv 2212.09748)


def _ddpm_ratios(like: Tensor) -> Tensor:
    """Noise over signal of the DDPM's steps, rising, (1000,) float64 on the device of `like`."""
    betas = torch.linspace(*DDPM_BETAS, DDPM_STEPS, dtype=torch.float64, device=like.device)
    signal = (1 - betas).cumprod(0)
    return ((1 - signal) / signal).sqrt()


def ddpm_input(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """What a DDPM network is fed for x_t (B, ...) at t (B,): the latent scaled to unit variance, and its step (B,).

    The (fractional) step in [0, 999] is the one of the same signal-to-noise ratio, (1 - t) / t; t outside of the
    schedule's range is served by its first or last step.
    """
    ratios = _ddpm_ratios(t).log()
    wanted = (t.double() / (1 - t.double()).clamp_min(1e-12)).clamp_min(1e-12).log().clamp(ratios[0], ratios[-1])
    above = torch.searchsorted(ratios, wanted).clamp(1, DDPM_STEPS - 1)
    low, high = ratios[above - 1], ratios[above]
    step = above - 1 + (wanted - low) / (high - low)
    norm = (t.square() + (1 - t).square()).sqrt()
    return x_t / _per_sample(norm, x_t), step.to(t.dtype)


def ddpm_velocity(scaled: Tensor, noise: Tensor, step: Tensor) -> Tensor:
    """Velocity noise - x0_hat of a predicted `noise` (B, ...) at the input that `ddpm_input` made."""
    below = step.double().floor().long().clamp(0, DDPM_STEPS - 2)
    ratios = _ddpm_ratios(step).log()
    ratio = (ratios[below] + (step.double() - below) * (ratios[below + 1] - ratios[below])).exp()
    signal = (1 + ratio.square()).rsqrt()
    x0_hat = (scaled - _per_sample(signal * ratio, scaled) * noise) / _per_sample(signal, scaled)
    return noise - x0_hat
