"""The collector of routing keeps the chosen steps of all batches in their order, and counts what it keeps."""

import torch

from sharpmoe import sampling
from sharpmoe.config import SampleConfig
from sharpmoe.report.sampled_routing import SampledRouting
from sharpmoe.report.samples import draw_images
from sharpmoe.sampling import SamplingOptions
from tests.report.test_film import decode, request
from tests.toys import toy_model

SETTINGS = SampleConfig(num_steps=4, cfg_scale=1.0)


def test_chosen_steps_are_kept_over_batches() -> None:
    told: list[sampling.SamplingStep] = []
    kept, model = SampledRouting([3, 0, 3], with_choices=True), toy_model("diffmoe")
    draw_images(model, request(3), SETTINGS, decode, SamplingOptions(batch_size=2, callback=told.append))
    draw_images(model, request(3), SETTINGS, decode, SamplingOptions(batch_size=2, callback=kept))
    chosen = [[each for each in told if each.step == step] for step in (0, 3)]
    assert kept.times == tuple(batches[0].t for batches in chosen)
    for batches, read in zip(chosen, kept.read(), strict=True):
        assert torch.equal(torch.cat([each.x0_prev for each in batches if each.x0_prev is not None]), read)
    experts, choices = kept.experts(), kept.choices()
    assert experts is not None
    assert choices.shape[:3] == (2, len(model.moe_layers()), 3)
    assert torch.equal(choices.sum((1, 4)), experts)


def test_a_dense_model_has_no_experts_to_count() -> None:
    kept = SampledRouting([1])
    draw_images(toy_model("dense", saliency_router=False), request(1), SETTINGS, decode, SamplingOptions(callback=kept))
    assert kept.experts() is None
    assert len(kept.read()) == 1
