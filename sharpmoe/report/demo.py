"""A local page that draws an image with the saliency routers on and off beside each other (Gradio, extra `demo`)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from data_pipeline.encode.like import OriginCoders
from data_pipeline.read.shards import ShardSet
from sharpmoe import sampling
from sharpmoe.config import SampleConfig
from sharpmoe.errors import ConfigError, SharpMoEError, outside_error
from sharpmoe.model.backbone import Backbone
from sharpmoe.report.figures import Pixels, to_pixels
from sharpmoe.report.routing_sheet import RoutingSheet, draw_routing_sheet
from sharpmoe.report.sampled_routing import SampledRouting
from sharpmoe.report.samples import Prompts, draw_images, encode_prompts, override_sampling
from sharpmoe.saliency import saliency_map

_MAX_STEPS = 8  # of a routing sheet, evenly spread
_MOST_STEPS = 250  # of sampling, that the page takes
_MAX_SIDE = 256  # pixels of a shown image, at most
_Found = tuple[Pixels | None, Pixels | None, Pixels | None, str]  # on, off, sheet, message


@dataclass(frozen=True, kw_only=True)
class DemoModel:
    """What the page draws with."""

    model: Backbone  # on its device
    shards: ShardSet | OriginCoders  # its text encoder and codec
    settings: SampleConfig  # where the page says nothing else
    name: str

    def __post_init__(self) -> None:
        sampling.require_still(self.model.config, "the demo")

    @property
    def has_routers(self) -> bool:
        """Whether there are saliency routers to turn off."""
        return bool(self.model.config.saliency_router and self.model.moe_layers())

    def draw(self, prompt: str, seed: float, guidance: float, steps: float) -> _Found:
        """Draw one image of a caption, or of the number of a class, from the same noise with the routers on and off.

        Returns both images, a routing sheet with a row for each, and "" or an error as one line. Without saliency
        routers there is one image; without MoE layers there is no sheet. One image is one pool of DiffMoE.
        """
        try:
            given = {"seed": _whole("seed", seed), "cfg_scale": guidance, "num_steps": _whole("steps", steps)}
            settings = override_sampling(self.settings, given)
            if settings.num_steps > _MOST_STEPS:
                raise ConfigError(f"steps is {settings.num_steps}, allowed here: 1 to {_MOST_STEPS}")
            return self._drawn(
                _prompts(prompt, self.model.config.conditioning, self.model.config.num_classes), settings
            )
        except Exception as error:  # noqa: BLE001 - the page shows what a launcher prints
            known = error if isinstance(error, SharpMoEError) else outside_error(error)
            return None, None, None, f"error: {known or f'this is a bug ({type(error).__name__}: {error})'}"

    def _drawn(self, prompts: Prompts, settings: SampleConfig) -> _Found:
        request = encode_prompts(self.model.config, self.shards, prompts, next(self.model.parameters()).device)
        codec = self.shards.codec_object()
        images: list[torch.Tensor] = []
        experts: list[torch.Tensor | None] = []
        steps = settings.num_steps
        ways: tuple[sampling.SaliencyInput, ...] = ("own", "off") if self.has_routers else ("own",)
        for saliency in ways:
            kept = SampledRouting(range(0, steps, -(-steps // _MAX_STEPS)))
            options = sampling.SamplingOptions(pool_per_image=True, callback=kept, saliency=saliency)
            images.append(draw_images(self.model, request, settings, codec.decode, options))
            found = kept.experts()
            experts.append(None if found is None else found[:, 0])
        pixels = [_enlarged(each) for each in to_pixels(torch.cat(images))]
        shown = pixels[1] if len(pixels) > 1 else None
        return pixels[0], shown, self._sheet(torch.cat(images), experts, kept.times), ""

    def _sheet(
        self, images: torch.Tensor, experts: list[torch.Tensor | None], times: tuple[float, ...]
    ) -> Pixels | None:
        counted = [each for each in experts if each is not None]
        if not counted:
            return None
        side = self.model.config.latent_size // self.model.config.patch_size
        sheet = RoutingSheet(
            images=images,
            saliency=saliency_map(images, (side, side)),
            foreground=torch.full((len(images), side * side), float("nan")),
            experts=torch.stack(counted),
            times=times,
            captions=("saliency routers on", "saliency routers off")[: len(images)],
        )
        return draw_routing_sheet(sheet)


def open_page(model: DemoModel) -> Any:
    """Return the page as gradio.Blocks; `serve_page` opens it. Raises ConfigError where gradio is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import gradio  # noqa: PLC0415  (optional)
    except ImportError:
        raise ConfigError(
            "the demo needs the package gradio; install the extra `demo` (pip install 'sharpmoe[demo]', or make extras)"
        ) from None
    is_class = model.model.config.conditioning == "class"
    shown: dict[str, Any] = {"format": "png", "buttons": ["download", "fullscreen"]}  # without "share", which uploads
    first = "0" if is_class else next(iter(model.settings.captions), "")
    with gradio.Blocks(title=f"sharpmoe demo: {model.name}", analytics_enabled=False) as page:
        gradio.Markdown(f"# {model.name}")
        label = f"class (0 to {model.model.config.num_classes - 1})" if is_class else "caption"
        prompt = gradio.Textbox(first, label=label, max_lines=3)
        with gradio.Row():
            seed = gradio.Number(model.settings.seed, label="seed", precision=0, minimum=0)
            guidance = gradio.Slider(0, 10, model.settings.cfg_scale, step=0.1, label="guidance (1: none)")
            steps = gradio.Slider(1, _MOST_STEPS, model.settings.num_steps, step=1, label="steps")
        button = gradio.Button("Draw", variant="primary")
        message = gradio.Textbox(label="message", visible=True, interactive=False, max_lines=2)
        with gradio.Row():
            on = gradio.Image(label="saliency routers on" if model.has_routers else "image", **shown)
            off = gradio.Image(label="saliency routers off", visible=model.has_routers, **shown)
        gradio.Markdown("experts per token at each step")
        sheet = gradio.Image(show_label=False, **shown)
        inputs, outputs = [prompt, seed, guidance, steps], [on, off, sheet, message]
        button.click(model.draw, inputs, outputs, concurrency_limit=1)
        prompt.submit(model.draw, inputs, outputs, concurrency_limit=1)
        page.load(model.draw, inputs, outputs, concurrency_limit=1)
    return page.queue(default_concurrency_limit=1, max_size=8)


