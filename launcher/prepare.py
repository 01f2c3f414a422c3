"""Prepare images as shards: `python launcher/prepare.py [--source fluent|FOLDER|TABLE|TAR] [--out FOLDER] ...`.

On several devices or machines start it with torchrun, deepspeed or srun: the work is divided between the ranks. A
killed run continues where it was when the same command is run again.
"""

if not __package__:  # run as a script, which has this folder on its path
    import startup  # noqa: F401 - Ctrl-C or missing packages are one line

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from data_pipeline.encode.build import CODEC_CHOICES, DEFAULT_AUTOENCODER, unread_codec_options
from data_pipeline.encode.texts import TEXT_DTYPES
from data_pipeline.encode.transformer_texts import MINILM
from data_pipeline.prepare.destination import check_destination, open_destination
from data_pipeline.prepare.estimate import dry_run
from data_pipeline.prepare.finish import Summary
from data_pipeline.prepare.ranks import Rank, device_of, rank_of
from data_pipeline.prepare.recipe import POSTERIORS, Recipe, recipe_of
from data_pipeline.prepare.saliency_kinds import SALIENCIES
from data_pipeline.prepare.write import Machine, prepare_shards
from data_pipeline.sources.images import FITS
from data_pipeline.sources.open import SourceOptions, open_source
from launcher.bounds import POSITIVE, SHARE, Whole
from launcher.command import Command, Unread
from launcher.devices import DEVICE_HELP, device_name
from sharpmoe.evaluation.base_error import BASE_ERROR

_KINDS = {**SALIENCIES, BASE_ERROR.name: BASE_ERROR}


def _shown(name: str) -> str:
    """Say what a kind of saliency is, and how its options are written."""
    kind = _KINDS[name]
    return kind.text + (f" (written {kind.usage()})" if kind.options else "") if name == kind.name else kind.name


def _unread(arguments: argparse.Namespace) -> Iterator[Unread]:
    if arguments.like:
        yield Unread("with --like, which takes the text encoder from there", ("--join", "--max-length"))
    elif len(arguments.encoder or ()) < 2:
        yield Unread("with one text encoder", ("--join",))
    chosen_by, names = unread_codec_options(vars(arguments))
    yield Unread(f"with {chosen_by}, which says what the codec is", [f"--{name.replace('_', '-')}" for name in names])
    if arguments.source == "fluent":
        yield Unread("without --source FOLDER", ("--class-folders", "--moments"))
    else:
        yield Unread("with --source, which names other images than the default ones", ("--cache", "--tarball"))
    if not (arguments.class_folders or arguments.moments):
        yield Unread("without --class-folders", ("--flip",))


def _act(arguments: argparse.Namespace) -> None:
    # Some virtual machines advertise AMX and kill a process that uses it; oneDNN does, for bfloat16 on the host.
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
    place, recipe = rank_of(os.environ), recipe_of(vars(arguments), _KINDS)
    machine = _machine(arguments, place)
    if arguments.dry_run:
        check_destination(arguments.out)
        for line in (
            dry_run(open_source(_source_options(arguments, recipe)), recipe, machine) if place.rank == 0 else ()
        ):
            print(line)
        return
    with open_destination(arguments.out) as out:
        source = open_source(_source_options(arguments, recipe))
        _report(prepare_shards(source, out.folder, recipe, machine, out.publish), place, out.shown)


def _report(done: Summary, place: Rank, shown: Callable[[str], str]) -> None:
    if not done.complete:
        what = f"{done.folder}: rank {place.rank} of {place.size} has written its shards; others have not yet"
        print(shown(what))
    elif done.worked or place.rank == 0:
        for line in done.skipped_lines():
            print(shown(line), file=sys.stderr)
        for line in done.table:
            print(line)
        print(shown(done.line()))


def _source_options(arguments: argparse.Namespace, recipe: Recipe) -> SourceOptions:
    return SourceOptions(
        source=arguments.source,
        class_folders=arguments.class_folders,
        moments=arguments.moments,
        flip=arguments.flip,
        cache=arguments.cache,
        tarball=arguments.tarball,
        saliency_maps=recipe.saliency.kind.takes_maps,
    )


def _machine(arguments: argparse.Namespace, place: Rank) -> Machine:
    main_rank = place.rank == 0
    say = (lambda line: print(line, file=sys.stderr)) if main_rank and arguments.buckets else (lambda line: None)
    return Machine(device_of(arguments.device, place), arguments.threads, place, main_rank, say)


