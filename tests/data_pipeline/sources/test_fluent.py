import base64
import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

import pytest

import data_pipeline.sources.fluent as fluent_module
from data_pipeline.sources.fluent import FluentSource
from data_pipeline.sources.items import Item
from sharpmoe.errors import DataError
from tests.fixtures_data import listing


def package(path: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> Path:
    """A tarball in the shape of the npm package, taken for the pinned one."""
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            content = name.encode()
            info = tarfile.TarInfo(f"package/assets/{name}.webp")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    monkeypatch.setattr(fluent_module, "FLUENT_SHA512", digest)
    return path


def fluent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, Item]:
    tarball = package(tmp_path / "p.tgz", monkeypatch, *names)
    return {item.key: item for item in listing(FluentSource(tmp_path, tarball)).items}


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
    assert [item.captions[0][0] for item in fluent(tmp_path, monkeypatch, name).values()] == [caption]


def test_twins_are_taken_once_and_unknown_names_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tarball = package(tmp_path / "p.tgz", monkeypatch, "0023-fe0f-20e3", "23-fe0f-20e3", "1f600", "abcdef")
    found = listing(FluentSource(tmp_path, tarball))
    assert [item.key for item in found.items] == ["23-20e3", "1f600"]
    assert [entry.name for entry in found.skipped] == ["abcdef"]


def test_a_concept_keeps_one_split_in_every_gender_and_tone() -> None:
    professions = ["1f33e", "1f373", "1f393", "1f3a4", "1f3a8", "1f3eb", "1f3ed", "1f4bb", "1f4bc", "1f527", "1f52c"]
    for job in professions:
        plain = [fluent_module._fluent_split([person, "200d", job]) for person in ("1f9d1", "1f468", "1f469")]
        toned = [fluent_module._fluent_split([person, "1f3fd", "200d", job]) for person in ("1f9d1", "1f468", "1f469")]
        assert len(set(plain)) == 1
        assert (plain[0] == "unseen") == (toned[0] == "unseen") == (toned[2] == "unseen")


def test_the_shares_of_the_splits() -> None:
    concepts = [fluent_module._fluent_split([f"{point:x}"]) for point in range(0x10000, 0x12000)]
    tones = [fluent_module._fluent_split([f"{point:x}", "1f3fd"]) for point in range(0x10000, 0x12000)]
    assert concepts.count("unseen") / len(concepts) == pytest.approx(1 / 20, abs=0.01)
    assert "unseen_tone" not in concepts
    assert tones.count("unseen_tone") / len(tones) == pytest.approx(0.95 / 10, abs=0.01)


def test_a_wrong_tarball_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.tgz").write_bytes(b"something else")
    with pytest.raises(DataError, match="sha512"):
        listing(FluentSource(tmp_path, tmp_path / "p.tgz"))
    with pytest.raises(DataError, match="no such file"):
        listing(FluentSource(tmp_path, tmp_path / "q.tgz"))


def test_npm_missing_or_failing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="install npm") as missing:
        listing(FluentSource(tmp_path / "cache"))
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\necho more >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(DataError, match=r"failed: npm error code ENOTFOUND; .*--tarball") as failed:
        listing(FluentSource(tmp_path / "cache"))
    assert "\n" not in str(missing.value) + str(failed.value)


def test_a_download_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("npm", 1)

    monkeypatch.setattr(subprocess, "run", slow)
    with pytest.raises(DataError, match="check the network"):
        listing(FluentSource(tmp_path))
