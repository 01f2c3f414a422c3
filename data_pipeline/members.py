"""Encode and decode the members of a sample: .npy, .json and .txt, and never a pickle.

Every decoder takes the bytes of one member and raises DamageError that says what is wrong; the caller adds shard and
key.
"""

import ast
import io
import json
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.safety import CAPS
from sharpmoe.errors import DamageError

try:
    from isal.isal_zlib import crc32 as _crc32  # the same values as zlib's, ten times as fast
except ImportError:
    from zlib import crc32 as _crc32

_SUFFIXES = frozenset({"npy", "json", "txt"})
_DTYPES = frozenset({"<f2", "<f4", "<f8", "|u1", "|i1", "|b1", "<i2", "<i4", "<i8", "<u2", "<u4", "<u8"})
_MAGIC = b"\x93NUMPY"
_PREFIX = 10  # magic, version, length of the header (version 1)
_HEADER = 4096  # maximal bytes of a header, many times what our arrays need
BFLOAT16_BITS = np.dtype("<u2")  # NumPy has no bfloat16: where floats are expected, 16-bit integers hold its bits
# By dtype: views of its bits with and without sign, and the smallest value of each that is an infinity or a NaN.
_NOT_FINITE = {
    "<f2": (np.int16, 0x7C00, np.uint16, 0xFC00),
    BFLOAT16_BITS.str: (np.int16, 0x7F80, np.uint16, 0xFF80),
    "<f4": (np.int32, 0x7F800000, np.uint32, 0xFF800000),
}

Buffer = bytes | memoryview


class _Header(NamedTuple):
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    size: int  # bytes of the array


def checksum(content: Buffer) -> int:
    """Return the crc32 of a member."""
    return _crc32(content)


def suffix_of(name: str) -> str:
    """Return `npy`, `json` or `txt` (`latent.npy` -> `npy`). Raises DamageError for any other suffix."""
    suffix = name.rpartition(".")[2]
    if suffix not in _SUFFIXES:
        raise DamageError(f"member .{name[:40]} is not one of .npy, .json, .txt: it is not read")
    return suffix


def encode_npy(array: np.ndarray) -> bytes:
    """Return a .npy file, C order, little endian. Raises ValueError for objects."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(array, order="C"), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def decode_npy(content: Buffer) -> np.ndarray:
    """Return the array of a .npy member, read-only and without a copy.

    Only plain numbers in C order are read, and the header must account for every byte that follows it.
    """
    if len(content) > CAPS.member:
        raise DamageError(f"{len(content)} bytes, at most {CAPS.member} are read")
    if len(content) < _PREFIX or content[:8] != _MAGIC + b"\x01\x00":
        raise DamageError("not a .npy file of version 1")
    start = _PREFIX + int.from_bytes(content[8:_PREFIX], "little")
    if start > min(len(content), _HEADER):
        raise DamageError("the .npy header is cut short or too long")
    header = _header(bytes(content[_PREFIX:start]))
    if header.size != len(content) - start:
        raise DamageError(f"the .npy header states {header.size} bytes, {len(content) - start} follow it")
    return np.frombuffer(content, header.dtype, offset=start).reshape(header.shape)


@lru_cache(maxsize=4096)  # a header is parsed once, then looked up: parsing costs more than the rest of the sample
def _header(text: bytes) -> _Header:
    try:
        fields = ast.literal_eval(text.decode("ascii").strip())
        dtype, fortran, shape = fields["descr"], fields["fortran_order"], fields["shape"]
    except (ValueError, SyntaxError, KeyError, TypeError, RecursionError, MemoryError):
        raise DamageError("the .npy header cannot be read") from None
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise DamageError(f"dtype {str(dtype)[:40]!r} is not a plain number; objects are never read")
    plain = isinstance(shape, tuple) and len(shape) <= 8 and all(type(n) is int and n >= 0 for n in shape)
    if fortran is not False or not plain:
        raise DamageError("the .npy header is not that of an array in C order")
    return _Header(np.dtype(dtype), shape, math.prod(shape) * np.dtype(dtype).itemsize)


def as_float32(array: np.ndarray) -> np.ndarray:
    """Return the values of floats, or of bfloat16 bits, as float32."""
    if array.dtype == BFLOAT16_BITS:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def all_finite(array: np.ndarray) -> bool:
    """Return whether every element of floats, or of bfloat16 bits, is finite."""
    kind = _NOT_FINITE.get(array.dtype.str)
    if kind is None or not array.size or not array.flags.c_contiguous:
        return bool(np.isfinite(array).all())
    signed, positive, unsigned, negative = kind
    bits = array.reshape(-1)  # two integer maxima: no temporary array, a tenth of the time
    largest = np.maximum.reduce
    return bool(largest(bits.view(signed)) < positive and largest(bits.view(unsigned)) < negative)


def encode_npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return an uncompressed .npz, as np.savez writes it, with the same bytes every time."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), encode_npy(array))
    return stream.getvalue()


def decode_npz(content: bytes, compressed: bool = False) -> dict[str, np.ndarray]:
    """Return the arrays of a .npz file, at most `CAPS.sample` bytes: np.load would expand a compression bomb.

    Compressed files are read only with `compressed`.
    """
    arrays, left = {}, CAPS.sample
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for info in archive.infolist():
                if info.compress_type not in ((0, 8) if compressed else (0,)):
                    raise DamageError("a compressed .npz is not read")
                with archive.open(info) as file:
                    expanded = file.read(left + 1)  # the size stated in the directory may be wrong
                left -= len(expanded)
                if left < 0:
                    raise DamageError(f"a .npz of more than {CAPS.sample} bytes is not read")
                arrays[info.filename.removesuffix(".npy")] = decode_npy(expanded)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, struct.error):
        raise DamageError("not a .npz file") from None
    return arrays


def encode_json(content: Any) -> bytes:
    """Return compact UTF-8 JSON with a newline at its end."""
    return (json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n").encode()


def decode_json(content: Buffer) -> dict[str, Any]:
    """Return the object of a .json member."""
    if len(content) > CAPS.member:
        raise DamageError(f"{len(content)} bytes, at most {CAPS.member} are read")
    try:
        decoded = json.loads(bytes(content))
    except (ValueError, RecursionError):  # not UTF-8, not JSON, or nested too deeply
        raise DamageError("not a JSON object") from None
    if not isinstance(decoded, dict):
        raise DamageError("not a JSON object")
    return decoded


def decode_text(content: Buffer) -> str:
    """Return the text of a .txt member."""
    if len(content) > CAPS.member:
        raise DamageError(f"{len(content)} bytes, at most {CAPS.member} are read")
    try:
        return bytes(content).decode()
    except UnicodeDecodeError as error:
        raise DamageError(f"not UTF-8 text (byte {error.start})") from None
