"""The pages build as a site, strictly: every link leads to a file of the site, and nothing comes from the network."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOADED = {"script": "src", "img": "src", "iframe": "src", "link": "href"}  # a browser requests these by itself


class Links(HTMLParser):
    """Collects the places that a page leads to (`links`) and those that it loads (`loaded`)."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "a" and found.get("href"):
            self.links.append(str(found["href"]))
        if tag in LOADED and found.get(LOADED[tag]):
            self.loaded.append(str(found[LOADED[tag]]))


@pytest.mark.slow
def test_the_site_builds_strictly_and_is_whole(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="mkdocs-material is not installed; `make extras` installs it")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pages = {page: Links(page) for page in tmp_path.rglob("*.html") if page.name != "404.html"}
    sources = [path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")]
    assert [str(path) for path in sources if tmp_path / path not in pages] == []
    assert tmp_path / "repository" / "index.html" in pages
    own = {
        page: found for page, found in pages.items() if tmp_path / "repository" not in page.parents
    }  # README: badges
    assert [(page.name, place) for page, found in own.items() for place in found.loaded if ":" in place] == []
    lost = [
        (page.relative_to(tmp_path).as_posix(), target)
        for page, found in pages.items()
        for target in {link.partition("#")[0] for link in [*found.links, *found.loaded]}
        if target and not re.match(r"[a-z]+:", target) and not (page.parent / unquote(target)).is_file()
    ]
    assert lost == []


def test_the_font_of_the_site_is_that_of_the_reader() -> None:
    assert re.search(r"^  font: false$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
