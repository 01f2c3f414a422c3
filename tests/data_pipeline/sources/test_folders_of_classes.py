"""One folder per class, and latents that ProMoE has cached."""

from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from data_pipeline.encode.autoencoders import _SD_VAE_SCALE
from data_pipeline.members import decode_npy
from data_pipeline.read.shards import ShardSet
from data_pipeline.sources.folders import ClassFolderSource
from launcher.prepare import main
from sharpmoe.errors import DataError
from sharpmoe.saliency import saliency_map
from tests.fixtures_data import listing

CLASSES = ("n01", "n02", "n03")
SIZE = 32


def class_folder(root: Path, images: int = 4) -> Path:
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for number in range(images):
            pixels = generator.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{name}_{number}.png")
    return root


def cache(folder: Path, root: Path) -> Path:
    """Moments as ProMoE's preprocess_vae.py writes them."""
    generator = np.random.default_rng(1)
    for image in sorted(folder.rglob("*.png")):
        path = root / image.relative_to(folder).with_suffix(".latent.npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = generator.standard_normal((2, 8, SIZE // 8, SIZE // 8)).astype(np.float32)
        np.savez_compressed(path, latent=arrays[0], latent_flip=arrays[1])
    return root


def test_labels_count_the_class_folders(tmp_path: Path) -> None:
    items = listing(ClassFolderSource(class_folder(tmp_path / "set"))).items
    assert {(Path(item.name).parent.name, item.label) for item in items} == {("n01", 0), ("n02", 1), ("n03", 2)}
    assert {item.captions[0][0] for item in items} == set(CLASSES)
    assert len({item.key for item in items}) == len(items) == 12


def test_train_and_val_are_the_splits_and_classes_have_names(tmp_path: Path) -> None:
    class_folder(tmp_path / "train")
    class_folder(tmp_path / "val", images=1)
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01 tench, Tinca tinca\nn02 goldfish\n")
    items = listing(ClassFolderSource(tmp_path, flip=True)).items
    assert sum(item.split == "unseen" for item in items) == 3
    assert sum(item.split == "train" for item in items) == 24
    assert {item.captions[0][0] for item in items} == {"tench", "goldfish", "n03"}
    assert not any(item.flip for item in items if item.split == "unseen")


def test_cached_moments_become_latents_with_the_saliency_of_the_image(tmp_path: Path) -> None:
    class_folder(tmp_path / "set" / "train", images=6)
    class_folder(tmp_path / "set" / "val", images=1)
    cache(tmp_path / "set" / "train", tmp_path / "cache")
    cache(tmp_path / "set" / "val", tmp_path / "cache")
    arguments = ["--source", str(tmp_path / "set"), "--out", str(tmp_path / "out"), "--size", str(SIZE), "--flip"]
    assert main([*arguments, "--moments", str(tmp_path / "cache"), "--encoder", "hash"]) == 0
    shards = ShardSet.open(tmp_path / "out", "train")
    assert shards.latent_shape == (4, 4, 4)
    assert shards.num_samples == 36
    batch = shards.batch(range(36))
    assert sorted(set(batch.label.tolist())) == [0, 1, 2]
    for row, key in enumerate(batch.keys):
        name = key.split("-")[1]
        flip = key.endswith("flip")
        with np.load(tmp_path / "cache" / name.split("_")[0] / f"{name}.latent.npz") as arrays:
            expected = torch.from_numpy(arrays["latent_flip" if flip else "latent"][:4]) * _SD_VAE_SCALE
        torch.testing.assert_close(batch.latent[row], expected.half().float())
        image = np.array(Image.open(tmp_path / "set" / "train" / name.split("_")[0] / f"{name}.png"))
        pixels = torch.from_numpy(image).permute(2, 0, 1).float()[None] / 127.5 - 1
        saliency = saliency_map(pixels.flip(-1) if flip else pixels, shards.grid)[0]
        torch.testing.assert_close(batch.saliency[row], saliency, rtol=0, atol=2e-3)


def test_an_image_without_a_cached_latent_is_skipped_and_a_wrong_size_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = class_folder(tmp_path / "set", images=8)
    moments = cache(folder, tmp_path / "cache")
    (moments / "n01" / "n01_0.latent.npz").unlink()
    arguments = ["--source", str(folder), "--moments", str(moments), "--encoder", "hash", "--max-bad-share", "0.1"]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--size", str(SIZE)]) == 0
    assert "skipped n01/n01_0.png: no cached latent" in capsys.readouterr().err
    assert main([*arguments, "--out", str(tmp_path / "other"), "--size", "64"]) == 2
    assert "set --size" in capsys.readouterr().err


def test_a_missing_folder_and_an_empty_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--moments takes a folder"):
        ClassFolderSource(tmp_path, moments=tmp_path / "none")
    with pytest.raises(DataError, match="one folder per class"):
        listing(ClassFolderSource(tmp_path))


def test_cached_moments_with_std_and_mirror_image(tmp_path: Path) -> None:
    folder = class_folder(tmp_path / "set")
    cache(folder, tmp_path / "cache")
    arguments = [
        "--source",
        str(folder),
        "--moments",
        str(tmp_path / "cache"),
        "--encoder",
        "hash",
        "--size",
        str(SIZE),
    ]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--posterior", "std", "--flip-pair"]) == 0
    read = list(webdataset.WebDataset(str(tmp_path / "out" / "train-00000.tar"), shardshuffle=False))
    for sample in read:
        name = sample["__key__"].split("-")[1]
        with np.load(tmp_path / "cache" / name.split("_")[0] / f"{name}.latent.npz") as arrays:
            for suffix, moments in (("", arrays["latent"]), ("_flip", arrays["latent_flip"])):
                mean, std = moments[:4] * _SD_VAE_SCALE, np.exp(0.5 * moments[4:]) * _SD_VAE_SCALE
                np.testing.assert_allclose(decode_npy(sample[f"latent{suffix}.npy"]), mean, atol=1e-3)
                np.testing.assert_allclose(decode_npy(sample[f"latent{suffix}_std.npy"]), std, rtol=2e-3)


def left_out(folder: Path) -> dict[str, str]:
    return {entry.name: entry.reason for entry in listing(ClassFolderSource(folder)).skipped}


def test_a_link_that_leads_nowhere_is_left_out(tmp_path: Path) -> None:
    folder = class_folder(tmp_path)
    (folder / "n02" / "gone.png").symlink_to("/nowhere/x.png")
    (folder / "n04").symlink_to("/nowhere")
    assert left_out(folder) == {
        "n02/gone.png": "a link that leads nowhere",
        "n04": "a link that leads nowhere",
    }


def test_linked_class_folders_are_taken_and_loops_are_not(tmp_path: Path) -> None:
    folder = class_folder(tmp_path / "set")
    (class_folder(tmp_path / "other", images=2) / "n01" / "more").symlink_to(tmp_path / "set")
    (folder / "n04").symlink_to(tmp_path / "other" / "n02")
    (folder / "n03" / "sub").symlink_to(tmp_path / "other" / "n03")
    (folder / "n05").symlink_to(tmp_path)
    found = listing(ClassFolderSource(folder))
    assert sorted({item.label for item in found.items}) == [0, 1, 2, 3]
    assert sum(item.label == 3 for item in found.items) == 2
    assert sum(item.label == 2 for item in found.items) == 6
    assert {entry.name for entry in found.skipped} == {"n05"}


@pytest.mark.parametrize("val", ["val", "validation", "valid"])
def test_held_out_pictures_without_a_class_of_train_are_named(val: str, tmp_path: Path) -> None:
    class_folder(tmp_path / "train", images=2)
    class_folder(tmp_path / val, images=1)
    picture = tmp_path / val / "n01" / "n01_0.png"
    (tmp_path / val / "flat.png").write_bytes(picture.read_bytes())
    (tmp_path / val / "n99").mkdir()
    (tmp_path / val / "n99" / "x.png").write_bytes(picture.read_bytes())
    (tmp_path / "test" / "n01").mkdir(parents=True)
    (tmp_path / "test" / "n01" / "y.png").write_bytes(picture.read_bytes())
    (tmp_path / "train" / ".hidden").mkdir()
    (tmp_path / "train" / "notes.rst").write_text("x")
    found = listing(ClassFolderSource(tmp_path))
    assert {item.split for item in found.items} == {"train", "unseen"}
    assert len(found.items) == 9
    assert {entry.name: entry.reason for entry in found.skipped} == {
        f"{val}/flat.png": f"not in a class folder; expected {val}/CLASS/flat.png",
        f"{val}/n99/x.png": "n99/ is not a class of train/",
        "test/n01/y.png": "test/ is neither train/ nor val/ nor validation/ nor valid/",
        "train/.hidden": "a hidden folder is no class; rename it where it is one",
        "*.rst": "1 file of a kind that is not taken; only pictures in class folders are",
    }
    assert all(entry.beside for entry in found.skipped)


def test_a_val_folder_beside_the_classes(tmp_path: Path) -> None:
    class_folder(tmp_path)
    class_folder(tmp_path / "val", images=1)
    found = listing(ClassFolderSource(tmp_path)).items
    assert sorted({item.label for item in found}) == [0, 1, 2]
    assert sum(item.split == "unseen" for item in found) == 3


def test_a_class_that_is_called_train(tmp_path: Path) -> None:
    class_folder(tmp_path)
    (tmp_path / "n02").rename(tmp_path / "train")
    found = listing(ClassFolderSource(tmp_path))
    assert {(Path(item.name).parent.name, item.label) for item in found.items} == {("n01", 0), ("n03", 1), ("train", 2)}
    assert not found.skipped


def test_class_names_that_are_not_utf8_are_one_line(tmp_path: Path) -> None:
    class_folder(tmp_path)
    (tmp_path / "LOC_synset_mapping.txt").write_bytes("n01 caf\u00e9".encode("latin-1"))
    with pytest.raises(DataError, match=r"LOC_synset_mapping.txt: not UTF-8 text \(byte 7\); save it as UTF-8"):
        listing(ClassFolderSource(tmp_path))
    (tmp_path / "LOC_synset_mapping.txt").write_bytes("\ufeffn01 caf\u00e9".encode())
    assert {item.captions[0][0] for item in listing(ClassFolderSource(tmp_path)).items} == {"caf\u00e9", "n02", "n03"}


@pytest.mark.parametrize("in_splits", [True, False])
def test_a_held_out_picture_never_takes_the_latent_of_a_training_picture(in_splits: bool, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    class_folder(folder / "train", images=2)
    class_folder(folder / "val", images=1)
    (folder / "val" / "n02" / "n02_0.png").rename(folder / "val" / "n02" / "other.png")
    for split in ("train", "val"):
        cache(folder / split, tmp_path / "cache" / (split if in_splits else ""))
    found = listing(ClassFolderSource(folder, tmp_path / "cache"))
    latents = {item.name: Path(item.latent).relative_to(tmp_path / "cache").as_posix() for item in found.items}
    assert latents["val/n02/other.png"] == f"{'val/' if in_splits else ''}n02/other.latent.npz"
    assert latents.get("val/n01/n01_0.png") == ("val/n01/n01_0.latent.npz" if in_splits else None)
    assert len(found.skipped) == (0 if in_splits else 2)
    assert all("that of train/n0" in entry.reason for entry in found.skipped)


def test_what_macos_adds_is_no_class_and_no_image(tmp_path: Path) -> None:
    folder = class_folder(tmp_path / "set")
    expected = listing(ClassFolderSource(folder)).items
    for path in (folder / "n01" / "._n01_0.png", folder / "n02" / "._n02_0.png", folder / "__MACOSX" / "._n01"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\0\5\x16\7")
    found = listing(ClassFolderSource(folder))
    assert found.items == expected
    assert [(entry.name, entry.reason, entry.beside) for entry in found.skipped] == [
        ("__MACOSX", "what macOS adds to archives is no class", True),
        ("._*", "files that macOS writes beside others (2)", True),
    ]
