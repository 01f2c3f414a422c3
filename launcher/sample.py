"""Draw images: `python launcher/sample.py runs/quickstart --captions "a red apple" "a cat"`.

For published figures of a class-conditional model: `--npz batch.npz --num 50000 --steps 250 --cfg-scale 1.5`.
"""

if not __package__:  # run as a script, which has this folder on its path
    import startup  # noqa: F401 - Ctrl-C or missing packages are one line

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_pipeline.encode.like import OriginCoders
from data_pipeline.read.shards import ShardSet
from launcher.bounds import NOT_NEGATIVE, NOT_NEGATIVE_REAL, POSITIVE, POSITIVE_REAL, SEED, SHARE
from launcher.command import Command, Unread
from launcher.devices import placed, placement_arguments
from sharpmoe import sampling
from sharpmoe.config import SampleConfig
from sharpmoe.console import print_note
from sharpmoe.errors import ConfigError
from sharpmoe.evaluation.adm import AdmBatch, draw_adm_batch, join_adm_batch
from sharpmoe.evaluation.captions import read_captions
from sharpmoe.evaluation.prompt_sets import open_prompts
from sharpmoe.model.backbone import Backbone
from sharpmoe.model.captured import capture_calls
from sharpmoe.model.compiled import compile_blocks
from sharpmoe.model.weights import load_model
from sharpmoe.report.counterfactual import counterfactual_table, draw_counterfactual, write_counterfactual
from sharpmoe.report.film import record_film, write_film
from sharpmoe.report.prompt_folder import draw_prompt_folder, part_of_rank
from sharpmoe.report.runs import SavedModel, average_note, find_saved_model
from sharpmoe.report.samples import (
    DrawOptions,
    Prompts,
    Size,
    check_weak_origin,
    draw_to_files,
    encode_prompts,
    open_coders,
    override_sampling,
    parse_part,
    pixels_per_latent,
)

_FRAMES = 8  # steps of --film


class _Named(NamedTuple):
    """A model, and what its weights are called."""

    model: Backbone
    name: str


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What is drawn, by what."""

    arguments: argparse.Namespace
    settings: SampleConfig
    model: Backbone
    shards: ShardSet | OriginCoders
    saved: SavedModel
    weak: _Named | None

    def options(self, part: sampling.ImagePart) -> DrawOptions:
        """Return the options of drawing a part of the images."""
        given = self.arguments
        pixels = Size(given.height, given.width)
        weak = self.weak and self.weak.model
        return DrawOptions(
            part=part,
            batch_size=given.batch_size,
            pool_per_image=given.pool_per_image,
            size=pixels,
            weak=weak,
            fps=given.fps or DrawOptions().fps,
        )


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, help="run folder, checkpoint folder or .safetensors file")
    _prompt_arguments(parser)
    add("--weights", choices=("ema", "live"), default="ema", help="which weights of a run")
    add(
        "--shards",
        help="prepared shards, for codec and text encoder (default: those of the run, else what the weights name)",
    )
    _sampling_arguments(parser)
    _look_arguments(parser)
    add(
        "--out",
        type=Path,
        help="folder for the images (default: samples/drawn in the run folder; looks, of --film and so on)",
    )
    placement_arguments(parser)


def _prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is drawn."""
    add = parser.add_argument
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--captions", nargs="+", help="one image each (default: sample.captions of the run)")
    prompts.add_argument("--captions-file", type=Path, help="text file with one caption per line")
    prompts.add_argument(
        "--labels", nargs="+", type=NOT_NEGATIVE, default=(), help="classes, for a class-conditional model"
    )
    prompts.add_argument(
        "--npz", type=Path, help="write a batch for the ADM evaluator, with balanced labels, and its protocol"
    )
    prompts.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE|FOLDER",
        help="draw into --out for a benchmark: GenEval's .jsonl, DPG-bench's folder of .txt, or .txt with captions",
    )
    add("--per-prompt", type=POSITIVE, metavar="N", help="images of each of --prompts (default: the benchmark's, or 1)")
    add(
        "--part",
        type=parse_part,
        metavar="I/N",
        help="draw only the I-th of N parts, as a job array does (default: all; with --prompts, the rank's)",
    )
    add("--join", type=POSITIVE, metavar="N", help="join the N parts of --npz that were drawn, and draw nothing")
    add("--num", type=POSITIVE, default=50_000, help="images of --npz")


