import copy
import gc
import hashlib
import io
import json
import multiprocessing
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.index import sealed
from data_pipeline.prepare.write import prepare_shards
from data_pipeline.read.mixture import Mixture
from data_pipeline.read.samples import Draw, Sample
from data_pipeline.read.shards import ShardSet, SplitPart
from data_pipeline.sources.images import load_picture
from data_pipeline.sources.items import Item
from sharpmoe.errors import DamageError, DataError
from sharpmoe.saliency import saliency_map, token_mask
from tests.fixtures_data import QUIET, ShapesSource, make_shards, make_unequal_shards, shapes_recipe
from tests.memory_shards import Options, open_files, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_shards(tmp_path / "d")


@pytest.fixture
def shards(folder: Path) -> ShardSet:
    return ShardSet.open(folder, "train")


def one_line(error: pytest.ExceptionInfo[DataError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def replace_member(folder: Path, shard: str, member: str, content: bytes) -> str:
    """Put other bytes of the same size into the first sample and mend all checksums; returns its key."""
    tar, table = folder / f"{shard}.tar", folder / f"{shard}.json"
    record = json.loads(table.read_text())
    key, places = record["samples"][0]
    offset, size, _ = places[member]
    assert len(content) == size
    data = bytearray(tar.read_bytes())
    data[offset : offset + size] = content
    tar.write_bytes(data)
    places[member][2] = zlib.crc32(content)
    table.write_text(json.dumps(record))
    index = json.loads((folder / "index.json").read_text())
    for entry in index["shards"]:
        if entry["name"] == shard:
            entry["table_sha256"] = hashlib.sha256(table.read_bytes()).hexdigest()
    (folder / "index.json").write_bytes(sealed(index))
    return str(key)


def npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_shapes_and_types(shards: ShardSet) -> None:
    assert (shards.num_samples, shards.latent_shape, shards.grid) == (20, (4, 8, 8), (4, 4))
    assert (shards.text_length, shards.text_width, shards.pooled_width) == (4, 32, 32)
    assert shards.splits == {"train": 20, "unseen": 4}
    batch = shards.batch([3, 0, 19])
    assert batch.latent.shape == (3, 4, 8, 8)
    assert batch.text.shape == (3, 4, 32)
    assert batch.text_mask.shape == (3, 4)
    assert batch.pooled.shape == (3, 32)
    assert batch.saliency.shape == batch.foreground.shape == (3, 16)
    assert batch.position.tolist() == [3, 0, 19]
    assert shards.batch([3, 0], [100, 101]).position.tolist() == [100, 101]
    for tensor in (batch.latent, batch.pooled, batch.saliency, batch.foreground):
        assert tensor.dtype == torch.float32
    assert batch.text.dtype == torch.float16  # as it is stored
    assert batch.text_mask.dtype == torch.bool
    assert batch.label.dtype == batch.position.dtype == torch.int64
    assert torch.equal(batch.latent[1], shards.batch([0]).latent[0])


def test_values_are_those_of_the_pictures(shards: ShardSet) -> None:
    source = ShapesSource()
    items = {item.key: item for unit in source.units() for item in source.survey(unit) if isinstance(item, Item)}
    batch = shards.batch(range(20))
    pictures = [load_picture(source.read(items[key]), (32, 32)) for key in batch.keys]
    images = torch.from_numpy(np.stack([picture.pixels for picture in pictures]))
    alpha = torch.from_numpy(np.stack([picture.alpha for picture in pictures]))
    assert torch.equal(batch.saliency, saliency_map(images, (4, 4)))
    assert torch.equal(batch.foreground, token_mask(alpha, (4, 4)))
    assert torch.allclose(batch.latent, shards.codec_object().encode(images), atol=2e-3, rtol=1e-3)
    text = shards.text_encoder().encode(list(batch.captions))
    assert torch.equal(text.mask, batch.text_mask)
    assert torch.allclose(text.states, batch.text.float(), atol=2e-3)
    assert torch.allclose(text.pooled, batch.pooled)
    assert [items[key].captions[0][0] for key in batch.keys] == list(batch.captions)
    assert [items[key].label for key in batch.keys] == batch.label.tolist()
    assert batch.latent.std().item() == pytest.approx(1, abs=0.05)


def test_the_empty_caption(shards: ShardSet) -> None:
    text, mask, pooled = shards.empty_text()
    assert text.shape == (4, 32)
    assert mask.tolist() == [True, False, False, False]
    assert torch.allclose(pooled, shards.text_encoder().encode([""]).pooled[0])
    assert text[0].abs().sum() > 0


def test_images_without_alpha_have_no_foreground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.prepare.encoding.load_picture", lambda *a: load_picture(*a)._replace(alpha=None))
    batch = ShardSet.open(make_shards(tmp_path / "d"), "train").batch([0, 1])
    assert batch.foreground.isnan().all()
    assert batch.saliency.isfinite().all()


# --- choices ----------------------------------------------------------------------------------------------------------


def drawn(options: Options, count: int = 400) -> list[Sample]:
    shards = open_files(write([("16x16", 2)], options))
    found = [shards.load(1, Draw(7, position)) for position in range(count)]
    return [sample for sample in found if isinstance(sample, Sample)]


def test_captions_are_chosen_by_their_weights() -> None:
    samples = drawn(Options(captions=(1, 3, 0)))
    assert {sample.caption for sample in samples} == {"caption 0 of 1", "caption 1 of 1"}
    second = [sample for sample in samples if sample.caption == "caption 1 of 1"]
    assert len(samples) == 400
    assert len(second) == pytest.approx(300, abs=40)
    assert all((sample.text == 1).all() and (sample.pooled == 1).all() for sample in second)
    assert [sample.caption for sample in samples] == [s.caption for s in drawn(Options(captions=(1, 3, 0)))]


def test_mirror_images_come_with_mirrored_maps() -> None:
    plain = open_files(write([("16x16", 2)], Options(flip=True))).load(1)
    assert isinstance(plain, Sample)
    samples = drawn(Options(flip=True))
    mirrored = [sample for sample in samples if not np.array_equal(sample.latent, plain.latent)]
    assert len(mirrored) == pytest.approx(200, abs=50)
    for sample in mirrored:
        assert np.array_equal(sample.latent, plain.latent[..., ::-1])
        assert sample.saliency.tolist() == plain.saliency.reshape(2, 2)[:, ::-1].ravel().tolist()


def test_latents_are_drawn_around_their_mean() -> None:
    samples = drawn(Options(spread=True))
    values = np.stack([sample.latent for sample in samples])
    plain = open_files(write([("16x16", 2)], Options(spread=True))).load(1)
    assert isinstance(plain, Sample)
    assert (values.mean(0) - plain.latent) == pytest.approx(0, abs=0.13)  # 5 standard errors
    assert values.std() == pytest.approx(np.hypot(0.5, plain.latent.astype(np.float32).std()), rel=0.1)
    assert len({sample.latent.tobytes() for sample in samples}) == 400


def test_buckets_follow_one_another() -> None:
    shards = open_files(write([("16x16", 3), ("32x8", 4), ("16x16", 2)]))
    assert [shards.bucket_of(index) for index in range(9)] == ["16x16"] * 5 + ["32x8"] * 4
    assert (shards.indices_of("32x8"), shards.main_bucket) == (range(5, 9), "16x16")
    assert shards.batch(range(5)).keys == ("s0000", "s0001", "s0002", "s0007", "s0008")
    assert shards.batch(range(5, 9)).latent.shape == (4, 2, 8, 2)
    with pytest.raises(ValueError, match="different buckets"):
        shards.batch([0, 5])


def test_frames_are_an_axis_of_latents_and_maps() -> None:
    shards = open_files(write([("3x16x16", 3), ("3x8x32", 2)], Options(spread=True, flip=True)))
    assert (shards.frames, shards.latent_shape, shards.grid) == (3, (2, 3, 4, 4), (3, 2, 2))
    batch = shards.batch(range(3))
    assert batch.latent.shape == (3, 2, 3, 4, 4)
    assert batch.saliency.shape == (3, 12)
    drawn = {bool(sample.saliency[0]): sample for sample in (shards.load(3, Draw(0, at)) for at in range(20))}
    assert {*drawn} == {False, True}  # as it is, and mirrored
    ramp = np.arange(12, dtype=np.float32) / 8
    assert np.array_equal(drawn[False].saliency, ramp)
    assert np.array_equal(drawn[True].saliency.reshape(3, 1, 4), ramp.reshape(3, 1, 4)[..., ::-1])
    assert drawn[True].latent[0, 0, 0, 0] > drawn[True].latent[0, 0, 0, -1]


def test_a_folder_has_one_number_of_frames() -> None:
    with pytest.raises(DataError, match="buckets of different numbers of frames"):
        open_files(write([("3x16x16", 3), ("16x16", 2)]))
    clips, others, still = (
        open_files(write([(bucket, 2)], prefix=bucket), f"place{bucket}") for bucket in ("3x16x16", "4x16x16", "16x16")
    )
    for other in (others, still):
        with pytest.raises(
            DataError, match=rf"{other.location}: frames is {other.frames}, place3x16x16 has 3; prepare"
        ):
            Mixture([clips, other])
    assert Mixture([clips, clips]).buckets["3x16x16"].tokens == 12


def test_prepared_buckets(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "d", 40, buckets="32x32,24x64", sides=((1, 1), (1, 3)))
    shards = ShardSet.open(folder, "train")
    for name, bucket in shards.buckets.items():
        batch = shards.batch(shards.indices_of(name))
        assert batch.latent.shape[1:] == bucket.latent
        assert batch.saliency.shape[1] == bucket.grid[0] * bucket.grid[1]
    assert {name: bucket.grid for name, bucket in shards.buckets.items()} == {"32x32": (4, 4), "24x64": (3, 8)}
    assert (shards.main_bucket, shards.grid, shards.image_size) == ("32x32", (4, 4), 32)


def test_folders_of_the_first_schema_are_read() -> None:
    shards = ShardSet.open(Path(__file__).parents[2] / "data" / "fluent_slice", "train")
    assert json.loads((Path(shards.location) / "index.json").read_text())["schema"] == 1
    assert (shards.num_samples, list(shards.buckets)) == (37, ["64x64"])
    assert shards.batch(range(37)).latent.shape == (37, *shards.latent_shape)


# --- what can be wrong ------------------------------------------------------------------------------------------------


def test_a_folder_that_was_never_prepared(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no index.json; run `python launcher/prepare.py --out") as error:
        ShardSet.open(tmp_path, "train")
    one_line(error)


def test_a_split_that_does_not_exist(folder: Path) -> None:
    with pytest.raises(DataError, match=r"no samples in split 'val'; it has train \(20\), unseen \(4\)") as error:
        ShardSet.open(folder, "val")
    one_line(error)


def test_a_missing_shard(folder: Path) -> None:
    (folder / "train-00001.tar").unlink()
    with pytest.raises(
        DataError, match=r"train-00001.tar: shard is missing; run `python launcher/prepare.py`"
    ) as error:
        ShardSet.open(folder, "train")
    one_line(error)
    ShardSet.open(folder, "unseen")


def test_a_missing_table(folder: Path) -> None:
    (folder / "train-00001.json").unlink()
    with pytest.raises(DataError, match=r"train-00001.json: table is missing; run `python launcher/prepare") as error:
        ShardSet.open(folder, "train")
    one_line(error)
    ShardSet.open(folder, "unseen")


def test_a_shard_cut_short(folder: Path) -> None:
    path = folder / "train-00001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"train-00001.tar: shard has \d+ bytes, expected \d+") as error:
        ShardSet.open(folder, "train")
    one_line(error)


def test_a_shard_that_goes_away_after_opening(folder: Path, shards: ShardSet) -> None:
    (folder / "train-00000.tar").unlink()
    with pytest.raises(DamageError, match=r"train-00000.tar, key number 0, cannot be read \(No such file"):
        shards.batch([0])


def test_damage_may_be_borne(folder: Path) -> None:
    (folder / "train-00000.tar").unlink()
    (folder / "train-00001.tar").write_bytes((folder / "train-00001.tar").read_bytes()[:-512])
    shards = ShardSet.open(folder, "train", accept_damage=True)
    assert str(shards.load(0)).startswith(f"{folder}/train-00000.tar, key number 0, cannot be read")
    assert isinstance(shards.load(8), Sample)
    assert [str(flaw).split(": ")[1][:9] for flaw in shards.flaws()] == ["shard has"]
    assert shards.flaws() == []


def test_flipped_bytes_name_shard_and_key(folder: Path, shards: ShardSet) -> None:
    key, places = json.loads((folder / "train-00000.json").read_text())["samples"][0]
    path = folder / "train-00000.tar"
    data = bytearray(path.read_bytes())
    data[places["latent.npy"][0] + 200] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamageError, match=rf"train-00000.tar, key {key}, latent.npy: checksum differs") as error:
        shards.batch([0])
    one_line(error)
    shards.batch([1])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_latent_that_is_not_finite(folder: Path, value: float) -> None:
    latent = np.zeros((4, 8, 8), dtype=np.float16)
    latent[1, 2, 3] = value
    key = replace_member(folder, "train-00000", "latent.npy", npy(latent))
    with pytest.raises(DataError, match=rf"train-00000.tar, key {key}, latent.npy: holds NaN or infinity") as error:
        ShardSet.open(folder, "train").batch([0])
    one_line(error)


def test_a_latent_of_another_shape(folder: Path) -> None:
    key = replace_member(folder, "train-00000", "latent.npy", npy(np.zeros((8, 4, 8), dtype=np.float16)))
    with pytest.raises(
        DataError, match=rf"key {key}, latent.npy: float16 of shape \(8, 4, 8\), expected floats of shape \(4, 8, 8\)"
    ):
        ShardSet.open(folder, "train").batch([0])


def test_pickles_are_never_loaded(folder: Path) -> None:
    size = json.loads((folder / "train-00000.json").read_text())["samples"][0][1]["latent.npy"][1]
    content = npy(np.array([{"a": 1}], dtype=object))
    replace_member(folder, "train-00000", "latent.npy", content + b"\0" * (size - len(content)))
    with pytest.raises(DataError, match=r"dtype '\|O' is not a plain number; objects are never read"):
        ShardSet.open(folder, "train").batch([0])


def test_a_wrong_codec_or_encoder(shards: ShardSet, tmp_path: Path) -> None:
    shards.require(shards.codec, shards.encoder)
    with pytest.raises(DataError, match=r"wrong codec in .*channels is 4, expected 16") as error:
        shards.require(codec={**shards.codec, "channels": 16})
    one_line(error)
    with pytest.raises(DataError, match=r"wrong text encoder in .*width is 32, expected 384"):
        shards.require(encoder={**shards.encoder, "width": 384})


def test_a_codec_file_of_other_shards(shards: ShardSet, folder: Path, tmp_path: Path) -> None:
    other = make_shards(tmp_path / "other", num_images=30)
    (folder / "codec.safetensors").write_bytes((other / "codec.safetensors").read_bytes())
    with pytest.raises(DataError, match=r"wrong codec in .*codec.safetensors: sha256 is"):
        shards.codec_object()


@pytest.mark.parametrize("name", ["index.json", "train-00000.json", "empty_text.npz"])
def test_other_damaged_files(name: str, folder: Path) -> None:
    (folder / name).write_bytes(b"{" + (folder / name).read_bytes()[:-5])
    with pytest.raises(DataError, match=rf"{name}.* damaged") as error:
        _read_all(folder)
    one_line(error)


def _read_all(folder: Path) -> None:
    shards = ShardSet.open(folder, "train")
    shards.batch([0])
    shards.empty_text()


def test_another_schema(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "schema": 99}))
    with pytest.raises(DataError, match="schema 99, expected 2"):
        ShardSet.open(folder, "train")


