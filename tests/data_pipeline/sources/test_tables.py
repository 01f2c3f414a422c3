import json
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.prepare.ranks import Rank
from data_pipeline.prepare.survey import Catalog, refuse_missing, survey
from data_pipeline.sources import rows
from data_pipeline.sources.items import Skipped, held_out, source_identity
from data_pipeline.sources.open import SourceOptions, open_source
from sharpmoe.errors import DataError
from tests.data_pipeline.sources.test_folders import drawn_folder
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
def test_a_bad_row_is_left_out_and_named(line: str, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    captions(tmp_path, {"file": "a.png", "caption": "a"}, line)
    found = listed(tmp_path)
    assert [item.captions[0][0] for item in found.items] == ["a"]
    (left_out,) = found.skipped
    assert "captions.jsonl" in left_out.name + left_out.reason
    assert "2" in left_out.name + left_out.reason
    assert "\n" not in left_out.name + left_out.reason
    assert not left_out.beside


def test_bad_rows_alone_are_an_error_of_one_line(tmp_path: Path) -> None:
    captions(tmp_path, "{", '{"file": 3}')
    with pytest.raises(
        DataError, match=r"captions.jsonl: no captioned image found \(captions.jsonl, line 1: not JSON"
    ) as e:
        listed(tmp_path)
    assert "\n" not in str(e.value)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    rows = b'{"file": "a.png", "caption": "\xff"}\n{"file": "a.png", "caption": "b"}\n'
    (tmp_path / "captions.jsonl").write_bytes(rows)
    found = listed(tmp_path)
    assert [item.captions[0][0] for item in found.items] == ["b"]
    assert found.skipped == [Skipped("captions.jsonl, line 1", "not UTF-8 text (byte 30); save it as UTF-8")]
    (tmp_path / "table.csv").write_bytes(b"file,caption\na.png,caf\xe9\na.png,good\n")
    found = listed(tmp_path / "table.csv")
    assert [item.captions[0][0] for item in found.items] == ["good"]
    assert [entry.reason for entry in found.skipped] == ["not UTF-8 text; save the table as UTF-8"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_a_table_in_utf16_is_named_so(encoding: str, name: str, tmp_path: Path) -> None:
    text = "file,caption\na.png,x\n" if name == "t.csv" else '{"file": "a.png", "caption": "x"}\n'
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(DataError, match=f"{name}: not UTF-8 text"):
        listed(tmp_path / name)


def test_rows_that_do_not_fit_the_header_are_left_out(tmp_path: Path) -> None:
    for name in "abcd":
        picture(tmp_path / f"{name}.png")
    (tmp_path / "t.csv").write_text("file,caption\na.png,red, on a table\nb.png,plain,,\nc.png\n\nd.png,last\n")
    found = listed(tmp_path / "t.csv")
    assert {item.name: item.captions[0][0] for item in found.items} == {"b.png": "plain", "d.png": "last"}
    assert [(entry.name, entry.reason) for entry in found.skipped] == [
        ("t.csv, line 2", "3 cells, the header has 2: put a caption that holds a comma in quotes"),
        ("c.png", "row 4 of t.csv has no caption"),
    ]


def test_a_quote_that_is_never_closed_loses_one_row(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(6)]
    for name in names:
        picture(tmp_path / name)
    rows = [f"{name},caption" for name in names]
    rows[2] = '2.png,"never closed'
    (tmp_path / "t.csv").write_text("\n".join(["file,caption", *rows]) + "\n")
    found = listed(tmp_path / "t.csv")
    assert [item.name for item in found.items] == ["0.png", "1.png", "3.png", "4.png", "5.png"]
    assert [entry.name for entry in found.skipped] == ["t.csv, line 4"]
    assert "quote" in found.skipped[0].reason


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_labels_with_gaps_are_floats(name: str, tmp_path: Path) -> None:
    labels = [3.0, None, "cat"] if name != "t.parquet" else [3.0, None, 2.5]
    rows = [{"file": f"{number}.png", "caption": "x", "label": label} for number, label in enumerate(labels)]
    for row in rows:
        picture(tmp_path / str(row["file"]))
    if name == "t.csv":
        lines = ["File,Caption,Label", "0.png,x,3.0", "1.png,x,", "2.png,x,cat"]
        (tmp_path / name).write_text("\n".join(lines))
    elif name == "t.jsonl":
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
    else:
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / name)
    found = listed(tmp_path / name)
    assert [item.label for item in found.items] == [3, -1]
    assert "is not a whole number" in found.skipped[0].reason


def test_a_null_caption_is_left_out(tmp_path: Path) -> None:
    for name in "ab":
        picture(tmp_path / f"{name}.png")
    captions(tmp_path, {"file": "a.png", "caption": None}, {"file": "b.png", "caption": "b"})
    found = listed(tmp_path)
    assert [item.name for item in found.items] == ["b.png"]
    assert found.skipped == [Skipped("a.png", "row 1 of captions.jsonl has no caption")]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "CAPTIONS.CSV"])
