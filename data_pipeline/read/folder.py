"""Read the files of a prepared folder beside its samples, through a store, and compare them with the index."""

import hashlib
from collections.abc import Sequence

from data_pipeline.index import INDEX_FILE, Index, Places, Shard, parse_index, parse_table
from data_pipeline.read.damage import how_to_rewrite
from data_pipeline.read.samples import TAR_BLOCK
from data_pipeline.store.store import Store
from sharpmoe.errors import DamageError, DataError
from sharpmoe.invocation import spell_command

_TAIL = 1 << 20  # bytes of zeros that may follow the last member of a tar


def read_index(store: Store) -> tuple[Index, str]:
    """Read the index of a prepared folder; return it and its sha256. Raises DataError."""
    try:
        content = store.small(INDEX_FILE)
    except DamageError:
        raise DataError(
            f"{store.location}: no {INDEX_FILE}; run `{spell_command('prepare')} --out {store.location} "
            "[--source FOLDER]`, which also finishes what an earlier run began, or name the place that the "
            "shards were moved to (--data.shards of a run, --shards of other commands)"
        ) from None
    return parse_index(content, f"{store.location}/{INDEX_FILE}"), hashlib.sha256(content).hexdigest()


def read_table(store: Store, shard: Shard) -> Sequence[tuple[str, Places]]:
    """Read keys and places of a shard's samples. Raises DamageError where the table is not the one in the index."""
    content = checked_file(store, f"{shard.name}.json", shard.table_sha256)
    if content is None:
        raise DamageError(f"its table {shard.name}.json is missing or damaged")
    samples = parse_table(content, f"{store.location}/{shard.name}.json").samples
    if len(samples) != shard.num_samples:
        raise DamageError(f"{shard.name}.json: {len(samples)} samples, the index has {shard.num_samples}")
    return samples


def check_files(store: Store, shard: Shard) -> None:
    """Raise a DamageError where a shard or its table is missing, or the shard has another size than the index says."""
    path = f"{store.location}/{shard.name}.tar"
    try:
        size = store.size(f"{shard.name}.tar")
    except DamageError:
        raise DamageError(f"{path}: shard is missing; {how_to_rewrite()}") from None
    if size != shard.size:
        raise DamageError(f"{path}: shard has {size} bytes, expected {shard.size}; delete it and {how_to_rewrite()}")
    try:
        store.size(f"{shard.name}.json")
    except DamageError:
        raise DamageError(f"{store.location}/{shard.name}.json: table is missing; {how_to_rewrite()}") from None


def ends_in_zeros(store: Store, shard: Shard, table: Sequence[tuple[str, Places]]) -> bool:
    """Return whether only zeros follow the last member of a tar."""
    ends = [place[0] + place[1] for _, places in table[-1:] for place in places.values()]
    start = max(ends, default=0)
    start += -start % TAR_BLOCK
    if not 0 <= shard.size - start <= _TAIL:
        return False
    place = f"{shard.name}.tar", start, shard.size - start
    # Read twice at most: a cached copy may be damaged.
    return any(not store.read(*place, fresh=fresh).strip(b"\0") for fresh in (False, True))


def checked_file(store: Store, name: str, sha256: str) -> bytes | None:
    """Read a small file whose checksum is in the index; None where it is missing or differs."""
    try:
        content = store.small(name)
    except DamageError:
        return None
    return content if hashlib.sha256(content).hexdigest() == sha256 else None