def test_an_index_out_of_range(shards: ShardSet) -> None:
    for index in (-1, 20):
        with pytest.raises(IndexError):
            shards.batch([index])


# --- processes --------------------------------------------------------------------------------------------------------


def _first_latent(shards: ShardSet) -> float:
    return float(shards.batch([0]).latent.sum())


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.slow
def test_it_may_be_used_in_other_processes(shards: ShardSet, method: str) -> None:
    here = _first_latent(shards)
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(_first_latent, (shards,)) == here
    assert _first_latent(copy.copy(shards)) == _first_latent(shards) == here


def test_files_are_closed(folder: Path) -> None:
    gc.collect()  # what earlier tests left behind must not be counted
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        ShardSet.open(folder, "train").batch(range(20))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_fingerprint_follows_the_content(tmp_path: Path, folder: Path) -> None:
    same, other = make_shards(tmp_path / "a"), tmp_path / "b"
    prepare_shards(ShapesSource(), other, replace(shapes_recipe(), limit=23), QUIET)
    first = ShardSet.open(folder, "train").fingerprint
    assert ShardSet.open(same, "train").fingerprint == first
    assert ShardSet.open(other, "train").fingerprint != first


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_parts_of_a_split_are_all_of_it_once(tmp_path: Path, of: int) -> None:
    """In the order of the split, over shards and buckets."""
    folder = make_unequal_shards(tmp_path)
    whole = ShardSet.open(folder, "train")
    keys = [whole.batch([index]).keys[0] for index in range(whole.num_samples)]
    assert len(whole.buckets) == 3
    for number in range(1, of + 1):
        part = ShardSet.open(folder, f"train:{number}/{of}")
        rows = range(number - 1, whole.num_samples, of)
        assert [part.batch([index]).keys[0] for index in range(part.num_samples)] == [keys[row] for row in rows]
        assert [part.label(index) for index in range(part.num_samples)] == [whole.label(row) for row in rows]
        assert [part.bucket_of(index) for index in range(part.num_samples)] == [whole.bucket_of(row) for row in rows]
        found = [index for name in part.buckets for index in part.indices_of(name)]
        assert found == list(range(part.num_samples))
        assert {name: sum(counts) for name, counts in part.bucket_shards.items()} == {
            name: len(part.indices_of(name)) for name in part.buckets
        }


def test_a_part_that_is_none_is_one_line(folder: Path) -> None:
    assert SplitPart.read("unseen") == ("unseen", 1, 1)
    assert SplitPart.read("unseen:2/3") == ("unseen", 2, 3)
    for split, message in (
        ("unseen:3/2", "split 'unseen:3/2': expected SPLIT or SPLIT:I/N with I up to N"),
        ("unseen:a", "expected SPLIT or SPLIT:I/N"),
        ("unseen:9/9", "no samples in split 'unseen:9/9'"),
    ):
        with pytest.raises(DataError, match=message) as raised:
            ShardSet.open(folder, split)
        assert str(folder) in one_line(raised)
