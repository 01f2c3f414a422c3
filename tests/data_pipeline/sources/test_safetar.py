"""Tars of others: what tarfile writes is listed alike, and no header makes us read, follow or believe."""

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.safety import Caps
from data_pipeline.sources import safetar
from data_pipeline.sources.safetar import Member, Refusal, TarSample
from sharpmoe.errors import DamageError, DataError

SUFFIXES = frozenset({"jpg", "txt", "json", "seg.png"})


def _tar(path: Path, files: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def _special(path: Path, **fields: object) -> Path:
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        for name, value in fields.items():
            setattr(info, name, value)
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    return path


NAMES = st.text("abcd", min_size=1, max_size=80)


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(st.builds("{}/{}.txt".format, NAMES, NAMES), st.binary(max_size=1100), max_size=5),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_lists_what_tarfile_wrote(tmp_path_factory, files: dict[str, bytes], form: int) -> None:
    path = _tar(tmp_path_factory.mktemp("tar") / "a.tar", files, form)
    found = list(safetar.members(path, SUFFIXES))
    assert all(isinstance(member, Member) for member in found)
    assert {f"{member.key}.txt": safetar.read_member(path, member) for member in found} == files


def test_long_and_foreign_names_of_both_dialects(tmp_path: Path) -> None:
    name = "深い/" + "x" * 300 + ".txt"
    for number, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        path = _tar(tmp_path / f"{number}.tar", {name: b"a", "b.txt": b"b"}, form)
        assert [member.key for member in safetar.members(path, SUFFIXES)] == [name[:-4], "b"]


def test_samples_are_neighbours_of_one_key(tmp_path: Path) -> None:
    files = {"d/a.jpg": b"1", "d/a.TXT": b"2", "d/a.cls": b"3", "d/a.seg.png": b"4", "e/a.jpg": b"5", "e/a.jpg ": b""}
    found = list(safetar.samples(_tar(tmp_path / "a.tar", files), SUFFIXES))
    assert [(sample.key, sorted(sample.members)) for sample in found if isinstance(sample, TarSample)] == [
        ("d/a", ["jpg", "seg.png", "txt"]),
        ("e/a", ["jpg"]),
    ]
    twice = _tar(tmp_path / "b.tar", {"a.jpg": b"1", "a.JPG": b"2"})
    assert [type(found) for found in safetar.samples(twice, SUFFIXES)] == [Refusal, TarSample]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "symbolic link"),
        ({"type": tarfile.LNKTYPE, "linkname": "b.jpg"}, "hard link"),
        ({"type": tarfile.CHRTYPE}, "device"),
        ({"type": tarfile.BLKTYPE}, "device"),
        ({"type": tarfile.FIFOTYPE}, "pipe"),
        ({"type": tarfile.GNUTYPE_SPARSE}, "not a regular file"),
        ({"name": "../a.jpg"}, "not a plain relative path"),
        ({"name": "a/../../b.jpg"}, "not a plain relative path"),
        ({"name": "/etc/a.jpg"}, "not a plain relative path"),
        ({"name": "a\\b.jpg"}, "not a plain relative path"),
        ({"name": "a\x1b[2J.jpg"}, "not a plain relative path"),
        ({"size": 2000}, "2000 bytes, at most 1000"),
    ],
)
def test_refused_members(tmp_path: Path, fields: dict[str, object], reason: str) -> None:
    (found,) = safetar.members(_special(tmp_path / "a.tar", **fields), SUFFIXES, Caps(member=1000))
    assert isinstance(found, Refusal)
    assert reason in found.reason
    assert found.name.isprintable()


def test_a_sample_of_many_members_has_a_cap(tmp_path: Path) -> None:
    path = _tar(tmp_path / "a.tar", {"a.jpg": bytes(900), "a.txt": bytes(900)})
    (found,) = safetar.samples(path, SUFFIXES, Caps(member=1000, sample=1500))
    assert found == Refusal("a", "1800 bytes in all, at most 1500 are read of one sample")


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_tars_are_not_expanded(tmp_path: Path, mode: str) -> None:
    with tarfile.open(tmp_path / "a.tar", mode) as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(DataError, match="expand it to a plain .tar"):
        list(safetar.members(tmp_path / "a.tar", SUFFIXES))


@pytest.mark.parametrize("kind", [b"L", b"x"])
def test_headers_do_not_say_how_much_is_read(tmp_path: Path, kind: bytes) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = kind, 1 << 40
    (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    with pytest.raises(DamageError, match="at most 65536 are read"):
        list(safetar.members(tmp_path / "a.tar", SUFFIXES))


def test_sizes_beyond_the_file(tmp_path: Path) -> None:
    for size in (1 << 20, 1 << 40, 1 << 80):
        header = tarfile.TarInfo("a.txt")
        header.size = size
        (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
        with pytest.raises(DamageError, match="ends inside a.txt"):
            list(safetar.members(tmp_path / "a.tar", SUFFIXES))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10239), st.integers(1, 255))
def test_any_byte_may_be_wrong(tmp_path_factory, place: int, change: int) -> None:
    """Damage is an error, or a member that is listed differently; never another exception, never a read outside."""
    path = _tar(tmp_path_factory.mktemp("tar") / "a.tar", {f"{n}.txt": bytes([65 + n]) * 700 for n in range(6)})
    content = bytearray(path.read_bytes())
    content[place] ^= change
    path.write_bytes(content)
    try:
        for member in safetar.members(path, SUFFIXES):
            if isinstance(member, Member):
                assert len(safetar.read_member(path, member)) == member.size
    except DamageError:
        pass


def test_cut_tars_are_noticed_wherever_they_are_cut(tmp_path: Path) -> None:
    path = _tar(tmp_path / "a.tar", {"a.txt": b"1" * 700, "b.txt": b"2" * 700})
    content = path.read_bytes()
    end = content.rstrip(b"\0")
    for cut in [*range(0, len(end), 64), len(end) + 100]:
        (tmp_path / "b.tar").write_bytes(content[:cut])
        with pytest.raises(DamageError, match="cut short"):
            list(safetar.members(tmp_path / "b.tar", SUFFIXES))
