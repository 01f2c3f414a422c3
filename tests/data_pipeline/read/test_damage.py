"""Damage: whatever changes in a shard is noticed, named and counted; a run bears as much as it was told to."""

import itertools
import json
import random
from collections.abc import Callable

import numpy as np
import pytest

from data_pipeline.members import encode_json, encode_npy
from data_pipeline.read.damage import Damage, DamageLedger
from data_pipeline.read.order import SampleOrder
from data_pipeline.read.shards import ShardSet
from data_pipeline.read.stream import Loaded, stream
from sharpmoe.errors import DamageError
from tests.memory_shards import BUCKETS, Files, open_files, reseal, sample, tar, write

ROWS = [("16x16", 4), ("16x16", 4)]
SHARD = "train-16x16-00001"
EPOCH = 8


def steps(
    files: Files, count: int, bad: float, batch: int = 4, rank: int = 0, world: int = 1, workers: int = 0
) -> list[Loaded]:
    loaded = stream(
        open_files(files),
        seed=5,
        global_batch=batch,
        micro_batch=batch // world,
        rank=rank,
        world=world,
        num_workers=workers,
        max_bad_fraction=bad,
    )
    return list(itertools.islice(loaded, count))


def met(read: list[Loaded]) -> set[Damage]:
    return {damage for step in read for damage in step.damage}


def keys(read: list[Loaded]) -> list[str]:
    return [key for step in read for batch in step.batches for key in batch.keys]


# --- whatever changes -------------------------------------------------------------------------------------------------


def extents(files: Files) -> dict[str, range]:
    """Bytes of every sample of the shard, from its first header to the end of its last padding."""
    table = json.loads(files[f"{SHARD}.json"])["samples"]
    starts = [min(place[0] for place in places.values()) - 512 for _, places in table]
    last = max(offset + size + -size % 512 for offset, size, _ in table[-1][1].values())
    return {key: range(*ends) for (key, _), ends in zip(table, itertools.pairwise([*starts, last]), strict=True)}


def regions(files: Files) -> list[int]:
    """A byte in every region of every sample: name, size, checksum and rest of headers, contents, padding; the end."""
    places = []
    for _, members in json.loads(files[f"{SHARD}.json"])["samples"]:
        for offset, size, _ in members.values():
            places += [offset - 512, offset - 380, offset - 360, offset - 100, offset, offset + size - 1]
            places += [offset + size] if size % 512 else []
    return [*places, len(files[f"{SHARD}.tar"]) - 1, places[-1] + 512]


def mutations() -> list[tuple[str, int, int]]:
    """(kind, byte, bit): 100 flips and 100 truncations; half of each in named regions, the rest anywhere."""
    files, dice = write(ROWS), random.Random(11)
    size = len(files[f"{SHARD}.tar"])
    spots = dice.sample(regions(files), 50), dice.sample(regions(files), 50)
    anywhere = [dice.sample(range(size), 50) for _ in range(2)]
    flips = [("flip", place, dice.randrange(8)) for place in (*spots[0], *anywhere[0])]
    return flips + [("cut", place, 0) for place in (*spots[1], *anywhere[1])]


def mutated(files: Files, kind: str, place: int, bit: int) -> Files:
    content = bytearray(files[f"{SHARD}.tar"])
    if kind == "flip":
        content[place] ^= 1 << bit
    else:
        del content[place:]
    return {**files, f"{SHARD}.tar": bytes(content)}


def test_200_mutations_are_noticed_and_counted_exactly() -> None:
    files = write(ROWS)
    where, sound = extents(files), dict(zip(keys(steps(files, 2, 0)), _rows(steps(files, 2, 0)), strict=True))
    assert len(mutations()) == 200
    for kind, place, bit in mutations():
        hurt = mutated(files, kind, place, bit)
        read = steps(hurt, 2, 0.99)
        found = met(read)
        expected = {key for key, span in where.items() if (place in span if kind == "flip" else place < span.stop)}
        assert {damage.key for damage in found if damage.key} == expected, (kind, place)
        assert found, f"{kind} at byte {place} is silent"
        assert all(damage.shard == f"memory/{SHARD}.tar" for damage in found)
        assert not expected & set(keys(read))
        assert all(np.array_equal(row, sound[key]) for key, row in zip(keys(read), _rows(read), strict=True))
        with pytest.raises(DamageError, match=f"memory/{SHARD}.tar") as error:
            steps(hurt, 2, 0)
        assert "\n" not in str(error.value)


def _rows(read: list[Loaded]) -> list[np.ndarray]:
    return [
        np.concatenate([part.numpy().ravel() for part in row])
        for step in read
        for batch in step.batches
        for row in zip(batch.latent, batch.text, batch.pooled, batch.saliency, strict=True)
    ]


# --- what a sample can lack -------------------------------------------------------------------------------------------


def rebuilt(change: Callable[[dict[str, bytes]], object]) -> Files:
    """The shard with its first sample changed, and every checksum mended."""
    files = write(ROWS)
    samples = [(f"s{number:04d}", sample(number, BUCKETS["16x16"])) for number in range(4, 8)]
    change(samples[0][1])
    content, places = tar(samples)
    table = {**json.loads(files[f"{SHARD}.json"]), "size": len(content), "samples": places}
    files |= {f"{SHARD}.tar": content, f"{SHARD}.json": json.dumps(table).encode()}
    reseal(files, SHARD)
    return files


def put(name: str, array: np.ndarray) -> Callable[[dict[str, bytes]], object]:
    return lambda members: members.update({name: encode_npy(array)})