def _arguments(parser: argparse.ArgumentParser) -> None:
    _source_arguments(parser)
    _content_arguments(parser)
    add = parser.add_argument_group("how it runs").add_argument
    add("--out", default="data/fluent64", help="folder of the shards, or s3://BUCKET/FOLDER, gs://BUCKET/FOLDER")
    add("--dry-run", action="store_true", help="print counts, sizes, buckets, time and bytes; write nothing")
    device = f"device of the autoencoder and the text encoder: {DEVICE_HELP}; cuda is one per rank"
    add("--device", type=device_name, default="auto", help=device)
    add("--threads", type=POSITIVE, default=min(8, os.cpu_count() or 1), help="threads that decode images, per rank")
    add("--max-bad-share", type=SHARE, default=Recipe().max_bad_share, help="share of images that may be left out")
    add("--allow-missing", action="store_true", help="leave out images that a table names and that do not exist")
    add(
        "--local_rank", "--local-rank", type=Whole(-1), default=0, help=argparse.SUPPRESS
    )  # the deepspeed command adds it


def _source_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("source").add_argument
    add(
        "--source",
        default="fluent",
        help="`fluent`; a folder with captions.jsonl, .csv or .parquet, with NAME.txt or NAME.json files beside the "
        "images, or with WebDataset .tar files; or one such table or .tar",
    )
    add("--class-folders", action="store_true", help="the folder holds one folder per class, such as ImageNet")
    add("--moments", type=Path, default=None, help="ProMoE's cached CLASS/NAME.latent.npz of a folder of classes")
    add("--flip", action="store_true", help="class folders: add every training image mirrored")
    add("--limit", type=POSITIVE, default=None, help="take only so many images")
    add("--cache", type=Path, default=Path("data/downloads"), help="folder for the download of the default images")
    add("--tarball", type=Path, default=None, help="npm package of the default images, where npm cannot download it")


def _content_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what the shards hold").add_argument
    add(
        "--size",
        type=POSITIVE,
        help=f"images become squares of so many pixels (default: {Recipe.image_size}); with --buckets: the squares "
        "that patch_pca is fitted to",
    )
    add(
        "--frames",
        type=POSITIVE,
        default=Recipe.frames,
        metavar="T",
        help="take T frames of animated GIF, WebP or PNG files, evenly spaced in time, as latents with a time axis "
        "(docs/video.md); animations with fewer are left out (default: 1, still images)",
    )
    add("--fit", choices=FITS, default="crop", help="images of another shape: crop the centre, or pad with white")
    add(
        "--buckets",
        default="",
        help="aspect buckets instead of the square: a list in pixels H x W as 256x256,192x336; with --bucket-step the "
        "side of a square in pixels (512: all shapes of at most its area within 1:3); without, a number of tokens "
        "(240: all grids of so many within 1:3)",
    )
    add("--bucket-step", type=POSITIVE, help="sides of buckets are multiples of so many pixels, as 64")
    add(
        "--saliency",
        metavar="KIND[:key=value,...]",
        default="laplacian",
        help=f"the map M of an image (default: laplacian): {'; '.join(f'{name}, {_shown(name)}' for name in _KINDS)}",
    )
    add("--patch-size", type=POSITIVE, default=2, help="patch size of the model, for the token grid")
    add("--codec", choices=CODEC_CHOICES, default="patch_pca", help="images to latents")
    add("--like", metavar="PLACE", help="codec and text encoder exactly as there: weights (.safetensors) or shards")
    add("--codec-from", metavar="PLACE", help="the fitted codec of weights or shards, instead of a new fit")
    add(
        "--codec-name",
        help="autoencoder_*: local folder of it or of a whole pipeline, or hub id (default of autoencoder_kl: "
        f"{DEFAULT_AUTOENCODER})",
    )
    add("--posterior", choices=POSTERIORS, default="mean", help="autoencoder_*: what is stored of its posterior")
    add("--flip-pair", action="store_true", help="store the latent of the mirror image beside each latent")
    add("--pca-patch", type=POSITIVE, default=4, help="patch_pca: pixels per patch, each way")
    add("--pca-channels", type=POSITIVE, default=16, help="patch_pca: components kept")
    add("--pca-whiten", type=SHARE, default=0.5, help="patch_pca: 0 keeps the spread of the components, 1 equalises it")
    add(
        "--encoder",
        action="append",
        help="text encoder: the packaged MiniLM, a transformers folder (also of a diffusers pipeline) or hub id, or "
        "hash; options after commas as NAME,layer=-2,pooled=model,max_length=77; also dtype=bfloat16, pooled=none, and "
        "chat=plain, nucleus or @FILE for a chat template without system prompt, with that of Nucleus-Image or with "
        f"that in a file; repeat for several, joined along --join (default: {MINILM})",
    )
    add("--join", choices=("tokens", "features"), default="tokens", help="several encoders: what is concatenated")
    add("--max-length", type=Whole(2), default=32, help="longest caption in tokens; the rest is cut")
    add("--text-dtype", choices=tuple(TEXT_DTYPES), default=Recipe.text_dtype, help="of stored token states")
    add("--shard-samples", type=POSITIVE, default=512, help="images per shard")


main = Command(text=__doc__, arguments=_arguments, act=_act, unread=_unread)

if __name__ == "__main__":
    main.run()
