"""How the user calls the commands: scripts of a checkout, or the console command. Used in messages only. No torch."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from sharpmoe.shipped_files import IS_INSTALLED, SHIPPED_ROOT

_PACKAGE = "launcher"
_IN_TEXT = re.compile(rf"(?:(deepspeed|torchrun)\s|python\s)?{_PACKAGE}/(\w+)\.py")


def spell_command(name: str) -> str:
    """Return what starts the launcher `name` ("sample", "gpu-check") as this process was started.

    `sharpmoe sample` where the console command or an installed package runs, else `python launcher/sample.py`, with the
    path of the checkout where that is not the working folder.
    """
    script = _script(name)
    return f"sharpmoe {name}" if script is None else f"python {script}"


def spell_ranks_command(starter: str, name: str) -> str:
    """Return what starts several ranks of the launcher `name`: `starter` is `deepspeed` or `torchrun` with options."""
    script = _script(name)
    return f"{starter} {f'--module {_PACKAGE}.{_module(name)}' if script is None else script}"


def spell_text(text: str) -> str:
    """Return a text, such as a docstring, with `python launcher/NAME.py` in it spelled as the user calls it."""

    def spelled(found: re.Match[str]) -> str:
        starter, name = found[1], found[2].replace("_", "-")
        return spell_ranks_command(starter, name) if starter else spell_command(name)

    return _IN_TEXT.sub(spelled, text)


class CommandSpellings(Mapping[str, str]):
    """Every name -> its command, for `str.format_map`: `{sample} --compile`. `{train_script}` is what ranks start."""

    def __getitem__(self, name: str) -> str:
        script = name.removesuffix("_script")
        return spell_command(name) if script == name else spell_ranks_command("", script).lstrip()

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _script(name: str) -> Path | None:
    """Return the script of a launcher, None where the console command is what the user calls."""
    if IS_INSTALLED or (sys.argv and Path(sys.argv[0]).stem == "sharpmoe"):
        return None
    here = Path(_PACKAGE, f"{_module(name)}.py")
    return here if here.is_file() else SHIPPED_ROOT / here


def _module(name: str) -> str:
    return name.replace("-", "_")
