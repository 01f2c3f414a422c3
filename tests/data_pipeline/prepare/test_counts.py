"""The closing table of a preparation: taken, left out by reason, enlarged, captions cut."""

import json
from pathlib import Path

import pytest
from PIL import Image

import data_pipeline.prepare.ranks as ranks
import data_pipeline.prepare.write as write
from data_pipeline.prepare.counts import Counts, _reason_of, left_out_lines, read_counts, reasons_of, write_counts
from data_pipeline.sources.items import Skipped, shown
from launcher.prepare import main

OPTIONS = ("--encoder", "hash", "--codec", "pixel", "--patch-size", "4", "--size", "16", "--shard-samples", "3")


def pictures(folder: Path, *sizes: tuple[int, int]) -> Path:
    folder.mkdir(parents=True)
    for number, size in enumerate(sizes):
        Image.new("RGB", size, "red").save(folder / f"p{number}.png")
        (folder / f"p{number}.txt").write_text("word " * (number + 1))
    return folder


def table(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    lines = capsys.readouterr().out.splitlines()
    found = [line.partition(" ") for line in lines if not line.startswith((" ", "/"))]
    return {name: rest.strip() for name, _, rest in found}


def test_the_table_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = pictures(tmp_path / "set", (16, 16), (15, 40), (40, 15), (90, 90), (15, 15))
    (source / "p3.txt").unlink()
    Image.new("RGB", (9, 9)).save(source / "q.png")
    (source / "orphan.txt").write_text("x")
    arguments = ["--source", str(source), "--out", str(tmp_path / "out"), *OPTIONS, "--max-length", "4"]
    for _ in range(2):  # a folder that was complete says the same
        assert main(arguments) == 0
        found = table(capsys)
        assert found["taken"].startswith("4 pictures: train ")
        assert found["left"] == "out  3"
        assert found["enlarged"] == "3 of 4 pictures are smaller than the target 16x16 (cropped)"
        assert found["captions"] == "1 of 4 cut at 4 tokens (--max-length); the longest has 6"


def test_the_table_is_the_same_on_several_ranks_in_several_buckets_and_after_a_kill(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [(16, 16), (15, 40), (40, 15), (90, 90), (30, 60), (60, 30), (8, 8), (20, 11)] * 3
    source = pictures(tmp_path / "set", *sizes)
    table_of_bucket = ("--buckets", "16", "--bucket-step", "4", "--max-length", "4", "--shard-samples", "2")
    words = ["--source", str(source), *OPTIONS, *table_of_bucket, "--fit", "crop"]
    monkeypatch.setattr(ranks, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(ranks, "_POLL_S", 0.001)
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    whole = table(capsys)
    assert whole["enlarged"].startswith("6 of 24 pictures are smaller than their bucket (24x8, ")
    assert whole["captions"] == "21 of 24 cut at 4 tokens (--max-length); the longest has 25"
    monkeypatch.setenv("WORLD_SIZE", "2")
    real, left = write._write_shard, 3  # shards before the kill

    def killed(*arguments: object) -> object:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(write, "_write_shard", killed)
    for rank, code in (("0", 130), ("0", 0), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert main([*words, "--out", str(tmp_path / "two")]) == code
        monkeypatch.setattr(write, "_write_shard", real)
        last = table(capsys)
    assert last == whole


def test_reasons_are_grouped(tmp_path: Path) -> None:
    entries = [Skipped(f"d/p{n}.png", f"no caption in p{n}.txt") for n in range(5)]
    entries += [Skipped(f"{n}.png", f"row {n} of t7.csv has no caption") for n in range(3)]
    assert left_out_lines(entries, 7, {"train": 6, "unseen": 1}) == [
        "taken     7 pictures: train 6, unseen 1",
        "left out  8",
        "          5 x no caption in NAME.txt",
        "          3 x row N of t7.csv has no caption",
    ]
    # One wording keeps its numbers; equal wordings too.
    one = [Skipped("g.png", "row 41 of m.csv names it"), *[Skipped("g", "3 files of a kind")] * 2]
    assert reasons_of(one) == {"row 41 of m.csv names it": 1, "3 files of a kind": 2}
    many = [Skipped("x", f"reason {'x' * n}") for n in range(1, 30)]
    assert left_out_lines(many, 0, {})[-1] == "          ... and 9 further reasons"
    assert _reason_of(Skipped("a.png", "not a caption")) == "not a caption"
    assert _reason_of(Skipped("a.png", "no data. see a.txt")) == "no data. see NAME.txt"


@pytest.mark.parametrize(
    "stem", ["foto (1)", "ä b", "x [2] y", "日本 3", "a.b (c)", "IMG_1 copy", "10 20", "new\nline", "+*?"]
)
def test_a_name_with_spaces_brackets_or_other_letters_is_left_out_of_its_reason(stem: str) -> None:
    for name in (f"{stem}.png", f"sub/{stem}.png"):
        assert _reason_of(Skipped(name, f"no caption in {shown(stem)}.txt")) == "no caption in NAME.txt"
    assert _reason_of(Skipped(f"{stem}.png", f"row 7: {stem}.png, 3 bytes")) == "row N: NAME.png, N bytes"


def test_pad_enlarges_less_and_is_part_of_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = pictures(tmp_path / "set", (15, 40), (40, 15), (15, 15))
    arguments = ["--source", str(source), *OPTIONS]
    assert main([*arguments, "--out", str(tmp_path / "pad"), "--fit", "pad"]) == 0
    assert table(capsys)["enlarged"] == "1 of 3 pictures are smaller than the target 16x16 (padded with white)"
    assert json.loads((tmp_path / "pad" / "recipe.json").read_text())["request"]["fit"] == "pad"
    assert main([*arguments, "--out", str(tmp_path / "pad")]) == 2
    assert "was prepared with fit = 'pad'" in capsys.readouterr().err
    assert main([*arguments, "--out", str(tmp_path / "crop")]) == 0
    assert "fit" not in json.loads((tmp_path / "crop" / "recipe.json").read_text())["request"]


def test_a_dry_run_tells_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = pictures(tmp_path / "set", (16, 16), (15, 40))
    arguments = ["--source", str(source), "--out", str(tmp_path / "out"), *OPTIONS, "--max-length", "2", "--dry-run"]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "tried: enlarged  1 of 2 pictures are smaller than the target 16x16" in told
    assert "2 to train on\n" in told, "sizes of squares are not listed: no number of enlarged ones there"
    assert "tried: captions  1 of 2 cut at 2 tokens" in told


def test_counts_of_another_version_are_not_read(tmp_path: Path) -> None:
    write_counts(tmp_path / "a", Counts(pictures=3, longest=9))
    assert read_counts(tmp_path / "a") + Counts(pictures=1, longest=4) == Counts(pictures=4, longest=9)
    (tmp_path / "b").write_text('{"other": 1}')
    assert read_counts(tmp_path / "b") == read_counts(tmp_path / "none") == Counts()
    assert Counts().lines([(16, 16)], "crop") == []


def test_what_nothing_is_held_out_of_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "held out  none: add a top-level val/ folder or a split, or train with --data.validation_split train"
    assert left_out_lines([], 7, {"train": 7})[1] == line
    assert line not in left_out_lines([], 7, {"train": 6, "unseen": 1})
    arguments = [
        "--source",
        str(pictures(tmp_path / "set", (16, 16), (15, 40))),
        "--out",
        str(tmp_path / "out"),
        *OPTIONS,
    ]
    for more in (["--dry-run"], []):
        assert main([*arguments, *more]) == 0
        assert line in capsys.readouterr().out.splitlines()


def test_a_dry_run_says_what_will_be_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = pictures(tmp_path / "set", (16, 16), (15, 40))
    names = [path.name for path in sorted(source.glob("*.png"))]
    rows = [f"{name},text" for name in [*names, "gone.png"]]
    (source / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    arguments = ["--source", str(source), "--out", str(tmp_path / "out"), *OPTIONS]
    assert main([*arguments, "--dry-run"]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith("without --dry-run this is refused: 1 of 3 images are missing (gone.png; row 4")
    assert told.endswith("or pass --allow-missing to leave them out")
    assert main([*arguments, "--dry-run", "--allow-missing"]) == 0
    assert "refused" not in capsys.readouterr().out


def test_what_is_in_a_val_folder_is_held_out_in_a_dry_run_and_on_several_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pictures(tmp_path / "set", *[(16, 16)] * 30)
    pictures(source / "val", (16, 16), (15, 40), (40, 15))
    arguments = ["--source", str(source), "--out", str(tmp_path / "out"), *OPTIONS]
    assert main([*arguments, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "33 of 33 pictures: train 30, unseen 3" in told
    assert "30 to train on\n" in told
    assert "held out  none" not in told
    monkeypatch.setattr(ranks, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(ranks, "_POLL_S", 0.001)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main(arguments) == 0
    assert table(capsys)["taken"] == "33 pictures: train 30, unseen 3"
