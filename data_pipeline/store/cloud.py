"""Objects of s3:// and gs://, through fsspec with s3fs or gcsfs.

Credentials are those that these libraries find (environment, profile, machine role), never from the URL.
"""

import errno
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data_pipeline.safety import redact
from data_pipeline.store.ranges import TransientError
from sharpmoe.errors import DamageError, DataError

_DRIVERS = {"s3": "s3fs", "gs": "gcsfs"}
# What the drivers raise besides OSError for a request that failed.
_FOREIGN = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
)
# Of those, what another try does not change -> what is wrong.
_FINAL = {
    "NoCredentialsError": "no credentials were found",
    "PartialCredentialsError": "the credentials are incomplete",
    "CredentialRetrievalError": "the credentials cannot be read",
    "TokenRetrievalError": "the login has expired",
    "ProfileNotFound": "the profile does not exist",
    "ParamValidationError": "the name of the bucket or of an object is not valid",
    "InvalidRegionError": "the region is not valid",
}


class CloudFolder:
    """The objects below one s3:// or gs:// prefix. Safe in threads; belongs to one process.

    Methods raise TransientError for what may pass, DamageError where an object does not exist, and DataError where
    the place cannot be used.
    """

    def __init__(self, url: str, timeout_s: float = 30.0) -> None:
        parts = urlsplit(url)
        self._shown = redact(url).removesuffix("/")
        if parts.username or parts.query:
            raise DataError(f"{self._shown}: no user, password or query in the URL; pass credentials by environment")
        if not parts.netloc:
            raise DataError(f"{parts.scheme}://: names no bucket; expected {parts.scheme}://BUCKET/FOLDER")
        self._prefix = f"{parts.netloc}{parts.path}".rstrip("/")
        self._files = _filesystem(parts.scheme.lower(), self._shown, timeout_s)
        self._failures = _failures()

    def fetch(self, name: str, start: int, stop: int) -> bytes:
        content: bytes = self._call(name, "cat_file", start=start, end=stop)
        return content

    def size(self, name: str) -> int:
        return int(self._call(name, "size"))

    def listing(self) -> Iterator[tuple[str, int]]:
        """Yield (name, bytes) of every object below the prefix, at any depth, sorted by name; none where it is new."""
        try:
            found = self._call("", "find", detail=True)
        except DamageError:
            found = {}
        for path in sorted(found):
            name = path.removeprefix("/").removeprefix(f"{self._prefix}/")
            if found[path]["type"] == "file" and not name.endswith("/"):
                yield name, int(found[path]["size"])

    def put(self, name: str, content: Path | bytes) -> None:
        """Write an object, which appears whole or not at all, and replaces one of its name."""
        if isinstance(content, bytes):
            self._call(name, "pipe_file", after=(content,))
        else:
            self._call(name, "put_file", before=(str(content),))
        size, written = len(content) if isinstance(content, bytes) else content.stat().st_size, self.size(name)
        if written != size:
            raise TransientError(f"{written} bytes arrived of {size}")

    def remove(self, name: str) -> None:
        self._call(name, "rm_file")

    def _call(
        self, name: str, method: str, before: tuple[Any, ...] = (), after: tuple[Any, ...] = (), **arguments: Any
    ) -> Any:
        """Call a method of the file system; `before` and `after`: arguments whose names differ between drivers."""
        where = f"{self._shown}/{name}".rstrip("/")
        path = f"{self._prefix}/{name}".rstrip("/")
        try:
            return getattr(self._files, method)(*before, path, *after, **arguments)
        except FileNotFoundError:
            if before or after:  # a new object: nothing else can be missing
                raise DataError(f"{self._shown}: the bucket does not exist; make it, or correct the URL") from None
            raise DamageError(f"{where}: does not exist") from None
        except PermissionError:
            raise DataError(f"{where}: access denied; check the credentials in the environment") from None
        except self._failures as error:
            if isinstance(error, OSError) and error.errno == errno.EINVAL and method == "cat_file":
                return b""  # a range beyond the end
            name = type(error).__name__
            if name in _FINAL:
                raise DataError(f"{where}: {_FINAL[name]} ({name}); check the environment") from None
            raise TransientError(f"request failed ({name})") from None


def _filesystem(scheme: str, shown: str, timeout_s: float) -> Any:
    logging.getLogger(_DRIVERS[scheme]).setLevel(logging.CRITICAL)  # they print tracebacks of what is raised as well
    try:
        import fsspec  # noqa: PLC0415  (optional)

        return fsspec.filesystem(
            scheme, skip_instance_cache=True, use_listings_cache=False, **_limits(scheme, timeout_s)
        )
    except ImportError:
        driver = _DRIVERS[scheme]
        raise DataError(
            f"{shown}: {scheme}:// needs fsspec and {driver}; pip install {driver} (or the extra: sharpmoe[{scheme}])"
        ) from None


def _limits(scheme: str, timeout_s: float) -> dict[str, Any]:
    if scheme == "s3":
        return {"config_kwargs": {"connect_timeout": timeout_s, "read_timeout": timeout_s}}
    return {"timeout": timeout_s}


def _failures() -> tuple[type[BaseException], ...]:
    found: list[type[BaseException]] = [OSError, TimeoutError]
    for module, name in _FOREIGN:
        try:
            found.append(getattr(importlib.import_module(module), name))
        except (ImportError, AttributeError):
            continue
    return tuple(found)
