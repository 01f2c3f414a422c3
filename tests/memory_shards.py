"""Shard sets in memory, written byte by byte here: reading is tested without the code that prepares."""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipeline.index import EMPTY_FILE, Bucket, Index, Shard, ShardTable, index_bytes, sealed, table_bytes
from data_pipeline.members import encode_json, encode_npy, encode_npz
from data_pipeline.read.folder import read_index
from data_pipeline.read.shards import ShardSet
from sharpmoe.errors import DamageError

TEXT_WIDTH, POOLED_WIDTH, TEXT_LENGTH = 6, 5, 4
BUCKETS = {
    "16x16": Bucket((16, 16), (2, 4, 4), (2, 2), 0),
    "32x8": Bucket((32, 8), (2, 8, 2), (4, 1), 0),
    "8x32": Bucket((8, 32), (2, 2, 8), (1, 4), 0),
    "24x16": Bucket((24, 16), (2, 6, 4), (3, 2), 0),  # more tokens than the others
    "3x16x16": Bucket((16, 16), (2, 3, 4, 4), (3, 2, 2), 0),  # three frames
    "3x8x32": Bucket((8, 32), (2, 3, 2, 8), (3, 1, 4), 0),
    "4x16x16": Bucket((16, 16), (2, 4, 4, 4), (4, 2, 2), 0),
}
Files = dict[str, bytes]


class MemoryStore:
    """A Store of files in a dict; counts what is read."""

    def __init__(self, files: Files, location: str = "memory") -> None:
        self.location, self.files, self.reads = location, files, 0

    def read(self, name: str, offset: int, size: int, fresh: bool = False) -> bytes:
        self.reads += 1
        content = self.small(name)[offset : offset + size]
        if len(content) != size:
            raise DamageError(f"{self.location}/{name}: ends before a sample does")
        return content

    def size(self, name: str) -> int:
        return len(self.small(name))

    def small(self, name: str) -> bytes:
        if name not in self.files:
            raise DamageError(f"{self.location}/{name}: cannot be read (No such file or directory)")
        return self.files[name]


class Options:
    """What every sample has beside the least."""

    def __init__(self, captions: Sequence[float] = (), spread: bool = False, flip: bool = False) -> None:
        self.captions, self.spread, self.flip = captions, spread, flip


PLAIN = Options()


def write(shards: Sequence[tuple[str, int]], options: Options = PLAIN, prefix: str = "s") -> Files:
    """Files of a folder whose split `train` has these (bucket, number of samples), in order."""
    files: Files = {EMPTY_FILE: encode_npz({"text": np.ones((1, TEXT_WIDTH)), "pooled": np.ones(POOLED_WIDTH)})}
    entries, first = [], 0
    for number, (bucket, count) in enumerate(shards):
        name = f"train-{bucket}-{number:05d}"
        members = [
            (f"{prefix}{first + row:04d}", sample(first + row, BUCKETS[bucket], options)) for row in range(count)
        ]
        files[f"{name}.tar"], places = tar(members)
        digest = sha256(files[f"{name}.tar"])
        size = len(files[f"{name}.tar"])
        table = ShardTable(
            split="train",
            bucket=bucket,
            size=size,
            sha256=digest,
            text_length=TEXT_LENGTH,
            samples=places,
            skipped=[],
        )
        files[f"{name}.json"] = table_bytes(table)
        entries.append(
            Shard(
                name=name,
                split="train",
                bucket=bucket,
                num_samples=count,
                size=size,
                sha256=digest,
                table_sha256=sha256(files[f"{name}.json"]),
            )
        )
        first += count
    files["index.json"] = index_bytes(make_index(entries, {EMPTY_FILE: sha256(files[EMPTY_FILE])}))
    return files


def open_files(files: Files, location: str = "memory") -> ShardSet:
    store = MemoryStore(files, location)
    index, fingerprint = read_index(store)
    return ShardSet(store, "train", index, fingerprint)


def make_index(shards: Sequence[Shard], files: Mapping[str, str]) -> Index:
    counts = {name: sum(shard.num_samples for shard in shards if shard.bucket == name) for name in BUCKETS}
    buckets = {name: BUCKETS[name]._replace(num_samples=count) for name, count in counts.items() if count}
    splits = {"train": sum(counts.values())}
    identity = {"kind": "memory"}
    return Index(
        source=identity,
        buckets=buckets,
        patch_size=2,
        text_length=TEXT_LENGTH,
        text_width=TEXT_WIDTH,
        pooled_width=POOLED_WIDTH,
        codec=identity,
        encoder=identity,
        splits=splits,
        shards=list(shards),
        files=dict(files),
        skipped=[],
    )


def sample(number: int, bucket: Bucket, options: Options = PLAIN) -> dict[str, bytes]:
    """Members of a sample whose every value tells which one it is."""
    ramp = np.arange(bucket.tokens, dtype=np.float32) / 8
    latent = np.broadcast_to(np.arange(bucket.latent[-1]), bucket.latent).astype(np.float16) + number % 64
    arrays = {
        "latent": latent,
        "text": np.full((1 + number % TEXT_LENGTH, TEXT_WIDTH), number % 64, dtype=np.float16),
        "pooled": np.full(POOLED_WIDTH, number % 64, dtype=np.float32),
        "saliency": ramp,
    }
    if options.spread:
        arrays["latent_std"] = np.full(bucket.latent, 0.5, dtype=np.float16)
    if options.flip:
        arrays["latent_flip"] = latent[..., ::-1]
    meta: dict[str, object] = {"file": f"{number}.png", "label": number % 3, "split": "train"}
    for other in range(1, len(options.captions)):
        arrays[f"text{other}"] = np.full((1, TEXT_WIDTH), other, dtype=np.float16)
        arrays[f"pooled{other}"] = np.full(POOLED_WIDTH, other, dtype=np.float32)
    if options.captions:
        texts = [f"caption {i} of {number}" for i in range(len(options.captions))]
        meta["captions"] = [
            {"text": text, "weight": weight} for text, weight in zip(texts, options.captions, strict=True)
        ]
    members = {f"{name}.npy": encode_npy(array) for name, array in arrays.items()}
    return {**members, "json": encode_json(meta), "txt": f"caption 0 of {number}".encode()}


def tar(samples: Sequence[tuple[str, dict[str, bytes]]]) -> tuple[bytes, list]:
    stream, places = io.BytesIO(), []
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for key, members in samples:
            found = {}
            for extension, content in sorted(members.items()):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                found[extension] = [stream.tell() + 512, len(content), zlib.crc32(content)]
                archive.addfile(info, io.BytesIO(content))
            places.append((key, found))
    return stream.getvalue(), places


def reseal(files: Files, shard: str) -> None:
    """Mend the checksums of a shard's table in the index, as one who writes hostile shards would."""
    tree = json.loads(files["index.json"])
    for entry in tree["shards"]:
        if entry["name"] == shard:
            entry["table_sha256"] = sha256(files[f"{shard}.json"])
            entry["size"] = len(files[f"{shard}.tar"])
    files["index.json"] = sealed(tree)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
