import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.sources.items import source_identity
from data_pipeline.sources.open import SourceOptions, open_source
from sharpmoe.errors import DataError
from tests.data_pipeline.sources.test_images import encoded
from tests.fixtures_data import Listing, listing

PNG = encoded(Image.new("RGB", (8, 8), "red"))
JPG = encoded(Image.new("RGB", (8, 8), "blue"), "jpeg")
WEBP = encoded(Image.new("RGB", (8, 8), "green"), "webp")


def write(path: Path, *members: tuple[str, bytes | str | dict[str, object]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            data = json.dumps(content).encode() if isinstance(content, dict) else content
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def listed(path: Path) -> Listing:
    return listing(open_source(SourceOptions(source=str(path))))


def test_pictures_and_captions_of_all_kinds(tmp_path: Path) -> None:
    write(
        tmp_path / "set-000.tar",
        ("000.png", PNG),
        ("000.txt", "a red square\n"),
        ("001.json", {"caption": "blue 🟦", "width": 8}),
        ("001.jpg", JPG),
        ("001.cls", "17"),
        ("002.webp", WEBP),
        ("002.json", {"captions": ["green", {"text": "very green", "weight": 2}]}),
        ("002.txt", "not this one"),
        ("002.pyd", b"never looked at"),
    )
    source = open_source(SourceOptions(source=str(tmp_path)))
    found = listing(source)
    assert [item.captions for item in found.items] == [
        (("a red square", 1.0),),
        (("blue 🟦", 1.0),),
        (("green", 1.0), ("very green", 2.0)),
    ]
    assert [item.label for item in found.items] == [-1, 17, -1]
    assert [source.read(item) for item in found.items] == [PNG, JPG, WEBP]
    assert source.read(found.items[0], 5) == PNG[:5]
    assert [(entry.name, entry.beside) for entry in found.skipped] == [("set-000.tar/*.pyd", True)]
    assert listed(tmp_path / "set-000.tar").items == found.items


def test_keys_of_two_tars_do_not_clash(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.tar", ("0.png", PNG), ("0.txt", name))
    assert len({item.key for item in listed(tmp_path).items}) == 2
    assert len(list(open_source(SourceOptions(source=str(tmp_path))).units())) == 2


def test_what_cannot_be_used_is_listed(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.tar",
        ("0.png", PNG),
        ("1.txt", "no picture"),
        ("2.png", PNG),
        ("2.txt", b"caf\xe9"),
        ("3.png", PNG),
        ("3.json", "["),
        ("../4.png", PNG),
        ("5.png", PNG),
        ("5.txt", "good"),
        ("55.txt", "its picture may be lost"),
        ("6.png", PNG * 1000),
        ("6.txt", "lost"),
    )
    path.write_bytes(path.read_bytes()[:-20_000])
    found = listed(tmp_path)
    assert [item.captions[0][0] for item in found.items] == ["good"]
    reasons = {entry.name: entry.reason for entry in found.skipped}
    assert reasons["a.tar/0"] == "no caption: neither .txt nor .json"
    assert reasons["a.tar/1"] == "no picture with this key"
    assert reasons["a.tar/2"] == "caption 2.txt is not UTF-8 (byte 3)"
    assert reasons["a.tar/3"] == "caption 3.json is not JSON"
    assert "not a plain relative path" in reasons["a.tar/'../4.png'"]
    assert "cut short" in reasons["a.tar"]
    assert "what follows is left out" in reasons["a.tar"]


def test_a_tar_that_changed_is_another_source(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", ("0.png", PNG), ("0.txt", "one"))
    before = [unit.digest for unit in open_source(SourceOptions(source=str(tmp_path))).units()]
    write(path, ("0.png", PNG), ("0.txt", "two"))
    assert [unit.digest for unit in open_source(SourceOptions(source=str(tmp_path))).units()] != before


def test_dots_in_keys(tmp_path: Path) -> None:
    write(
        tmp_path / "a.tar",
        ("0.jpg", JPG),
        ("0.txt", "plain"),
        ("img.v1.jpg", JPG),
        ("img.v1.txt", "one"),
        ("img.v2.jpg", JPG),
        ("img.v2.TXT", "two"),
        ("x.depth.png", PNG),
        ("x.jpg", JPG),
        ("x.seg.png", PNG),
        ("x.txt", "with parts"),
        ("y.1.jpg", JPG),
    )
    found = listed(tmp_path)
    assert {item.name: item.captions[0][0] for item in found.items} == {
        "a.tar/0.jpg": "plain",
        "a.tar/img.v1.jpg": "one",
        "a.tar/img.v2.jpg": "two",
        "a.tar/x.jpg": "with parts",
    }
    assert {entry.name for entry in found.skipped} == {"a.tar/*.depth.png", "a.tar/*.seg.png", "a.tar/y.1"}


def test_many_keys_that_differ_after_their_first_dot(tmp_path: Path) -> None:
    members = [(f"photo.{n:04d}.{end}", JPG if end == "jpg" else str(n)) for n in range(300) for end in ("jpg", "txt")]
    write(tmp_path / "a.tar", *members)
    assert [item.captions[0][0] for item in listed(tmp_path).items] == [str(number) for number in range(300)]


def test_pictures_with_a_class_only(tmp_path: Path) -> None:
    write(
        tmp_path / "a.tar",
        ("0.jpg", JPG),
        ("0.cls", "1"),
        ("1.jpg", JPG),
        ("1.cls", "7"),
        ("2.jpg", JPG),
        ("2.cls", "cat"),
    )
    found = listed(tmp_path)
    assert [(item.captions[0][0], item.label) for item in found.items] == [("class 1", 1), ("class 7", 7)]
    assert [entry.name for entry in found.skipped] == ["a.tar/2"]
    (tmp_path / "classnames.txt").write_text("tench\ngoldfish\n")
    assert [item.captions[0][0] for item in listed(tmp_path).items] == ["goldfish", "class 7"]


def test_caption_files_and_pictures_of_other_kinds(tmp_path: Path) -> None:
    write(
        tmp_path / "a.tar", ("0.jpg", JPG), ("0.caption", "hello"), ("1.avif", b"x"), ("1.txt", "x"), ("._0.jpg", b"x")
    )
    found = listed(tmp_path)
    assert [item.captions[0][0] for item in found.items] == ["hello"]
    assert {entry.name for entry in found.skipped} == {"a.tar/1", "a.tar/._*"}


def test_pictures_beside_tars_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", ("0.png", PNG), ("0.txt", "one"))
    (tmp_path / "preview.png").write_bytes(PNG)
    found = listed(tmp_path)
    assert [item.captions[0][0] for item in found.items] == ["one"]
    assert [(entry.name, entry.beside) for entry in found.skipped] == [("preview.png", True)]


def test_labels_that_are_no_numbers_say_so_where_no_caption_is(tmp_path: Path) -> None:
    write(
        tmp_path / "a.tar",
        ("0.png", PNG),
        ("0.cls", "3.0\n"),
        ("1.png", PNG),
        ("1.cls", "cat"),
        ("2.png", PNG),
        ("2.cls", "9" * 70),
        ("3.png", PNG),
        ("3.cls", "cat"),
        ("3.txt", "a cat"),
    )
    found = listed(tmp_path)
    assert [(item.captions[0][0], item.label) for item in found.items] == [("class 3", 3), ("a cat", -1)]
    assert [tuple(entry[:2]) for entry in found.skipped] == [
        ("a.tar/1", "no caption, and its label 'cat' is not a whole number"),
        ("a.tar/2", "no caption, and its label '?' is not a whole number"),
    ]


def test_class_names_that_are_not_utf8_are_one_line(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", ("0.png", PNG), ("0.cls", "0"))
    (tmp_path / "classnames.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"classnames.txt: not UTF-8 text \(byte 3\); save it as UTF-8"):
        listed(tmp_path)


def test_saliency_maps_are_taken_where_they_are_asked_for(tmp_path: Path) -> None:
    write(
        tmp_path / "a.tar",
        ("0.jpg", JPG),
        ("0.saliency.png", PNG),
        ("0.txt", "with a map"),
        ("1.jpg", JPG),
        ("1.txt", "without"),
    )
    plain, source = (open_source(SourceOptions(source=str(tmp_path), saliency_maps=maps)) for maps in (False, True))
    found = listing(source)
    marked, unmarked = found.items
    assert marked.saliency is not None
    assert unmarked.saliency is None
    assert source.read(replace(marked, image=marked.saliency)) == PNG
    assert source.read(marked) == JPG
    assert not found.skipped
    unused = listing(plain)
    assert unused.items == [replace(item, saliency=None) for item in found.items]
    assert [(entry.name, entry.reason, entry.beside) for entry in unused.skipped] == [
        ("a.tar/*.saliency.*", "saliency maps (1), which --saliency supplied takes", True)
    ]


def test_what_macos_adds_is_no_sample(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", ("0.jpg", JPG), ("._0.jpg", b"\0\5\x16\7"), ("0.txt", "a"), ("._0.txt", b"\0\5"))
    (tmp_path / "._a.tar").write_bytes(b"\0\5\x16\7")
    found = listed(tmp_path)
    assert [item.captions for item in found.items] == [(("a", 1.0),)]
    assert [(entry.name, entry.beside) for entry in found.skipped] == [("a.tar/._*", True)]


def splits(path: Path) -> set[tuple[str, str]]:
    """Return the tar and the split of every sample."""
    return {(item.image.file, item.split) for item in listed(path).items}


def test_exactly_the_tars_of_a_held_out_folder_are_held_out(tmp_path: Path) -> None:
    members = [(f"{number:02}.{kind}", b"x") for number in range(30) for kind in ("png", "txt")]
    for folder in ("train", "deep/val"):
        (tmp_path / "set" / folder).mkdir(parents=True)
        write(tmp_path / "set" / folder / "a.tar", *members)
    source = open_source(SourceOptions(source=str(tmp_path / "set")))
    before = source_identity(source, source.units())[0]
    drawn = "407a803b1d7274c81c0e2e0cfccb7971b9a7695a2c363d54dd63d8e9128616a2"  # of the version before such folders
    assert before["sha256"] == drawn
    assert len(splits(tmp_path / "set")) == 4
    (tmp_path / "set" / "val").mkdir()
    write(tmp_path / "set" / "val" / "b.tar", *members)
    assert splits(tmp_path / "set") == {
        ("train/a.tar", "train"),
        ("deep/val/a.tar", "train"),
        ("val/b.tar", "unseen"),
    }
    source = open_source(SourceOptions(source=str(tmp_path / "set")))
    digests = source_identity(source, source.units())[1]
    (tmp_path / "set" / "val").rename(tmp_path / "set" / "other")
    source = open_source(SourceOptions(source=str(tmp_path / "set")))
    assert not set(digests) & set(source_identity(source, source.units())[1]), "another split is another listing"
