"""Hostile shards and pictures, tried in a process of its own: `python -m tests.data_pipeline.hostile FOLDER`.

Prints a JSON object: what came of every input, what the interpreter was seen to do that it must never do, and how much
memory was taken at most beyond that of an empty run.
"""

import contextlib
import gzip
import io
import json
import os
import pickle
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.encode.build import load_codec
from data_pipeline.index import INDEX_FILE, sealed
from data_pipeline.members import encode_json
from data_pipeline.read.shards import ShardSet
from launcher.prepare import main as prepare
from sharpmoe.errors import DataError
from tests import memory_shards
from tests.memory_shards import BUCKETS, Files, reseal, sha256, tar, write

SHARD = "train-16x16-00000"
SENTINEL = "executed"
GIB = 1 << 30
_FORBIDDEN = (
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "pickle.find_class",
    "socket.connect",
)


class Payload:
    """A pickle that leaves a file where it is opened."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {SENTINEL}",)


PICKLE = pickle.dumps(Payload())


def watch(folder: Path, seen: list[str]) -> None:
    """Write down every program started, pickle followed, connection made, and file written outside `folder`."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _FORBIDDEN:
            seen.append(f"{event} {arguments!r}"[:200])
        if event == "open" and isinstance(arguments[0], str):
            path, written = Path(arguments[0]).resolve(), arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if (written and not path.is_relative_to(folder)) or str(path) == "/etc/passwd":
                seen.append(f"open {path}")

    sys.addaudithook(hook)


# --- shards -----------------------------------------------------------------------------------------------------------


def members(change: Callable[[dict[str, bytes]], object]) -> Files:
    """A sealed shard whose first sample was changed: its checksums hold."""
    samples = [(f"s{number}", memory_shards.sample(number, BUCKETS["16x16"])) for number in range(4)]
    change(samples[0][1])
    return _with(*tar(samples))


def _with(content: bytes, samples: object) -> Files:
    files = write([("16x16", 4)])
    table = {**json.loads(files[f"{SHARD}.json"]), "size": len(content), "samples": samples}
    files |= {f"{SHARD}.tar": content, f"{SHARD}.json": encode_json(table)}
    reseal(files, SHARD)
    return files


def added(name: str, content: bytes) -> Files:
    return members(lambda found: found.update({name: content}))


def tabled(change: Callable[[list], object]) -> Files:
    """The table tells lies."""
    samples = [(f"s{number}", memory_shards.sample(number, BUCKETS["16x16"])) for number in range(4)]
    content, places = tar(samples)
    told = json.loads(json.dumps(places))
    change(told)
    return _with(content, told)


def indexed(change: Callable[[dict[str, Any]], object]) -> Files:
    files = write([("16x16", 4)])
    tree = json.loads(files[INDEX_FILE])
    change(tree)
    return {**files, INDEX_FILE: sealed(tree)}


def linked() -> Files:
    """The first record of the tar says that it is a link."""
    files = write([("16x16", 4)])
    content = bytearray(files[f"{SHARD}.tar"])
    content[156:157] = b"2"
    content[157:168] = b"/etc/passwd"
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    return _with(bytes(content), json.loads(files[f"{SHARD}.json"])["samples"])


def objects() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([Payload()], dtype=object), allow_pickle=True)
    return stream.getvalue()


def npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


def gzip_bomb() -> bytes:
    """A gigabyte of zeros, as 256 gzip members in a row."""
    return gzip.compress(bytes(4 << 20), mtime=0) * 256


def empty(content: bytes) -> Files:
    files = write([("16x16", 4)])
    tree = json.loads(files[INDEX_FILE])
    tree["files"]["empty_text.npz"] = sha256(content)
    return {**files, "empty_text.npz": content, INDEX_FILE: sealed(tree)}


def zip_bomb() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("text.npy", "w") as file:
        for _ in range(64):
            file.write(bytes(1 << 20))
    return stream.getvalue()


def object_npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, text=np.array([Payload()], dtype=object), pooled=np.zeros(5))
    return stream.getvalue()


def rename(tree: dict[str, Any], name: str) -> None:
    tree["shards"][0]["name"] = name


