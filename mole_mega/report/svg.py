"""Line charts and heat maps as SVG text: pure functions, no library and no style sheet.

Ink is `currentColor`, so that a figure inside a page follows the page's light or dark; series and cells have colours of
their own that stand out from both. All text is escaped here.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

Points = Sequence[tuple[float, float]]
Scale = Literal["share", "diverging"]

NONE = "-"  # stands where there is no value

_SERIES = ("#3b82c4", "#e07b39", "#2f9e6e", "#c2528b", "#8a6fd1", "#a0892c", "#4aa3b5", "#c94f4f")
_DASHES = ("", "6 3", "2 3", "8 3 2 3")
# Colours of a heat map from its lowest to its highest value: one hue for shares; two, pale at zero, for signed values.
_SCALES: Mapping[Scale, tuple[tuple[int, int, int], ...]] = {
    "share": ((240, 245, 251), (158, 202, 225), (66, 133, 190), (8, 48, 107)),
    "diverging": ((165, 30, 40), (239, 150, 120), (246, 246, 246), (130, 180, 214), (15, 75, 145)),
}
_GREY = "#8888884d"
_CHAR = 6.4  # a character's width at the font size below


def line_chart(
    series: Mapping[str, Points],
    *,
    label: str,
    x_label: str = "step",
    y_label: str = "",
    width: int = 720,
    height: int = 260,
    bounds: tuple[float, float] | None = None,
    legend: bool = True,
) -> str:
    """One line a series, a dot where it has a single point. `label` is what a screen reader says; `bounds` fixes the y
    axis. Values must be finite. Raises ValueError when no series has a point."""
    points = [point for line in series.values() for point in line]
    if not points:
        raise ValueError("a chart without a point")
    x_low, x_high = _span([x for x, _ in points])
    y_low, y_high = bounds or _span([y for _, y in points], room=0.05)
    names = {name: shorten(name, 26) for name in series}
    right = 24 + _CHAR * max(map(len, names.values())) + 22 if legend else 12
    left, top, bottom = 68 if y_label else 52, 12, 40
    inner_w, inner_h = max(width - left - right, 60), height - top - bottom

    def place(x: float, y: float) -> tuple[float, float]:
        return left + inner_w * (x - x_low) / (x_high - x_low), top + inner_h * (1 - (y - y_low) / (y_high - y_low))

    parts = []
    for tick in ticks(y_low, y_high):
        _, y = place(x_low, tick)
        parts.append(_line(left, y, left + inner_w, y, 'stroke="currentColor" stroke-opacity="0.15"'))
        parts.append(_text(left - 7, y + 4, number(tick), anchor="end"))
    for tick in ticks(x_low, x_high, most=max(2, round(inner_w / 80))):
        x, _ = place(tick, y_low)
        parts.append(_line(x, top + inner_h, x, top + inner_h + 4, 'stroke="currentColor" stroke-opacity="0.5"'))
        parts.append(_text(x, top + inner_h + 17, number(tick), anchor="middle"))
    parts.append(
        _line(left, top + inner_h, left + inner_w, top + inner_h, 'stroke="currentColor" stroke-opacity="0.5"')
    )
    parts.append(_text(left + inner_w / 2, height - 6, x_label, anchor="middle"))
    if y_label:
        turned = f'transform="rotate(-90 13 {top + inner_h / 2:.1f})"'
        parts.append(_text(13, top + inner_h / 2, y_label, anchor="middle", extra=turned))
    for index, (name, line) in enumerate(series.items()):
        colour, dash = _SERIES[index % len(_SERIES)], _DASHES[index // len(_SERIES) % len(_DASHES)]
        stroke = f'fill="none" stroke="{colour}" stroke-width="1.8" stroke-linejoin="round"'
        stroke += f' stroke-dasharray="{dash}"' if dash else ""
        placed = [place(*point) for point in line]
        if len(placed) == 1:
            parts.append(f'<circle cx="{placed[0][0]:.1f}" cy="{placed[0][1]:.1f}" r="3" fill="{colour}"/>')
        elif placed:
            parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in placed)}" {stroke}/>')
        if legend:
            y = top + 8 + 18 * index
            parts.append(_line(left + inner_w + 14, y, left + inner_w + 36, y, stroke))
            parts.append(_text(left + inner_w + 42, y + 4, names[name], title=name))
    height = max(height, top + 18 * len(series) + 8) if legend else height
    return _svg(width, height, label, parts)


def heat_map(
    values: Sequence[Sequence[float | None]],
    row_names: Sequence[str],
    column_names: Sequence[str],
    *,
    label: str,
    row_title: str = "",
    column_title: str = "",
    bounds: tuple[float, float] = (0.0, 1.0),
    scale: Scale = "share",
    write: Callable[[float], str] | None = None,
) -> str:
    """A cell a value, coloured by where it lies in `bounds`; None is grey. Up to 16 columns, values stand in the cells.

    Raises ValueError when there is no cell, or rows and names do not match.
    """
    rows, columns = len(row_names), len(column_names)
    if not rows or not columns or len(values) != rows or any(len(row) != columns for row in values):
        raise ValueError(f"a heat map of {rows} x {columns} names for {[len(row) for row in values]} values")
    written = columns <= 16
    write = write or hundredths
    texts = [[write(value) if value is not None else NONE for value in row] for row in values]
    widest = max(max(map(len, row)) for row in texts)
    longest_head = min(130.0, _CHAR * max(map(len, column_names)) + 12)
    cell_w, cell_h = (max(44.0, _CHAR * widest + 12, longest_head), 24.0) if written else (14.0, 14.0)
    names = [shorten(name, 22) for name in row_names]
    left = (18 if row_title else 4) + _CHAR * max(map(len, names)) + 8
    heads = [shorten(name, max(3, int(cell_w / _CHAR))) for name in column_names]
    every = 1 if written else max(1, round(3 * _CHAR / cell_w) + 1)
    top = 20.0
    width, height = left + cell_w * columns + 4, top + cell_h * rows + (22 if column_title else 4)
    parts = []
    for column, head in enumerate(heads):
        if column % every == 0:
            x = left + cell_w * (column + 0.5)
            parts.append(_text(x, top - 6, head, anchor="middle", title=column_names[column]))
    for row, name in enumerate(names):
        y = top + cell_h * row
        parts.append(_text(left - 7, y + cell_h / 2 + 4, name, anchor="end", title=row_names[row]))
        for column, value in enumerate(values[row]):
            x = left + cell_w * column
            colour, ink = _cell_colours(value, bounds, scale)
            title = html.escape(f"{row_names[row]}, {column_names[column]}: {texts[row][column]}")
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell_w - 1:.1f}" height="{cell_h - 1:.1f}" fill="{colour}">'
                f"<title>{title}</title></rect>"
            )
            if written:
                parts.append(
                    _text(
                        x + cell_w / 2, y + cell_h / 2 + 4, texts[row][column], anchor="middle", extra=f'fill="{ink}"'
                    )
                )
    if row_title:
        middle = top + cell_h * rows / 2
        turned = f'transform="rotate(-90 11 {middle:.1f})"'
        parts.append(_text(11, middle, row_title, anchor="middle", extra=turned))
    if column_title:
        parts.append(_text(left + cell_w * columns / 2, height - 5, column_title, anchor="middle"))
    return _svg(width, height, label, parts)


def standalone(figure: str) -> str:
    """A figure as a file of its own: on white, whatever the viewer's background."""
    return figure.replace("<svg ", '<svg style="background:#fff;color:#222" ', 1) + "\n"


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`, at most `most` or so."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next((factor for factor in (1, 2, 5) if (high - low) / (step * factor) <= most), 10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def number(value: float) -> str:
    """A short figure for people: 4 digits, thousands apart."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 1e7 or abs(value) < 1e-4:
        return f"{value:.2e}"
    digits = max(0, 3 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{min(digits, 6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def hundredths(value: float) -> str:
    """Two digits after the point, and no -0.00."""
    return f"{round(value, 2) + 0.0:.2f}"


def shorten(text: str, most: int) -> str:
    """At most `most` characters, an ellipsis for the rest."""
    return text if len(text) <= most else text[: most - 1] + "…"


def _span(values: Sequence[float], room: float = 0.0) -> tuple[float, float]:
    """Lowest and highest, apart from each other also where all values are one."""
    low, high = min(values), max(values)
    if low == high:
        pad = abs(low) * 0.1 or 1.0
        return low - pad, high + pad
    return low - room * (high - low), high + room * (high - low)


def _cell_colours(value: float | None, bounds: tuple[float, float], scale: Scale) -> tuple[str, str]:
    """(fill, ink that can be read on it)."""
    if value is None:
        return _GREY, "currentColor"
    low, high = bounds
    stops = _SCALES[scale]
    place = min(1.0, max(0.0, (value - low) / (high - low))) * (len(stops) - 1)
    index = min(int(place), len(stops) - 2)
    red, green, blue = (
        round(a + (b - a) * (place - index)) for a, b in zip(stops[index], stops[index + 1], strict=True)
    )
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140
    return f"#{red:02x}{green:02x}{blue:02x}", "#ffffff" if dark else "#1a1a1a"


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", extra: str = "", title: str = "") -> str:
    more = f"<title>{html.escape(title)}</title>" if title and title != text else ""
    fill = extra if "fill=" in extra else f'fill="currentColor" {extra}'
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {fill.strip()}>{html.escape(text)}{more}</text>'


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{html.escape(label)}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" '
        'font-family="system-ui, \'DejaVu Sans\', sans-serif" font-size="11.5">'
    )
    return "\n".join([head, *parts, "</svg>"])