def _sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how it is drawn."""
    add = parser.add_argument
    add("--width", type=POSITIVE, help="pixels (default: the square of the model; any multiple of a token's pixels)")
    add("--height", type=POSITIVE, help="pixels, as --width")
    add(
        "--fps",
        type=POSITIVE_REAL,
        help=f"a model with frames: of the animations (default: {DrawOptions().fps:g})",
    )
    add("--steps", type=POSITIVE, help="sampling steps (default: sample.num_steps of the run)")
    add("--method", choices=("euler", "heun"), help="sampler (default: sample.method)")
    add("--cfg-scale", type=NOT_NEGATIVE_REAL, help="classifier-free guidance, 1 is none (default: sample.cfg_scale)")
    add("--guidance-source", choices=("own", "guided"), help="velocity behind x0_hat (default: sample.guidance_source)")
    add("--cfg-norm", choices=("none", "tokens"), help="norm of the guided velocity (default: sample.cfg_norm)")
    add("--cfg-interval", nargs=2, type=SHARE, metavar="T", help="times of guidance (default: sample.cfg_interval)")
    add("--shift", type=_shift, metavar="S|tokens", help="shift of the times (default: sample.shift of the run)")
    add("--weak-model", type=Path, metavar="WEIGHTS", help="guide away from this model instead of the empty caption")
    add("--seed", type=SEED, help="seed of the noise (default: sample.seed)")
    add("--batch-size", type=POSITIVE, default=16, help="images per model call")
    add("--pool-per-image", action="store_true", help="diffmoe: an image is a pool, so the batch size has no effect")
    add("--compile", action="store_true", help="compile the blocks first, for many images (equal to rounding)")
    add(
        "--cuda-graphs",
        action="store_true",
        help="replay each call of the model as one CUDA graph, for small models and few images; not of every router",
    )


def _look_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is shown of sampling itself."""
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument(
        "--film",
        nargs="?",
        type=POSITIVE,
        const=_FRAMES,
        metavar="N",
        help=f"draw N steps of sampling (default: {_FRAMES}): what the saliency routers read, and the routing",
    )
    shown.add_argument(
        "--counterfactual",
        action="store_true",
        help="draw from the same noise with the saliency routers on, off and guided by another image, and compare",
    )


def _unread(arguments: argparse.Namespace) -> Iterator[Unread]:
    if arguments.npz:
        square = "with --npz, which draws the square of the model as published figures are"
        yield Unread(square, ("--width", "--height"))
        yield Unread("with --npz", ("--per-prompt", "--pool-per-image", "--fps", "--out", "--film", "--counterfactual"))
    else:
        yield Unread("without --npz", ("--num", "--join"))
    if arguments.join:
        yield Unread("with --join", ("--part",))
    if not arguments.prompts:
        yield Unread("without --prompts", ("--per-prompt",))
    if arguments.film or arguments.counterfactual:
        option = "--film" if arguments.film else "--counterfactual"
        yield Unread(f"with {option}, which draws one picture of a few captions", ("--prompts", "--part"))


def _act(arguments: argparse.Namespace) -> None:
    saved = find_saved_model(arguments.model, arguments.weights)
    settings = override_sampling(saved.run.sample if saved.run else SampleConfig(), _overrides(arguments))
    model, header = load_model(saved.weights)
    if not arguments.npz and not arguments.prompts:
        _prompts(arguments, settings).check(model.config)  # before shards, which may be missing too
    if arguments.fps and model.config.latent_frames == 1:
        raise ConfigError("--fps is of animations, and the model draws still images; leave it out")
    shards = open_coders(saved, model, header, arguments.shards)
    model = placed(model, arguments)
    weak = _weak_model(arguments, header)
    if arguments.compile:
        compile_blocks(model, print_note)
    if arguments.cuda_graphs:
        for each in (model, *([weak.model] if weak else [])):
            capture_calls(each)
    draw = _npz if arguments.npz else _prompt_folder if arguments.prompts else _files
    if arguments.film or arguments.counterfactual:
        draw = _look
    if draw not in (_files, _npz):
        sampling.require_still(model.config, "--prompts, --film and --counterfactual")
    drawn = draw(_Call(arguments=arguments, settings=settings, model=model, shards=shards, saved=saved, weak=weak))
    print_note(average_note(saved))
    print(drawn)


