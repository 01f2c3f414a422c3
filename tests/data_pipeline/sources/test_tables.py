import json
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.prepare.ranks import Rank
from data_pipeline.prepare.survey import Catalog, refuse_missing, survey
from data_pipeline.sources.items import Skipped
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
