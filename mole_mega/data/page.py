"""What `preview.py` found as one HTML page that needs nothing beside it: pictures inside, no script, no network."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import torch
from PIL import Image

from mole_mega.data.image import ImageSpec
from mole_mega.data.preview import Shown, SourceView, columns

_COLOURS = ("#3b6fb6", "#d98032", "#4f9d69", "#b05aa0", "#8a7f33", "#4aa3b5", "#c0504d", "#7464b8")
# A small tower's picture is stored as it is; a larger one may lose what the eye does not see.
_LOSSLESS_SIDE = 96

_STYLE = """
:root { color-scheme: light dark; --text: #1c2430; --soft: #5d6875; --back: #fff; --card: #f5f7f9; --line: #dde2e8;
  --learned: #c9efd3; --learned-text: #0b5a26; --image: #d8e6fa; --image-text: #1d4f91; --bad: #a33a2a; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ee; --soft: #98a3b1; --back: #14181e; --card: #1d232b;
  --line: #323b47; --learned: #17452a; --learned-text: #a9eebf; --image: #1f3a5f; --image-text: #b9d6ff;
  --bad: #ff9d8c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 32px 24px 64px; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 12px; }
p { margin: 0 0 12px; color: var(--soft); }
.bar { display: flex; height: 22px; border-radius: 5px; overflow: hidden; margin: 12px 0 8px; }
.legend { margin: 0; padding: 0; list-style: none; }
.legend li { display: flex; gap: 8px; align-items: baseline; }
.dot { flex: none; width: 10px; height: 10px; border-radius: 50%; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 9px; border-bottom: 1px solid var(--line); text-align: right; }
th { color: var(--soft); font-weight: 600; font-size: 13px; line-height: 1.25; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.bad { color: var(--bad); margin: 10px 0 0; padding-left: 18px; }
.sample { display: flex; gap: 18px; padding: 16px; margin: 0 0 14px; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; }
.pictures { flex: none; width: 180px; display: flex; flex-direction: column; gap: 8px; }
.pictures img { width: 180px; height: 180px; border-radius: 4px; display: block; background: var(--line); }
.pictures img.small { image-rendering: pixelated; }
.words { flex: 1; min-width: 0; }
.facts { font-size: 13px; color: var(--soft); margin: 0 0 8px; }
.text { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13.5px/1.6 ui-monospace, "DejaVu Sans Mono",
  Menlo, Consolas, monospace; }
.learned, .image { border-radius: 3px; padding: 1px 2px; box-decoration-break: clone;
  -webkit-box-decoration-break: clone; }
.learned { background: var(--learned); color: var(--learned-text); }
.image { background: var(--image); color: var(--image-text); }
@media (max-width: 640px) { .sample { flex-direction: column; } }
"""


def page(
    title: str, views: Sequence[SourceView], shares: Sequence[float], plan: Sequence[str], facts: str, spec: ImageSpec
) -> str:
    """The page. `shares`: the asked share of each view's source; `plan`: a line a source; `facts`: one line on all."""
    bar = "".join(
        f'<div style="width:{share:.4%};background:{_colour(i)}" title="{_text(view.name)} {share:.1%}"></div>'
        for i, (view, share) in enumerate(zip(views, shares, strict=True))
    )
    legend = "".join(
        f'<li><span class="dot" style="background:{_colour(i)}"></span>{_text(line)}</li>'
        for i, line in enumerate(plan)
    )
    messages = "".join(f"<li>{_text(message)}</li>" for view in views for message in view.messages)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>\n'
        f"<h1>{_text(title)}</h1><p>{_text(facts)}</p>"
        f'<div class="bar">{bar}</div><ul class="legend">{legend}</ul>\n'
        f'<h2>Counts</h2><div class="scroll">{_table(columns(views))}</div>'
        + (f'<ul class="bad">{messages}</ul>' if messages else "")
        + '<h2>Samples</h2><p>As training gets them: <span class="learned">learned</span> words and stop tokens, '
        '<span class="image">places of an image</span>, and pictures as the vision tower sees them, padded to a '
        "square.</p>\n" + "".join(_samples(view, spec) for view in views) + "</body></html>\n"
    )


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    heading, *body = rows
    lines = ["".join(f"<th>{_text(cell)}</th>" for cell in heading)]
    lines += ["".join(f"<td>{_text(cell)}</td>" for cell in row) for row in body]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _samples(view: SourceView, spec: ImageSpec) -> str:
    cards = "".join(_sample(shown, spec) for shown in view.shown) or "<p>No usable sample in the rows looked at.</p>"
    return f"<h2>{_text(view.name)}</h2>\n{cards}\n"


def _sample(shown: Shown, spec: ImageSpec) -> str:
    images = "".join(_image(pixels, spec) for pixels in shown.pixels)
    pictures = f'<div class="pictures">{images}</div>' if images else ""
    text = "".join(
        _text(piece.text) if piece.kind == "given" else f'<span class="{piece.kind}">{_text(piece.text)}</span>'
        for piece in shown.pieces
    )
    facts = f"sample {_text(shown.sample_id)} &middot; {shown.places} places &middot; {shown.learned} learned"
    return (
        f'<div class="sample">{pictures}<div class="words"><p class="facts">{facts}</p>'
        f'<pre class="text">{text}</pre></div></div>\n'
    )


def _image(pixels: torch.Tensor, spec: ImageSpec) -> str:
    """One picture, its normalisation undone. pixels: float32 [3, size, size]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    levels = ((pixels * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    small, stream = spec.size <= _LOSSLESS_SIDE, io.BytesIO()
    Image.fromarray(levels.permute(1, 2, 0).numpy()).save(stream, "PNG" if small else "JPEG", quality=85)
    data = base64.b64encode(stream.getvalue()).decode()
    kind = "png" if small else "jpeg"
    return f'<img{" class=small" if small else ""} alt="" src="data:image/{kind};base64,{data}">'


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _text(text: str) -> str:
    return html.escape(text)
