"""Sampling of Nucleus-Image against its published pipeline: same noise, same states of the texts."""

import pytest
import torch

from sharpmoe import draws
from sharpmoe.config import SampleConfig
from sharpmoe.latent_patches import patchify
from sharpmoe.model.backbone import TextCondition
from sharpmoe.sampling import Request, SamplingOptions, generate
from tests.model.nucleus_reference import ours, reference

pytestmark = pytest.mark.slow  # the import of the pipeline takes ten seconds and more

DEFAULTS = {"cfg_scale": 4.0, "cfg_norm": "tokens", "shift": {"factor": "tokens"}}  # of the pipeline


def text(*lengths: int) -> TextCondition:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return TextCondition(torch.randn(len(lengths), max(lengths), 24) * mask[..., None], mask)


@pytest.mark.parametrize(("size", "lengths"), [((8, 8), (6, 6)), ((8, 12), (3, 8))])
def test_sampling_equals_the_published_pipeline(size: tuple[int, int], lengths: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = reference(use_sigmoid=True).eval()
    model = ours(network).eval()
    cond, empty, sample = text(*lengths), text(2, 2), SampleConfig(num_steps=6, seed=3, **DEFAULTS)
    drawn = generate(model, model.config, sample, Request(cond, empty, (0, 1)), SamplingOptions(size=size))

    published = pytest.importorskip("diffusers.pipelines.nucleusmoe_image.pipeline_nucleusmoe_image")
    scheduler = published.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    parts = dict.fromkeys(("vae", "text_encoder", "processor"))
    pipeline = published.NucleusMoEImagePipeline(transformer=network, scheduler=scheduler, **parts)
    noise = draws.noise(3, (0, 1), (4, *size), draws.Purpose.SAMPLE_NOISE)
    expected = pipeline(
        prompt_embeds=cond.tokens,
        prompt_embeds_mask=cond.mask,
        negative_prompt_embeds=empty.tokens,
        negative_prompt_embeds_mask=empty.mask,
        latents=patchify(noise, 2),
        height=8 * size[0],
        width=8 * size[1],
        num_inference_steps=6,
        output_type="latent",
    ).images
    assert not torch.allclose(patchify(noise, 2), expected, atol=0.1)
    torch.testing.assert_close(patchify(drawn, 2), expected, rtol=1e-4, atol=1e-4)
    plain = SampleConfig(num_steps=6, seed=3, cfg_scale=4.0)
    other = generate(model, model.config, plain, Request(cond, empty, (0, 1)), SamplingOptions(size=size))
    assert not torch.allclose(patchify(other, 2), expected, atol=1e-2)  # shift and norm matter