SUFFIXES = (
    "pkl",
    "pickle",
    "pyd",
    "pth",
    "pt",
    "npz",
    "mp",
    "cls",
    "latent.pkl",
    "npy.pkl",
    "pickle.gz",
    "ten",
    "cbor",
)
SHARDS: dict[str, Callable[[], Files]] = {
    **{f"a pickle as .{suffix}": lambda suffix=suffix: added(suffix, PICKLE) for suffix in SUFFIXES},
    **{f"a pickle as .{name}": lambda name=name: added(name, PICKLE) for name in ("latent.npy", "json", "txt")},
    "an array of objects": lambda: added("latent.npy", objects()),
    "an array with a program for a header": lambda: added(
        "latent.npy", npy("__import__('os').system('touch executed')")
    ),
    "an array of records": lambda: added(
        "latent.npy", npy("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,)}")
    ),
    "an array of ten terabytes": lambda: added(
        "latent.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2500000000000,)}")
    ),
    "a gzip bomb as .json.gz": lambda: added("json.gz", gzip_bomb()),
    "a gzip bomb as .json": lambda: added("json", gzip_bomb()),
    "JSON that is nested without end": lambda: added("json", b'{"label":' * 100_000),
    "a member that is a link": linked,
    "a key ..": lambda: tabled(lambda samples: samples[0].__setitem__(0, "..")),
    "a key with a path": lambda: tabled(lambda samples: samples[0].__setitem__(0, "../../x")),
    "a key from the root": lambda: tabled(lambda samples: samples[0].__setitem__(0, "/etc/passwd")),
    "a place before the file": lambda: tabled(lambda samples: samples[0][1]["json"].__setitem__(0, -512)),
    "a place behind the file": lambda: tabled(lambda samples: samples[0][1]["json"].__setitem__(0, 1 << 60)),
    "a place that is no number": lambda: tabled(lambda samples: samples[0][1]["json"].__setitem__(1, "9" * 5000)),
    "a member of ten gigabytes": lambda: tabled(lambda samples: samples[0][1]["json"].__setitem__(1, 10 * GIB)),
    "a shard named ..": lambda: indexed(lambda tree: rename(tree, "..")),
    "a shard outside the folder": lambda: indexed(lambda tree: rename(tree, "../../etc/passwd")),
    "a shard from the root": lambda: indexed(lambda tree: rename(tree, "/etc/passwd")),
    "a file outside the folder": lambda: indexed(lambda tree: tree["files"].update({"../x": "0" * 64})),
    "an index that is nested without end": lambda: {**write([("16x16", 4)]), INDEX_FILE: b'{"a":' * 200_000},
    "an index with a number without end": lambda: {
        **write([("16x16", 4)]),
        INDEX_FILE: b'{"schema":' + b"9" * 9999 + b"}",
    },
    "an empty caption that is a bomb": lambda: empty(zip_bomb()),
    "an empty caption of objects": lambda: empty(object_npz()),
}


