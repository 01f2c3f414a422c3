"""Tars from untrusted places, listed without trusting them.

Only headers are read, one block at a time, so that no header can make us read more than itself; contents are read
later by offset. Python's `tarfile` is not used: it allocates the sizes that the file states.
"""

import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_pipeline.safety import CAPS, Caps
from data_pipeline.sources.files import LOCAL, Files
from sharpmoe.errors import DamageError, DataError

_BLOCK = 512
_LONG = 1 << 16  # bytes of a long name or of pax records; Linux paths end at 4096
_REGULAR, _FOLDER = frozenset({b"0", b"\0", b"7"}), b"5"
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"PK\x03\x04": "zip",
}
_OPEN = 64  # samples with dots in their keys that may lie between members of one sample
_PAX = re.compile(rb"(\d{1,6}) ([^=\n]{1,100})=")


class Member(NamedTuple):
    """One regular file in a tar, not yet read."""

    key: str  # path up to the first dot of the file's name, as WebDataset has it; up to the last where that is known
    suffix: str  # what follows that dot, in lower case: `jpg`, `seg.png`
    offset: int  # of its content in the tar
    size: int


class Refusal(NamedTuple):
    """One member that is left out, and why."""

    name: str
    reason: str


class TarSample(NamedTuple):
    """Consecutive members with the same key."""

    key: str
    members: dict[str, Member]  # suffix -> member
    part_of: str = ""  # the neighbouring sample whose key is the part of this one before the first dot; "": none


class _Entry(NamedTuple):
    name: str
    kind: bytes
    size: int
    offset: int


def samples(
    path: Path,
    suffixes: frozenset[str],
    caps: Caps = CAPS,
    ignored: Callable[[str], object] = lambda name: None,
    files: Files = LOCAL,
) -> Iterator[TarSample | Refusal]:
    """Yield the samples of a tar in its order, as `members` lists them; one above `caps.sample` bytes is refused.

    WebDataset ends a key at the first dot of a file's name. Names with further dots (`a.v2.jpg`, `a.v2.txt`) are
    samples of their own; while they are neighbours of members of the key `a`, they name it in `part_of`.

    Raises DamageError where the tar is cut short or damaged, DataError where it is compressed.
    """
    base, plain, dotted = "", _Growing(""), deque()  # type: str, _Growing, deque[_Growing]
    for member in members(path, suffixes, caps, ignored, files):
        if isinstance(member, Refusal):
            yield member
            continue
        if _base(member.key) != base:
            yield from _closed(plain, dotted, caps)
            base = _base(member.key)
            plain, dotted = _Growing(base), deque()
        sample = plain if member.key == base else _dotted(member.key, dotted)
        if member.suffix in sample.members:
            yield Refusal(f"{member.key}.{member.suffix}", "its sample has a member of that name already")
            continue
        sample.members[member.suffix] = member
        if len(dotted) > _OPEN:
            yield _complete(dotted.popleft(), plain, caps)
    yield from _closed(plain, dotted, caps)


