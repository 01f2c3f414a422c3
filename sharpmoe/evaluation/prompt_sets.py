"""Prompts of benchmarks, and the folders of pictures that their tools score: GenEval, DPG-bench, plain captions.

Drawing goes on where a killed call was: what is on the disk is not drawn again. Scoring stays in the tools; what they
write is read by `evaluation.benchmarks`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sharpmoe.durable import write_atomically
from sharpmoe.errors import ConfigError, DataError, first_line
from sharpmoe.evaluation.captions import METADATA_FILE, read_captions

_GENEVAL_PROMPTS = 553
_GENEVAL_IMAGES = _DPG_IMAGES = 4  # per prompt


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Prompts in their order, and how many pictures of each are drawn."""

    layout: str  # a row of LAYOUTS
    prompts: tuple[str, ...]
    keys: tuple[str, ...]  # what a prompt's files are called
    metadata: tuple[dict[str, Any], ...]  # GenEval's line of each prompt; empty for other layouts
    each: int  # pictures per prompt

    @property
    def num_images(self) -> int:
        return len(self.prompts) * self.each

    def prompt_of(self, image: int) -> int:
        """Return the prompt of an image: the pictures of a prompt follow each other."""
        return image // self.each


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where the pictures of a prompt are."""

    path: Callable[[Path, PromptSet, int], Path]  # of an image, for the folder
    finish: Callable[[Path, PromptSet, int], None] | None = None  # called when all pictures of a prompt are there
    final: Callable[[Path, PromptSet, int], Path] | None = None  # what is made of the pictures of a prompt
    captioned: bool = True  # whether its tool tolerates captions.json in the folder


def open_prompts(place: Path, each: int | None = None) -> PromptSet:
    """Read prompts: a .jsonl of GenEval, a folder of .txt files of DPG-bench, or a .txt with one caption per line.

    each: pictures per prompt, by default those of the benchmark. Raises DataError for what is none of them.
    """
    if place.is_dir():
        return _dpg(place, each)
    if place.suffix == ".jsonl":
        return _geneval(place, each)
    if place.suffix != ".txt":
        raise DataError(
            f"{place}: --prompts reads GenEval's .jsonl, a folder of .txt files (DPG-bench), or a .txt with one caption"
            " per line; write the prompts as one of them"
        )
    captions = read_captions(place)
    keys = tuple(f"{number:05}" for number in range(len(captions)))
    return PromptSet(layout="captions", prompts=captions, keys=keys, metadata=(), each=each or 1)


def _geneval(path: Path, each: int | None) -> PromptSet:
    found = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                entry = json.loads(line)
                if not isinstance(entry, dict) or not _is_prompt(entry.get("prompt")):
                    raise DataError(f"{path}, line {number}: expected an object with a prompt, as GenEval has it")
                found.append(entry)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON lines ({first_line(error)})") from None
    if not found:
        raise DataError(f"{path}: holds no prompts; expected GenEval's evaluation_metadata.jsonl")
    return PromptSet(
        layout="geneval",
        prompts=tuple(entry["prompt"] for entry in found),
        keys=tuple(f"{number:05}" for number in range(len(found))),
        metadata=tuple(found),
        each=each or _GENEVAL_IMAGES,
    )


def _is_prompt(found: object) -> bool:
    return isinstance(found, str) and bool(found.strip())


def _dpg(folder: Path, each: int | None) -> PromptSet:
    files = sorted(folder.glob("*.txt"), key=lambda path: (len(path.stem), path.stem))
    if not files:
        raise DataError(f"{folder}: no prompts; expected NAME.txt files, as in DPG-bench's prompts folder")
    if each not in (None, 1, _DPG_IMAGES):
        raise ConfigError(f"--per-prompt {each}: DPG-bench scores 1 or {_DPG_IMAGES} pictures of a prompt")
    try:
        prompts = tuple(" ".join(path.read_text(encoding="utf-8").split()) for path in files)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{folder}: a prompt cannot be read ({first_line(error)})") from None
    for path, prompt in zip(files, prompts, strict=True):
        if not prompt:
            raise DataError(f"{path}: holds no prompt; write one, or remove the file")
    keys = tuple(path.stem for path in files)
    return PromptSet(layout="dpg", prompts=prompts, keys=keys, metadata=(), each=each or _DPG_IMAGES)


def image_path(prompts: PromptSet, folder: Path, image: int) -> Path:
    """Return where an image is written; GenEval's in NNNNN/samples/000k.png."""
    return LAYOUTS[prompts.layout].path(folder, prompts, image)


