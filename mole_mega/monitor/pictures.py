"""Heat maps of the routing as pixels, drawn with Pillow alone: readable by themselves, each cell with its value.

Shape suffixes: R rows, C columns, L layers, D sources, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from mole_mega.adapters.routing import IMAGE, TEXT, RoutingSummary, shares

_CELL_WIDTH, _CELL_HEIGHT, _GAP, _FONT_SIZE = 46, 26, 14, 13
_INK, _PAPER, _MISSING = (30, 30, 30), (255, 255, 255), (225, 225, 225)
# dark blue, green, yellow: even steps of lightness, also for who tells no red from green
_SEQUENTIAL = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
# blue, white, red: for signs
_DIVERGING = ((33, 102, 172), (146, 197, 222), (247, 247, 247), (244, 165, 130), (178, 24, 43))


@dataclass(frozen=True)
class Panel:
    """One heat map: `values` [R, C], NaN where there is nothing; colours run from `low` to `high`. With a negative
    `low` the colours tell the sign."""

    title: str
    values: np.ndarray
    rows: Sequence[str]
    columns: Sequence[str]
    low: float = 0.0
    high: float = 1.0


def routing_pictures(routing: RoutingSummary, domains: Sequence[str]) -> Mapping[str, np.ndarray]:
    """{tag: uint8 [height, width, 3]} of one step's loads: layer by expert; source by expert, a panel a layer; image
    places against text. Groups without a token are grey."""
    layers = [f"layer {layer}" for layer in routing.layers]
    experts = [f"e{expert}" for expert in range(routing.load_LE.shape[-1])]
    source_LDE = _loads(routing.counts_by_domain()).transpose(1, 0, 2)
    image_LE, text_LE = (_loads(routing.counts_by_modality(modality)) for modality in (IMAGE, TEXT))
    return {
        "pictures/load": draw([Panel("load: share of a layer's tokens", _loads(routing.counts_LE), layers, experts)]),
        "pictures/load_by_source": draw(
            [
                Panel(f"{layer}: load by source", source_DE, list(domains), experts)
                for layer, source_DE in zip(layers, source_LDE, strict=True)
            ]
        ),
        "pictures/image_and_text": draw(
            [
                Panel("load of image tokens", image_LE, layers, experts),
                Panel("load of text tokens", text_LE, layers, experts),
                Panel("image minus text", image_LE - text_LE, layers, experts, low=-1.0),
            ]
        ),
    }


def draw(panels: Sequence[Panel], panels_a_row: int = 3) -> np.ndarray:
    """The panels side by side, uint8 [height, width, 3]."""
    pictures = [_draw_panel(panel) for panel in panels]
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    across = min(panels_a_row, len(pictures))
    down = math.ceil(len(pictures) / across)
    sheet = Image.new("RGB", (across * (width + _GAP) + _GAP, down * (height + _GAP) + _GAP), _PAPER)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, across)
        sheet.paste(picture, (_GAP + column * (width + _GAP), _GAP + row * (height + _GAP)))
    return np.asarray(sheet)


def colour(value: float, low: float, high: float) -> tuple[int, int, int]:
    """Of a value between `low` and `high`; beyond them, the end's."""
    if not math.isfinite(value):
        return _MISSING
    anchors = _DIVERGING if low < 0 else _SEQUENTIAL
    place = min(max((value - low) / (high - low), 0.0), 1.0) * (len(anchors) - 1)
    index = min(int(place), len(anchors) - 2)
    share = place - index
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(anchors[index], anchors[index + 1], strict=True))
    return red, green, blue


def _draw_panel(panel: Panel) -> Image.Image:
    assert panel.values.shape == (len(panel.rows), len(panel.columns)), panel
    font = ImageFont.load_default(_FONT_SIZE)
    rows = [_shortened(row) for row in panel.rows]
    left = math.ceil(max(font.getlength(row) for row in rows)) + 8
    top = 2 * _CELL_HEIGHT  # title, column labels
    width = max(left + len(panel.columns) * _CELL_WIDTH, math.ceil(font.getlength(panel.title)) + 4)
    picture = Image.new("RGB", (width, top + len(rows) * _CELL_HEIGHT), _PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((0, _CELL_HEIGHT // 2), panel.title, _INK, font, anchor="lm")
    for c, column in enumerate(panel.columns):
        pen.text((left + (c + 0.5) * _CELL_WIDTH, 1.5 * _CELL_HEIGHT), column, _INK, font, anchor="mm")
    for r, row in enumerate(rows):
        y = top + r * _CELL_HEIGHT
        pen.text((left - 6, y + _CELL_HEIGHT / 2), row, _INK, font, anchor="rm")
        for c in range(len(panel.columns)):
            x, value = left + c * _CELL_WIDTH, float(panel.values[r, c])
            fill = colour(value, panel.low, panel.high)
            pen.rectangle((x, y, x + _CELL_WIDTH - 2, y + _CELL_HEIGHT - 2), fill)
            text = f"{value:.2f}" if math.isfinite(value) else "-"
            middle = (x + _CELL_WIDTH / 2 - 1, y + _CELL_HEIGHT / 2 - 1)
            pen.text(middle, text, _PAPER if _is_dark(fill) else _INK, font, anchor="mm")
    return picture


def _loads(counts: torch.Tensor) -> np.ndarray:
    """Shares over the last axis, NaN where a row has no token."""
    return torch.where(counts.sum(-1, keepdim=True) > 0, shares(counts), math.nan).numpy()


def _is_dark(fill: tuple[int, int, int]) -> bool:
    red, green, blue = fill
    return 0.299 * red + 0.587 * green + 0.114 * blue < 140


def _shortened(label: str, most: int = 24) -> str:
    return label if len(label) <= most else f"{label[: most - 1]}…"
