"""The page of a report: complete, self-contained, escaped, and without overflow in a browser."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from sharpmoe.report.page import report_page, write_report
from sharpmoe.report.run_set import describe_runs
from sharpmoe.report.run_table import console_report
from tests.report.stored_run import NASTY, write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (1300, 400)
_MEASURE = """<script>
document.querySelectorAll("details").forEach(part => part.open = true);
const scrolls = part => part && (getComputedStyle(part).overflowX == "auto" || scrolls(part.parentElement));
const wide = [...document.querySelectorAll("body *")].filter(
  part => part.getBoundingClientRect().right > innerWidth + 1 && !scrolls(part.parentElement));
parent.document.documentElement.setAttribute("data-measured", JSON.stringify({
  inner: innerWidth, scroll: document.documentElement.scrollWidth, wide: wide.map(part => part.outerHTML.slice(0, 90)),
  broken: [...document.images].filter(image => !image.complete || !image.naturalWidth).map(image => image.alt),
  images: document.images.length, height: document.documentElement.scrollHeight}));
</script>"""


class _Strict(HTMLParser):
    """Collects elements, and checks that each one that is opened is closed where it should be."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    second = {f"model.{NASTY}": NASTY, "sample.captions": [NASTY, "x" * 300], "a" * 120: "b" * 300}
    long = f"a-<b>{'long' * 20}"
    return [write_run(root / "first", shift=0.1), write_run(root / long, shift=0.3, wait=0.4, **second)]


@pytest.mark.parametrize("count", [1, 2])
def test_a_page_is_well_formed_and_takes_nothing_from_outside(runs: list[Path], count: int) -> None:
    page = report_page(describe_runs(runs[:count]))
    parser = _Strict()
    parser.feed(page)
    assert parser.open == []
    kinds = {tag for tag, _ in parser.found}
    assert not kinds & {"script", "link", "iframe", "object", "b<"}
    for _, attributes in parser.found:
        source = attributes.get("src") or "data:"
        assert source.startswith("data:")
        assert not any(name.startswith("on") or name in ("href", "srcset") for name in attributes)
    assert not re.search(r"https?://|url\(|@import", page)
    viewport = [attributes for tag, attributes in parser.found if attributes.get("name") == "viewport"]
    assert viewport[0]["content"] == "width=device-width, initial-scale=1"


def test_everything_that_is_shown_is_escaped(runs: list[Path]) -> None:
    page = report_page(describe_runs(runs))
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 3  # caption, key, value, warning
    assert "a-<b>" not in page


def test_a_page_has_its_sections_and_pictures(runs: list[Path]) -> None:
    page = report_page(describe_runs(runs[:1]))
    titles = re.findall(r"<h2>([^<]+)</h2>", page)
    assert titles == [
        "Overview",
        "Where compute goes: before and after",
        "Loss and validation",
        "Allocation",
        "Samples at equal seeds",
        "Experts and saliency routers",
        "FLOPs",
        "Speed, memory and optimizer",
        "Configuration",
        "What happened",
    ]
    assert page.index('class="verdict"') < page.index("<h2>")
    assert "compute moved to salient tokens: rank correlation +0.1" in page
    maps = re.findall(r'class="map"', page)
    assert len(maps) == 2 * (1 + 2 * 4)  # of two images: M, then four ranges of t before and after
    for data in re.findall(r"data:image/png;base64,([^\"]+)", page):
        Image.open(io.BytesIO(base64.b64decode(data))).verify()


def test_a_curve_of_one_time_is_named_by_it(runs: list[Path]) -> None:
    text = report_page(describe_runs(runs[:1]))
    assert "flow, t = 0.5" in text
    assert "flow_t0.5" not in text


def test_a_page_of_several_shows_differences_and_every_run(runs: list[Path]) -> None:
    page = report_page(describe_runs(runs))
    assert "Configuration: keys that differ" in page
    assert "paired by held-out image" in page
    assert page.count('class="run"') == 2
    assert page.index("against first: compute moved") < page.index("first: compute moved to")  # comparisons come first


def test_console_and_page_show_the_same_figures(runs: list[Path]) -> None:
    document = describe_runs(runs)
    text, page = console_report(document), report_page(document)
    figures = re.findall(r"[+-]\d[\d.e-]* \[[^\]]+\]", text)
    assert len(figures) > 10
    assert all(figure in page for figure in figures)


def test_a_report_is_the_same_from_its_document(runs: list[Path], tmp_path: Path) -> None:
    path, document = write_report(runs, tmp_path / "both.html")
    stored = json.loads((tmp_path / "both.json").read_text())
    assert stored == json.loads(json.dumps(document))
    assert report_page(stored) == path.read_text()


def test_a_page_of_a_bare_log_is_made(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("")
    page = report_page(describe_runs([tmp_path]))
    assert "no step is logged yet" in page
    assert "<h2>Samples" not in page


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overflows_in_a_browser(runs: list[Path], tmp_path: Path, width: int) -> None:
    """The page lies in a frame of the width: Chromium has no windows below 500 pixels."""
    inside = report_page(describe_runs(runs)).replace("</body>", _MEASURE + "</body>")
    frame = f'<iframe srcdoc="{html.escape(inside)}" width="{width}" height="1990" style="border: 0"></iframe>'
    (tmp_path / "page.html").write_text(f'<!doctype html><body style="margin: 0">{frame}</body>')
    shot = tmp_path / "page.png"
    words = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={max(width, 500)},2000",
        "--hide-scrollbars",
    ]
    words += ["--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", "--dump-dom"]
    words.append((tmp_path / "page.html").as_uri())
    done = subprocess.run([str(CHROMIUM), *words], check=True, timeout=200, capture_output=True, text=True)
    measured = json.loads(html.unescape(re.search(r'data-measured="([^"]*)"', done.stdout)[1]))
    assert measured["inner"] == width
    assert measured["scroll"] <= width, measured["wide"]
    assert measured["wide"] == []
    assert measured["broken"] == []
    assert measured["images"] > 10
    with Image.open(shot) as picture:
        colours = picture.convert("RGB").crop((0, 0, width, 1990)).resize((100, 100)).getcolors(10_000)
    assert len(colours) > 50  # something is drawn