def serve_page(model: DemoModel, port: int | None, say: Callable[[str], object], wait: bool = True) -> Any:
    """Serve the page on 127.0.0.1 until Ctrl-C and return it; `port` None: the first free one from 7860.

    `say` is called with the address. `wait` False returns while a thread serves. Raises ConfigError where gradio is not
    installed or the port is taken.
    """
    page = open_page(model)
    try:
        _, address, _ = page.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=["settings"],
        )
    except OSError as error:
        raise ConfigError(f"--port {port}: {error}; name another port, or none") from None
    say(f"{model.name}: {address} (Ctrl-C ends it)")
    if wait:
        page.block_thread()
    return page


def _prompts(text: str, conditioning: str, num_classes: int) -> Prompts:
    """Return the caption or the class that a text names. Raises ConfigError."""
    text = text.strip()
    if conditioning != "class":
        if not text:
            raise ConfigError("the caption is empty; write what to draw")
        return Prompts((text,))
    if not text.isdecimal() or int(text) >= num_classes:
        raise ConfigError(f"class is {text!r}, allowed: a whole number from 0 to {num_classes - 1}")
    return Prompts(labels=(int(text),))


def _whole(name: str, value: float | None) -> int:
    if value is None or value != int(value):
        raise ConfigError(f"{name} is {value}, expected a whole number")
    return int(value)


def _enlarged(pixels: Pixels) -> Pixels:
    """Repeat the pixels of a small image, so that a browser shows them sharp."""
    factor = max(1, _MAX_SIDE // max(pixels.shape[:2]))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)
