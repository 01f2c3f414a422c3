"""What is believed of data that somebody else may have written: names, places and sizes, and nothing beyond them."""

import os
import re
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

from sharpmoe.errors import DamageError, DataError

SCHEMES = frozenset({"http", "https", "s3", "gs"})
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
_KEY = re.compile(r"[A-Za-z0-9_-]{1,200}")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+-]*):")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SECRET = re.compile(r"\b([A-Za-z][A-Za-z0-9+-]*://)([^\s'\"<>]*)")


class Caps(NamedTuple):
    """How much of anything is read into memory, in bytes."""

    member: int = 64 << 20  # of one tar member
    sample: int = 256 << 20  # of all members of one sample
    small: int = 256 << 20  # of an index or a shard's table


CAPS = Caps()


def check_name(name: str) -> str:
    """A file's name inside a folder of shards: one plain component; DataError for paths, `..` and hidden files."""
    if not _NAME.fullmatch(name):
        raise DataError(f"file name {name[:80]!r}: expected letters, digits, dot, - and _ only; the index is not ours")
    return name


def check_key(key: str) -> str:
    """A sample's key: letters, digits, - and _, so that no key is ever a path; DamageError otherwise."""
    if not _KEY.fullmatch(key):
        raise DamageError(f"key {key[:80]!r}: expected 1 to 200 letters, digits, - and _")
    return key


def scheme_of(location: str) -> str | None:
    """The scheme of a URL in lower case, None for a local path; DataError for a scheme outside the allow-list."""
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
    """A URL with ${NAME} filled in from the environment, so that no credential need be written down.

    Raises DataError where a variable is not set.
    """
    missing = [name for name in _VARIABLE.findall(location) if name not in os.environ]
    if missing:
        raise DataError(f"{redact(location)}: environment variable {missing[0]} is not set; set it, or mend the URL")
    return _VARIABLE.sub(lambda match: os.environ[match.group(1)], location)


def has_secret(location: str) -> bool:
    """Whether a URL holds a user, password or query other than by ${NAME}; a configuration is copied and logged."""
    if scheme_of(location) is None:
        return False
    parts = urlsplit(_VARIABLE.sub("", location))
    user, colon, password = parts.netloc.rpartition("@")[0].partition(":")
    values = [part for part in parts.query.split("&") if part and not part.endswith("=")]
    return bool(password or values or (user and not colon))  # a user without password is a token


def redact(text: str) -> str:
    """`text` with user, password, query and fragment of every URL in it left out: those hold credentials."""
    return _SECRET.sub(lambda match: match.group(1) + _plain(match.group(1), match.group(2)), text)


def _plain(scheme: str, rest: str) -> str:
    try:
        parts = urlsplit(scheme + rest)
        kept = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    except ValueError:
        return "..."
    return kept[len(scheme) :]
