"""Checks of data from untrusted places: names, locations and sizes."""

import os
import re
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

from sharpmoe.errors import DamageError, DataError

SCHEMES = frozenset({"http", "https", "s3", "gs"})
LFS_POINTER = b"version https://git-lfs"  # start of what Git LFS leaves where a file has not been fetched
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
_KEY = re.compile(r"[A-Za-z0-9_-]{1,200}")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+-]*):")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SECRET = re.compile(r"\b([A-Za-z][A-Za-z0-9+-]*://)([^\s'\"<>]*)")


class Caps(NamedTuple):
    """How much is read into memory at most, in bytes."""

    member: int = 64 << 20  # of one tar member
    sample: int = 256 << 20  # of all members of one sample
    small: int = 256 << 20  # of an index or a shard's table


CAPS = Caps()


def check_name(name: str) -> str:
    """Return a file's name inside a folder of shards. Raises DataError for paths, `..` and hidden files."""
    if not _NAME.fullmatch(name):
        raise DataError(f"file name {name[:80]!r}: expected letters, digits, dot, - and _ only")
    return name


def check_key(key: str) -> str:
    """Return a sample's key: letters, digits, - and _, so that no key is a path. Raises DamageError for any other."""
    if not _KEY.fullmatch(key):
        raise DamageError(f"key {key[:80]!r}: expected 1 to 200 letters, digits, - and _")
    return key


def scheme_of(location: str) -> str | None:
    """Return the scheme of a URL in lower case, None for a local path. Raises DataError for a scheme not in SCHEMES."""
    match = _SCHEME.match(location)
    if match is None:
        return None
    scheme = match.group(1).lower()
    if scheme not in SCHEMES or not location[match.end() :].startswith("//"):
        raise DataError(
            f"{redact(location)[:120]}: scheme {scheme!r} is not allowed; expected a folder, or a URL of "
            f"{', '.join(sorted(SCHEMES))} (write ./ before a folder with a colon in its name)"
        )
    return scheme


def expand(location: str) -> str:
    """Replace ${NAME} in a URL by environment variables, so that configurations need no credentials.

    Raises DataError where a variable is not set.
    """
    missing = [name for name in _VARIABLE.findall(location) if name not in os.environ]
    if missing:
        raise DataError(f"{redact(location)}: environment variable {missing[0]} is not set; set it, or correct the URL")
    return _VARIABLE.sub(lambda match: os.environ[match.group(1)], location)


def has_secret(location: str) -> bool:
    """Return whether a URL holds a password, token or query other than ${NAME}; configurations are logged."""
    if scheme_of(location) is None:
        return False
    parts = urlsplit(_VARIABLE.sub("", location))
    user, colon, password = parts.netloc.rpartition("@")[0].partition(":")
    values = [part for part in parts.query.split("&") if part and not part.endswith("=")]
    return bool(password or values or (user and not colon))  # a user without password is a token


def redact(text: str) -> str:
    """Remove user, password, query and fragment from every URL in a text: they may hold credentials."""
    return _SECRET.sub(lambda match: match.group(1) + _plain(match.group(1), match.group(2)), text)


def _plain(scheme: str, rest: str) -> str:
    try:
        parts = urlsplit(scheme + rest)
        kept = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    except ValueError:
        return "..."
    return kept[len(scheme) :]