def test_tables_that_are_found_by_themselves(name: str, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "deep" / "other.png")
    (tmp_path / "b.tar").write_bytes(b"")
    (tmp_path / ".DS_Store").write_bytes(b"")
    text = (
        "file_name,text\na.png,hello\n" if name.lower().endswith("csv") else '{"file_name": "a.png", "text": "hello"}'
    )
    (tmp_path / name).write_text(text)
    found = listed(tmp_path)
    assert [(item.name, item.captions[0][0]) for item in found.items] == [("a.png", "hello")]
    assert {entry.name: entry.reason for entry in found.skipped} == {
        "deep/other.png": f"not named in {name}",
        "*.tar": "1 file of a kind that is not taken; only the table and its pictures are",
    }
    assert all(entry.beside for entry in found.skipped)


def test_an_image_folder_of_hugging_face_has_splits(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        picture(tmp_path / split / "a.png")
        (tmp_path / split / "metadata.csv").write_text(f"file_name,text\na.png,{split}\n")
    found = listed(tmp_path).items
    assert [(item.name, item.split, item.captions[0][0]) for item in found] == [
        ("train/a.png", "train", "train"),
        ("validation/a.png", "unseen", "validation"),
    ]


def embedded_table(path: Path, rows: list[dict[str, object]], metadata: dict[str, str] | None = None) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = arrow.Table.from_pylist(rows)
    parquet.write_table(table.replace_schema_metadata(metadata) if metadata else table, path, row_group_size=2)


def test_images_inside_parquet(tmp_path: Path) -> None:
    files = [picture(tmp_path / "x" / f"{colour}.png", colour).read_bytes() for colour in ("red", "green", "blue")]
    rows: list[dict[str, object]] = [
        {"image": {"bytes": content, "path": f"{number}.png"}, "text": f"number {number}"}
        for number, content in enumerate(files)
    ]
    picture(tmp_path / "outside.png")
    rows.append({"image": {"bytes": None, "path": "outside.png"}, "text": "by path"})
    embedded_table(tmp_path / "t.parquet", rows)
    source = open_source(SourceOptions(source=str(tmp_path / "t.parquet")))
    found = listing(source).items
    assert [item.captions[0][0] for item in found] == ["number 0", "number 1", "number 2", "by path"]
    assert [source.read(item) for item in found] == [*files, (tmp_path / "outside.png").read_bytes()]
    assert source.read(found[1], 5) == files[1][:5]
    assert len({item.key for item in found}) == 4


def test_a_data_set_of_hugging_face_with_class_names(tmp_path: Path) -> None:
    content = picture(tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").unlink()
    features = {"label": {"names": ["tench", "goldfish"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for split, label in (("train-00000-of-00001", 1), ("test-00000-of-00001", 0)):
        row = {"image": {"bytes": content, "path": None}, "label": label}
        embedded_table(tmp_path / "data" / f"{split}.parquet", [row], metadata)
    (tmp_path / "README.md").write_text("card")
    found = listed(tmp_path)
    assert [(item.split, item.label, item.captions[0][0]) for item in found.items] == [
        ("unseen", 0, "tench"),
        ("train", 1, "goldfish"),
    ]
    assert [entry.name for entry in found.skipped] == ["*.md"]


def test_a_name_that_is_too_long_is_left_out(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    captions(tmp_path, {"file": "x" * 300 + ".png", "caption": "x"}, {"file": "a.png", "caption": "a"})
    found = listed(tmp_path)
    assert [item.name for item in found.items] == ["a.png"]
    assert found.skipped[0].missing


def test_rows_that_name_nothing_and_odd_values_never_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_LINE_BYTES", 1000)
    picture(tmp_path / "a.png")
    good = {"file": "a.png", "caption": "red"}
    captions(
        tmp_path,
        {"file": "", "caption": "x"},
        '"a.png"',
        {**good, "caption": 5},
        {**good, "label": True},
        f'{{"file": "a.png", "caption": "x", "label": {"9" * 400}}}',
        {**good, "caption": "x" * 1000},
        good,
    )
    found = listed(tmp_path)
    assert [item.captions for item in found.items] == [(("red", 1.0),)]
    assert [entry.reason.partition(";")[0] for entry in found.skipped] == [
        "it names no file",
        '"a.png"',
        "row 3 of captions.jsonl: a caption that is not text",
        "row 4 of captions.jsonl: label 'True' is not a whole number",
        "row 5 of captions.jsonl: label 'a number of more than 19 digits' is not a whole number",
        "longer than 1000 bytes",
    ]


def test_csv_with_semicolons_as_excel_writes_them(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "captions.csv").write_bytes(b"\xef\xbb\xbffile;caption;label\r\na.png;a red, red square;3\r\n")
    ((item,), skipped) = listed(tmp_path)
    assert (item.captions, item.label, skipped) == ((("a red, red square", 1.0),), 3, [])


def test_parquet_with_odd_cells(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    content = picture(tmp_path / "a.png").read_bytes()
    images = [{"bytes": content, "path": "a"}, None, {"bytes": None, "path": None}, {"bytes": content, "path": "b"}]
    texts = arrow.array([b"red", b"x", b"x", b"caf\xe9"]).view(arrow.string())
    parquet.write_table(arrow.table({"image": images, "text": texts}), tmp_path / "t.parquet")
    found = listed(tmp_path / "t.parquet")
    assert [item.captions for item in found.items] == [(("red", 1.0),)]
    assert [tuple(entry[:2]) for entry in found.skipped] == [
        ("t.parquet, line 2", "it holds no picture"),
        ("t.parquet, line 3", "it holds no picture"),
        ("t.parquet/4/b", "row 4 of t.parquet: a caption that is not UTF-8"),
    ]
    (tmp_path / "l.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(DataError, match=r"l.parquet: is a pointer of Git LFS.*git lfs pull"):
        listed(tmp_path / "l.parquet")


@pytest.mark.parametrize("whole", [True, False])
def test_rows_that_name_pictures_of_a_held_out_folder_are_held_out(whole: bool, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    files = [f"{number}.png" for number in range(40)]
    assert "unseen" in map(held_out, files)
    names = [*files, "train/a.png", "val/a.png", "./deep/../val/b.png", str(folder / "val" / "c.png")]
    for name in (*files, "train/a.png", "val/a.png", "val/b.png", "val/c.png", "deep/d.png"):
        picture(folder / name)
    table = captions(folder, *({"file": name, "caption": "x"} for name in names))
    found = listed(folder if whole else table).items
    assert [item.name for item in found if item.split == "unseen"] == names[-3:]
    assert {item.split for item in found} == {"train", "unseen"}
    assert len(found) == len(names)


def test_rows_without_a_held_out_folder_are_the_source_that_they_were(tmp_path: Path) -> None:
    """The number is of the version before held-out folders. One that no usable row names changes nothing."""
    folder = drawn_folder(tmp_path / "set")
    files = [f"{'train' if number % 2 else 'deep/val'}/{number:02}.png" for number in range(60)]
    captions(folder, "".join(json.dumps({"file": file, "caption": "x"}) + "\n" for file in files))
    picture(folder / "val" / "unnamed.png")
    source = open_source(SourceOptions(source=str(folder)))
    sha256 = "d86632ee54a0fea2b391446eb3a48bf4a2e81fafc53bfd34af7151c6e8146b4a"
    assert source_identity(source, source.units())[0]["sha256"] == sha256
    assert [item.name for item in listed(folder).items if item.split == "unseen"] == ["train/11.png", "deep/val/42.png"]


@pytest.mark.parametrize("stems", [("captions", "captions"), ("captions", "metadata"), ("metadata", "captions")])
def test_tables_of_both_names_are_found_in_folders_of_splits(stems: tuple[str, str], tmp_path: Path) -> None:
    for split, stem in zip(("train", "validation"), stems, strict=True):
        picture(tmp_path / split / "a.png")
        (tmp_path / split / f"{stem}.jsonl").write_text('{"file": "a.png", "caption": "x"}\n')
    found = listed(tmp_path).items
    assert [(item.name, item.split) for item in found] == [("train/a.png", "train"), ("validation/a.png", "unseen")]


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("", ("captions.csv", "captions.jsonl")),  # in the folder itself captions.* is taken before metadata.*
        ("train", ("captions.csv", "captions.jsonl")),
        ("train", ("captions.jsonl", "metadata.csv")),
    ],
)
def test_several_tables_in_one_folder_are_one_line(where: str, names: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / where).mkdir(exist_ok=True)
    for name in names:
        (tmp_path / where / name).write_text("file,caption\n")
    how = "keep one of them there" if where else "name one of them with --source"
    with pytest.raises(DataError) as error:
        listed(tmp_path)
    assert str(error.value) == f"{tmp_path / where}: holds {', '.join(names)}; {how}"


def test_a_table_of_the_training_split_alone_is_no_table_of_splits(tmp_path: Path) -> None:
    """Without a held-out one the pictures are read by their text files, as ever."""
    for number in range(40):
        path = tmp_path / "train" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
        path.with_suffix(".txt").write_text("a picture")
    before = listing(open_source(SourceOptions(source=str(tmp_path)))).items
    assert {item.split for item in before} == {"train", "unseen"}
    (tmp_path / "train" / "captions.csv").write_text("file,caption\n0.png,another\n")
    assert listing(open_source(SourceOptions(source=str(tmp_path)))).items == before


def test_rows_that_are_absolute_are_held_out_through_a_link(tmp_path: Path) -> None:
    for name in ("train/a.png", "val/b.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True)
        (tmp_path / "set" / name).write_bytes(b"x")
    rows = [f"{tmp_path}/set/{name},a picture" for name in ("train/a.png", "val/b.png")]
    (tmp_path / "set" / "captions.csv").write_text("\n".join(["file,caption", *rows]) + "\n")
    (tmp_path / "link").symlink_to(tmp_path / "set")
    for place in ("set", "link"):
        found = listing(open_source(SourceOptions(source=str(tmp_path / place)))).items
        assert [item.split for item in found] == ["train", "unseen"], place
