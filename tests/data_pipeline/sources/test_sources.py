import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.prepare.ranks import Rank
from data_pipeline.prepare.survey import Catalog, refuse_missing, survey
from data_pipeline.sources import items
from data_pipeline.sources.items import Item, Skipped, from_json, to_json
from data_pipeline.sources.open import SourceOptions, open_source
from data_pipeline.sources.tables import _rows
from sharpmoe.errors import DataError
from tests.fixtures_data import Listing, listing


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def captions(folder: Path, *lines: object) -> Path:
    table = folder / "captions.jsonl"
    table.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), encoding="utf-8")
    return table


def listed(path: Path) -> Listing:
    return listing(open_source(SourceOptions(source=str(path))))


def texts(path: Path) -> dict[str, str]:
    return {item.name: item.captions[0][0] for item in listed(path).items}


def catalog(path: Path, work: Path) -> Catalog:
    source = open_source(SourceOptions(source=str(path)))
    digests = [unit.digest for unit in source.units()]
    survey(source, work, digests, Rank(), read_sizes=False, threads=1)
    return Catalog(work, digests)


# --- a caption beside every image -------------------------------------------------------------------------------------


def test_sidecars(tmp_path: Path) -> None:
    picture(tmp_path / "a.png").with_suffix(".txt").write_text("a red square\n", encoding="utf-8")
    picture(tmp_path / "deep" / "b.v2.JPG").with_suffix(".txt").write_text("größer", encoding="utf-8")
    picture(tmp_path / "c.png")
    picture(tmp_path / "d.png").with_suffix(".txt").write_text("  \n")
    picture(tmp_path / "e.png").with_suffix(".txt").write_bytes(b"caf\xe9")
    found = listed(tmp_path)
    assert texts(tmp_path) == {"a.png": "a red square", "deep/b.v2.JPG": "größer"}
    assert dict(entry[:2] for entry in found.skipped) == {
        "c.png": "no caption in c.txt",
        "d.png": "no caption in d.txt",
        "e.png": "caption e.txt is not UTF-8 (byte 3)",
    }
    assert all("." not in item.key and "/" not in item.key for item in found.items)


def test_captions_with_newlines_and_emoji_stay_as_they_are(tmp_path: Path) -> None:
    caption = "a fox 🦊\n\n  in the snow ❄️ — “so cold”"
    picture(tmp_path / "a.png").with_suffix(".txt").write_text(f"\ufeff{caption}\r\n", encoding="utf-8")
    assert texts(tmp_path) == {"a.png": caption}


def test_translations_under_a_caption_are_left_out(tmp_path: Path) -> None:
    text = "A brown bear.\naf.utf8='n Bruin beer.\nsr@latin.utf8=Medved.\npt_BR.utf8=Um urso.\nen=sure"
    picture(tmp_path / "a.png").with_suffix(".txt").write_text(text, encoding="utf-8")
    assert texts(tmp_path) == {"a.png": "A brown bear.\nen=sure"}


def test_json_beside_an_image_with_several_captions(tmp_path: Path) -> None:
    tree = {"captions": [{"text": "one", "weight": 3}, " two "]}
    picture(tmp_path / "a.png").with_suffix(".json").write_text(json.dumps(tree))
    picture(tmp_path / "b.png").with_suffix(".json").write_text("{")
    picture(tmp_path / "c.png").with_suffix(".json").write_text('{"captions": [{"text": "x", "weight": -1}]}')
    found = listed(tmp_path)
    assert [item.captions for item in found.items] == [(("one", 3.0), ("two", 1.0))]
    assert {entry.name for entry in found.skipped} == {"b.png", "c.png"}


def test_paths_that_look_alike_get_different_keys(tmp_path: Path) -> None:
    for file in ("a/b.png", "a-b.png", "a.b.png"):
        picture(tmp_path / file).with_suffix(".txt").write_text("x")
    assert len({item.key for item in listed(tmp_path).items}) == 3


# --- tables -----------------------------------------------------------------------------------------------------------


