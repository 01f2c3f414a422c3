"""Prompts of benchmarks, and where their tools expect the pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sharpmoe.errors import ConfigError, DataError
from sharpmoe.evaluation.prompt_sets import (
    finish_prompts,
    image_path,
    is_drawn,
    open_prompts,
    prompt_set_note,
    write_captions,
)


def put(path: Path, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), level, np.uint8)).save(path)


def test_geneval_has_a_folder_per_prompt(tmp_path: Path) -> None:
    entries = [
        {"tag": "counting", "prompt": "two cats", "include": [{"class": "cat", "count": 2}]},
        {"prompt": "a dog"},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, entries)))
    prompts, out = open_prompts(tmp_path / "p.jsonl"), tmp_path / "out"
    assert (prompts.num_images, prompts.each) == (8, 4)
    assert image_path(prompts, out, 6) == out / "00001" / "samples" / "0002.png"
    for image in range(4):
        assert not is_drawn(prompts, out, image)
        finish_prompts(prompts, out, [0, 1])
        assert not (out / "00000" / "metadata.jsonl").exists()
        put(image_path(prompts, out, image), image)
    finish_prompts(prompts, out, [0, 1])
    assert json.loads((out / "00000" / "metadata.jsonl").read_text()) == entries[0]
    assert not (out / "00001").exists()
    write_captions(prompts, out)
    assert json.loads((out / "captions.json").read_text())["00001/samples/0003.png"] == "a dog"
    assert "2 prompts x 4 pictures; published GenEval figures are of 553 x 4" in prompt_set_note(prompts)


def test_dpg_has_a_grid_of_four_per_prompt_and_nothing_else(tmp_path: Path) -> None:
    folder, out = tmp_path / "prompts", tmp_path / "out"
    folder.mkdir()
    for name in ("10", "2", "partiprompts1"):
        (folder / f"{name}.txt").write_text(f"prompt\n{name}\n")
    prompts = open_prompts(folder)
    assert prompts.keys == ("2", "10", "partiprompts1")
    assert prompts.prompts[0] == "prompt 2"
    for image in range(4):
        put(image_path(prompts, out, image), 10 * image)
    finish_prompts(prompts, out, [0, 1])
    write_captions(prompts, out)
    assert [path.name for path in out.iterdir()] == ["2.png"]
    assert not (tmp_path / "out.parts").exists()
    grid = np.asarray(Image.open(out / "2.png"))
    assert grid.shape == (8, 8, 3)
    assert [grid[0, 0, 0], grid[0, 7, 0], grid[7, 0, 0], grid[7, 7, 0]] == [0, 10, 20, 30]
    assert all(is_drawn(prompts, out, image) for image in range(4))
    assert image_path(open_prompts(folder, 1), out, 1) == out / "10.png"
    with pytest.raises(ConfigError, match="DPG-bench scores 1 or 4 pictures"):
        open_prompts(folder, 3)


def test_captions_have_a_picture_each_or_several(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("a cat\n\na dog\n")
    assert image_path(open_prompts(tmp_path / "c.txt"), tmp_path, 1) == tmp_path / "00001.png"
    assert image_path(open_prompts(tmp_path / "c.txt", 3), tmp_path, 4) == tmp_path / "00001_01.png"


@pytest.mark.parametrize("content", ["", "[1]", '{"text": "a"}', '{"prompt": " "}', "no json"])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"p\.jsonl"):
        open_prompts(tmp_path / "p.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"expected NAME\.txt files"):
        open_prompts(tmp_path / "empty")


@pytest.mark.parametrize("name", ["p.json", "p.csv", "p.JSONL", "p.yaml", "p"])
def test_what_is_no_list_of_prompts_is_not_drawn_line_by_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('["a cat", "a dog"]')
    with pytest.raises(DataError, match=r"--prompts reads GenEval's \.jsonl, a folder of \.txt"):
        open_prompts(tmp_path / name)


def test_an_empty_prompt_is_named_and_not_drawn(tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_text("a cat")
    (tmp_path / "2.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"2\.txt: holds no prompt; write one, or remove the file"):
        open_prompts(tmp_path)
