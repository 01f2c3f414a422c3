"""Turn images into shards: `python launcher/prepare.py [--source fluent|FOLDER|TABLE|TAR] [--out FOLDER] ...`.

On several devices or machines start it with torchrun, deepspeed or srun: the work is divided between the ranks. A run
that was killed goes on where it was when the same command is given again.
"""

import argparse
import os
import sys
from pathlib import Path

from data_pipeline.encode.transformer_texts import MINILM
from data_pipeline.identity import Identity
from data_pipeline.prepare.estimate import dry_run
from data_pipeline.prepare.finish import SKIPPED_FILE, Summary
from data_pipeline.prepare.ranks import Rank, device_of, rank_of
from data_pipeline.prepare.recipe import POSTERIORS, Recipe
from data_pipeline.prepare.write import Means, prepare
from data_pipeline.sources.fluent import FluentSource
from data_pipeline.sources.folders import open_source
from data_pipeline.sources.imagenet import ClassFolderSource
from data_pipeline.sources.items import Source
from launcher.command import Command
from sharpmoe.errors import DataError

_SHOWN = 50  # skipped pictures that are named
_ENCODER_OPTIONS = {"layer": int, "pooled": str, "max_length": int, "dtype": str}


def _act(arguments: argparse.Namespace) -> None:
    # Some virtual machines advertise AMX and kill a process that uses it; oneDNN does, for bfloat16 on the host.
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
    place = rank_of(os.environ)
    source, recipe, means = _source(arguments), _recipe(arguments), _means(arguments, place)
    if arguments.dry_run:
        lines = dry_run(source, recipe, means) if place.rank == 0 else []
        print("\n".join(lines), end="\n" if lines else "")
        return
    _report(prepare(source, arguments.out, recipe, means), place)


def _report(done: Summary, place: Rank) -> None:
    if not done.complete:
        print(f"{done.folder}: rank {place.rank} of {place.size} has written its shards; others have not yet")
        return
    if not done.worked and place.rank:
        return
    for picture in done.skipped[:_SHOWN]:
        print(f"skipped {picture.name}: {picture.reason}", file=sys.stderr)
    if done.num_skipped > _SHOWN:
        print(f"... {done.num_skipped} pictures in all, see {done.folder / SKIPPED_FILE}", file=sys.stderr)
    splits = ", ".join(f"{name} {count}" for name, count in done.splits.items())
    state = "prepared" if done.worked else "was complete, nothing to do"
    latents = ", ".join(str(bucket.latent) for bucket in done.buckets.values())
    print(f"{done.folder}: {state}: {splits}; latents {latents}; {done.num_skipped} pictures skipped")


def _source(arguments: argparse.Namespace) -> Source:
    if arguments.source == "fluent":
        return FluentSource(arguments.cache, arguments.tarball)
    if arguments.class_folders or arguments.moments:
        return ClassFolderSource(Path(arguments.source), arguments.moments, arguments.flip)
    return open_source(Path(arguments.source))


def _means(arguments: argparse.Namespace, place: Rank) -> Means:
    main_rank = place.rank == 0
    say = (lambda line: print(line, file=sys.stderr)) if main_rank and arguments.buckets else (lambda line: None)
    return Means(device_of(arguments.device, place), arguments.threads, place, main_rank, say)


def _recipe(arguments: argparse.Namespace) -> Recipe:
    return Recipe(
        arguments.size,
        arguments.patch_size,
        _codec(arguments),
        _encoder(arguments),
        arguments.shard_samples,
        arguments.limit,
        arguments.max_bad_share,
        arguments.allow_missing,
        arguments.buckets,
        arguments.posterior,
        arguments.flip_pair,
    )


def _codec(arguments: argparse.Namespace) -> Identity:
    if arguments.moments:
        return {"kind": "cached_moments", "name": arguments.codec_name}
    if arguments.codec == "patch_pca":
        return {
            "kind": "patch_pca",
            "patch": arguments.pca_patch,
            "channels": arguments.pca_channels,
            "whiten": arguments.pca_whiten,
        }
    if arguments.codec == "autoencoder_kl":
        return {"kind": "autoencoder_kl", "name": arguments.codec_name}
    return {"kind": "pixel"}


