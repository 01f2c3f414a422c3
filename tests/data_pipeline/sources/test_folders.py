import json
import os
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.sources.images import UNREADABLE
from data_pipeline.sources.items import Skipped, held_out, shown, source_identity
from data_pipeline.sources.open import SourceOptions, open_source
from data_pipeline.sources.walk import held_out_folders, split_of_folder
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


def caption(path: Path, text: str = "x") -> Path:
    picture(path).with_suffix(".txt").write_text(text)
    return path


def test_linked_folders_are_taken_once_whatever_the_loop(tmp_path: Path) -> None:
    caption(tmp_path / "elsewhere" / "deep" / "b.png")
    caption(tmp_path / "set" / "real" / "a.png")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "again").symlink_to(tmp_path / "set" / "real")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "lost").symlink_to("/nowhere")
    (tmp_path / "set" / "lost.png").symlink_to("/nowhere/x.png")
    found = listed(tmp_path / "set")
    assert [item.name for item in found.items] == ["real/a.png", "linked/deep/b.png"]
    assert {entry.name: entry.reason for entry in found.skipped} == {
        "again": "a link to real, which is taken already",
        "linked/loop": "a link to ., which is taken already",
        "lost": "a link that leads nowhere",
        "lost.png": "a link that leads nowhere",
    }


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caption(tmp_path / "a.png")
    caption(tmp_path / "closed" / "b.png")
    scan = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = listed(tmp_path)
    assert [item.name for item in found.items] == ["a.png"]
    assert found.skipped == [Skipped("closed", "folder cannot be read (Permission denied)", beside=True)]


def test_captions_of_all_spellings(tmp_path: Path) -> None:
    for number, ending in enumerate((".TXT", ".caption", ".Caption", ".png.txt", ".JSON")):
        picture(tmp_path / f"{number}.png")
        text = '{"caption": "c"}' if ending == ".JSON" else "c"
        (tmp_path / f"{number}{ending}").write_text(text)
    assert list(texts(tmp_path).values()) == ["c"] * 5


def test_what_is_no_picture_is_counted(tmp_path: Path) -> None:
    caption(tmp_path / "a.png")
    (tmp_path / "orphan.txt").write_text("no picture")
    for name in ("x.ogg", "y.OGG", "LICENSE", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"")
    found = listed(tmp_path)
    assert {entry.name: entry.reason.split(";")[0] for entry in found.skipped} == {
        "orphan.txt": "a caption without a picture of its name",
        "*.ogg": "2 files of a kind that is not taken",
        "(names without suffix)": "1 file of a kind that is not taken",
    }
    assert all(entry.beside for entry in found.skipped)


def test_what_lies_beside_the_pictures_does_not_change_the_identity(tmp_path: Path) -> None:
    def found() -> object:
        source = open_source(SourceOptions(source=str(tmp_path)))
        return source_identity(source, source.units())[0]

    caption(tmp_path / "a.png")
    before = found()
    (tmp_path / "orphan.txt").write_text("no picture")
    (tmp_path / "backup.tar").write_bytes(b"")
    assert found() == before
    caption(tmp_path / "b.png")
    assert found() != before


@pytest.mark.parametrize("text", [b"a\0 \0c\0a\0t\0", b"bell \x07", b"\x1b[31m red", b"\xff\xfea\0"])
def test_captions_with_control_characters_are_left_out(text: bytes, tmp_path: Path) -> None:
    caption(tmp_path / "a.png")
    caption(tmp_path / "b.png").with_suffix(".txt").write_bytes(text)
    caption(tmp_path / "c.png", "tab\tand\r\nline")
    found = listed(tmp_path)
    assert [item.name for item in found.items] == ["a.png", "c.png"]
    assert found.skipped[0].name == "b.png"
    assert found.skipped[0].reason.startswith("caption b.txt")


def test_a_folder_without_captions_says_what_it_saw(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"no captioned image found \(a.png: no caption in a.txt\); expected"):
        listed(tmp_path)


