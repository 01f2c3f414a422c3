"""The pages are complete and consistent: every page is listed, every link resolves, the map is that of the tree."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from sharpmoe.families import FAMILIES
from sharpmoe.train.rollout_schedules import SCHEDULES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"```.*?```", re.DOTALL)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def links(path: Path) -> list[str]:
    """Return the relative link targets of a page, without code blocks."""
    return [target for target in LINK.findall(FENCE.sub("", text_of(path))) if not re.match(r"[a-z]+:", target)]


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, in GitHub's form."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text_of(path)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_index():
    listed = {(DOCS / target.split("#")[0]).resolve() for target in links(DOCS / "index.md")}
    assert sorted(str(page.relative_to(DOCS)) for page in PAGES if page.name != "index.md" and page not in listed) == []


def test_the_index_has_one_line_per_page():
    lines = [line for line in text_of(DOCS / "index.md").splitlines() if line.startswith("* ")]
    targets = [LINK.findall(line)[0] for line in lines]
    assert sorted(set(targets)) == sorted(targets)
    assert [line for line in lines if not re.match(r"\* \[[^\]]+\]\([^)]+\): \S", line)] == []


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "assets" / "README.md", *PAGES],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_relative_links_resolve(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert ROOT in found.parents, f"{target} leaves the repository"
        assert not anchor or anchor in anchors(found), target


def test_no_text_names_a_page_that_does_not_exist():
    """Comments and docs may name pages of this repository only."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.splitlines()]
    texts = [path for path in files if path.suffix in (".py", ".md", ".yaml", ".toml") or path.name == "Makefile"]
    known = {path.name for path in [*files, *PAGES]} | {"NAME.md", "table.md"}
    named = {
        (path.relative_to(ROOT).as_posix(), page)
        for path in texts
        if path.is_file() and path != Path(__file__)
        for page in re.findall(r"[\w-]+\.md\b", text_of(path))
    }
    assert sorted(each for each in named if each[1] not in known) == []


@pytest.mark.parametrize("name", ["map", "configuration", "names"])
def test_a_generated_page_is_that_of_the_code(name):
    spec = importlib.util.spec_from_file_location(f"make_{name}", DOCS / f"make_{name}.py")
    assert spec is not None
    assert spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    assert text_of(DOCS / f"{name}.md") == maker.page(), f"run `python docs/make_{name}.py`"


def test_every_key_of_a_run_file_has_a_meaning():
    rows = re.findall(r"^\| `([\w.]+)` \|.*\| *(.*) \|$", text_of(DOCS / "configuration.md"), re.MULTILINE)
    assert len(rows) > 100
    assert [key for key, meaning in rows if not meaning] == []


def test_every_module_says_what_it_is():
    lines = re.findall(r"^\* `(\w+\.py)`: *(.*)$", text_of(DOCS / "map.md"), re.MULTILINE)
    assert lines
    assert [name for name, sentence in lines if not sentence] == []


def test_the_readme_lists_every_router_family():
    table = text_of(ROOT / "README.md").split("| `model.router` |")[1].split("\n\n")[0]
    rows = [row.split("|") for row in table.splitlines()[2:]]
    listed = [(router, varies) for row in rows for router, varies in _routers(row[1], row[3])]
    assert listed == [(name, "varies" if family.varies_compute else "equal") for name, family in FAMILIES.items()]


def _routers(names: str, compute: str) -> list[tuple[str, str]]:
    """Pair the routers of a row with whether their compute per token varies; one word holds for all of them."""
    routers, words = re.findall(r"`(\w+)`", names), re.findall(r"\w+", compute)
    return list(zip(routers, words if len(words) > 1 else words * len(routers), strict=True))


def test_tests_selected_by_a_word_exist():
    """`pytest FILE -k WORD` selects a test of that file."""
    commands = [found for page in PAGES for found in re.findall(r"pytest (tests/\S+\.py) -k (\w+)", text_of(page))]
    assert commands
    for file, word in commands:
        assert any(word in name for name in re.findall(r"^def (test_\w+)", text_of(ROOT / file), re.MULTILINE)), word


def test_the_readme_lists_every_rollout_schedule():
    row = next(line for line in text_of(ROOT / "README.md").splitlines() if line.startswith("| `rollout.schedule` |"))
    assert set(re.findall(r"`(\w+)`", row.split("|")[2])) == {*SCHEDULES, "auto"}
