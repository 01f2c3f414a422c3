"""The files of a prepared folder beside the tars: index.json for the whole folder, and a table for every shard.

    index.json         schema version, buckets, shapes, identities of source, codec and encoder, counts of the splits,
                       the shards with sizes and checksums, a checksum of every other file; written last
    SHARD.json         the table of SHARD.tar: its keys, and offset, size and crc32 of every member; written after it

Both are plain JSON. Reading them checks every field, and that no name leads out of the folder. Imports no torch.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from data_pipeline.members import encode_json
from data_pipeline.safety import check_name
from sharpmoe.errors import DataError
from sharpmoe.invocation import spell_command

_SCHEMA_VERSION = 2
INDEX_FILE, EMPTY_FILE = "index.json", "empty_text.npz"
LISTED_SKIPPED = 1000  # entries of `skipped` in an index, at most; skipped.jsonl has all
MAX_TOKENS = 1 << 18  # the most of one image, prepared or drawn
Identity = dict[str, Any]
PLAIN_SALIENCY: Identity = {"kind": "laplacian"}
_TEXT_DTYPE = "float16"
Places = Mapping[str, Sequence[int]]  # member extension, as "latent.npy" -> (offset, size, crc32) inside the tar

_T = TypeVar("_T")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Bucket(NamedTuple):
    """One resolution. Buckets of a folder may differ in their number of tokens."""

    image: tuple[int, int]  # pixels (H, W)
    latent: tuple[int, ...]  # (C, h, w), or of frames (C, T, h, w)
    grid: tuple[int, ...]  # tokens (h, w), or (T, h, w)
    num_samples: int  # over all splits

    @property
    def frames(self) -> int:
        """Frames of a sample; 1 for still images."""
        return self.grid[0] if len(self.grid) == 3 else 1

    @property
    def tokens(self) -> int:
        """Tokens of a sample, of all its frames."""
        return math.prod(self.grid)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar. All its samples are of one split and one bucket."""

    name: str  # of the tar and its table, without suffix
    split: str
    bucket: str
    num_samples: int
    size: int  # bytes of the tar
    sha256: str  # of the tar
    table_sha256: str


@dataclass(frozen=True, kw_only=True)
class Index:
    """The content of index.json, in the order of its keys."""

    source: Identity
    buckets: dict[str, Bucket]  # by name, as "256x192" (H x W pixels)
    patch_size: int  # latent pixels per token, each way
    text_length: int  # tokens of the longest text
    text_width: int
    pooled_width: int
    codec: Identity
    encoder: Identity
    splits: dict[str, int]  # samples of every split
    shards: list[Shard]
    files: dict[str, str]  # sha256 of the other files: codec, empty caption
    skipped: list[tuple[str, str]]  # (name, reason) of what the source has and the shards lack
    saliency: Identity = field(default_factory=lambda: dict(PLAIN_SALIENCY))  # where the maps M come from
    text_dtype: str = _TEXT_DTYPE  # of the token states

    @property
    def frames(self) -> int:
        """Frames of every sample; 1 for still images."""
        return next((bucket.frames for bucket in self.buckets.values()), 1)


@dataclass(frozen=True, kw_only=True)
class ShardTable:
    """The table of one shard, in the order of its keys."""

    split: str
    bucket: str
    size: int  # bytes of the tar
    sha256: str  # of the tar
    text_length: int  # tokens of its longest text
    samples: Sequence[tuple[str, Places]]  # (key, places of its members), in the order of the tar
    skipped: list[tuple[str, str]]  # (name, reason)


def bucket_name(image: Sequence[int], frames: int = 1) -> str:
    """Return the name of the bucket of images (H, W), or of so many frames (H, W)."""
    return "x".join(map(str, (*([frames] if frames > 1 else []), *image)))


def index_bytes(index: Index) -> bytes:
    """Return the content of index.json."""
    tree = _fields(index)
    tree["buckets"] = {name: bucket._asdict() for name, bucket in index.buckets.items()}
    tree["shards"] = [_fields(shard) for shard in index.shards]
    if index.saliency == PLAIN_SALIENCY:
        del tree["saliency"]  # as in folders that were written before there was another
    if index.text_dtype == _TEXT_DTYPE:
        del tree["text_dtype"]
    return sealed({"schema": _SCHEMA_VERSION, **tree})


def sealed(tree: dict[str, Any]) -> bytes:
    """Return JSON with a last key `sha256`, which is the hash of the JSON without that key."""
    content = encode_json({name: value for name, value in tree.items() if name != "sha256"})
    return content[:-2] + b',"sha256":"%s"}\n' % hashlib.sha256(content).hexdigest().encode()


def table_bytes(table: ShardTable) -> bytes:
    """Return the content of a shard's table."""
    return encode_json(_fields(table))