def test_caption_files_that_have_no_end_are_left_out(tmp_path: Path) -> None:
    picture(tmp_path / "good.png").with_suffix(".txt").write_text("good")
    os.mkfifo(picture(tmp_path / "pipe.png").with_suffix(".txt"))  # reading it would wait forever
    with picture(tmp_path / "huge.png").with_suffix(".txt").open("wb") as file:
        file.truncate(6 << 30)
    found = listed(tmp_path)
    assert [item.name for item in found.items] == ["good.png"]
    assert dict(entry[:2] for entry in found.skipped) == {
        "huge.png": f"caption huge.txt has {6 << 30} bytes, at most {16 << 20} are read",
        "pipe.png": "caption pipe.txt is not a regular file",
    }


@pytest.mark.parametrize("weight", ["1e400", "9" * 400, "-1", "NaN"])
def test_weights_that_are_no_numbers_leave_their_picture_out(weight: str, tmp_path: Path) -> None:
    picture(tmp_path / "good.png").with_suffix(".txt").write_text("good")
    fields = f'{{"captions": [{{"text": "a", "weight": {weight}}}]}}'
    picture(tmp_path / "bad.png").with_suffix(".json").write_text(fields)
    ((name, reason, *_),) = listed(tmp_path).skipped
    assert name == "bad.png"
    assert reason.startswith("caption bad.json: weight ")


def test_a_folder_with_an_archive_alone_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "set.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"no captioned image found \(\*.gz: 1 file .*; expand archives to a folder"):
        listed(tmp_path)


def test_names_are_shown_on_one_line() -> None:
    assert shown("a\nb\x1b[2J\udce9 \u00e9.png") == "a\\nb\\x1b[2J\\udce9 \u00e9.png"


def test_a_picture_of_gigabytes_is_never_read(tmp_path: Path) -> None:
    with picture(tmp_path / "huge.png").open("wb") as file:
        file.truncate(20 << 30)
    (tmp_path / "huge.txt").write_text("huge")
    source = open_source(SourceOptions(source=str(tmp_path)))
    (item,) = listing(source).items
    with pytest.raises(UNREADABLE, match=f"{20 << 30} bytes, at most {1 << 30} are read"):
        source.read(item)


def test_what_macos_adds_is_counted_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "__MACOSX").mkdir()
    for name in ("a.jpg", "a.txt", "a.saliency.png"):
        for path in (tmp_path / f"._{name}", tmp_path / "__MACOSX" / f"._{name}"):
            path.write_bytes(b"\0\5\x16\7")
    (tmp_path / ".DS_Store").write_bytes(b"")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("a picture")
    for maps in (False, True):
        found = listing(open_source(SourceOptions(source=str(tmp_path), saliency_maps=maps)))
        assert [item.name for item in found.items] == ["a.jpg"]
        assert [(entry.name, entry.reason, entry.beside) for entry in found.skipped] == [
            ("._*", "files that macOS writes beside others (6)", True)
        ]


def splits(path: Path, maps: bool = False) -> dict[str, str]:
    found = listing(open_source(SourceOptions(source=str(path), saliency_maps=maps))).items
    return {item.name: item.split for item in found}


@pytest.mark.parametrize("name", ["val", "validation", "valid", "test", "Val"])
def test_exactly_the_pictures_of_a_held_out_folder_are_held_out(name: str, tmp_path: Path) -> None:
    drawn = [f"{number}.png" for number in range(40)]
    assert "unseen" in map(held_out, drawn)
    for file in (*drawn, "train/a.png", "deep/val/b.png"):
        caption(tmp_path / file)
    before = identity(tmp_path)
    for file in (f"{name}/c.png", f"{name}/deep/d.png"):
        caption(tmp_path / file)
    found = splits(tmp_path)
    assert {file for file, split in found.items() if split == "unseen"} == {f"{name}/c.png", f"{name}/deep/d.png"}
    assert set(found.values()) == {"train", "unseen"}
    assert identity(tmp_path) != before


