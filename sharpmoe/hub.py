"""Classes with which diffusers loads a folder that `export.py --to diffusers` has written: the network and a pipeline.

The two code files of such a folder import them from here, so that a model draws with the code that trained it: a copy
of every router family in each folder would age there. Import this module only where diffusers is installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from data_pipeline.encode.like import OriginCoders, origin_in
from sharpmoe.config import ModelConfig, SampleConfig
from sharpmoe.durable import write_atomically
from sharpmoe.errors import ConfigError
from sharpmoe.model.backbone import Backbone, Condition, ModelOutput
from sharpmoe.model.build import build_model
from sharpmoe.model.published.own import CODE_FILES, json_file_text, own_index
from sharpmoe.report.figures import to_pictures
from sharpmoe.report.samples import Prompts, Size, draw_images, encode_prompts, override_sampling
from sharpmoe.sampling import SamplingOptions

Prompt = str | int | Sequence[str] | Sequence[int]


class SharpMoETransformer(ModelMixin, ConfigMixin):
    """A backbone as a model of diffusers; `backbone` is the model itself, of which this is a view."""

    _keep_in_fp32_modules = ["expert_threshold", "expert_bias", "pos_embed", "unused_query_norm"]  # noqa: RUF012 - buffers

    @register_to_config
    def __init__(self, model: Mapping[str, Any], meta: Mapping[str, str] | None = None) -> None:
        """model: fields of `ModelConfig`; meta: what is known of the weights, with codec and text encoder."""
        super().__init__()
        backbone = build_model(ModelConfig(**model))
        backbone.origin = origin_in(meta or {})
        # One set of tensors under the names of weights files, whichever of the two moves, casts or replaces them.
        self._parameters, self._buffers, self._modules = backbone._parameters, backbone._buffers, backbone._modules
        object.__setattr__(self, "backbone", backbone.eval())

    backbone: Backbone

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast as the backbone does, which rounds no buffer."""
        self.backbone._apply(fn, recurse)
        return self

    def forward(
        self, x_t: Tensor, t: Tensor, condition: Condition, x0_prev: Tensor | None = None, **options: Any
    ) -> ModelOutput:
        """Predict the velocity, as `Backbone.forward` does."""
        output: ModelOutput = self.backbone(x_t, t, condition, x0_prev, **options)
        return output


class SharpMoEPipeline(DiffusionPipeline):
    """Draw images; the clean prediction x0_hat of each step is what the saliency routers of the next one read."""

    transformer: SharpMoETransformer
    model_cpu_offload_seq = "transformer"

    def __init__(
        self,
        transformer: SharpMoETransformer,
        sample: Mapping[str, Any] | None = None,
        places: Mapping[str, str] | None = None,
    ) -> None:
        """sample: defaults of drawing, fields of the section `sample` of a run (docs/configuration.md).

        places: where the autoencoder and text encoders are that the model names, {name: folder or Hub id}. Their
        weights must be those of the training. Both are loaded when the first images are drawn.
        """
        super().__init__()
        self.register_modules(transformer=transformer)
        self.register_to_config(sample=dict(sample or {}), places=dict(places or {}))
        self._coders: OriginCoders | None = None

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        batch_size: int = 16,
        output_type: str = "pil",
        return_dict: bool = True,
        **settings: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images for captions, or for labels of a class-conditional model.

        height, width: pixels, by default those of the model's square. Noise is `latents` (B, C, [T,] h, w) with unit
        variance, or drawn from `generator`, or that of `sharpmoe.sample` with `seed`. batch_size: images per model
        call. output_type: pil, np (B, [T,] H, W, 3) in [0, 1], pt (B, 3, [T,] H, W) in [-1, 1], or latent; T frames of
        a model that has them, whose pil clips are lists of frames. settings: further fields of the section `sample`:
        method, cfg_interval, cfg_norm, guidance_source, shift.
        Raises ConfigError and DataError.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ConfigError(f"output_type is {output_type!r}, expected pil, np, pt or latent")
        model, coders = self.transformer.backbone, self._origin()
        given = {"num_steps": num_inference_steps, "cfg_scale": guidance_scale, "seed": seed, **settings}
        sample = override_sampling(SampleConfig(**self.config.sample), given)
        many = [prompt] if isinstance(prompt, str | int) else [*prompt]
        prompts = Prompts.of([one for one in many for _ in range(num_images_per_prompt)], model.config)
        request = encode_prompts(model.config, coders, prompts, self.transformer.device)
        codec = coders.codec_object()
        size = Size(height, width).of_latents(model.config, codec)
        shape = (len(request.indices), *model.config.shape_of_latent(size))
        if generator is not None and latents is None:
            latents = torch.randn(shape, generator=generator, device=generator.device)
        if latents is not None and latents.shape != shape:
            raise ConfigError(f"latents: shape {tuple(latents.shape)}, expected {shape} for these prompts and sizes")
        decode = (lambda found: found) if output_type == "latent" else codec.decode
        options = SamplingOptions(batch_size=batch_size, size=size, noise=latents)
        drawn = draw_images(model, request, sample, decode, options)
        images: Any = drawn
        if output_type == "np":
            images = ((drawn + 1) / 2).clamp(0, 1).movedim(1, -1).numpy()
        elif output_type == "pil":
            images = to_pictures(drawn)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write the folder as diffusers does, with the code files that make it load elsewhere; without the card."""
        super().save_pretrained(save_directory, *args, **kwargs)
        for name, text in CODE_FILES.items():
            write_atomically(Path(save_directory) / name, text)
        write_atomically(Path(save_directory) / self.config_name, json_file_text(own_index(self.config.sample)))

    def _origin(self) -> OriginCoders:
        """Return codec and text encoder of the model, where `places` says that they are."""
        if self._coders is None:
            origin = self.transformer.backbone.origin
            if "codec" not in origin:
                raise ConfigError("the model does not say with which codec it was trained; export it from its run")
            found = {
                key: json.dumps(_moved(json.loads(value), self.config.places)) if key in ("codec", "encoder") else value
                for key, value in origin.items()
            }
            self._coders = OriginCoders(found, "transformer/config.json")
        return self._coders


def _moved(identity: Any, places: Mapping[str, str]) -> Any:
    """Return an identity with the names that `places` maps replaced, in its parts too."""
    if isinstance(identity, list):
        return [_moved(part, places) for part in identity]
    if not isinstance(identity, dict):
        return identity
    moved = {key: _moved(value, places) for key, value in identity.items()}
    return moved | ({"name": places.get(moved["name"], moved["name"])} if isinstance(moved.get("name"), str) else {})