def _fields(record: Shard | Index | ShardTable) -> dict[str, Any]:
    """Return the fields of a record without copying their values."""
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def parse_index(content: bytes, where: str) -> Index:
    """Read index.json; schema 1, which had one bucket, is read as well.

    Raises DataError, which names `where`, for other schemas and for anything that is not an index.
    """
    tree = _tree(content, where, f"delete it and run `{spell_command('prepare')}` again")
    schema = tree.get("schema")
    if schema not in (1, _SCHEMA_VERSION):
        raise DataError(f"{where}: schema {schema!r}, expected {_SCHEMA_VERSION}; prepare the data again")
    if schema == _SCHEMA_VERSION and sealed(tree) != content:
        raise DataError(f"{where}: damaged, or edited by hand; delete it and run `{spell_command('prepare')}` again")
    return _built(lambda: _index(_upgraded(tree) if schema == 1 else tree), where)


def parse_table(content: bytes, where: str) -> ShardTable:
    """Read a shard's table. Raises DataError, which names `where`, for anything else."""
    tree = _tree(content, where, f"delete it and run `{spell_command('prepare')}` again as before")
    return _built(lambda: _table(tree), where)


def _tree(content: bytes, where: str, fix: str) -> dict[str, Any]:
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        raise DataError(f"{where}: damaged; {fix}") from None
    if not isinstance(tree, dict):
        raise DataError(f"{where}: holds a {type(tree).__name__}, expected an object; {fix}")
    return tree


def _built(build: Callable[[], _T], where: str) -> _T:
    try:
        return build()
    except KeyError as error:
        raise DataError(f"{where}: key {error} is missing; prepare the data again") from None
    except (TypeError, ValueError, AttributeError, IndexError, DataError) as error:
        raise DataError(f"{where}: not what this version writes ({error}); prepare the data again") from None


def _upgraded(tree: dict[str, Any]) -> dict[str, Any]:
    """Convert schema 1, which had one square bucket without a name."""
    size, count = tree["image_size"], sum(tree["splits"].values())
    bucket = {"image": [size, size], "latent": tree["latent_shape"], "grid": tree["grid"], "num_samples": count}
    name = bucket_name((size, size))
    return {**tree, "buckets": {name: bucket}, "shards": [{**shard, "bucket": name} for shard in tree["shards"]]}


def _index(tree: dict[str, Any]) -> Index:
    buckets = {str(name): _bucket(bucket) for name, bucket in tree["buckets"].items()}
    if len({bucket.frames for bucket in buckets.values()}) > 1:
        raise ValueError("buckets of different numbers of frames")
    shards = [_shard(shard, buckets) for shard in tree["shards"]]
    return Index(
        source=dict(tree["source"]),
        buckets=buckets,
        patch_size=_count(tree["patch_size"]),
        text_length=_count(tree["text_length"]),
        text_width=_count(tree["text_width"]),
        pooled_width=_count(tree["pooled_width"]),
        codec=dict(tree["codec"]),
        encoder=dict(tree["encoder"]),
        splits={str(name): _count(count) for name, count in tree["splits"].items()},
        shards=shards,
        files={check_name(name): _digest(digest) for name, digest in tree["files"].items()},
        skipped=[(str(name), str(reason)) for name, reason in tree["skipped"]],
        saliency=dict(tree.get("saliency", PLAIN_SALIENCY)),
        text_dtype=str(tree.get("text_dtype", _TEXT_DTYPE)),
    )


def _bucket(tree: dict[str, Any]) -> Bucket:
    image, latent, grid = ([_count(size) for size in tree[name]] for name in ("image", "latent", "grid"))
    if (len(image), len(latent), len(grid)) not in ((2, 3, 2), (2, 4, 3)) or latent[1:-2] != grid[:-2]:
        raise ValueError(f"bucket {tree!r}")
    return Bucket((image[0], image[1]), tuple(latent), tuple(grid), _count(tree["num_samples"]))


def _shard(tree: dict[str, Any], buckets: Mapping[str, Bucket]) -> Shard:
    if tree["bucket"] not in buckets:
        raise ValueError(f"shard {tree['name']!r} has the unknown bucket {tree['bucket']!r}")
    return Shard(
        name=check_name(tree["name"]),
        split=str(tree["split"]),
        bucket=tree["bucket"],
        num_samples=_count(tree["num_samples"]),
        size=_count(tree["size"]),
        sha256=_digest(tree["sha256"]),
        table_sha256=_digest(tree["table_sha256"]),
    )


def _table(tree: dict[str, Any]) -> ShardTable:
    return ShardTable(
        split=str(tree["split"]),
        bucket=str(tree.get("bucket", "")),  # schema 1 has none
        size=_count(tree["size"]),
        sha256=_digest(tree["sha256"]),
        text_length=_count(tree["text_length"]),
        samples=[(str(key), places) for key, places in tree["samples"]],
        skipped=[(str(name), str(reason)) for name, reason in tree["skipped"]],
    )


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is not a count")
    return value


def _digest(value: Any) -> str:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise ValueError(f"{value!r} is not a sha256")
    return value
