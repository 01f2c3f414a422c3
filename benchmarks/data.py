"""Speed of one worker that reads prepared shards, against webdataset's reader on the same tars, and of resuming.

    python -m benchmarks.data [--json FILE] [--check]

Both make batches of 32: ours in random order, every member checked by its crc32 and for NaN; webdataset in the order of
the tar, unchecked, with its default decoders and `batched`. The files are in the page cache, so this is the cost of the
reader.
"""

import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import webdataset

from benchmarks.harness import Case, Goals, Planned, main
from benchmarks.synthetic import Text, link_shards, write_shards
from data_pipeline.read.batches import collate
from data_pipeline.read.damage import Damage
from data_pipeline.read.order import SampleOrder
from data_pipeline.read.samples import Draw, Sample
from data_pipeline.read.shards import ShardSet
from data_pipeline.read.stream import stream

_BATCH = 32
_RATIO, _RESUME_MS = 3.0, 1000.0  # the goals
_MEMBERS = ("latent.npy", "text.npy", "pooled.npy", "saliency.npy", "json", "txt")
_TEXTS = {Text(77, 768): 256, Text(120, 4096): 96}  # samples per shard
_MANY_SHARDS, _SHARD_SAMPLES = 10_000, 1_000
_RESUMING = "data.first_batch_after_resume_10m"


def cases(folder: Path) -> Iterator[Planned]:
    """Yield all cases; the shards of a case are written below `folder` just before it."""
    for text, count in _TEXTS.items():
        name = f"data.latent_4x32x32_text_{text.length}x{text.width}"
        yield Planned(name, partial(_reading_of, name, folder / f"{text.length}x{text.width}", text, count))
    yield Planned(_RESUMING, partial(_resuming_in, folder / "many"))


def _reading_of(name: str, folder: Path, text: Text, count: int) -> Case:
    return _reading(name, write_shards(folder, text, 2, count))


def _resuming_in(folder: Path) -> Case:
    return _resuming(link_shards(folder, Text(8, 16), _MANY_SHARDS, _SHARD_SAMPLES))


def _reading(name: str, folder: Path) -> Case:
    shards = ShardSet.open(folder, "train")
    order = SampleOrder([shards.num_samples // 2] * 2, seed=0)
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    places = range(0, shards.num_samples, _BATCH)

    def ours() -> int:
        for first in places:
            positions = range(first, first + _BATCH)
            collate((_sound(shards, order, position) for position in positions), positions, shards.text_length)
        return shards.num_samples

    def reference() -> int:
        batches = webdataset.WebDataset(tars, shardshuffle=False).decode().to_tuple(*_MEMBERS).batched(_BATCH)
        return sum(len(batch[0]) for batch in batches)

    return Case(name, ours, reference, goals=Goals(ratio=_RATIO))


def _sound(shards: ShardSet, order: SampleOrder, position: int) -> Sample:
    sample = shards.load(order.at(position).sample, Draw(0, position))
    if isinstance(sample, Damage):
        raise sample.error()
    return sample


def _resuming(folder: Path) -> Case:
    """Return the time to the first batch, in the middle of the third epoch of ten million samples."""
    start = int(2.4 * _MANY_SHARDS * _SHARD_SAMPLES) // _BATCH * _BATCH

    def resume() -> int:
        shards = ShardSet.open(folder, "train")
        steps = stream(shards, seed=0, global_batch=_BATCH, micro_batch=_BATCH, rank=0, world=1, start=start)
        next(steps)
        steps.close()
        return 1

    return Case(_RESUMING, resume, goals=Goals(ms=_RESUME_MS))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(main(lambda _: cases(Path(scratch)), __doc__.splitlines()[0]))
