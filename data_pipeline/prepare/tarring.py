"""WebDataset tars with the same bytes on every machine."""

import io
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from data_pipeline.index import Places
from data_pipeline.prepare.encoding import Encoded


def write_tar(path: Path, samples: Iterable[Encoded]) -> tuple[list[tuple[str, Places]], int]:
    """Write a tar; returns (key, {extension: (offset, size, crc32)}) of each of its samples, and the longest text."""
    found: list[tuple[str, Places]] = []
    longest = 0
    with path.open("wb") as stream, tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for sample in samples:
            places = {}
            for extension, content in sorted(sample.members.items()):
                info = tarfile.TarInfo(f"{sample.key}.{extension}")  # mtime, uid and gid stay 0
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
                end = stream.tell() - (-len(content) % tarfile.BLOCKSIZE)
                places[extension] = (end - len(content), len(content), zlib.crc32(content))
            found.append((sample.key, places))
            longest = max(longest, sample.text_length)
    return found, longest