def test_captions_file_with_both_spellings_and_several_captions_of_one_image(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    captions(
        tmp_path,
        {"file": "a.png", "caption": "one", "label": 3},
        "",
        {"image": "a.png", "text": "two"},
    )
    found = listed(tmp_path).items
    assert [(item.captions[0][0], item.label) for item in found] == [("one", 3), ("two", -1)]
    assert len({item.split for item in found}) == 1


def test_every_row_of_an_image_is_a_sample_with_a_key_of_its_own(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    captions(tmp_path, *({"file": f"{name}.png", "caption": str(n)} for n in range(3) for name in "ab"))
    found = catalog(tmp_path, tmp_path / "work")
    made = found.items(range(len(found)))
    assert len({item.key for item in made}) == 6
    assert {item.key.rpartition("-")[2] for item in made if item.captions[0][0] == "2"} == {"3"}


def test_a_list_of_captions_with_weights(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    captions(tmp_path, {"file": "a.png", "captions": ["one", {"text": "two", "weight": 0.5}, ""]})
    assert listed(tmp_path).items[0].captions == (("one", 1.0), ("two", 0.5))


def test_csv_and_tsv(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b, c.png")
    text = 'path,caption,label\na.png,"red, ""so"" red\nreally 🟥",4\n"b, c.png",[x] marks,\n'
    (tmp_path / "captions.csv").write_text(text, encoding="utf-8-sig")
    assert texts(tmp_path) == {"a.png": 'red, "so" red\nreally 🟥', "b, c.png": "[x] marks"}
    assert [item.label for item in listed(tmp_path).items] == [4, -1]
    (tmp_path / "table.tsv").write_text('file\tcaptions\na.png\t["one", "two"]\n')
    assert listed(tmp_path / "table.tsv").items[0].captions == (("one", 1.0), ("two", 1.0))


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for number in range(9):
        picture(tmp_path / f"{number}.png")
    table = {
        "file": [f"{number}.png" for number in range(9)],
        "text": [f"number {number}" for number in range(9)],
        "label": [None, *range(1, 9)],
        "size": list(range(9)),
    }
    parquet.write_table(arrow.table(table), tmp_path / "captions.parquet", row_group_size=4)
    assert texts(tmp_path) == {f"{number}.png": f"number {number}" for number in range(9)}
    assert [item.label for item in listed(tmp_path).items] == [-1, *range(1, 9)]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match=r"bad.parquet: not a parquet table .*expected a column file") as error:
        listed(tmp_path / "bad.parquet")
    assert "\n" not in str(error.value)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "captions.parquet").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match="pip install pyarrow, or save the table as .jsonl or .csv"):
        listed(tmp_path)


def test_tables_without_the_columns(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("url,caption\nx,y\n")
    with pytest.raises(DataError, match="columns url, caption; expected a column file or image"):
        listed(tmp_path)
    (tmp_path / "captions.tsv").write_text("file\tcaption\n")
    with pytest.raises(DataError, match=r"holds captions.csv, captions.tsv; name one of them"):
        listed(tmp_path)
    with pytest.raises(DataError, match="no captioned image found"):
        listed(tmp_path / "captions.tsv")


def test_a_captions_file_that_names_missing_images(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    captions(tmp_path, {"file": "a.png", "caption": "a"}, {"file": "gone.png", "caption": "b"})
    found = catalog(tmp_path, tmp_path / "work")
    with pytest.raises(DataError, match=r"1 of 2 images are missing \(gone.png; row 2 of captions.*--allow-missing"):
        refuse_missing(found, allow=False)
    refuse_missing(found, allow=True)
    assert len(found) == 1
    assert list(found.left_out()) == [
        Skipped("gone.png", "row 2 of captions.jsonl names it, but it is not there", True)
    ]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "3",
        '{"file": "a.png"}',
        '{"caption": "x"}',
        '{"file": 3, "caption": "x"}',
        '{"file": "a.png", "caption": "x", "label": "cat"}',
        '{"file": "a.png", "caption": "\\ud83d"}',
        '{"file": "a\\u0000.png", "caption": "x"}',
        '{"file": "a.png", "captions": [{"text": "x", "weight": 0}]}',
        "[" * 100_000,
    ],
)
def test_a_bad_line_is_named(line: str, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    captions(tmp_path, {"file": "a.png", "caption": "a"}, line)
    with pytest.raises(DataError, match=r"captions.jsonl, line 2: .*expected") as error:
        listed(tmp_path)
    assert "\n" not in str(error.value)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_bytes(b'{"file": "\xff"}')
    with pytest.raises(DataError, match="not UTF-8"):
        listed(tmp_path)
    (tmp_path / "table.csv").write_bytes(b"file,caption\na.png,caf\xe9\n")
    with pytest.raises(DataError, match="not UTF-8"):
        list(_rows(tmp_path / "table.csv"))


# --- sources as such --------------------------------------------------------------------------------------------------


def test_no_folder_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        open_source(SourceOptions(source=str(tmp_path / "none")))
    with pytest.raises(DataError, match="no captioned image"):
        listed(tmp_path)


def identity(path: Path) -> dict[str, object]:
    source = open_source(SourceOptions(source=str(path)))
    return source.identity([unit.digest for unit in source.units()])


def test_identity_follows_captions_and_files_but_not_the_place(tmp_path: Path) -> None:
    def source(parent: str, caption: str = "x", colour: str = "red") -> dict[str, object]:
        folder = tmp_path / parent / "set"
        picture(folder / "a.bmp" if colour == "red" else folder / "a.png", colour)
        (folder / "a.txt").write_text(caption)
        return identity(folder)

    first = source("one")
    assert source("two") == first
    assert source("three", caption="y") != first
    assert source("four", colour="blue") != first


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
    for entry in (item, replace(item, pixels=None), Skipped("a", "b"), Skipped("a", "b", True)):
        assert from_json(to_json(entry).encode()) == entry
        assert "\n" not in to_json(entry)


def test_a_file_name_that_is_not_utf8_is_left_out(tmp_path: Path) -> None:
    picture(tmp_path / "a.png").with_suffix(".txt").write_text("x")
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    try:
        os.rename(tmp_path / "a.png", odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    os.rename(tmp_path / "a.txt", odd.replace(".png", ".txt"))
    picture(tmp_path / "b.png").with_suffix(".txt").write_text("x")
    found = listed(tmp_path)
    assert [item.name for item in found.items] == ["b.png"]
    assert found.skipped == [Skipped(r"caf\udce9.png", "its name is not UTF-8")]
