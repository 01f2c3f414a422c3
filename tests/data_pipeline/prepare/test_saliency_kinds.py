"""Supplied saliency maps, from files beside images to samples."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.encode.codecs import Pixel
from data_pipeline.encode.saliency import EncodedImages, MapContext, parse_saliency
from data_pipeline.encode.texts import HashTextEncoder
from data_pipeline.prepare.saliency_kinds import SALIENCIES
from data_pipeline.read.mixture import Mixture
from data_pipeline.read.shards import ShardSet
from data_pipeline.sources.images import Picture
from launcher.prepare import main
from launcher.shards import main as shards_main
from sharpmoe.errors import DataError
from sharpmoe.report.contact import sample_cards
from sharpmoe.saliency import saliency_map

SMALL = ("--size", "32", "--encoder", "hash")
COUNT = 12


def noise(seed: int, size: tuple[int, int]) -> Image.Image:
    generator = np.random.Generator(np.random.Philox(key=seed))
    return Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of 64x64 and 48x96 pixels; every map, of a third of the size, is white in its left half."""
    path = tmp_path / "pictures"
    path.mkdir()
    for number in range(COUNT):
        height, width = ((64, 64), (48, 96))[number % 2]
        noise(number, (height, width)).save(path / f"{number}.png")
        (path / f"{number}.txt").write_text(f"picture {number}")
        levels = np.zeros((height // 3, width // 3), np.uint8)
        levels[:, : width // 6] = 255
        Image.fromarray(levels).save(path / f"{number}.saliency.png")
    return path


def prepare(folder: Path, out: Path, *words: str) -> int:
    codec = () if "--codec-from" in words else ("--pca-channels", "8")
    return main(["--source", str(folder), "--out", str(out), *SMALL, *codec, *words])


def maps_of(out: Path) -> dict[str, np.ndarray]:
    found = {}
    for split in json.loads((out / "index.json").read_text())["splits"]:
        shards = ShardSet.open(out, split)
        for index in range(shards.num_samples):
            batch, bucket = shards.batch([index]), shards.buckets[shards.bucket_of(index)]
            found[batch.captions[0]] = batch.saliency[0].reshape(bucket.grid).numpy()
    return found


def made(
    text: str, images: torch.Tensor, pictures: list[Picture], grid: tuple[int, int]
) -> tuple[torch.Tensor, list[bool]]:
    choice = parse_saliency(text, SALIENCIES)
    codec, encoder = Pixel(), HashTextEncoder(4, 8)
    count = len(images)
    batch = EncodedImages(
        images=images,
        pictures=pictures,
        grid=grid,
        latents=images.half(),
        texts=[{}] * count,
        labels=[-1] * count,
        numbers=list(range(count)),
    )
    return choice.maps(choice.kind.create(choice, MapContext(codec, encoder, 2, "cpu")), batch)


def test_the_laplacian_is_that_of_the_pixels() -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pictures = [Picture(image.numpy(), None) for image in images]
    assert torch.equal(made("laplacian", images, pictures, (4, 4))[0], saliency_map(images, (4, 4)))


def test_a_supplied_map_is_averaged_over_each_token() -> None:
    levels = np.random.Generator(np.random.Philox(key=1)).random((3, 1, 32, 48), dtype=np.float32)
    pictures = [Picture(np.zeros((3, 32, 48), np.float32), None, saliency=one) for one in levels]
    found, _ = made("supplied", torch.zeros(3, 3, 32, 48), pictures, (4, 6))
    expected = levels.reshape(3, 4, 8, 6, 8).mean((2, 4)).reshape(3, 24)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("words", [(), ("--fit", "pad"), ("--buckets", "32x32,24x48")])
def test_maps_follow_their_pictures(words: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    assert prepare(folder, tmp_path / "out", "--saliency", "supplied", *words) == 0
    found = maps_of(tmp_path / "out")
    assert len(found) == COUNT
    for caption, saliency in found.items():
        height, width = saliency.shape
        np.testing.assert_allclose(saliency[1:-1, : width // 2 - 1], 1, atol=0.01)  # without the soft edge
        np.testing.assert_allclose(saliency[:, width // 2 + 1 :], 0, atol=0.01)
        wide = int(caption.split()[1]) % 2 == 1
        padded = wide and "pad" in words  # 48x96 in 32x32: 16 rows of picture, 8 of bars above and below
        np.testing.assert_allclose(saliency[0, 0], 0 if padded else 1, atol=0.01)
        assert (height, width) == ((3, 6) if wide and "--buckets" in words else (4, 4))


def test_stored_maps_are_mirrored_with_their_picture(folder: Path, tmp_path: Path) -> None:
    classes = tmp_path / "classes"
    for name in ("a", "b"):
        (classes / name).mkdir(parents=True)
        for number in range(6):
            for suffix in (".png", ".saliency.png"):
                (classes / name / f"{name}{number}{suffix}").write_bytes((folder / f"{number}{suffix}").read_bytes())
    assert prepare(classes, tmp_path / "out", "--class-folders", "--flip", "--saliency", "supplied") == 0
    shards = ShardSet.open(tmp_path / "out", "train")
    assert shards.num_samples + shards.splits.get("unseen", 0) * 2 == 24  # only training images come mirrored too
    batch = shards.batch(range(shards.num_samples))
    for key, saliency in zip(batch.keys, batch.saliency.reshape(-1, 4, 4), strict=True):
        left, right = saliency[:, :1].mean(), saliency[:, 3:].mean()
        assert (left < 0.01 and right > 0.99) if key.endswith("-flip") else (left > 0.99 and right < 0.01)


def test_pictures_without_a_map_are_left_out_and_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "3.saliency.png").unlink()
    (folder / "4.saliency.png").write_bytes(b"no picture")
    (folder / "5.png").rename(folder / "5b.png")
    (folder / "5.txt").rename(folder / "5b.txt")
    (folder / "5.saliency.png").rename(folder / "5b.saliency.JPG")  # the suffix says nothing
    Image.new("L", (8, 8)).save(folder / "other.saliency.png")
    assert prepare(folder, tmp_path / "out", "--saliency", "supplied") == 0
    output = capsys.readouterr()
    assert "taken     10 pictures" in output.out
    assert "1 x no saliency map (3.saliency.png)" in output.out
    assert "skipped 3.png: no saliency map (3.saliency.png)" in output.err
    assert "skipped 4.png: its saliency map is unreadable: not a picture of a known kind" in output.err
    assert "skipped other.saliency.png: a saliency map without a picture of its name" in output.err
    assert len(maps_of(tmp_path / "out")) == 10


def test_maps_that_are_not_asked_for_are_no_pictures(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(folder, tmp_path / "with", "--max-bad-share", "0") == 0
    assert f"saliency maps ({COUNT}), which --saliency supplied takes" in capsys.readouterr().err
    for path in folder.glob("*.saliency.png"):
        path.unlink()
    assert prepare(folder, tmp_path / "without") == 0
    tars = [{path.name: path.read_bytes() for path in (tmp_path / name).glob("*.tar")} for name in ("with", "without")]
    assert tars[0] == tars[1]
    index = json.loads((tmp_path / "with" / "index.json").read_text())
    assert "saliency" not in index  # as folders of earlier versions
    assert index["source"] == json.loads((tmp_path / "without" / "index.json").read_text())["source"]


def test_a_table_names_maps(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "maps").mkdir()
    rows = ["file,caption,saliency"]
    for number in range(COUNT):
        rows.append(f"{number}.png,picture {number},{f'maps/{number}.png' if number else ''}")  # the first: beside it
        if number:
            (folder / f"{number}.saliency.png").rename(folder / "maps" / f"{number}.png")
    (folder / "maps" / "7.png").unlink()
    (folder / "captions.csv").write_text("\n".join(rows))
    assert prepare(folder, tmp_path / "out", "--saliency", "supplied") == 0
    output = capsys.readouterr()
    assert "skipped 7.png: its saliency map maps/7.png is not there" in output.err
    assert "not named" not in output.err
    found = maps_of(tmp_path / "out")
    assert len(found) == COUNT - 1
    assert all(saliency[:, 0].min() > 0.99 for saliency in found.values())


def test_a_parquet_table_holds_maps(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As bytes beside images of the table; one row names its map, one has none, one is broken."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = tmp_path / "table"
    table.mkdir()
    rows = [
        {
            "image": {"bytes": (folder / f"{number}.png").read_bytes(), "path": f"{number}.png"},
            "caption": f"picture {number}",
            "saliency": {"bytes": (folder / f"{number}.saliency.png").read_bytes(), "path": None},
        }
        for number in range(COUNT)
    ]
    (folder / "1.saliency.png").rename(table / "one.png")
    rows[1]["saliency"], rows[2]["saliency"] = {"bytes": None, "path": "one.png"}, None
    rows[3]["saliency"] = {"bytes": b"no picture", "path": None}
    parquet.write_table(arrow.Table.from_pylist(rows), table / "t.parquet", row_group_size=5)
    assert prepare(table, tmp_path / "out", "--saliency", "file") == 0
    output = capsys.readouterr()
    assert "skipped t.parquet/3/2.png: no saliency map" in output.err
    assert "skipped t.parquet/4/3.png: its saliency map is unreadable: not a picture of a known kind" in output.err
    found = maps_of(tmp_path / "out")
    for number in (2, 3):
        (folder / f"{number}.png").unlink()
    (table / "one.png").rename(folder / "1.saliency.png")
    assert prepare(folder, tmp_path / "beside", "--saliency", "file") == 0
    beside = maps_of(tmp_path / "beside")
    assert len(found) == COUNT - 2
    assert {name: m.tolist() for name, m in found.items()} == {name: m.tolist() for name, m in beside.items()}


def test_the_kind_is_part_of_recipe_and_shards(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(folder, tmp_path / "supplied", "--saliency", "supplied") == 0
    like = ("--codec-from", str(tmp_path / "supplied"))
    assert prepare(folder, tmp_path / "plain", *like) == 0
    assert prepare(folder, tmp_path / "supplied") == 2
    assert "was prepared with saliency = 'supplied', now asked for None" in capsys.readouterr().err
    supplied, plain = (ShardSet.open(tmp_path / name, "train") for name in ("supplied", "plain"))
    assert (supplied.saliency, plain.saliency) == ({"kind": "supplied"}, {"kind": "laplacian"})
    with pytest.raises(DataError, match="wrong saliency in .*plain: kind is 'laplacian', expected 'supplied'"):
        Mixture([supplied, plain])
    folders = [str(tmp_path / name) for name in ("supplied", "plain")]
    assert shards_main(["merge", str(tmp_path / "both"), *folders, "--quiet"]) == 2
    assert "wrong saliency" in capsys.readouterr().err
    assert shards_main(["stats", folders[0]]) == 0
    assert "saliency   kind supplied" in capsys.readouterr().out
    assert shards_main(["verify", folders[0], "--quiet"]) == 0
    card = sample_cards(supplied, 1)[0]
    assert card.saliency[0, :, 0].min() > 0.99  # contact sheets draw what is stored


def test_file_is_another_word_for_supplied(folder: Path, tmp_path: Path) -> None:
    assert prepare(folder, tmp_path / "out", "--saliency", "supplied") == 0
    assert prepare(folder, tmp_path / "out", "--saliency", "file") == 0
    assert ShardSet.open(tmp_path / "out", "train").saliency == {"kind": "supplied"}


def test_missing_maps_may_be_replaced(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "3.saliency.png").unlink()
    assert prepare(folder, tmp_path / "out", "--saliency", "file:missing=laplacian") == 0
    assert f"replaced  1 of {COUNT} saliency maps are the substitutes" in capsys.readouterr().out
    assert prepare(folder, tmp_path / "plain", "--codec-from", str(tmp_path / "out")) == 0
    found, plain = maps_of(tmp_path / "out"), maps_of(tmp_path / "plain")
    assert np.array_equal(found["picture 3"], plain["picture 3"])
    assert found["picture 4"][:, 0].min() > 0.99
    assert ShardSet.open(tmp_path / "out", "train").saliency == {"kind": "supplied", "missing": "laplacian"}


@pytest.fixture
def cut_out(folder: Path) -> Path:
    """The pictures, of which all but two are transparent in their right half, and without supplied maps."""
    for number in range(COUNT):
        (folder / f"{number}.saliency.png").unlink()
        if number > 1:
            pixels = np.asarray(Image.open(folder / f"{number}.png").convert("RGBA")).copy()
            pixels[:, pixels.shape[1] // 2 :, 3] = 0
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("words", [(), ("--buckets", "32x32,24x48")])
def test_alpha_as_saliency(
    words: tuple[str, ...], cut_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(cut_out, tmp_path / "out", "--saliency", "foreground", *words) == 0
    output = capsys.readouterr()
    assert "2 x no transparency, so no foreground map (--saliency foreground:missing=laplacian" in output.out
    assert "saliency  foreground" in output.out
    found = maps_of(tmp_path / "out")
    assert len(found) == COUNT - 2
    for saliency in found.values():
        half = saliency.shape[1] // 2
        assert saliency[:, : half - 1].min() > 0.99
        assert saliency[:, half + 1 :].max() < 0.01


def test_pictures_without_alpha_may_have_flat_maps(
    cut_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--saliency", "foreground:missing=flat")
    assert prepare(cut_out, tmp_path / "out", *words, "--dry-run") == 0
    assert "saliency  foreground (missing flat)" in capsys.readouterr().out
    assert prepare(cut_out, tmp_path / "out", *words) == 0
    output = capsys.readouterr().out
    assert f"flat      2 of {COUNT} saliency maps are the same everywhere" in output
    assert f"replaced  2 of {COUNT}" in output
    found = maps_of(tmp_path / "out")
    assert not found["picture 0"].any()
    assert found["picture 2"][:, 0].min() > 0.99
    assert prepare(cut_out, tmp_path / "out", "--saliency", "foreground") == 2
    assert "was prepared with saliency" in capsys.readouterr().err


def test_like_with_other_maps_is_noted(cut_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(cut_out, tmp_path / "one", "--saliency", "foreground") == 0
    size = ("--size", "32")
    words = ["--source", str(cut_out), "--out", str(tmp_path / "two"), "--like", str(tmp_path / "one"), *size]
    assert main(words) == 0
    assert "saliency  laplacian; --like has foreground: such folders are neither merged nor mixed" in (
        capsys.readouterr().out
    )


def test_a_bad_choice_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(folder, tmp_path / "out", "--saliency", "depth") == 2
    error = capsys.readouterr().err
    assert "kind 'depth'; expected laplacian, foreground, file, supplied, model, base-error" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_changed_maps_are_another_source(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(folder, tmp_path / "out", "--saliency", "supplied") == 0
    noise(5, (40, 40)).save(folder / "2.saliency.png")
    assert prepare(folder, tmp_path / "out", "--saliency", "supplied") == 2
    assert "was prepared with source.sha256" in capsys.readouterr().err


def test_maps_in_tars(folder: Path, tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    with tarfile.open(tars / "a.tar", "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name)
    assert prepare(tars, tmp_path / "in-tars", "--saliency", "supplied") == 0
    assert prepare(folder, tmp_path / "beside", "--saliency", "supplied") == 0
    found, expected = maps_of(tmp_path / "in-tars"), maps_of(tmp_path / "beside")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[caption], expected[caption]) for caption in expected)
