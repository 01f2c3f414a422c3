"""Elements of a page: every text and attribute is escaped unless it is markup already (markupsafe)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from markupsafe import Markup, escape

_VOID = ("br", "img", "meta")  # elements of HTML without an end; those of SVG have one


def element(name: str, /, *content: str, **attributes: object) -> Markup:
    """Return an element; `class_` is the attribute class, `stroke_width` stroke-width; None leaves an attribute out."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    words = Markup("").join(Markup(' {}="{}"').format(Markup(key), str(value)) for key, value in given.items())
    head = Markup("<{}{}>").format(Markup(name), words)
    return head if name in _VOID else head + joined(content) + Markup("</{}>").format(Markup(name))


def joined(parts: Iterable[str], between: str = "") -> Markup:
    """Join parts, escaping those that are no markup."""
    return Markup(escape(between)).join(parts)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Markup:
    """Return a table that scrolls by itself where it is too wide; the first column names the rows."""
    top = element("tr", *(element("th", cell) for cell in head)) if any(head) else Markup("")
    body = [
        element("tr", element("th", name, scope="row"), *(element("td", cell) for cell in cells))
        for name, *cells in rows
    ]
    return element("div", element("table", element("thead", top), element("tbody", *body)), class_="scroll")


def folded(title: str, *content: str) -> Markup:
    """Return content that opens on a click; nothing for no content."""
    return element("details", element("summary", title), *content) if any(content) else Markup("")


def section(title: str, *content: str, level: int = 2) -> Markup:
    """Return a titled section; nothing for no content."""
    kept = [part for part in content if part]
    return element("section", element(f"h{level}", title), *kept) if kept else Markup("")
