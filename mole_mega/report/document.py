"""A report as data, and its two forms: one HTML page that needs nothing else, and Markdown that says the same in text.

Whatever comes from a run is text here, and is escaped when it is written.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

# What neither HTML nor XML may hold.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Missing:
    """What this report would show if the run had recorded it, or something that went wrong with it."""

    text: str


@dataclass(frozen=True)
class Table:
    """The first column is text, the others line up on the right unless `text_columns` says more."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


@dataclass(frozen=True)
class Figure:
    """A drawing with its caption; `table` is what Markdown shows in its place (None: the blocks after it say it)."""

    svg: str
    caption: str
    table: Table | None = None


@dataclass(frozen=True)
class Figures:
    """Small drawings of one kind side by side; Markdown shows them one after another."""

    figures: Sequence[Figure]


@dataclass(frozen=True)
class Code:
    text: str


Block = Paragraph | Missing | Table | Figure | Figures | Code


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    title: str
    lead: str
    sections: Sequence[Section]


def to_html(document: Document) -> str:
    """One self-contained page: figures inside, no script, nothing from the network; follows the reader's light or
    dark."""
    title = _html(document.title)
    contents = " · ".join(
        f'<a href="#s{index}">{_html(section.title)}</a>' for index, section in enumerate(document.sections)
    )
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>",
        f'<header><h1>{title}</h1>\n<p class="lead">{_html(document.lead)}</p>\n<nav>{contents}</nav></header>',
    ]
    for index, section in enumerate(document.sections):
        parts.append(f'<section id="s{index}">\n<h2>{_html(section.title)}</h2>')
        parts += [_block_html(block) for block in section.blocks]
        parts.append("</section>")
    parts.append("</main>\n</body>\n</html>\n")
    return "\n".join(parts)


def to_markdown(document: Document) -> str:
    """The same in text: a figure is the table of its values."""
    parts = [f"# {_markdown(document.title)}", _markdown(document.lead)]
    for section in document.sections:
        parts.append(f"## {_markdown(section.title)}")
        parts += [_block_markdown(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _block_html(block: Block) -> str:
    match block:
        case Paragraph(text):
            return f"<p>{_html(text)}</p>"
        case Missing(text):
            return f'<p class="missing">{_html(text)}</p>'
        case Table(header, rows, text_columns):
            return _table_html(header, rows, text_columns)
        case Figure(svg, caption, _):
            return f"<figure>\n{_clean(svg)}\n<figcaption>{_html(caption)}</figcaption></figure>"
        case Figures(figures):
            return '<div class="figures">\n' + "\n".join(map(_block_html, figures)) + "\n</div>"
        case Code(text):
            return f"<pre>{_html(text)}</pre>"


def _table_html(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        kinds = [' class="text"' if index < text_columns else "" for index in range(len(row))]
        return "".join(f"<{tag}{kind}>{_html(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="wide"><table>\n<thead><tr>{cells(header, "th")}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _block_markdown(block: Block) -> str:
    match block:
        case Paragraph(text):
            return _markdown(text)
        case Missing(text):
            return f"> {_markdown(text)}"
        case Table(header, rows, text_columns):
            rules = ["---" if index < text_columns else "---:" for index in range(len(header))]
            lines = [[_markdown(cell) for cell in row] for row in (header, *rows)]
            lines.insert(1, rules)
            return "\n".join("| " + " | ".join(line) + " |" for line in lines)
        case Figure(_, caption, table):
            return _markdown(caption) + (f"\n\n{_block_markdown(table)}" if table else "")
        case Figures(figures):
            return "\n\n".join(map(_block_markdown, figures))
        case Code(text):
            longest = max((len(run) for run in re.findall("`+", text)), default=0)
            fence = "`" * max(3, longest + 1)
            return f"{fence}\n{_clean(text).rstrip()}\n{fence}"


def _clean(text: str) -> str:
    return _CONTROL.sub("\ufffd", text)


def _html(text: str) -> str:
    return html.escape(_clean(text))


def _markdown(text: str) -> str:
    """Text that Markdown takes for text, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", " ".join(_clean(text).split()))


_STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5b6670; --rule: #d9dee3; --page: #ffffff; --card: #f6f8fa;
  --warn: #9a4b00; --warn-page: #fff4e5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e8ed; --soft: #9aa7b3; --rule: #333c45; --page: #14181c;
  --card: #1c2228; --warn: #ffc27a; --warn-page: #33260f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.45;
  font: 15px/1.45 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 25px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 38px 0 10px; padding-bottom: 5px; border-bottom: 1px solid var(--rule); }
.lead { color: var(--soft); margin: 0 0 10px; }
nav { font-size: 13px; } a { color: inherit; text-underline-offset: 3px; }
p { margin: 8px 0; max-width: 82ch; overflow-wrap: anywhere; }
.missing { color: var(--warn); background: var(--warn-page); border-left: 3px solid var(--warn); padding: 6px 12px; }
.wide { overflow-x: auto; margin: 10px 0; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 14px 3px 0; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
.text { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 5em; max-width: 60ch; }
figure { margin: 12px 0; padding: 12px; background: var(--card); border-radius: 6px; overflow-x: auto; }
figure svg { display: block; max-width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: 13px; margin-top: 6px; max-width: 82ch; overflow-wrap: anywhere; }
.figures { display: flex; flex-wrap: wrap; gap: 12px; margin: 12px 0; }
.figures figure { margin: 0; flex: 0 1 auto; max-width: 100%; }
.figures figcaption { width: 0; min-width: 100%; }
pre { background: var(--card); border-radius: 6px; padding: 12px; overflow-x: auto; font-size: 12.5px; line-height: 1.4;
  font-family: ui-monospace, "DejaVu Sans Mono", monospace; }
@media print { body { font-size: 11px; } section { break-inside: auto; } figure, table { break-inside: avoid; } }
"""