LATENT = np.zeros((2, 4, 4), dtype=np.float16)
SPOILED = {
    "nan": (put("latent.npy", LATENT + np.float16("nan")), r"latent.npy: holds NaN or infinity"),
    "inf": (put("latent.npy", np.full_like(LATENT, -np.inf)), r"latent.npy: holds NaN or infinity"),
    "inf in the text": (put("text.npy", np.full((2, 6), np.inf, np.float16)), r"text.npy: holds NaN or infinity"),
    "shape": (put("latent.npy", LATENT.reshape(4, 2, 4)), r"latent.npy: float16 of shape \(4, 2, 4\), expected floats"),
    "whole numbers": (put("latent.npy", LATENT.astype(np.int32)), r"latent.npy: int32 of shape"),
    "long text": (put("text.npy", np.zeros((9, 6), np.float16)), r"text.npy: 9 tokens, at most 4 expected"),
    "no latent": (lambda members: members.pop("latent.npy"), r"latent.npy: the sample has no such member"),
    "no caption": (lambda members: members.pop("txt"), r"txt: the sample has no such member"),
    "no label": (
        lambda members: members.update({"json": encode_json({"file": "x"})}),
        r"json: label None is not a class",
    ),
    "no json": (lambda members: members.update({"json": b"[1]"}), r"json: not a JSON object"),
    "captions": (
        lambda members: members.update({"json": encode_json({"label": 1, "captions": 3})}),
        r"json: captions are not a list of text and weight",
    ),
    "weights": (
        lambda members: members.update({"json": encode_json({"label": 1, "captions": [{"text": "a", "weight": -1}]})}),
        r"json: weights of captions are not positive numbers",
    ),
    "not UTF-8": (lambda members: members.update({"txt": b"\xff\xfe"}), r"txt: not UTF-8"),
    "a pickle": (lambda members: members.update({"latent.pkl": b"x"}), r"member .latent.pkl is not one of .npy"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_sample_is_named_and_replaced(name: str) -> None:
    change, what = SPOILED[name]
    files = rebuilt(change)
    (damage,) = met(steps(files, 2, 0.2))
    assert (damage.shard, damage.key) == (f"memory/{SHARD}.tar", "s0004")
    with pytest.raises(DamageError, match=rf"memory/{SHARD}.tar, key s0004, {what}"):
        steps(files, 2, 0)


@pytest.mark.parametrize("name", ["tar", "json"])
@pytest.mark.parametrize("how", ["missing", "other"])
def test_a_shard_or_table_that_is_gone_costs_its_samples(name: str, how: str) -> None:
    files = write(ROWS)
    files[f"{SHARD}.{name}"] = b"x" * 2000
    if how == "missing":
        del files[f"{SHARD}.{name}"]
    read = steps(files, 2, 0.5)
    assert len({damage.key for damage in met(read) if damage.key}) == 4
    assert set(keys(read)) == {"s0000", "s0001", "s0002", "s0003"}
    with pytest.raises(DamageError, match=f"memory/{SHARD}.tar"):
        steps(files, 2, 0)
    with pytest.raises(DamageError, match=r"of 8 samples are damaged, more than data.max_bad_fraction 0.4 allows"):
        steps(files, 2, 0.4)


# --- replacement ------------------------------------------------------------------------------------------------------


def test_the_next_sound_sample_of_the_order_takes_the_place() -> None:
    files = rebuilt(SPOILED["nan"][0])
    order = [f"s{SampleOrder((4, 4), 5).at(number).sample:04d}" for number in range(3 * EPOCH)]
    expected = [
        next(key for key in order[number:] if key != "s0004") for number in range(2 * EPOCH)
    ]  # a spoiled one at the end of an epoch is replaced by the first of the next
    assert keys(steps(files, 4, 0.2)) == expected


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (4, 1)])
def test_replacements_are_the_same_on_any_layout(world: int, workers: int) -> None:
    files = mutated(write(ROWS), "cut", 20_000, 0)
    alone = steps(files, 5, 0.9)
    ranks = [steps(files, 5, 0.9, rank=rank, world=world, workers=workers) for rank in range(world)]
    assert [key for step in zip(*ranks, strict=True) for share in step for key in keys([share])] == keys(alone)
    assert set.union(*(met(read) for read in ranks)) == met(alone)


def test_a_set_without_a_sound_sample_ends() -> None:
    files = write(ROWS)
    del files[f"{SHARD}.tar"], files["train-16x16-00000.tar"]
    with pytest.raises(DamageError, match="8 of 8 samples are damaged"):
        steps(files, 1, 0.9)


def test_held_out_samples_are_never_replaced() -> None:
    shards: ShardSet = open_files(rebuilt(SPOILED["nan"][0]))
    with pytest.raises(DamageError, match="key s0004, latent.npy: holds NaN"):
        shards.batch(range(8))
    cut = open_files(mutated(write(ROWS), "cut", len(write(ROWS)[f"{SHARD}.tar"]) - 1, 0))
    with pytest.raises(DamageError, match=r"shard has \d+ bytes, expected \d+"):
        cut.batch([7])


def test_a_ledger_counts_samples_once_and_flaws_not_at_all() -> None:
    ledger = DamageLedger(100, 0.02)
    one, two, three = (Damage("a.tar", key, "latent.npy: holds NaN or infinity") for key in "xyz")
    assert ledger.add([two, one, two]) == [one, two]
    assert ledger.add([one, Damage("a.tar", "", "cut short")]) == [Damage("a.tar", "", "cut short")]
    assert ledger.num_bad == 2
    with pytest.raises(DamageError, match=r"3 of 100 samples are damaged, .* 0.02 allows; the latest: a.tar, key z"):
        ledger.add([three])
    with pytest.raises(DamageError, match=r"^a.tar, key x, latent.npy: holds NaN or infinity; delete the shard"):
        DamageLedger(100, 0).add([one])
