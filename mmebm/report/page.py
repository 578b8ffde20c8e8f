"""HTML out of plain values. Every string that is no element is escaped, so nothing in a run can become markup.

The standard library is enough for a page of headings, tables and pictures; a template engine would be a dependency that
escapes only where it is asked to.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

__all__ = ["Best", "Html", "details", "document", "element", "figure", "join", "number", "table", "tree", "with_error"]

VOID: Final = ("img", "meta")
# A list of numbers longer than this is told by its ends.
LONGEST: Final = 12

STYLE: Final = """
:root { color-scheme: light dark; --ink: #1f2933; --faint: #5b6b7b; --line: #d9e0e8; --paper: #ffffff; --shade: #f4f6f9;
  --accent: #2b6cb0; --note: #fff7e0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ef; --faint: #9fb0c1; --line: #33404e; --paper: #151b22; --shade: #1d252e; --accent: #7db4ea;
    --note: #37301a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 70rem; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
h4 { font-size: .9rem; margin: 1rem 0 .3rem; color: var(--faint); }
p { margin: .5rem 0; max-width: 48rem; }
ul { margin: .5rem 0; padding-left: 1.3rem; max-width: 48rem; }
a { color: var(--accent); }
main .lead { font-size: .86rem; }
nav { margin: 1rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .9rem; }
.lead { color: var(--faint); margin: 0; }
.note { background: var(--note); padding: .6rem .9rem; border-radius: .3rem; max-width: 48rem; }
.note ul { margin: .2rem 0; }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--faint); }
th:first-child, td:first-child { text-align: left; padding-left: .2rem; }
td { white-space: nowrap; }
td.best { font-weight: 700; color: var(--accent); }
dt { font-weight: 600; margin-top: .5rem; }
dd { margin: 0 0 0 1.3rem; max-width: 46rem; }
.verdict { max-width: 48rem; font-size: 1.02rem; }
.verdict strong { color: var(--accent); }
td.text { text-align: left; min-width: 12rem; max-width: 30rem; white-space: normal; overflow-wrap: anywhere; }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
tbody tr:hover { background: var(--shade); }
figure { margin: .8rem 0 1.2rem; }
img { display: block; max-width: 100%; height: auto; background: #ffffff; border-radius: .3rem; }
figcaption { font-size: .86rem; color: var(--faint); margin-top: .4rem; max-width: 48rem; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--accent); font-size: .92rem; }
@media (prefers-color-scheme: dark) { img { padding: .3rem; } }
@media print {
  :root { --ink: #000000; --faint: #444444; --line: #bbbbbb; --paper: #ffffff; --shade: #ffffff; --accent: #000000;
    --note: #ffffff; }
  body { padding: 0; max-width: none; font-size: 10pt; }
  nav { display: none; }
  h2, h3, h4 { break-after: avoid; }
  figure, tr, .note { break-inside: avoid; }
  .wide { overflow: visible; }
  details::details-content { content-visibility: visible; }
}
"""


class Html(str):
    """Markup, ready to be put into a page."""

    __slots__ = ()


class Best(str):
    """A cell of a table that is marked as the best of its column."""

    __slots__ = ()


def join(*parts: Any) -> Html:
    """Parts one after the other: markup as it is, anything else escaped, None left out."""
    return Html("".join(p if isinstance(p, Html) else html.escape(str(p)) for p in parts if p is not None))


def element(tag: str, *content: Any, **attributes: str) -> Html:
    """One element. ``class_`` stands for the attribute ``class``."""
    given = "".join(f' {name.rstrip("_")}="{html.escape(value)}"' for name, value in attributes.items())
    return Html(f"<{tag}{given}>" + ("" if tag in VOID else f"{join(*content)}</{tag}>"))


def number(value: Any) -> str:
    """A value as it is printed: four digits of a float, a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return f"{value:.4g}" if value != int(value) or abs(value) >= 1e6 else f"{value:.0f}"
    return str(value)


def with_error(value: float, error: float) -> str:
    """A value beside its standard error: the error to two digits, and the value as far."""
    if not (math.isfinite(value) and math.isfinite(error) and error > 0):
        return number(value)
    digits = 1 - math.floor(math.log10(error))
    if digits > 6:  # zeros that nobody counts
        return f"{value:.2g} ± {error:.2g}"
    digits = max(digits, 0)
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> Html:
    """A table with a header row; the first column names the rows."""

    def cell(value: Any) -> Html:
        if isinstance(value, Best):
            return element("td", value, class_="best")
        text = isinstance(value, str) and not isinstance(value, Html) and len(value) > 32
        inner = value if isinstance(value, Html) else number(value)
        return element("td", inner, class_="text") if text else element("td", inner)

    header = element("thead", element("tr", *(element("th", name) for name in head))) if any(head) else None
    body = element("tbody", *(element("tr", *map(cell, row)) for row in rows))
    return element("div", element("table", header, body), class_="wide")


def figure(path: Path, alt: str, caption: str | None = None) -> Html:
    """A PNG inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    picture = element("img", src=f"data:image/png;base64,{data}", alt=alt)
    return element("figure", picture, element("figcaption", caption) if caption else None)


def details(title: str, *content: Any) -> Html:
    """Content behind a line that opens it."""
    return element("details", element("summary", title), *content)


def _plain(value: Any) -> bool:
    """Whether a value fits into a cell."""
    if isinstance(value, Mapping):
        return False
    return not isinstance(value, (list, tuple)) or not any(isinstance(v, (Mapping, list, tuple)) for v in value)


def _cell(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        return value
    if len(value) <= LONGEST:
        return ", ".join(map(number, value)) or "none"
    return f"{len(value)} values: {number(value[0])}, {number(value[1])}, ..., {number(value[-1])}"


def tree(value: Any, level: int = 3) -> Html:
    """Any JSON data: tables where its shape is a table's, headings below each other elsewhere."""
    if isinstance(value, Mapping):
        if not value:
            return element("p", "none", class_="lead")
        rows = list(value.values())
        if all(isinstance(row, Mapping) and row and all(map(_plain, row.values())) for row in rows):
            return _matrix([(key, row) for key, row in value.items()])
        plain = {key: item for key, item in value.items() if _plain(item)}
        parts = [table(("", ""), [(str(key), _cell(item)) for key, item in plain.items()])] if plain else []
        tag = f"h{min(level, 4)}"
        for key, item in value.items():
            if key not in plain:
                parts += [element(tag, key), tree(item, level + 1)]
        return join(*parts)
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(row, Mapping) and all(map(_plain, row.values())) for row in value):
            return _matrix([(None, row) for row in value])
        if not _plain(value):
            return element("ul", *(element("li", tree(item, level + 1)) for item in value))
    return element("p", _cell(value) if isinstance(value, (list, tuple)) else number(value))


def _matrix(rows: Sequence[tuple[Any, Mapping[str, Any]]]) -> Html:
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    lead = rows[0][0] is not None
    return table(
        ([""] if lead else []) + names,
        [([str(key)] if lead else []) + [_cell(row.get(name)) for name in names] for key, row in rows],
    )


def document(title: str, lead: Any, parts: Sequence[tuple[str, str, Html]]) -> str:
    """The page.

    Args:
        title: of the page.
        lead: below it.
        parts: (id, heading, content) of each section.
    """
    links = element("nav", *(element("a", heading, href=f"#{name}") for name, heading, _ in parts))
    sections = [element("section", element("h2", heading), content, id=name) for name, heading, content in parts]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Html(STYLE)),
    )
    body = element("body", element("header", element("h1", title), lead), links, element("main", *sections))
    return "<!doctype html>\n" + element("html", head, "\n", body, lang="en") + "\n"
