"""A folder as people have them: pictures of every kind, captions of every kind, and files that are broken."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.read.shards import ShardSet
from data_pipeline.sources.images import UNREADABLE, load_picture, upright_size
from launcher.prepare import main
from tests.data_pipeline.sources.test_images import encoded

ARGUMENTS = ("--size", "32", "--encoder", "hash", "--pca-channels", "8", "--shard-samples", "4")


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    generator = np.random.default_rng(width * height)
    pixels = generator.integers(0, 255, (height, width, len(Image.new(mode, (1, 1)).getbands())), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def sideways(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, "jpeg", exif=exif)


def animated() -> bytes:
    content = io.BytesIO()
    frames = [noise(20, 30).quantize(16) for _ in range(3)]
    frames[0].save(content, "gif", save_all=True, append_images=frames[1:], duration=50)
    return content.getvalue()


def sixteen_bit_rgb() -> bytes:
    """A PNG with 16 bits in each of three channels, which Pillow reads and does not write."""
    rows = b"".join(b"\0" + bytes(range(60)) for _ in range(10))
    header = struct.pack(">IIBBBBB", 10, 10, 16, 2, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


GOOD = {
    "odd-size.png": encoded(noise(37, 91)),
    "one-pixel.png": encoded(noise(1, 1)),
    "thin.png": encoded(noise(300, 2)),
    "rgba.png": encoded(noise(33, 40, "RGBA")),
    "palette.png": encoded(noise(30, 30).quantize(8)),
    "palette-clear.png": encoded(noise(30, 30).quantize(8), transparency=3),
    "grey.png": encoded(noise(31, 30, "L")),
    "grey-alpha.png": encoded(noise(31, 30, "LA")),
    "bits.png": encoded(noise(30, 30, "L").convert("1")),
    "sixteen.png": encoded(Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30) * 70)),
    "sixteen-rgb.png": sixteen_bit_rgb(),
    "sixteen-grey.tiff": encoded(Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30) * 70), "tiff"),
    "cmyk.jpg": encoded(noise(40, 40, "CMYK"), "jpeg"),
    "ycbcr.tif": encoded(noise(40, 40, "YCbCr"), "tiff"),
    "animated.gif": animated(),
    "sideways.jpg": sideways(noise(40, 20)),
    "jpeg-called.png": encoded(noise(40, 40), "jpeg"),
    "png-called.JPEG": encoded(noise(40, 40)),
    "lossless.webp": encoded(noise(25, 25, "RGBA"), "webp", lossless=True),
    "bitmap.bmp": encoded(noise(25, 25), "bmp"),
    "größe 🦊.png": encoded(noise(25, 25)),
    "deep/a.b.c.png": encoded(noise(25, 25)),
}
UNKNOWN = "unreadable: not a picture of a known kind (PNG, JPEG, WEBP, GIF, BMP, TIFF)"
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
FLOATS = Image.fromarray(np.zeros((9, 9), np.float32))
BAD = {
    "zero.png": (b"", UNKNOWN),
    "text-called.png": (b"this is no picture", UNKNOWN),
    "page-called.jpg": (b"<html><body>404</body></html>", UNKNOWN),
    "postscript-called.png": (POSTSCRIPT, UNKNOWN),
    "cut.png": (encoded(noise(90, 90))[:900], "unreadable: image file is truncated"),
    "cut.jpg": (encoded(noise(90, 90), "jpeg")[:900], "unreadable: image file is truncated"),
    "float.tiff": (encoded(FLOATS, "tiff"), "unreadable: float images have no stated range"),
    "bomb.png": (encoded(Image.new("1", (9000, 9000))), "unreadable: 9000x9000 pixels, at most 64000000 are decoded"),
}
CAPTION = "a fox 🦊\nin the snow,\r\n\tso cold — “brrr”"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "stamps"
    (root / "deep").mkdir(parents=True)
    for name, content in {**GOOD, **{name: content for name, (content, _) in BAD.items()}}.items():
        (root / name).write_bytes(content)
        (root / name).with_suffix(".txt").write_bytes(f"{CAPTION} {name}".encode())
    (root / "uncaptioned.png").write_bytes(GOOD["grey.png"])
    (root / "blank.png").write_bytes(GOOD["grey.png"])
    (root / "blank.txt").write_text(" \n")
    (root / "latin.png").write_bytes(GOOD["grey.png"])
    (root / "latin.txt").write_bytes("größe".encode("latin-1"))
    (root / "drawing.svg").write_text("<svg/>")
    (root / "drawing.txt").write_text("a drawing")
    (root / "sound.ogg").write_bytes(b"OggS")
    (root / "notes.txt").write_text("no picture of this name")
    return root


REASONS = {
    "drawing.svg": ".svg is not read; expected .apng .bmp .gif .jpeg .jpg .png .tif .tiff .webp",
    "uncaptioned.png": "no caption in uncaptioned.txt",
    "blank.png": "no caption in blank.txt",
    "notes.txt": "a caption without a picture of its name",
    "*.ogg": "1 file of a kind that is not taken",
    "latin.png": "caption latin.txt is not UTF-8 (byte 2)",
    **{name: reason for name, (_, reason) in BAD.items()},
}


@pytest.mark.parametrize("buckets", ["", "16"])
def test_it_prepares_and_says_what_it_left_out(
    buckets: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--source", str(folder), "--out", str(tmp_path / "out"), *ARGUMENTS, "--buckets", buckets]
    assert main(arguments) == 0
    output = capsys.readouterr()
    told = dict(line.removeprefix("skipped ").split(": ", 1) for line in output.err.splitlines() if "skipped" in line)
    assert told.keys() == REASONS.keys()
    assert all(told[name].startswith(reason) for name, reason in REASONS.items()), told
    assert f"{len(REASONS)} left out" in output.out
    listed = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert {json.loads(line)["name"]: json.loads(line)["reason"] for line in listed} == told
    captions = {}
    for split in json.loads((tmp_path / "out" / "index.json").read_text())["splits"]:
        shards = ShardSet.open(tmp_path / "out", split)
        for index in range(shards.num_samples):
            sample = shards.batch([index])
            captions[sample.captions[0].removeprefix(f"{CAPTION} ")] = sample
    assert captions.keys() == GOOD.keys()
    assert all(sample.captions[0].startswith(CAPTION) for sample in captions.values())
    assert all(sample.latent.isfinite().all() for sample in captions.values())
    clear = {name for name, sample in captions.items() if sample.foreground.isfinite().all()}
    assert clear == {"rgba.png", "palette-clear.png", "grey-alpha.png", "lossless.webp"}


def test_a_dry_run_writes_nothing_and_tells_what_it_would_take(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--source", str(folder), "--out", str(tmp_path / "out"), *ARGUMENTS]
    assert main([*arguments, "--dry-run", "--buckets", "16"]) == 0
    told = capsys.readouterr().out
    assert "buckets of 16 tokens each; for a side of 16 pixels add --bucket-step 64" in told
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--buckets", "16"]) == 0
    done = json.loads((tmp_path / "out" / "index.json").read_text())
    for name, bucket in done["buckets"].items():
        line = next(line for line in told.splitlines() if line.startswith(f"bucket {name} "))
        found = int(line.split(": ")[1].split(" ")[0])
        assert 0 <= found - bucket["num_samples"] <= len(BAD)  # some turn out to be broken when they are decoded
    shards = next(line for line in told.splitlines() if line.startswith("estimate") and "shards" in line)
    assert f"{len(done['shards'])} shards" in shards
    size = sum(shard["size"] for shard in done["shards"]) / 1e9
    assert float(shards.split(" shards, ")[1].split(" GB")[0]) == pytest.approx(size, rel=0.8)
    assert "left out: 2 x no caption in NAME.txt" in told
    assert "estimate: 0 h 00 min" in told


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(GOOD)),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
    st.floats(0.2, 1),
)
def test_damaged_files_are_unreadable_or_pictures_and_nothing_else(
    name: str, changes: list[tuple[float, int]], kept: float
) -> None:
    content = bytearray(GOOD[name])
    for place, value in changes:
        content[int(place * (len(content) - 1))] = value
    damaged = bytes(content[: int(len(content) * kept)])
    for look in (lambda: load_picture(damaged, (8, 8)).pixels.shape, lambda: upright_size(damaged)):
        try:
            assert look() is not None
        except UNREADABLE:
            continue