class _Growing:
    """A sample to which members are still added."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.members: dict[str, Member] = {}


def _base(key: str) -> str:
    """Return a key up to the first dot of its file name."""
    folder, slash, name = key.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _dotted(key: str, dotted: deque[_Growing]) -> _Growing:
    found = next((sample for sample in dotted if sample.key == key), None)
    if found is None:
        found = _Growing(key)
        dotted.append(found)
    return found


def _closed(plain: _Growing, dotted: deque[_Growing], caps: Caps) -> Iterator[TarSample | Refusal]:
    for sample in (plain, *dotted):
        if sample.members:
            yield _complete(sample, plain, caps)


def _complete(sample: _Growing, plain: _Growing, caps: Caps) -> TarSample | Refusal:
    size = sum(member.size for member in sample.members.values())
    if size > caps.sample:
        return Refusal(sample.key, f"{size} bytes in all, at most {caps.sample} are read of one sample")
    return TarSample(sample.key, sample.members, plain.key if sample is not plain and plain.members else "")


def members(
    path: Path,
    suffixes: frozenset[str],
    caps: Caps = CAPS,
    ignored: Callable[[str], object] = lambda name: None,
    files: Files = LOCAL,
) -> Iterator[Member | Refusal]:
    """Yield regular members with a suffix in `suffixes`; links, devices, `..` and too large ones are refused.

    Folders are ignored, and so are members of other suffixes (a set may hold what we do not use): `ignored` is called
    with their names. Raises DamageError where the tar is cut short or a header is damaged, DataError where it is
    compressed.
    """
    with files.open(path) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(0)
        _refuse_compressed(path, file)
        for entry in _entries(path, file, end):
            judged = _judge(entry, suffixes, caps)
            if judged is not None:
                yield judged
            elif entry.kind != _FOLDER:
                ignored(entry.name)


def read_member(path: Path, member: Member, files: Files = LOCAL) -> bytes:
    """Read the content of a member. Raises DamageError where the tar ends before it does."""
    content = files.read(path, member.offset, member.size)
    if len(content) != member.size:
        raise DamageError(f"{path}: ends inside {member.key}.{member.suffix}")
    return content


def _judge(entry: _Entry, suffixes: frozenset[str], caps: Caps) -> Member | Refusal | None:
    shown = entry.name[:120]
    if entry.kind == _FOLDER:
        return None
    if entry.kind not in _REGULAR:
        return Refusal(shown, f"{_KINDS.get(entry.kind, 'not a regular file')}; only regular files are read")
    path = entry.name.removeprefix("./")
    parts = path.split("/")
    if not path.isprintable() or "\\" in path or any(part in ("", ".", "..") for part in parts):
        return Refusal(repr(shown), "its name is not a plain relative path")
    stem, dot, suffix = parts[-1].partition(".")
    if suffix.lower() not in suffixes:
        stem, dot, suffix = parts[-1].rpartition(".")
    if not stem or not dot or suffix.lower() not in suffixes or parts[-1].startswith("."):
        return None
    if entry.size > caps.member:
        return Refusal(shown, f"{entry.size} bytes, at most {caps.member} are read")
    return Member("/".join([*parts[:-1], stem]), suffix.lower(), entry.offset, entry.size)


def _refuse_compressed(path: Path, file: BinaryIO) -> None:
    start = file.read(8)
    file.seek(0)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(f"{path}: compressed ({name}); expand it to a plain .tar first: members are read by offset")


def _entries(path: Path, file: BinaryIO, end: int) -> Iterator[_Entry]:
    """Yield members, with the names and sizes that long-name and pax headers before them state."""
    offset, name, size = 0, None, None  # type: int, str | None, int | None
    while offset + _BLOCK <= end:
        file.seek(offset)
        header = file.read(_BLOCK)
        if not header.strip(b"\0"):
            return  # the end mark
        entry = _parse(path, header, offset)
        content = entry.offset
        if entry.kind in (b"L", b"x"):
            text = _extra(path, file, entry)
            long_name, long_size = (_c_string(text), None) if entry.kind == b"L" else _pax(text)
            name, size = long_name or name, size if long_size is None else long_size
        elif entry.kind not in (b"g", b"K"):  # a comment for the whole tar, a link's long target
            entry = entry._replace(name=name or entry.name, size=entry.size if size is None else size)
            if content + entry.size > end:
                raise DamageError(f"{path}: cut short: it ends inside {entry.name[:120]}")
            yield entry
            name = size = None
        offset = content + -(-entry.size // _BLOCK) * _BLOCK
    raise DamageError(f"{path}: cut short: the end mark of a tar is missing")


def _parse(path: Path, header: bytes, offset: int) -> _Entry:
    """Parse one ustar, GNU or old header, after a check of its checksum."""
    stated = _number(header[148:156])
    if stated is None or stated != sum(header) - sum(header[148:156]) + 8 * 32:
        raise DamageError(f"{path}: not a tar, or damaged: no valid header at byte {offset}")
    size = _number(header[124:136])
    if size is None:
        raise DamageError(f"{path}: damaged: no valid size in the header at byte {offset}")
    name = _c_string(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:
        name = f"{_c_string(header[345:500])}/{name}"
    return _Entry(name, header[156:157], size, offset + _BLOCK)


def _extra(path: Path, file: BinaryIO, entry: _Entry) -> bytes:
    if entry.size > _LONG:
        raise DamageError(f"{path}: a header of {entry.size} bytes at byte {entry.offset}, at most {_LONG} are read")
    return file.read(entry.size)


def _pax(text: bytes) -> tuple[str | None, int | None]:
    r"""Return the path and size in pax records `LENGTH KEY=VALUE\n`; other keys are ignored."""
    fields: dict[bytes, bytes] = {}
    place = 0
    while match := _PAX.match(text, place):
        stop = place + int(match.group(1))
        if stop <= match.end():
            break
        fields[match.group(2)] = text[match.end() : stop - 1]
        place = stop
    name, size = fields.get(b"path"), fields.get(b"size", b"")
    stated = int(size[:20]) if size.isdigit() else None  # Python refuses to read numbers of thousands of digits
    return (None if name is None else name.decode(errors="replace")), stated


def _number(field: bytes) -> int | None:
    """Parse octal digits, or GNU's base 256 for sizes from 8 GiB; None for anything else."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    return int(digits, 8) if digits and all(digit in b"01234567" for digit in digits) else None


def _c_string(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(errors="replace")
