"""Where captions of pictures are found."""

import json
from pathlib import Path

import pytest

from sharpmoe.errors import DataError
from sharpmoe.evaluation.captions import captions_of_files, read_captions


def test_files_of_all_parts_are_read_and_beat_the_metadata(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}" / "samples" / "0.png" for number in range(3)]
    for path in files:
        path.parent.mkdir(parents=True)
    (tmp_path / "0" / "metadata.jsonl").write_text(json.dumps({"prompt": "zero"}))
    (tmp_path / "1" / "metadata.jsonl").write_text(json.dumps({"prompt": "one"}))
    (tmp_path / "captions_a.json").write_text(json.dumps({"1/samples/0.png": "first"}))
    (tmp_path / "captions_b.json").write_text(json.dumps({"2/samples/0.png": "second"}))
    assert captions_of_files(tmp_path, files) == ("zero", "first", "second")


def test_a_picture_without_caption_and_a_damaged_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.png: has no caption"):
        captions_of_files(tmp_path, [tmp_path / "a.png"])
    (tmp_path / "captions.json").write_text("[]")
    with pytest.raises(DataError, match=r"captions\.json: holds a list, expected an object"):
        captions_of_files(tmp_path, [tmp_path / "a.png"])


@pytest.mark.parametrize("name", ["captions.json", "captions.jsonl", "captions.CSV"])
def test_json_and_tables_are_no_lines_of_captions(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"000.png": "a cat"}')
    with pytest.raises(DataError, match="no text file with one caption per line"):
        read_captions(tmp_path / name)
