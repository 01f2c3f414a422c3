"""Write docs/map.md, the first sentence of every module's docstring: `python docs/make_map.py`."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "map.md"
PACKAGES = ("launcher", "sharpmoe", "data_pipeline")
HEAD = """# Map of the code

One line per module: the first sentence of its docstring. `python docs/make_map.py` writes this page and
`tests/contract/test_docs.py` compares it with the code, so a new module appears here or the test fails.
"""


def first_sentence(path: Path) -> str:
    """Return the first sentence of a module's docstring on one line; empty if it has none."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", paragraph, maxsplit=1)[0].rstrip(":")


def folders() -> list[Path]:
    """Return the packages and their folders in the order of the page."""
    found = [path.parent for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")]
    return sorted(found, key=lambda path: (PACKAGES.index(path.relative_to(ROOT).parts[0]), path))


def page() -> str:
    """Return the text of docs/map.md."""
    parts = [HEAD]
    for folder in folders():
        modules = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
        lines = [f"* `{path.name}`: {first_sentence(path)}\n" for path in modules]
        title = f"## {folder.relative_to(ROOT).as_posix()}/\n\n{first_sentence(folder / '__init__.py')}\n"
        parts.append("\n".join([title, "".join(lines)] if lines else [title]))
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
