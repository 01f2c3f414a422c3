"""One static HTML page for a run folder: curves of log.jsonl, allocation tables, sample grids, routing sheets."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from sharpmoe.durable import write_atomically
from sharpmoe.errors import DataError
from sharpmoe.evaluation.allocation import Allocation, allocation_table
from sharpmoe.log_file import LOG_FILE, read_log
from sharpmoe.report import figures

_ENDS = {"before": 0, "after": 2}  # names that a run gives its two tables

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222 }
img { max-width: 100%; vertical-align: top } figure { margin: 1em 0 } figcaption { color: #666 }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; line-height: 1.35 }
.curves img { width: 32% }
"""


def write_page(folder: Path | str) -> Path:
    """Write <run folder>/report.html and return its path. Raises DataError where the folder holds no log."""
    folder = Path(folder)
    log = folder / LOG_FILE
    if not log.is_file():
        raise DataError(f"{folder}: no {LOG_FILE}; expected the folder of a run (runs/<name>)")
    parts = [
        f"<h1>{html.escape(folder.resolve().name)}</h1>",
        _section("Allocation", _allocation(folder / "allocation")),
        _section("Samples", _pictures(folder, "samples")),
        _section("Routing: experts per token at each denoising step", _pictures(folder, "routing")),
        _section("Curves", _curves(read_log(log))),
        _section("Configuration", _configuration(folder / "config.yaml")),
    ]
    page = f'<!doctype html><meta charset="utf-8"><title>{html.escape(folder.name)}</title><style>{_STYLE}</style>'
    path = folder / "report.html"
    write_atomically(path, page + "\n".join(part for part in parts if part) + "\n")
    return path


def _section(title: str, body: str) -> str:
    return f"<h2>{html.escape(title)}</h2>\n{body}" if body else ""


def _allocation(folder: Path) -> str:
    """Return table and curves of allocation/*.json: before training first, after it last, others by name."""
    files = sorted(folder.glob("*.json"), key=lambda path: (_ENDS.get(path.stem, 1), _natural(path)))
    results = {path.stem: Allocation.load(path) for path in files}
    if not results:
        return ""
    return f"<pre>{html.escape(allocation_table(results))}</pre>\n{_embedded(figures.allocation_curves(results))}"


def _natural(path: Path) -> list[tuple[int, str]]:
    """Return a key that orders names by the numbers in them, whatever the times of the files are."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.stem)]


def _pictures(folder: Path, kind: str) -> str:
    """Return links to the pictures of samples/ or routing/, the last step first, without those in folders below."""
    files = sorted((folder / kind).glob("*.png"), key=_natural, reverse=True)
    return "\n".join(
        f'<figure><img loading="lazy" src="{html.escape(f"{kind}/{path.name}")}">'
        f"<figcaption>{html.escape(path.stem)}</figcaption></figure>"
        for path in files
    )


def _curves(log: Mapping[str, Mapping[int, float]]) -> str:
    """Return one plot per group of tags (the part before the slash), together in one block."""
    groups: dict[str, dict[str, Mapping[int, float]]] = {}
    for tag, points in log.items():
        group, _, name = tag.partition("/")
        key = group if group in ("loss", "validation") or group.startswith(("routing", "allocation")) else tag
        if any(points.values()) or group != "loss":  # losses that the run does not use are always 0
            groups.setdefault(key, {})[name or tag] = points
    plots = [_embedded(figures.step_curves(lines, group)) for group, lines in groups.items()]
    return f'<div class="curves">{"".join(plots)}</div>' if plots else ""


def _configuration(path: Path) -> str:
    return f"<pre>{html.escape(path.read_text(encoding='utf-8'))}</pre>" if path.is_file() else ""


def _embedded(pixels: figures.Pixels) -> str:
    """Return a picture embedded in the page, so that a copied page keeps its curves."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