def is_drawn(prompts: PromptSet, folder: Path, image: int) -> bool:
    """Whether an image is on the disk, or what was made of it."""
    final = LAYOUTS[prompts.layout].final
    if final is not None and final(folder, prompts, prompts.prompt_of(image)).is_file():
        return True
    return image_path(prompts, folder, image).is_file()


def finish_prompts(prompts: PromptSet, folder: Path, numbers: Iterable[int]) -> None:
    """Write what a tool needs beside the pictures of these prompts, where all of them are drawn."""
    finish = LAYOUTS[prompts.layout].finish
    if finish is None:
        return
    for number in numbers:
        mine = range(number * prompts.each, (number + 1) * prompts.each)
        if all(is_drawn(prompts, folder, image) for image in mine):
            finish(folder, prompts, number)


def write_captions(prompts: PromptSet, folder: Path) -> None:
    """Write captions.json, the caption of every picture, which CLIPScore and caption retrieval read."""
    if not LAYOUTS[prompts.layout].captioned:
        return
    names = {
        image_path(prompts, folder, image).relative_to(folder).as_posix(): prompts.prompts[prompts.prompt_of(image)]
        for image in range(prompts.num_images)
    }
    write_atomically(folder / "captions.json", json.dumps(names, indent=0, ensure_ascii=False) + "\n")


def prompt_set_note(prompts: PromptSet) -> str:
    """Return what a figure of these prompts cannot be called, "" where they are the benchmark's."""
    if prompts.layout == "geneval" and (len(prompts.prompts), prompts.each) != (_GENEVAL_PROMPTS, _GENEVAL_IMAGES):
        return (
            f"note: {len(prompts.prompts)} prompts x {prompts.each} pictures; published GenEval figures are of "
            f"{_GENEVAL_PROMPTS} x {_GENEVAL_IMAGES}"
        )
    return ""


def _geneval_path(folder: Path, prompts: PromptSet, image: int) -> Path:
    return folder / prompts.keys[prompts.prompt_of(image)] / "samples" / f"{image % prompts.each:04}.png"


def _write_metadata(folder: Path, prompts: PromptSet, number: int) -> None:
    write_atomically(folder / prompts.keys[number] / METADATA_FILE, json.dumps(prompts.metadata[number]))


def _captions_path(folder: Path, prompts: PromptSet, image: int) -> Path:
    key = prompts.keys[prompts.prompt_of(image)]
    return folder / (f"{key}.png" if prompts.each == 1 else f"{key}_{image % prompts.each:02}.png")


def _dpg_path(folder: Path, prompts: PromptSet, image: int) -> Path:
    """Return the place of one picture: beside the folder, in which the tool scores every file."""
    number, place = divmod(image, prompts.each)
    if prompts.each == 1:
        return _dpg_final(folder, prompts, number)
    return folder.with_name(f"{folder.name}.parts") / f"{prompts.keys[number]}-{place}.png"


def _dpg_final(folder: Path, prompts: PromptSet, number: int) -> Path:
    return folder / f"{prompts.keys[number]}.png"


def _write_grid(folder: Path, prompts: PromptSet, number: int) -> None:
    """Join the four pictures of a prompt as KEY.png, two by two, and delete them; a single one is KEY.png already."""
    final = _dpg_final(folder, prompts, number)
    if final.is_file():
        return
    parts = [_dpg_path(folder, prompts, number * prompts.each + place) for place in range(prompts.each)]
    pixels = [np.asarray(Image.open(path).convert("RGB")) for path in parts]
    grid = np.concatenate([np.concatenate(pixels[:2], 1), np.concatenate(pixels[2:], 1)], 0)
    write_atomically(final, lambda draft: Image.fromarray(grid).save(draft, format="PNG"))
    for path in parts:
        path.unlink()
    with suppress(OSError):  # other prompts have parts there still
        parts[0].parent.rmdir()


LAYOUTS: dict[str, _Layout] = {
    "geneval": _Layout(path=_geneval_path, finish=_write_metadata),
    "dpg": _Layout(path=_dpg_path, finish=_write_grid, final=_dpg_final, captioned=False),
    "captions": _Layout(path=_captions_path),
}
