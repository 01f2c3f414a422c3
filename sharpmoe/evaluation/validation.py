"""Held-out flow loss at eight fixed times with fixed noise: the curve that shows whether a run still learns."""

from __future__ import annotations

import math
from typing import NamedTuple

from sharpmoe.evaluation.held_out import ALONE, Samples, Share, observe, spread
from sharpmoe.model.backbone import Backbone

# Fixed and not shifted (`rollout.shift`), so that curves of several runs compare. Descending from the first time of
# training's rollout, so that a model with saliency routers gets only inputs that it was trained on.
VALIDATION_TIMES = (0.999, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)


class Validation(NamedTuple):
    """Mean flow loss over held-out images."""

    by_time: dict[float, float]  # loss at each of VALIDATION_TIMES
    mean: float  # over the times
    error: float  # standard error of that mean, over images
    images: int
    per_image: tuple[float, ...] = ()  # the mean over the times of each, for differences paired by image

    def scalars(self, group: str = "validation") -> dict[str, float]:
        """Return the figures under the tags of the log: validation/flow and validation/flow_t<time>."""
        by_time = {f"{group}/flow_t{time:g}": loss for time, loss in self.by_time.items()}
        return {f"{group}/flow": self.mean, **by_time}


def validate(
    model: Backbone, samples: Samples, *, images: int = 128, seed: int = 0, chunk: int = 16, share: Share = ALONE
) -> Validation:
    """Measure the flow loss of `images` held-out samples, spread over the split, in eval mode.

    A model with saliency routers rolls out along the eight times, and each step reads the x0_hat of the step before, as
    in training; for other models the order of the times has no effect. Communicates only through `share.reduce`; every
    rank makes the same number of model calls, and the result does not depend on the number of ranks.
    """
    indices = spread(samples.num_samples, images)
    observed = observe(model, samples, indices, VALIDATION_TIMES, seed=seed, chunk=chunk, share=share)
    losses = observed.flow.double()
    per_image = losses.mean(1)
    error = (per_image.std() / len(per_image) ** 0.5).item() if len(per_image) > 1 else math.nan
    by_time = dict(zip(VALIDATION_TIMES, losses.mean(0).tolist(), strict=True))
    return Validation(by_time, per_image.mean().item(), error, len(per_image), tuple(per_image.tolist()))
