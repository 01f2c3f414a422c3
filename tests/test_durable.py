"""A file is absent, old or complete, whatever ends its writer; nothing is left beside it."""

import errno
import os
from pathlib import Path

import pytest

from sharpmoe import durable


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("content", [b"new", "new", lambda path: path.write_bytes(b"new")])
def test_a_file_is_replaced_by_bytes_text_or_a_writer(content: durable.Content, tmp_path: Path) -> None:
    path = tmp_path / "made" / "file"
    for _ in range(2):
        durable.write_atomically(path, content)
        assert path.read_bytes() == b"new"
        assert names(path.parent) == ["file"]


def test_a_writer_that_fails_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(draft: Path) -> None:
        draft.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        durable.write_atomically(path, fail)
    with pytest.raises(KeyboardInterrupt):
        durable.publish_once(tmp_path / "other", fail)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("links", [True, False])
def test_the_first_writer_wins(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"

    def overtaken(draft: Path) -> None:
        draft.write_text("second")
        path.write_text("first")

    if not links:

        def refuse(*_: object) -> None:
            raise OSError("no hard links")

        monkeypatch.setattr(os, "link", refuse)
        durable.publish_once(path, "first")
    else:
        durable.publish_once(path, overtaken)
    durable.publish_once(path, "third")
    assert path.read_text() == "first"
    assert names(tmp_path) == ["file"]


def test_drafts_of_killed_writers_are_removed(tmp_path: Path) -> None:
    for name in (".a[1].host-1.tmp", ".b.host-1.tmp", "c.tmp", ".d"):
        (tmp_path / name).touch()
    durable.remove_drafts(tmp_path, "a[1]")
    assert names(tmp_path) == [".b.host-1.tmp", ".d", "c.tmp"]
    durable.remove_drafts(tmp_path)
    assert names(tmp_path) == [".d", "c.tmp"]


def test_sha256_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "abc").write_text("abc")
    assert durable.sha256_of(tmp_path / "abc").startswith("ba7816bf8f01cfea")  # FIPS 180-2, appendix B.1


def test_a_folder_in_the_place_of_a_file_is_named_before_anything_is_written(tmp_path: Path) -> None:
    written: list[Path] = []
    with pytest.raises(IsADirectoryError) as caught:
        durable.write_atomically(tmp_path, written.append)
    assert (caught.value.filename, written) == (str(tmp_path), [])


def test_an_error_names_the_file_and_not_its_draft(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def full(draft: Path) -> None:
        raise OSError(28, "No space left on device", str(draft))

    with pytest.raises(OSError, match="No space left") as caught:
        durable.write_atomically(path, full)
    assert caught.value.filename == str(path)


def test_a_folder_is_checked_without_being_made(tmp_path: Path) -> None:
    durable.check_folder(tmp_path / "a" / "b")
    assert names(tmp_path) == []
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(NotADirectoryError) as caught:
            durable.check_folder(wrong)
        assert caught.value.filename == str(tmp_path / "file")


def test_a_folder_mounted_for_reading_is_not_called_one_without_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable.os, "access", lambda *_: False)
    with pytest.raises(PermissionError):
        durable.check_folder(tmp_path / "new")
    real = os.statvfs(tmp_path)
    reading = os.statvfs_result([*real[:8], real.f_flag | os.ST_RDONLY, real.f_namemax])
    monkeypatch.setattr(durable.os, "statvfs", lambda _: reading)
    for act in (lambda: durable.check_folder(tmp_path / "new"), lambda: durable.write_atomically(tmp_path / "x", b"x")):
        with pytest.raises(OSError, match="Read-only file system") as caught:
            act()
        assert (caught.value.errno, caught.value.filename) == (errno.EROFS, str(tmp_path))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), RuntimeError("I/O error: full (os error 28)")])
def test_a_full_disk_is_reported_with_the_file(error: Exception, tmp_path: Path) -> None:
    def write(draft: Path) -> None:
        draft.write_bytes(b"half")
        raise error

    with pytest.raises(OSError, match="No space left|full") as caught:
        durable.write_atomically(tmp_path / "a", write)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a"))
    assert list(tmp_path.iterdir()) == []