def _overrides(arguments: argparse.Namespace) -> dict[str, object]:
    options = {"num_steps": "steps", "method": "method", "cfg_scale": "cfg_scale", "seed": "seed"}
    given = {field: getattr(arguments, option) for field, option in options.items()}
    given |= {"guidance_source": arguments.guidance_source, "cfg_norm": arguments.cfg_norm}
    return given | {"cfg_interval": arguments.cfg_interval, "shift": arguments.shift}


def _shift(text: str) -> dict[str, object]:
    """Parse a factor, or `tokens`, as a section sample.shift. Raises argparse.ArgumentTypeError."""
    return {"factor": text if text == "tokens" else POSITIVE_REAL(text)}


def _weak_model(arguments: argparse.Namespace, header: Mapping[str, str]) -> _Named | None:
    """Load the model to guide away from; `header`: of the weights of the model that it guides."""
    if arguments.weak_model is None:
        return None
    saved = find_saved_model(arguments.weak_model, arguments.weights)
    weak, weak_header = load_model(saved.weights)
    check_weak_origin(weak_header, header)
    return _Named(placed(weak, arguments), saved.name)


def _npz(call: _Call) -> Path:
    given, weak = call.arguments, call.weak
    codec = call.shards.codec_object(given.device)
    batch = AdmBatch(
        path=given.npz,
        num_images=given.num,
        image_size=call.model.config.latent_size * pixels_per_latent(codec),
        batch_size=given.batch_size,
        weights=call.saved.name,
        part=given.part or sampling.ImagePart(),
        weak_weights=weak and weak.name,
        frames=call.model.config.latent_frames,
        dtype=given.dtype,
    )
    if given.join:
        return join_adm_batch(call.model.config, call.settings, batch, given.join)
    return draw_adm_batch(call.model, call.settings, codec.decode, batch, weak and weak.model)


def _prompt_folder(call: _Call) -> Path:
    given = call.arguments
    if given.out is None:
        raise ConfigError("--prompts needs --out FOLDER, into which a benchmark's pictures are drawn")
    prompts = open_prompts(given.prompts, given.per_prompt)
    options = call.options(given.part or part_of_rank())
    return draw_prompt_folder(call.model, call.shards, prompts, call.settings, given.out, options)


def _files(call: _Call) -> Path | str:
    given = call.arguments
    part = given.part or sampling.ImagePart()
    folder = given.out or call.saved.folder / "samples" / "drawn"
    prompts = _prompts(given, call.settings)

    def say(note: str) -> None:
        print(note, file=sys.stderr)

    grid = draw_to_files(call.model, call.shards, prompts, call.settings, folder, call.options(part), say)
    return grid or f"part {part}: nothing to draw; a part is at least one batch (--batch-size {given.batch_size})"


def _look(call: _Call) -> Path:
    """Draw what happens while images are drawn."""
    given = call.arguments
    prompts, codec = _prompts(given, call.settings), call.shards.codec_object()
    request = encode_prompts(call.model.config, call.shards, prompts, next(call.model.parameters()).device)
    pixels = call.options(sampling.ImagePart())
    options = pixels.of_latents(pixels.size.of_latents(call.model.config, codec))
    folder, titles, seed = given.out or call.saved.folder / "looks", prompts.titles(), call.settings.seed
    if given.film:
        film = record_film(call.model, request, call.settings, codec.decode, given.film, options)
        return write_film(folder, film, titles, call.saved.name, seed)
    found = draw_counterfactual(call.model, request, call.settings, codec.decode, options)
    print(counterfactual_table(found))
    return write_counterfactual(folder, found, titles, call.saved.name, seed)


def _prompts(arguments: argparse.Namespace, settings: SampleConfig) -> Prompts:
    if arguments.captions_file:
        return Prompts(read_captions(arguments.captions_file))
    if arguments.labels:
        return Prompts(labels=tuple(arguments.labels))
    return Prompts(tuple(arguments.captions or settings.captions))


main = Command(text=__doc__, arguments=_arguments, act=_act, unread=_unread)

if __name__ == "__main__":
    main.run()
