"""Folders of a user's disk: linked ones are followed, and what cannot be read is named."""

import os
import stat
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data_pipeline.sources.items import IMAGE_SUFFIXES, OTHER_IMAGES, SPLIT_FOLDERS, Skipped
from sharpmoe.errors import DataError

LINK_TO_NOWHERE = "a link that leads nowhere"
_MAP = ".saliency"
MAP_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_MAP_ENDS = tuple(f"{_MAP}{suffix}" for suffix in MAP_SUFFIXES)
_ARCHIVES = frozenset({".7z", ".bz2", ".gz", ".rar", ".tgz", ".xz", ".zip", ".zst"})
_EXPAND = "expand archives to a folder or to a plain .tar"
_CLUTTER = frozenset({".ds_store", "thumbs.db", "desktop.ini"})  # written by file managers, never by a person
_DOUBLE = "._"  # macOS writes ._NAME beside NAME on disks of others, and in the __MACOSX/ of an archive


def walk_folders(root: Path) -> Iterator[tuple[Path, list[str]] | Skipped]:
    """Yield every folder below `root` with its sorted file names; then what linked folders hold.

    A folder that is reached twice, so also a loop of links, is walked once. Folders that cannot be read and links that
    lead nowhere are yielded as left out, with names relative to `root`.
    """
    seen: dict[tuple[int, int], str] = {}
    starts = deque([root])
    while starts:
        start = starts.popleft()
        first = seen.get(_inode(start) or (0, 0))
        if first is not None:
            yield Skipped(_below(start, root), f"a link to {first}, which is taken already", beside=True)
            continue
        failed: list[OSError] = []
        for folder, folders, names in os.walk(start, onerror=failed.append):
            path = Path(folder)
            inode = _inode(path)
            if inode is None or inode in seen:
                folders.clear()
                continue
            seen[inode] = _below(path, root)
            folders.sort()
            links = [name for name in folders if (path / name).is_symlink()]
            starts.extend(path / name for name in links)
            yield path, sorted(names)
        for error in failed:
            yield Skipped(_below(Path(error.filename), root), f"folder cannot be read ({error.strerror})", beside=True)


def held_out_folders(root: Path) -> list[Path]:
    """Return the folders in `root` itself that are named as a held-out split (items.SPLIT_FOLDERS), in any case."""
    return sorted(path for path in root.iterdir() if SPLIT_FOLDERS.get(path.name.lower()) == "unseen" and path.is_dir())


def split_of_folder(path: Path, apart: Sequence[Path]) -> str:
    """Return the split of an image of a source with folders of held-out images: `unseen` below one of them, or `train`.

    `path`: of the image or of its folder; links are followed. `apart`: those folders, resolved.
    """
    real = path.resolve()
    return "unseen" if any(real.is_relative_to(each) for each in apart) else "train"


def file_size(path: Path) -> int | str:
    """Return the bytes of a file, or why it cannot be read."""
    try:
        found = path.stat()
    except OSError as error:
        return LINK_TO_NOWHERE if os.path.islink(path) else f"cannot be read ({error.strerror})"
    return found.st_size if stat.S_ISREG(found.st_mode) else "not a regular file"


def text_lines(path: Path) -> list[str]:
    """Return the lines of a text file. Raises DataError where it cannot be read, or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); correct it, or remove it") from None


class OtherFiles:
    """Counts, by suffix, of the files that a source sees and does not take."""

    def __init__(self, taken: str) -> None:
        """`taken`: what the source takes instead, for the message."""
        self._taken = taken
        self._counts: Counter[str] = Counter()
        self._doubles = 0

    def add(self, name: str, before: str = "") -> None:
        """Count one file; `before`: what is part of its kind before the suffix, as `.seg` of `a.seg.png`."""
        if is_double(name):
            self._doubles += 1
        elif Path(name).name.lower() not in _CLUTTER:
            suffix = before + Path(name).suffix.lower()
            self._counts[f"*{suffix}" if suffix else "(names without suffix)"] += 1

    def left_out(self, where: str = "") -> Iterator[Skipped]:
        """Yield one record for every suffix; `where`: a prefix of its name."""
        for pattern, count in sorted(self._counts.items()):
            files = "1 file" if count == 1 else f"{count} files"
            how = _EXPAND if Path(pattern).suffix in _ARCHIVES else self._taken
            yield Skipped(where + pattern, f"{files} of a kind that is not taken; {how}", beside=True)
        if self._doubles:
            yield Skipped(f"{where}{_DOUBLE}*", f"files that macOS writes beside others ({self._doubles})", beside=True)


def is_double(name: str) -> bool:
    """Return whether a file is ._NAME, which macOS writes beside NAME: it has NAME's suffix, and attributes in it."""
    return Path(name).name.startswith(_DOUBLE)


def is_image(name: str) -> bool:
    """Return whether a file's suffix is that of an image, of a kind that is read or not."""
    return Path(name).suffix.lower() in IMAGE_SUFFIXES | OTHER_IMAGES and not is_double(name)


def is_saliency_map(name: str) -> bool:
    """Return whether a file is named as the saliency map of an image: NAME.saliency.png, in any case."""
    return name.lower().endswith(_MAP_ENDS) and not is_double(name)


def saliency_map_of(image: str, is_there: Callable[[str], bool]) -> str | None:
    """Return the name (or the path, where `image` is one) of the saliency map of an image; None where there is none."""
    stem = image.removesuffix(Path(image).suffix)
    for suffix in MAP_SUFFIXES:
        for spelling in (f"{_MAP}{suffix}", f"{_MAP}{suffix.upper()}", f"{_MAP}{suffix}".upper()):
            if is_there(stem + spelling):
                return stem + spelling
    return None


def unused_maps(count: int, where: str = "") -> Iterator[Skipped]:
    """Yield one record of the saliency maps that a source was not asked for; none where there are none."""
    if count:
        yield Skipped(f"{where}*{_MAP}.*", f"saliency maps ({count}), which --saliency supplied takes", beside=True)


def other_image(name: str) -> str | None:
    """Return why an image of this suffix is not read; None where it is."""
    suffix = Path(name).suffix.lower()
    return f"{suffix} is not read; expected {' '.join(sorted(IMAGE_SUFFIXES))}" if suffix in OTHER_IMAGES else None


def _below(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
