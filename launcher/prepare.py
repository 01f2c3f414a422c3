"""Turn images into shards: `python launcher/prepare.py [--source fluent|FOLDER] [--out FOLDER] ...`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.encode import MINILM, Identity
from data_pipeline.imagenet import ClassFolderSource
from data_pipeline.sources import FluentSource, FolderSource, Source
from data_pipeline.write import Recipe, prepare
from sharpmoe.errors import SharpMoEError


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, prepare, report; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        done = prepare(_source(arguments), arguments.out, _recipe(arguments), device=arguments.device)
    except SharpMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for picture in done.skipped:
        print(f"skipped {picture.name}: {picture.reason}", file=sys.stderr)
    splits = ", ".join(f"{name} {count}" for name, count in done.splits.items())
    state = "prepared" if done.worked else "was complete, nothing to do"
    print(f"{done.folder}: {state}: {splits}; latents {done.latent_shape}; {len(done.skipped)} pictures skipped")
    return 0


def _source(arguments: argparse.Namespace) -> Source:
    if arguments.source == "fluent":
        return FluentSource(arguments.cache, arguments.tarball)
    if arguments.class_folders or arguments.moments:
        return ClassFolderSource(Path(arguments.source), arguments.moments, arguments.flip)
    return FolderSource(Path(arguments.source), arguments.allow_missing)


def _recipe(arguments: argparse.Namespace) -> Recipe:
    return Recipe(
        arguments.size,
        arguments.patch_size,
        _codec(arguments),
        _encoder(arguments),
        arguments.shard_samples,
        arguments.limit,
        arguments.max_bad_share,
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
    if arguments.encoder == "hash":
        return {"kind": "hash", "width": 32, "max_length": arguments.max_length}
    return {"kind": "transformers", "name": arguments.encoder, "max_length": arguments.max_length}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--source", default="fluent", help="`fluent`, or a folder of images with captions.jsonl or NAME.txt files")
    add("--class-folders", action="store_true", help="the folder holds one folder per class, such as ImageNet")
    add("--moments", type=Path, default=None, help="ProMoE's cached CLASS/NAME.latent.npz of a folder of classes")
    add("--flip", action="store_true", help="class folders: take every training image mirrored as well")
    add("--out", type=Path, default=Path("data/fluent64"), help="folder of the shards")
    add("--size", type=int, default=64, help="images are cropped to a square and resized to this many pixels")
    add("--patch-size", type=int, default=2, help="patch size of the model, for the token grid")
    add("--codec", choices=("patch_pca", "autoencoder_kl", "pixel"), default="patch_pca", help="images to latents")
    add("--codec-name", default="stabilityai/sd-vae-ft-ema", help="autoencoder_kl: local folder or hub id")
    add("--pca-patch", type=int, default=4, help="patch_pca: pixels per patch, each way")
    add("--pca-channels", type=int, default=16, help="patch_pca: components kept")
    add("--pca-whiten", type=float, default=0.5, help="patch_pca: 0 keeps the spread of the components, 1 equals it")
    add("--encoder", default=MINILM, help="text encoder: the packaged MiniLM, a transformers folder or hub id, or hash")
    add("--max-length", type=int, default=32, help="longest caption in tokens; the rest is cut")
    add("--shard-samples", type=int, default=512, help="pictures per shard")
    add("--limit", type=int, default=None, help="take only so many pictures")
    add("--max-bad-share", type=float, default=0.01, help="share of pictures that may be skipped as unusable")
    add("--allow-missing", action="store_true", help="skip images that captions.jsonl names and the folder lacks")
    add("--cache", type=Path, default=Path("data/downloads"), help="where the default images are downloaded to")
    add("--tarball", type=Path, default=None, help="the npm package of the default images, where npm cannot fetch it")
    add("--device", default="cpu", help="device of the autoencoder and the text encoder")
    return parser


if __name__ == "__main__":
    sys.exit(main())