def _encoder(arguments: argparse.Namespace) -> Identity:
    parts = [_one_encoder(text, arguments.max_length) for text in arguments.encoder or [MINILM]]
    if len(parts) == 1:
        return parts[0]
    return {"kind": "joined", "along": arguments.join, "encoders": parts}


def _one_encoder(text: str, max_length: int) -> Identity:
    """`NAME` or `NAME,layer=-2,pooled=model,max_length=77,dtype=bfloat16`."""
    name, *options = text.split(",")
    found: Identity = {"max_length": max_length}
    for option in options:
        key, _, value = option.partition("=")
        try:
            found[key] = _ENCODER_OPTIONS[key](value)
        except (KeyError, ValueError):
            known = ", ".join(f"{key}=..." for key in _ENCODER_OPTIONS)
            raise DataError(f"--encoder {text}: option {option!r}; expected NAME and any of {known}") from None
    return {"kind": "hash", "width": 32, **found} if name == "hash" else {"kind": "transformers", "name": name, **found}


def _arguments(parser: argparse.ArgumentParser) -> None:
    _source_arguments(parser)
    _content_arguments(parser)
    add = parser.add_argument_group("how it runs").add_argument
    add("--out", type=Path, default=Path("data/fluent64"), help="folder of the shards")
    add("--dry-run", action="store_true", help="print counts, sizes, buckets and what it would take; write nothing")
    add("--device", default="cpu", help="device of the autoencoder and the text encoder; cuda: one per rank")
    add("--threads", type=int, default=min(8, os.cpu_count() or 1), help="threads that decode pictures, per rank")
    add("--max-bad-share", type=float, default=Recipe().max_bad_share, help="share of pictures that may be left out")
    add("--allow-missing", action="store_true", help="leave out images that a table names and that are not there")
    add("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed command adds it


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
    add("--flip", action="store_true", help="class folders: take every training image mirrored as well")
    add("--limit", type=int, default=None, help="take only so many pictures")
    add("--cache", type=Path, default=Path("data/downloads"), help="where the default images are downloaded to")
    add("--tarball", type=Path, default=None, help="the npm package of the default images, where npm cannot fetch it")


def _content_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what the shards hold").add_argument
    add("--size", type=int, default=64, help="images are cropped to a square and resized to this many pixels")
    add(
        "--buckets",
        default="",
        help="aspect buckets instead of the square: a number of tokens (240: all grids of so many within 1:3), or a "
        "list in pixels H x W as 256x256,192x336",
    )
    add("--patch-size", type=int, default=2, help="patch size of the model, for the token grid")
    add("--codec", choices=("patch_pca", "autoencoder_kl", "pixel"), default="patch_pca", help="images to latents")
    add("--codec-name", default="stabilityai/sd-vae-ft-ema", help="autoencoder_kl: local folder or hub id")
    add("--posterior", choices=POSTERIORS, default="mean", help="autoencoder_kl: what is stored of its posterior")
    add("--flip-pair", action="store_true", help="store the latent of the mirror image beside each latent")
    add("--pca-patch", type=int, default=4, help="patch_pca: pixels per patch, each way")
    add("--pca-channels", type=int, default=16, help="patch_pca: components kept")
    add("--pca-whiten", type=float, default=0.5, help="patch_pca: 0 keeps the spread of the components, 1 equals it")
    add(
        "--encoder",
        action="append",
        help="text encoder: the packaged MiniLM, a transformers folder or hub id, or hash; options after commas as "
        "NAME,layer=-2,pooled=model,max_length=77,dtype=bfloat16; several times for several, joined as --join says "
        f"(default: {MINILM})",
    )
    add("--join", choices=("tokens", "features"), default="tokens", help="several encoders: what is put side by side")
    add("--max-length", type=int, default=32, help="longest caption in tokens; the rest is cut")
    add("--shard-samples", type=int, default=512, help="pictures per shard")


main = Command(text=__doc__, arguments=_arguments, act=_act)

if __name__ == "__main__":
    main.run()
