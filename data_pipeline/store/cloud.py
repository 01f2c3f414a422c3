"""Byte ranges of s3:// and gs://, through fsspec with s3fs or gcsfs.

Credentials are those that these libraries find (environment, profile, machine role), never from the URL.
"""

import errno
import importlib
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


class CloudRanges:
    """Ranges of the objects below one s3:// or gs:// prefix."""

    def __init__(self, url: str, timeout_s: float) -> None:
        parts = urlsplit(url)
        self._shown = redact(url)
        if parts.username or parts.query:
            raise DataError(f"{self._shown}: no user, password or query in the URL; pass credentials by environment")
        self._prefix = f"{parts.netloc}{parts.path}".rstrip("/")
        self._files = _filesystem(parts.scheme.lower(), self._shown, timeout_s)
        self._failures = _failures()

    def fetch(self, name: str, start: int, stop: int) -> bytes:
        content: bytes = self._call(name, "cat_file", start=start, end=stop)
        return content

    def size(self, name: str) -> int:
        return int(self._call(name, "size"))

    def _call(self, name: str, method: str, **arguments: int) -> Any:
        try:
            return getattr(self._files, method)(f"{self._prefix}/{name}", **arguments)
        except FileNotFoundError:
            raise DamageError(f"{self._shown}/{name}: does not exist") from None
        except PermissionError:
            raise DataError(f"{self._shown}/{name}: access denied; check the credentials in the environment") from None
        except self._failures as error:
            if isinstance(error, OSError) and error.errno == errno.EINVAL:
                return b""  # a range beyond the end
            raise TransientError(f"request failed ({type(error).__name__})") from None


def _filesystem(scheme: str, shown: str, timeout_s: float) -> Any:
    try:
        import fsspec  # noqa: PLC0415  (optional)

        return fsspec.filesystem(
            scheme, skip_instance_cache=True, use_listings_cache=False, **_limits(scheme, timeout_s)
        )
    except ImportError:
        raise DataError(
            f"{shown}: {scheme}:// needs fsspec and {_DRIVERS[scheme]}; pip install {_DRIVERS[scheme]}"
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
