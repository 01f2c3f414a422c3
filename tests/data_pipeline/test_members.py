"""Members: what goes in comes out, and nothing but plain numbers, objects of JSON and text comes out at all."""

import contextlib
import io
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from data_pipeline import members
from data_pipeline.safety import CAPS
from sharpmoe.errors import DamageError

PLAIN = st.sampled_from(["<f2", "<f4", "<f8", "|u1", "<i8", "|b1"]).map(np.dtype)


@given(PLAIN.flatmap(lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=0, max_dims=4, min_side=0))))
def test_arrays_come_back_as_numpy_reads_them(array: np.ndarray) -> None:
    content = members.encode_npy(array)
    found = members.decode_npy(content)
    np.testing.assert_array_equal(found, np.load(io.BytesIO(content), allow_pickle=False))
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    assert not found.flags.writeable


TEXT = st.text('aé\n"\\{\u2028😀')


@given(st.dictionaries(TEXT, st.integers() | TEXT | st.lists(st.integers())))
def test_json_and_text_come_back(content: dict[str, object]) -> None:
    assert members.decode_json(members.encode_json(content)) == content
    assert members.decode_text(str(content).encode()) == str(content)


@given(st.binary(max_size=300) | st.binary(max_size=300).map(lambda tail: b"\x93NUMPY\x01\x00" + tail))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    for decode in (members.decode_npy, members.decode_json, members.decode_text, members.decode_npz):
        with contextlib.suppress(DamageError):
            decode(content)


def _npy(header: str, body: bytes = b"\0" * 8) -> bytes:
    text = header.encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


class _Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return (open, ("executed", "w"))


def _objects() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([_Bomb()], dtype=object), allow_pickle=True)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_objects(), "objects are never read"),
        (pickle.dumps(_Bomb()), "not a .npy"),
        (_npy("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,)}"), "not a plain number"),
        (_npy("{'descr': '>f8', 'fortran_order': False, 'shape': (1,)}"), "not a plain number"),
        (_npy("{'descr': '<f8', 'fortran_order': True, 'shape': (1,)}"), "C order"),
        (_npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}"), "C order"),
        (_npy("{'descr': '<f8', 'fortran_order': False, 'shape': (True,)}"), "C order"),
        (_npy("{'descr': '<f8', 'fortran_order': False, 'shape': (10**15,)}"), "cannot be read"),
        (_npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,)}"), "states"),
        (_npy("{'descr': '<f8', 'fortran_order': False, 'shape': (2,)}"), "states 16 bytes, 8 follow"),
        (_npy("(" * 4000), "cannot be read"),
        (_npy("__import__('os').system('true')"), "cannot be read"),
        (_npy("{}" + " " * 5000), "too long"),
    ],
)
def test_hostile_arrays(content: bytes, message: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DamageError, match=message):
        members.decode_npy(content)
    assert list(tmp_path.iterdir()) == []


def test_hostile_json_and_text() -> None:
    for content in (b"[" * 200_000, b'{"a":' + b"[" * 200_000, b"\xff", b"[1]", b'{"a": ' + b"9" * 9999 + b"}"):
        with pytest.raises(DamageError, match="not a JSON object"):
            members.decode_json(content)
    with pytest.raises(DamageError, match="not UTF-8 text \\(byte 1\\)"):
        members.decode_text(b"a\xff")
    with pytest.raises(DamageError, match="at most"):
        members.decode_text(b" " * (CAPS.member + 1))


@pytest.mark.parametrize("suffix", ["pyd", "pkl", "pickle", "pth", "pt", "npz", "mp", "cls.gz", "json.gz", "npy.exe"])
def test_suffixes_outside_the_list(suffix: str) -> None:
    with pytest.raises(DamageError, match="not one of"):
        members.suffix_of(suffix)


def test_npz_comes_back_and_bombs_do_not() -> None:
    arrays = {"text": np.ones((2, 3), np.float16), "pooled": np.zeros(4, np.float32)}
    content = members.encode_npz(arrays)
    assert content == members.encode_npz(arrays)
    for found in (members.decode_npz(content), np.load(io.BytesIO(content), allow_pickle=False)):
        assert set(found) == set(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
    stream = io.BytesIO()
    np.savez_compressed(stream, a=np.arange(5))
    np.testing.assert_array_equal(members.decode_npz(stream.getvalue(), compressed=True)["a"], np.arange(5))
    with pytest.raises(DamageError, match="compressed"):
        members.decode_npz(stream.getvalue())
    bomb = io.BytesIO()
    with (
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.npy", "w") as file,
    ):
        for _ in range(CAPS.sample // (1 << 20) + 1):
            file.write(bytes(1 << 20))
    with pytest.raises(DamageError, match="more than"):
        members.decode_npz(bomb.getvalue(), compressed=True)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_all_finite_agrees_with_numpy(dtype: str, value: float) -> None:
    array = np.linspace(-6e4, 6e4, 24).astype(dtype).reshape(4, 6)
    assert members.all_finite(array)
    assert members.all_finite(array[:, ::2])
    array[3, 5] = value
    assert not members.all_finite(array)
    assert not members.all_finite(array[:, 1::2])
    assert members.all_finite(np.finfo(dtype).max * np.ones(3, dtype))
