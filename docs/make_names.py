"""Write docs/names.md, what other trainers call the keys of a run: `python docs/make_names.py`."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from sharpmoe.config_names import ELSEWHERE

PAGE = Path(__file__).resolve().parent / "names.md"
HEAD = """# Coming from another trainer

What scripts of diffusers, Accelerate, PEFT, Lightning, Megatron, DeepSpeed and of DiT, SiT and PixArt repositories
call the keys of a run. A command that gets one of these names answers with the same line. `python docs/make_names.py`
writes this page from `sharpmoe/config_names.py`; all keys are in [configuration.md](configuration.md).

| here | elsewhere |
|---|---|
"""
MISSING = """
## Not offered

| name elsewhere | instead |
|---|---|
"""


class _Scripts(Mapping[str, str]):
    """Every command -> its script in a checkout, for `str.format_map`."""

    def __getitem__(self, name: str) -> str:
        return f"`launcher/{name.removesuffix('_script').replace('-', '_')}.py`"

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def page() -> str:
    """Return the text of docs/names.md."""
    here = defaultdict[str, list[str]](list)
    for name, hint in ELSEWHERE.items():
        here[re.sub(r"\b([a-z]+(?:\.[a-z_]+)+)\b", r"`\1`", hint.replace("|", "\\|")).format_map(_Scripts())].append(
            name
        )
    rows = {hint: f"| {hint} | {', '.join(f'`{name}`' for name in names)} |\n" for hint, names in here.items()}
    missing = {hint for hint in rows if hint.startswith("not offered")}
    there = "".join(row for hint, row in rows.items() if hint not in missing)
    return HEAD + there + MISSING + "".join(_turned(hint, here[hint]) for hint in rows if hint in missing)


def _turned(hint: str, names: list[str]) -> str:
    return f"| {', '.join(f'`{name}`' for name in names)} | {hint.removeprefix('not offered').lstrip(':; ') or '-'} |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