def store(files: Files, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def read(folder: Path) -> None:
    """All that a run reads of a folder."""
    shards = ShardSet.open(folder, "train")
    shards.empty_text()
    shards.batch(range(shards.num_samples))


def hollow(folder: Path, count: int) -> Path:
    """A sealed shard whose first sample has `count` more members of 60 MiB, in a file of zeros that takes no disk."""
    size, checksum = 60 << 20, zlib.crc32(bytes(60 << 20))
    files = tabled(
        lambda samples: samples[0][1].update({f"m{n}.npy": [n * size + 30720, size, checksum] for n in range(count)})
    )
    table, total = json.loads(files[f"{SHARD}.json"]), (count + 1) * size
    files[f"{SHARD}.json"] = encode_json({**table, "size": total})
    reseal(files, SHARD)
    tree = json.loads(files[INDEX_FILE])
    tree["shards"][0]["size"] = total
    store({**files, INDEX_FILE: sealed(tree)}, folder)
    os.truncate(folder / f"{SHARD}.tar", total)
    return folder


def spoiled_files(folder: Path) -> dict[str, Callable[[], object]]:
    """Folders with files that are no files, or giants."""

    def with_file(name: str, spoil: Callable[[Path], object]) -> Callable[[], object]:
        def act() -> None:
            place = store(write([("16x16", 4)]), folder / f"{len(list(folder.iterdir()))}")
            (place / name).unlink()
            spoil(place / name)
            read(place)

        return act

    def giant(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(20 * GIB)

    return {
        "a sample of 1200 MiB": lambda: read(hollow(folder / "large", 20)),
        "a sample just below the cap": lambda: read(hollow(folder / "capped", 4)),
        **{f"{name} of 20 GiB": with_file(name, giant) for name in (INDEX_FILE, f"{SHARD}.json", f"{SHARD}.tar")},
        **{f"{name} is a pipe": with_file(name, os.mkfifo) for name in (INDEX_FILE, f"{SHARD}.json", f"{SHARD}.tar")},
        "the tar is a device": with_file(f"{SHARD}.tar", lambda path: path.symlink_to("/dev/zero")),
        "pipe: as a place": lambda: read(Path()) if ShardSet.open(f"pipe:touch {SENTINEL}", "train") else None,
        "file: as a place": lambda: ShardSet.open("file:///etc", "train"),
        "a codec that is a pickle": lambda: _codec(folder / "codec"),
    }


def _codec(folder: Path) -> None:
    folder.mkdir()
    (folder / "codec.safetensors").write_bytes(PICKLE)
    load_codec(folder)


# --- pictures ---------------------------------------------------------------------------------------------------------


def png(size: int = 32) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (size, size), "red").save(stream, "png")
    return stream.getvalue()


def png_bomb() -> bytes:
    """60,000 x 60,000 pixels in a few bytes."""
    head = (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    chunk = b"IHDR" + head
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + chunk + zlib.crc32(chunk).to_bytes(4, "big") + png()[33:]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(touch executed) system\n%%EOF\n"


def evil_files() -> dict[str, bytes]:
    good = {f"good{n}.{suffix}": content for n in range(4) for suffix, content in (("png", png()), ("txt", b"red"))}
    bad = {
        "pickled.jpg": PICKLE,
        "eps.png": EPS,
        "bomb.png": png_bomb(),
        "../out.png": png(),
        "/root.png": png(),
        "gz.png": gzip_bomb(),
    }
    texts = {name.replace(name[-3:], "txt"): b"a caption" for name in bad}
    pairs = dict(pair for both in zip(bad.items(), texts.items(), strict=True) for pair in both)
    deep = {"deep.png": png(), "deep.json": b'{"caption":' * 100_000}
    return {**good, **pairs, **deep, "x.pkl": PICKLE, "x.pyd": PICKLE}


def evil_tar(path: Path) -> None:
    """One good sample among bad ones."""
    with tarfile.open(path, "w") as archive:
        for name, content in evil_files().items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for kind, name in (
            (tarfile.SYMTYPE, "link.png"),
            (tarfile.LNKTYPE, "link.txt"),
            (tarfile.CHRTYPE, "device.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)


def prepared(source: Path, folder: Path) -> Callable[[], object]:
    def act() -> str:
        shown = io.StringIO()
        arguments = ["--source", str(source), "--out", str(folder), "--size", "32", "--encoder", "hash"]
        with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(shown):
            code = prepare([*arguments, "--pca-channels", "4", "--max-bad-share", "0.99", "--threads", "1"])
        if code:
            raise DataError(shown.getvalue().strip())
        return shown.getvalue()

    return act


def pictures(folder: Path) -> dict[str, Callable[[], object]]:
    tars, bombs = folder / "tars", folder / "bombs"
    for place in (tars, bombs):
        place.mkdir(parents=True)
    evil_tar(tars / "a.tar")
    (bombs / "a.tar").write_bytes(gzip_bomb())
    return {
        "a tar of hostile pictures": prepared(tars, folder / "out"),
        "a tar that is a gzip bomb": prepared(bombs, folder / "none"),
    }


def tried(act: Callable[[], object]) -> str:
    """What came of it: a DataError's text behind its kind, or what was returned."""
    try:
        return f"read: {act()}"
    except DataError as error:
        return f"{type(error).__name__}: {error}"


def main(folder: Path) -> None:
    (folder / "work").mkdir()
    os.chdir(folder / "work")
    os.environ["GOPEN_REWRITE"] = f"{folder}=pipe:touch {SENTINEL}; cat /dev/zero "
    read(store(write([("16x16", 4)]), folder / "benign"))
    prepared_once = folder / "warm"
    prepared_once.mkdir()
    for number in range(4):
        (prepared_once / f"{number}.png").write_bytes(png())
        (prepared_once / f"{number}.txt").write_text("red")
    warm = prepared(prepared_once, folder / "warm-out")()
    built = {
        name: store(build(), folder / "shards" / str(number)) for number, (name, build) in enumerate(SHARDS.items())
    }
    acts = {name: (lambda place=place: read(place)) for name, place in built.items()}
    acts |= spoiled_files(folder / "shards") | pictures(folder / "pictures")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    seen: list[str] = []
    watch(folder, seen)
    base = memory("VmRSS")
    results = {name: tried(act) for name, act in acts.items()}
    report = {"results": results, "seen": list(seen), "peak_mib": (memory("VmHWM") - base) / 1024, "warm": warm}
    executed = Path(SENTINEL).exists()
    seen.clear()
    pickle.loads(PICKLE)  # what would have been seen
    print(json.dumps({**report, "executed": executed, "control": seen, "control_executed": Path(SENTINEL).exists()}))


def memory(name: str) -> int:
    """A figure of /proc/self/status, in KiB."""
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
