"""What the hub and `datasets` leave on a disk."""

import os
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.sources.open import SourceOptions, open_source
from sharpmoe.errors import DataError
from tests.data_pipeline.sources.test_images import encoded
from tests.data_pipeline.sources.test_tars import write
from tests.fixtures_data import Listing, listing

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
PNG = encoded(Image.new("RGB", (8, 8), "red"))


def table(*texts: str):
    return arrow.table({"image": [{"bytes": PNG, "path": f"{text}.png"} for text in texts], "text": list(texts)})


def stream(path: Path, *texts: str, indexed: bool = False) -> None:
    """An .arrow file: a stream of batches as `datasets` writes it, or with an index as Feather."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = arrow.ipc.new_file if indexed else arrow.ipc.new_stream
    with path.open("wb") as file, new(file, table(*texts).schema) as writer:
        for text in texts:
            writer.write_table(table(text))


def write_parquet(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table(*texts), path)


def listed(path: Path) -> Listing:
    source = open_source(SourceOptions(source=str(path)))
    found = listing(source)
    assert all(source.read(item) == PNG for item in found.items)
    return found


def splits(path: Path) -> dict[str, str]:
    return {item.captions[0][0]: item.split for item in listed(path).items}


def test_save_to_disk(tmp_path: Path) -> None:
    for split in ("train", "test"):
        stream(tmp_path / split / "data-00000-of-00001.arrow", f"{split} one", f"{split} two")
        (tmp_path / split / "state.json").write_text("{}")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert splits(tmp_path) == {"train one": "train", "train two": "train", "test one": "unseen", "test two": "unseen"}
    assert set(splits(tmp_path / "train")) == {"train one", "train two"}


@pytest.mark.parametrize("indexed", [False, True])
def test_one_arrow_file_of_both_kinds(indexed: bool, tmp_path: Path) -> None:
    stream(tmp_path / "a.arrow", "one", "two", indexed=indexed)
    assert set(splits(tmp_path / "a.arrow")) == {"one", "two"}
    (tmp_path / "cut.arrow").write_bytes((tmp_path / "a.arrow").read_bytes()[:100])
    with pytest.raises(DataError, match="cut.arrow: not a table of arrow"):
        listed(tmp_path / "cut.arrow")


def test_the_cache_of_load_dataset(tmp_path: Path) -> None:
    folder = tmp_path / "default" / "0.0.0" / "abc"
    stream(folder / "set-train-00000-of-00002.arrow", "one")
    stream(folder / "set-validation.arrow", "two")
    stream(folder / "cache-0123.arrow", "filtered")
    assert splits(tmp_path) == splits(folder) == {"one": "train", "two": "unseen"}


def test_a_snapshot_of_links(tmp_path: Path) -> None:
    write_parquet(tmp_path / "blobs" / "0" / "x", "one")
    (tmp_path / "blobs" / "0" / "x").rename(tmp_path / "blobs" / "sha")
    for revision in ("old", "new"):
        folder = tmp_path / "snapshots" / revision / "data"
        folder.mkdir(parents=True)
        os.symlink("../../../blobs/sha", folder / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"holds the revisions new, old; name one as .*snapshots/REVISION"):
        listed(tmp_path)
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / "main").write_text("new")
    (item,) = listed(tmp_path).items
    assert item.captions == (("one", 1.0),)


def test_configurations_are_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "one" / "train" / "0000.parquet", "one")
    write_parquet(tmp_path / "one" / "test" / "0000.parquet", "two")
    assert splits(tmp_path) == {"one": "train", "two": "unseen"}
    write_parquet(tmp_path / "other" / "0000.parquet", "three")
    with pytest.raises(DataError, match=r"holds several sets of tables \(one, other\); name one"):
        listed(tmp_path)


def test_tables_of_img2dataset_beside_its_tars_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "00000.tar", ("0.png", PNG), ("0.txt", "one"))
    parquet.write_table(arrow.table({"url": ["u"], "caption": ["one"]}), tmp_path / "00000.parquet")
    assert set(splits(tmp_path)) == {"one"}


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_damaged_table_among_several_is_left_out(suffix: str, tmp_path: Path) -> None:
    save = write_parquet if suffix == "parquet" else stream
    for name in "abc":
        save(tmp_path / f"{name}.{suffix}", f"{name} one", f"{name} two")
    damaged = tmp_path / f"b.{suffix}"
    damaged.write_bytes(damaged.read_bytes()[:100])
    (tmp_path / f"._c.{suffix}").write_bytes(b"\0\5\x16\7")
    found = listed(tmp_path)
    assert sorted(item.captions[0][0] for item in found.items) == ["a one", "a two", "c one", "c two"]
    bad = [entry for entry in found.skipped if not entry.beside]
    assert [entry.name for entry in bad] == [damaged.name]
    assert bad[0].reason.startswith("not a ")
    assert bad[0].reason.endswith("what follows is left out")
    for name in "ac":
        (tmp_path / f"{name}.{suffix}").write_bytes(b"")
    with pytest.raises(DataError, match=f"no captioned image found .*a.{suffix}: not a "):
        listed(tmp_path)


def test_the_rows_before_a_damaged_group_are_kept(tmp_path: Path) -> None:
    texts = [f"{number}" for number in range(1024)]
    for name in "ab":
        parquet.write_table(table(*texts), tmp_path / f"{name}.parquet", row_group_size=512, compression="none")
    damaged = tmp_path / "b.parquet"
    column = parquet.ParquetFile(damaged).metadata.row_group(1).column(0)
    content = bytearray(damaged.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + 64] = b"\xff" * 64
    damaged.write_bytes(content)
    found = listed(tmp_path)  # reads every picture that it lists
    assert len(found.items) == 1024 + 512
    assert [entry.name for entry in found.skipped] == ["b.parquet"]
