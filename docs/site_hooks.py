"""Hooks of `mkdocs build`: the navigation is that of index.md, and linked files outside docs/ become part of the site.

The pages stay as a reader of the repository needs them: their links lead to README.md, LICENSE or code beside docs/. In
the site such files stand under repository/, and links to folders become plain text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
_OUTSIDE = "repository"
_LINK = re.compile(r"(!?)\[((?:!\[[^\]]*\]\([^)]*\)|[^\]])*)\]\(([^)\s]+)\)")
_CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
_CODE_OR_LINK = re.compile(f"{_CODE.pattern}|{_LINK.pattern}", re.DOTALL)


def on_config(config: Any) -> Any:
    """Make the navigation from the headings and lists of index.md."""
    sections: list[tuple[str, list[Any]]] = [("Start", [{"All pages": "index.md"}])]
    for line in (DOCS / "index.md").read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"##+ (.*)", line):
            sections.append((heading[1], []))
        elif entry := re.match(r"\* \[([^\]]+)\]\(([^)#]+)\)", line):
            title, place = entry[1], _in_site((DOCS / entry[2]).resolve())
            sections[-1][1].append(place if title.endswith(".md") else {title: place})
    config.nav = [{title: entries} for title, entries in sections]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the files outside docs/ that pages link to, and those that these link to."""
    from mkdocs.structure.files import File  # noqa: PLC0415  (optional)

    pending = [path for page in DOCS.rglob("*.md") for path in _linked(page)]
    while pending:
        path = pending.pop()
        place = _in_site(path)
        if files.get_file_from_path(place) is None and path.is_file():
            files.append(File.generated(config, place, abs_src_path=str(path)))
            pending += _linked(path) if path.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let links lead to where their targets stand in the site."""
    place = page.file.src_uri
    source = Path(page.file.abs_src_path)

    def led(link: re.Match[str]) -> str:
        text, (target, mark, anchor) = _LINK.sub(led, link[2]), link[3].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return f"{link[1]}[{text}]({link[3]})"
        found = _in_site((source.parent / target).resolve())
        if files.get_file_from_path(found) is None:
            return text
        return f"{link[1]}[{text}]({os.path.relpath(found, os.path.dirname(place))}{mark}{anchor})"

    return _CODE_OR_LINK.sub(lambda part: led(link) if (link := _LINK.fullmatch(part[0])) else part[0], markdown)


def _linked(page: Path) -> list[Path]:
    """Return the existing files of the repository that a page links to."""
    text = _CODE.sub("", page.read_text(encoding="utf-8"))
    targets = [target.partition("#")[0] for _, _, target in _LINK.findall(text) if not re.match(r"[a-z]+:", target)]
    return [path for target in targets if target and ROOT in (path := (page.parent / target).resolve()).parents]


def _in_site(path: Path) -> str:
    """Return the place in the site of a file of the repository."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    return f"{_OUTSIDE}/{path.relative_to(ROOT).as_posix()}"
