"""Check prepared folders byte by byte: recompute every checksum, decode every sample."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from data_pipeline.index import Index, Shard
from data_pipeline.read.damage import Damage
from data_pipeline.read.folder import read_table
from data_pipeline.read.samples import Span, Spec, check_sample
from data_pipeline.store.store import Store
from sharpmoe.errors import DamageError

_CHUNK = 8 << 20  # bytes hashed at a time
Advance = Callable[[int], object]  # receives numbers of bytes that were read


class _Checked(NamedTuple):
    """What was checked and what was found."""

    shards: int
    samples: int
    size: int  # bytes
    damage: list[Damage]

    @property
    def num_bad(self) -> int:
        """Number of samples that cannot be used."""
        return sum(bool(damage.key) for damage in self.damage)


def verify_folder(store: Store, index: Index, advance: Advance = lambda _: None, threads: int = 4) -> _Checked:
    """Recompute sha256 of every file and crc32 of every member, and decode every sample as a run would.

    Everything wrong is listed, in the order of the index. Raises DataError only where the store itself cannot be read.
    `advance` is called from several threads.
    """
    damage = [*_miscounted(store, index), *_changed_files(store, index)]
    with ThreadPoolExecutor(threads) as pool:
        for found in pool.map(partial(_check_shard, store, index, advance), index.shards):
            damage += found
    samples, size = (sum(column) for column in zip(*((s.num_samples, s.size) for s in index.shards), strict=True))
    return _Checked(len(index.shards), samples, size, damage)


def _miscounted(store: Store, index: Index) -> Iterator[Damage]:
    """Yield counts of the index that differ from the sums over its shards."""
    where = f"{store.location}/index.json"
    for kind, counts in (
        ("split", index.splits),
        ("bucket", {name: bucket.num_samples for name, bucket in index.buckets.items()}),
    ):
        for name, count in counts.items():
            held = sum(shard.num_samples for shard in index.shards if getattr(shard, kind) == name)
            if held != count:
                yield Damage(where, "", f"{kind} {name} has {count} samples, its shards have {held}")


def _changed_files(store: Store, index: Index) -> Iterator[Damage]:
    for name, sha256 in index.files.items():
        try:
            if hashlib.sha256(store.small(name)).hexdigest() != sha256:
                yield Damage(f"{store.location}/{name}", "", "sha256 differs from the index")
        except DamageError as error:
            yield _damage(f"{store.location}/{name}", error)


def _check_shard(store: Store, index: Index, advance: Advance, shard: Shard) -> list[Damage]:
    where = f"{store.location}/{shard.name}.tar"
    damage = []
    try:
        size = store.size(f"{shard.name}.tar")
        if size != shard.size:
            damage.append(Damage(where, "", f"shard has {size} bytes, expected {shard.size}"))
        if _sha256(store, f"{shard.name}.tar", size, advance) != shard.sha256:
            damage.append(Damage(where, "", "sha256 differs from the index"))
        table = read_table(store, shard)
    except DamageError as error:
        return [*damage, _damage(where, error), *_all_lost(where, shard)]
    bucket = index.buckets[shard.bucket]
    spec = Spec(bucket.latent, bucket.grid, index.text_length, index.text_width, index.pooled_width)
    for key, places in table:
        try:
            check_sample(partial(store.read, f"{shard.name}.tar"), Span(key, places, size), spec)
        except DamageError as error:
            damage.append(Damage(where, key, str(error)))
    return damage


def _all_lost(where: str, shard: Shard) -> list[Damage]:
    return [Damage(where, f"number {row}", "lost with its shard") for row in range(shard.num_samples)]


def _damage(where: str, error: DamageError) -> Damage:
    return Damage(where, "", str(error).removeprefix(f"{where}: "))


def _sha256(store: Store, name: str, size: int, advance: Advance) -> str:
    digest = hashlib.sha256()
    for start in range(0, size, _CHUNK):
        content = store.read(name, start, min(_CHUNK, size - start), fresh=True)  # not what a cache remembers
        digest.update(content)
        advance(len(content))
    return digest.hexdigest()
