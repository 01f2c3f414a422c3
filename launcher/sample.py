"""Draw images: `python launcher/sample.py runs/quickstart --captions "a red apple" "a cat"`.

For published figures of a class-conditional model: `--npz batch.npz --num 50000 --steps 250 --cfg-scale 1.5`.
"""

import argparse
from pathlib import Path

import torch

from data_pipeline.read.shards import ShardSet
from launcher.command import Command
from sharpmoe import sampling
from sharpmoe.config import DataConfig, SampleConfig
from sharpmoe.evaluation import adm
from sharpmoe.model.dit import DiT
from sharpmoe.model.weights import load_model
from sharpmoe.report import samples
from sharpmoe.report.runs import find_source


def _act(arguments: argparse.Namespace) -> None:
    print(_sample(arguments))


def _sample(arguments: argparse.Namespace) -> Path | str:
    source = find_source(arguments.model, arguments.weights)
    settings = samples.with_overrides(source.run.sample if source.run else SampleConfig(), _given(arguments))
    data = source.run.data if source.run else DataConfig()
    shards = ShardSet.open(arguments.shards or data.first_place, data.train_split, data.remote.options())
    model = load_model(source.weights)[0].to(arguments.device)
    samples.check_shards(model, shards)
    if arguments.compile:
        sampling.compile_blocks(model)
    if arguments.npz:
        return _batch(arguments, settings, model, shards, source.name)
    wish = samples.Wish(_captions(arguments, settings), tuple(arguments.labels))
    asked, part = samples.request(model.config, shards, wish, arguments.device), arguments.part
    rows = part.rows(len(asked.indices), arguments.batch_size)
    if not rows:
        return f"part {part}: nothing to draw; a part is at least one batch (--batch-size {arguments.batch_size})"
    images = samples.draw(
        model,
        sampling.take(asked, rows),
        settings,
        shards.codec_object().decode,
        arguments.batch_size,
        arguments.pool_per_image,
        samples.latent_size(shards, arguments.bucket),
    )
    titles = wish.titles()[rows.start : rows.stop]
    grid = "grid" if part.of == 1 else f"grid_part{part.number}of{part.of}"
    return samples.write(arguments.out or source.folder / "samples" / "drawn", images, titles, rows.start, grid)[-1]


def _batch(arguments: argparse.Namespace, settings: SampleConfig, model: DiT, shards: ShardSet, name: str) -> Path:
    batch = adm.Batch(arguments.npz, arguments.num, shards.image_size, arguments.batch_size, name, arguments.part)
    if arguments.join:
        return adm.join_batch(model.config, settings, batch, arguments.join)
    return adm.draw_batch(model, settings, shards.codec_object(arguments.device).decode, batch)


def _captions(arguments: argparse.Namespace, settings: SampleConfig) -> tuple[str, ...]:
    if arguments.captions_file:
        return samples.read_captions(arguments.captions_file)
    return tuple(arguments.captions) or (() if arguments.labels else settings.captions)


def _given(arguments: argparse.Namespace) -> dict[str, object]:
    names = {"num_steps": "steps", "method": "method", "cfg_scale": "cfg_scale", "seed": "seed"}
    given = {field: getattr(arguments, name) for field, name in names.items()}
    return given | {"guidance_source": arguments.guidance_source}


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, help="run folder, checkpoint folder or .safetensors file")
    wishes = parser.add_mutually_exclusive_group()
    wishes.add_argument(
        "--captions", nargs="+", default=(), help="one image each (default: sample.captions of the run)"
    )
    wishes.add_argument("--captions-file", type=Path, help="text file, one caption a line")
    wishes.add_argument("--labels", nargs="+", type=int, default=(), help="classes, for a class-conditional model")
    wishes.add_argument(
        "--npz", type=Path, help="write a batch for the ADM evaluator, labels balanced, and its protocol"
    )
    add(
        "--part", type=samples.parse_part, default=sampling.Part(), help="I/N: only the I-th of N parts, as a job array"
    )
    add("--join", type=int, metavar="N", help="join the N parts of --npz that were drawn, and draw nothing")
    add("--num", type=int, default=50_000, help="images of --npz (default: 50000)")
    add("--weights", choices=("ema", "live"), default="ema", help="which weights of a run (default: ema)")
    add("--shards", help="prepared shards, for codec and text encoder (default: those of the run)")
    add("--bucket", metavar="HxW", help="resolution of the shards to draw in (default: a square)")
    add("--steps", type=int, help="sampling steps (default: sample.num_steps of the run)")
    add("--method", choices=("euler", "heun"), help="sampler (default: sample.method)")
    add("--cfg-scale", type=float, help="classifier-free guidance, 1 is none (default: sample.cfg_scale)")
    add("--guidance-source", choices=("own", "guided"), help="velocity behind x0_hat (default: sample.guidance_source)")
    add("--seed", type=int, help="seed of the noise (default: sample.seed)")
    add("--batch-size", type=int, default=16, help="images per model call (default: 16)")
    add("--pool-per-image", action="store_true", help="diffmoe: an image is a pool, so that batches do not matter")
    add("--compile", action="store_true", help="compile the blocks first, for many images (same pictures to rounding)")
    add("--out", type=Path, help="folder of the pictures (default: samples/drawn in the run folder)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where the model runs")


main = Command(text=__doc__, arguments=_arguments, act=_act)

if __name__ == "__main__":
    main.run()
