import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data_pipeline.prepare.ranks as ranks
from data_pipeline.encode.like import read_origin
from data_pipeline.index import parse_index
from data_pipeline.read.shards import ShardSet
from launcher.prepare import main
from tests.distributed import free_port

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--size", "32", "--encoder", "hash", "--pca-channels", "8", "--shard-samples", "16")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(60):
        Image.effect_noise((40, 32), number).convert("RGB").save(folder / f"{number}.jpg")
        (folder / f"{number}.txt").write_text(f"noise of strength {number}")
    return folder


def test_a_folder_of_pictures_from_end_to_end(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--source", str(pictures), "--out", str(tmp_path / "out"), *SMALL]
    assert main(arguments) == 0
    assert "prepared: train" in capsys.readouterr().out
    shards = ShardSet.open(tmp_path / "out", "train")
    assert shards.latent_shape == (8, 8, 8)
    assert shards.batch([0]).captions[0].startswith("noise of strength")
    assert shards.batch([0]).foreground.isnan().all()
    assert main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_skipped_pictures_are_named(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pictures / "7.jpg").write_bytes(b"no picture")
    (pictures / "8.txt").unlink()
    arguments = ["--source", str(pictures), "--out", str(tmp_path / "out"), *SMALL]
    assert main([*arguments, "--max-bad-share", "0.1"]) == 0
    output = capsys.readouterr()
    assert "skipped 7.jpg: unreadable" in output.err
    assert "skipped 8.jpg: no caption in 8.txt" in output.err
    assert "2 left out" in output.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "/no/such/folder"], "no such folder"),
        (["--encoder", "/no/such/encoder"], "cannot be loaded"),
        (["--size", "33"], "multiple of 4"),
        (["--limit", "0"], "--limit: got '0'"),
        (["--max-length", "1"], "--max-length: got '1'"),
        (["--encoder", "nothere,layers=2"], "option 'layers=2'; expected NAME and any of layer=N, pooled=mean"),
        (["--encoder", "hash,chat=plain"], "option 'chat=plain'; expected NAME and any of max_length=N"),
        (["--buckets", "32x32,32x36"], "32x36: patch size 2 does not divide the 8x9 latent"),
        (["--buckets", "32", "--bucket-step", "12"], "a step must be a whole number of tokens"),
        (["--bucket-step", "64"], "needs the side of a square in pixels, as --buckets 512 --bucket-step 64"),
        (["--buckets", "32x32,32x64", "--size", "48"], "none is 48 pixels; leave out --size"),
        (["--buckets", "64", "--bucket-step", "16", "--size", "48"], "none is 48 pixels; leave out --size"),
        (["--posterior", "sample"], "patch_pca has one latent per image"),
        (["--source", "/no/such/table.parquet"], "no such file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--source", str(pictures), "--out", str(tmp_path / "out"), *SMALL]
    assert main([*common, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_an_autoencoder_that_is_not_there(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--source", str(pictures), "--out", str(tmp_path / "out"), "--size", "32", "--encoder", "hash"]
    assert main([*words, "--codec", "autoencoder_kl", "--codec-name", "/no/such/codec"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "cannot be loaded" in error
    assert error.count("\n") == 1


def test_a_captions_file_with_a_missing_image(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"file": f"{number}.jpg", "caption": "x"} for number in range(61)]
    (pictures / "captions.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    arguments = ["--source", str(pictures), "--out", str(tmp_path / "out"), *SMALL]
    assert main(arguments) == 2
    assert "1 of 61 images are missing (60.jpg; row 61 of captions.jsonl" in capsys.readouterr().err
    assert main([*arguments, "--allow-missing", "--max-bad-share", "0.02"]) == 0


def test_several_encoders_side_by_side(pictures: Path, tmp_path: Path) -> None:
    arguments = ["--source", str(pictures), *SMALL, "--encoder", "hash,max_length=4"]
    for join, length, pooled in (("tokens", 9, 64), ("features", 5, 64)):
        assert main([*arguments, "--out", str(tmp_path / join), "--join", join]) == 0
        shards = ShardSet.open(tmp_path / join, "train")
        assert shards.batch([0]).text_mask.sum() == length
        assert shards.batch([0]).pooled.shape == (1, pooled)
        assert shards.encoder["kind"] == "joined"
        assert shards.text_encoder().identity == shards.encoder


def test_ranks_one_after_the_other(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ranks, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(ranks, "_POLL_S", 0.001)
    arguments = ["--source", str(pictures), "--out", str(tmp_path / "out"), *SMALL, "--shard-samples", "4"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main([*arguments, "--local_rank=0"]) == 2
    assert "rank 0, which fits the codec for all 2 ranks, gives no sign of life" in capsys.readouterr().err
    for rank, shown in (("0", "rank 0 of 2 has written its shards"), ("1", "prepared: train"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert main([*arguments, "--local_rank=0"]) == 0
        output = capsys.readouterr().out
        assert shown in output if shown else not output


def odd_pictures(folder: Path, count: int) -> Path:
    """Pictures of random sizes and shapes, as a user has them."""
    folder.mkdir()
    generator = np.random.Generator(np.random.Philox(key=count))
    for number in range(count):
        height, width = generator.integers(40, 200, 2)
        Image.effect_noise((int(width), int(height)), 60).convert("RGB").save(folder / f"{number}.jpg")
        (folder / f"{number}.txt").write_text(f"noise of size {height} x {width}")
    return folder


def test_odd_pictures_in_buckets_like_the_shipped_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, base = odd_pictures(tmp_path / "set", 40), ROOT / "assets" / "base.safetensors"
    words = ["--source", str(folder), "--like", str(base), "--buckets", "64", "--bucket-step", "16"]
    assert main([*words, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert "taken     40 pictures" in capsys.readouterr().out
    index = parse_index((tmp_path / "out" / "index.json").read_bytes(), "")
    assert index.codec == read_origin(base).codec_identity
    expected = {"96x32": (12, 4), "80x48": (10, 6), "64x64": (8, 8), "48x80": (6, 10), "32x96": (4, 12)}
    assert {name: bucket.grid for name, bucket in index.buckets.items()} == expected
    for name, bucket in index.buckets.items():
        assert f"bucket {name} ({bucket.grid[0]}x{bucket.grid[1]} = " in told
        assert bucket.latent == (16, bucket.grid[0] * 2, bucket.grid[1] * 2)
    assert sum(bucket.num_samples for bucket in index.buckets.values()) == 40
    shards = ShardSet.open(tmp_path / "out", "train")
    assert shards.main_bucket == "64x64"  # of the base's own size


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_under_torchrun_write_what_one_process_writes(pictures: Path, tmp_path: Path) -> None:
    arguments = [str(ROOT / "launcher/prepare.py"), "--source", str(pictures), *SMALL, "--shard-samples", "4"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for command, out in (([sys.executable], "one"), (torchrun, "two")):
        whole = [*command, *arguments, "--out", out]
        done = subprocess.run(whole, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


@pytest.mark.slow
def test_the_command_runs_as_a_script(pictures: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launcher/prepare.py"), "--source", str(pictures), "--out", "out", *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "index.json").is_file()
