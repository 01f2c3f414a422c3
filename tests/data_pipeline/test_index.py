"""Indexes and tables: they come back as they were written, and no change in them is silent."""

import random

import pytest

from data_pipeline.index import INDEX_FILE, index_bytes, parse_index, parse_table, sealed, table_bytes
from sharpmoe.errors import DataError
from tests.memory_shards import Files, Options, open_files, write

FILES = write([("16x16", 5), ("32x8", 4)], Options(captions=(1, 2), spread=True))
NAMES = (INDEX_FILE, "train-16x16-00000.json", "train-32x8-00001.json", "empty_text.npz")


def read_all(files: Files) -> None:
    shards = open_files(files)
    shards.empty_text()
    for name in shards.buckets:
        shards.batch(shards.indices_of(name))


def changes() -> list[tuple[str, str, int, int]]:
    """(file, kind, byte, bit): 100 flips and 100 truncations."""
    dice = random.Random(5)
    return [
        (name, kind, dice.randrange(len(FILES[name])), dice.randrange(8))
        for kind in ("flip", "cut")
        for name in NAMES
        for _ in range(25)
    ]


def test_200_changes_of_indexes_and_tables_are_noticed() -> None:
    assert len(changes()) == 200
    read_all(FILES)
    for name, kind, place, bit in changes():
        content = bytearray(FILES[name])
        if kind == "flip":
            content[place] ^= 1 << bit
        else:
            del content[place:]
        with pytest.raises(DataError) as error:
            read_all({**FILES, name: bytes(content)})
        assert "\n" not in str(error.value), (name, kind, place)


def test_they_come_back_as_they_were_written() -> None:
    content = FILES[INDEX_FILE]
    assert index_bytes(parse_index(content, "here")) == content
    table = FILES["train-16x16-00000.json"]
    assert table_bytes(parse_table(table, "here")) == table


def test_an_index_edited_by_hand_is_refused() -> None:
    edited = FILES[INDEX_FILE].replace(b'"text_length":4', b'"text_length":8')
    assert edited != FILES[INDEX_FILE]
    with pytest.raises(
        DataError, match=r"here: damaged, or edited by hand; delete it and run `python launcher/prepare.py`"
    ):
        parse_index(edited, "here")


def test_a_seal_is_its_own() -> None:
    assert sealed({"a": 1, "sha256": "x"}) == sealed({"a": 1})
