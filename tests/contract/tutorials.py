"""Run the commands of a page as they are written, in a folder that looks like a checkout after `make quickstart`."""

import contextlib
import importlib
import io
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tests.distributed import CONTEXT

ROOT = Path(__file__).resolve().parents[2]
SHARED = ("assets", "benchmarks", "configs", "launcher", "sharpmoe", "data_pipeline", "docs")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def workplace(folder: Path) -> Path:
    """Return a folder with the code and the shipped files of this repository, and no data."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SHARED:
        (folder / name).symlink_to(ROOT / name)
    (folder / "data").mkdir()
    (folder / "runs").mkdir()
    return folder


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a text in one language."""
    return [body for found, body in FENCE.findall(text) if found == language]


def changed(text: str, changes: Mapping[str, str]) -> str:
    """Return a text with substitutions, each of which it must contain: a page that changes changes its test."""
    for old, new in changes.items():
        assert old in text, f"the page does not contain {old!r} any more"
        text = text.replace(old, new)
    return text


def commands(block: str) -> list[list[str]]:
    """Return the words of every command of a shell block; `#` begins a comment, a backslash continues a line."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def run_command(words: list[str], expected: int = 0) -> str:
    """Run `python launcher/NAME.py ...`, `deepspeed launcher/train.py ...` or `torchrun ...`; return what it prints.

    It runs in the current folder, with one rank: a command that trains in a process of its own, any other in this one.
    The exit code must be `expected`.
    """
    place = next(index for index, word in enumerate(words) if word.startswith("launcher/"))
    name = Path(words[place]).stem
    call = _in_process if name == "train" else _here
    code, output = call(name, words[place + 1 :])
    assert code == expected, f"{shlex.join(words)}: exit code {code}\n{output}"
    return output


def _here(name: str, words: list[str]) -> tuple[int, str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = importlib.import_module(f"launcher.{name}").main(words)
    return code, printed.getvalue()


def _in_process(name: str, words: list[str]) -> tuple[int, str]:
    log = Path(f".{name}.log").resolve()
    process = CONTEXT.Process(target=_main, args=(name, words, os.getcwd(), log))
    process.start()
    process.join(240)
    if process.exitcode is None:
        process.kill()
    return -1 if process.exitcode is None else process.exitcode, log.read_text(encoding="utf-8")


def _main(name: str, words: list[str], folder: str, log: Path) -> None:
    """Run a launcher in a fresh process without the variables of ranks."""
    os.chdir(folder)
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = importlib.import_module(f"launcher.{name}").main(words)
    sys.stdout.flush()
    os._exit(code)


def draw_photos(
    folder: Path, count: int, sides: tuple[tuple[int, int], ...] = ((97, 71), (64, 120), (150, 90))
) -> Path:
    """Write captioned pictures of odd sizes (width, height), NAME.jpg and NAME.txt: a coloured thing on noise."""
    folder.mkdir(parents=True)
    colours, things = ("red", "green", "blue", "orange", "purple"), ("disc", "box", "bar")
    for number in range(count):
        width, height = sides[number % len(sides)]
        noise = np.random.Generator(np.random.Philox(key=number)).integers(150, 230, (height, width, 3))
        image = Image.fromarray(noise.astype(np.uint8))
        colour, thing = colours[number % 5], things[number % 3]
        box = (width // 4, height // 4, 3 * width // 4, 3 * height // 4)
        pen = ImageDraw.Draw(image)
        draw = {"disc": pen.ellipse, "box": pen.rectangle, "bar": pen.rounded_rectangle}[thing]
        draw(box, fill=colour)
        image.save(folder / f"photo-{number:03}.jpg", quality=92)
        (folder / f"photo-{number:03}.txt").write_text(f"a {colour} {thing}, photo {number}\n", encoding="utf-8")
    return folder
