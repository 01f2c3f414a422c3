from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.sources import items
from data_pipeline.sources.items import Item, Skipped, from_json, to_json
from data_pipeline.sources.open import SourceOptions, open_source
from sharpmoe.errors import DataError
from tests.fixtures_data import Listing, listing


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def listed(path: Path) -> Listing:
    return listing(open_source(SourceOptions(source=str(path))))


def texts(path: Path) -> dict[str, str]:
    return {item.name: item.captions[0][0] for item in listed(path).items}


def test_units_cover_a_source_and_change_with_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "UNIT_RECORDS", 4)
    for number in range(10):
        picture(tmp_path / f"{number}.png").with_suffix(".txt").write_text(str(number))
    before = [unit.digest for unit in open_source(SourceOptions(source=str(tmp_path))).units()]
    assert [len(unit.records) for unit in open_source(SourceOptions(source=str(tmp_path))).units()] == [4, 4, 2]
    assert sorted(texts(tmp_path).values()) == [str(number) for number in range(10)]
    (tmp_path / "5.txt").write_text("changed")
    after = [unit.digest for unit in open_source(SourceOptions(source=str(tmp_path))).units()]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_a_picture_that_changed_since_it_was_listed_is_noticed(tmp_path: Path) -> None:
    picture(tmp_path / "a.png").with_suffix(".txt").write_text("x")
    source = open_source(SourceOptions(source=str(tmp_path)))
    item = listing(source).items[0]
    assert source.read(item) == (tmp_path / "a.png").read_bytes()
    assert source.read(item, 10) == (tmp_path / "a.png").read_bytes()[:10]
    (tmp_path / "a.png").write_bytes(source.read(item) + b"more")
    with pytest.raises(DataError, match="changed since it was listed"):
        source.read(item)


def test_items_survive_their_file(tmp_path: Path) -> None:
    item = Item(
        key="k",
        split="train",
        captions=(("a\n🦊", 2.0), ("b", 0.5)),
        image=items.Place("f", 3, 4),
        name="n",
        label=7,
        latent="m",
        flip=True,
        pixels=(3, 4),
    )
    listed = '["k","train",[["a\\n🦊",2.0],["b",0.5]],["f",3,4],"n",7,"m",true,[3,4]]'
    assert to_json(item) == listed  # as every version has written it
    for entry in (
        item,
        replace(item, pixels=None),
        Skipped("a", "b"),
        Skipped("a", "b", True),
        Skipped("a", "b", beside=True),
    ):
        assert from_json(to_json(entry).encode()) == entry
        assert "\n" not in to_json(entry)


def test_a_listing_of_an_older_version_is_read() -> None:
    assert from_json('["a","b",true]') == Skipped("a", "b", missing=True)