def test_held_out_pictures_keep_their_maps(tmp_path: Path) -> None:
    for file in ("a.png", "b.png", "val/c.png", "val/d.png"):
        caption(tmp_path / file)
    for file in ("a.saliency.png", "val/c.saliency.png"):
        picture(tmp_path / file)
    found = listing(open_source(SourceOptions(source=str(tmp_path), saliency_maps=True))).items
    assert [(item.name, item.split, item.saliency and item.saliency.file) for item in found] == [
        ("a.png", "train", "a.saliency.png"),
        ("b.png", "train", None),
        ("val/c.png", "unseen", "val/c.saliency.png"),
        ("val/d.png", "unseen", None),
    ]


def test_a_linked_folder_is_held_out_and_one_without_captions_holds_out_nothing(tmp_path: Path) -> None:
    for number in range(40):
        caption(tmp_path / "set" / f"{number}.png")
    drawn = splits(tmp_path / "set")
    picture(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "set" / "val").symlink_to(tmp_path / "elsewhere")
    assert splits(tmp_path / "set") == drawn
    caption(tmp_path / "elsewhere" / "b.png")
    assert {file for file, split in splits(tmp_path / "set").items() if split == "unseen"} == {"val/b.png"}


def drawn_folder(folder: Path) -> Path:
    """Make 60 pictures without a held-out folder at the top, every third with a map."""
    for number in range(60):
        path = folder / ("train" if number % 2 else "deep/val") / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        path.with_suffix(".txt").write_text(f"picture {number}")
        if number % 3 == 0:
            path.with_suffix(".saliency.png").write_bytes(b"x")
    return folder


@pytest.mark.parametrize(("maps", "sha256"), [(False, "f5836391da34eea1"), (True, "7a7beb644740c43f")])
def test_a_folder_without_held_out_folder_is_the_source_that_it_was(maps: bool, sha256: str, tmp_path: Path) -> None:
    """The numbers are of the version before held-out folders: its shards go on, with the same pictures held out."""
    folder = drawn_folder(tmp_path / "set")
    source = open_source(SourceOptions(source=str(folder), saliency_maps=maps))
    assert str(source_identity(source, source.units())[0]["sha256"]).startswith(sha256)
    unseen = [file for file, split in splits(folder, maps).items() if split == "unseen"]
    assert unseen == ["deep/val/42.png", "train/11.png"]


def test_folders_of_held_out_images_and_links_to_them(tmp_path: Path) -> None:
    for name in ("Val", "train/val", "pool", "tests", "x"):
        (tmp_path / "set" / name).mkdir(parents=True)
    (tmp_path / "set" / "validation").symlink_to(tmp_path / "set" / "pool")
    found = held_out_folders(tmp_path / "set")
    assert [path.name for path in found] == ["Val", "validation"]
    apart = [path.resolve() for path in found]
    splits = {
        "Val/a.png": "unseen",
        "Val/deep/a.png": "unseen",
        "x/../Val/a.png": "unseen",
        "pool/a.png": "unseen",  # by its other name it is below validation/
        "validation/a.png": "unseen",
        "train/val/a.png": "train",
        "tests/a.png": "train",
        "../val/a.png": "train",
        "a.png": "train",
    }
    assert {path: split_of_folder(tmp_path / "set" / path, apart) for path in splits} == splits


def test_a_link_to_pictures_of_the_source_holds_them_out(tmp_path: Path) -> None:
    for number in range(40):
        caption(tmp_path / "set" / f"{number}.png")
    for name in "ab":
        caption(tmp_path / "set" / "pool" / f"{name}.png")
    (tmp_path / "set" / "val").symlink_to(tmp_path / "set" / "pool")
    found = splits(tmp_path / "set")
    assert {file for file, split in found.items() if split == "unseen"} == {"pool/a.png", "pool/b.png"}
    assert len(found) == 42
