"""What training will see of a source: samples as pieces of text with the loss mask, and counts over many rows.

Nothing here is learned from or counted by training; `page.py` shows the same as HTML.
"""

from __future__ import annotations

import statistics
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

import torch

from mole_mega.data.collate import load_pixels
from mole_mega.data.conversation import IGNORE_INDEX, Encoder, Example
from mole_mega.data.image import ImageSpec
from mole_mega.data.sources import BadSample, Source
from mole_mega.data.tally import aligned

# A text could otherwise colour, move or reorder what stands around it. Escaped: control characters and bidi overrides.
_REORDERING = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_ANSI = {"given": ("", ""), "learned": ("\x1b[1;32m", "\x1b[0m"), "image": ("\x1b[36m", "\x1b[0m")}
_MARKS = {"given": ("", ""), "learned": ("[[", "]]"), "image": ("", "")}
# Messages kept of each kind of bad sample.
_KEPT_MESSAGES = 2


@dataclass(frozen=True)
class Piece:
    """A run of a sample's tokens: given to the model, learned from, or the places of one image."""

    kind: Literal["given", "learned", "image"]
    text: str


@dataclass(frozen=True)
class Shown:
    """A sample to look at: its pieces, and pixels float32 [images, 3, size, size] as the vision tower gets them."""

    sample_id: str
    places: int
    learned: int
    pieces: tuple[Piece, ...]
    pixels: torch.Tensor


@dataclass
class SourceView:
    """What was found in the rows of a source that were looked at. `places`, `learned`: by usable row."""

    name: str
    size: int
    looked_at: int = 0
    places: list[int] = field(default_factory=list)
    learned: list[int] = field(default_factory=list)
    images: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)


def look_at(source: Source, rows: Iterable[int], encoder: Encoder, spec: ImageSpec, samples: int) -> SourceView:
    """Read rows as training reads them, images included, and keep the first `samples` usable ones to show."""
    view = SourceView(source.name, len(source))
    for row in rows:
        view.looked_at += 1
        try:
            example = encoder.encode(source[row])
            if len(view.shown) < samples:
                view.shown.append(_show(example, encoder, spec))
            else:
                for image in example.images:
                    image.open()
        except BadSample as bad:
            if view.bad[bad.kind] < _KEPT_MESSAGES:
                view.messages.append(str(bad))
            view.bad[bad.kind] += 1
            continue
        view.places.append(len(example.tokens))
        view.learned.append(int((example.labels != IGNORE_INDEX).sum()))
        view.images += len(example.images)
    return view


def pieces(example: Example, encoder: Encoder) -> Iterator[Piece]:
    """The sample in order. A token is learned if the place before it has it as its label."""
    learned = [False, *(example.labels[:-1] != IGNORE_INDEX).tolist()]
    ids = example.tokens.tolist()
    kinds = ["image" if i == encoder.image_token_id else "learned" if known else "given"
             for i, known in zip(ids, learned, strict=True)]  # fmt: skip
    text_ids: list[int] = []
    start = 0
    for kind, run in groupby(kinds):
        end = start + len(list(run))
        if kind == "image":
            for _ in range(start, end, encoder.places_per_image):
                yield Piece("image", f"<image x {encoder.places_per_image}>")
        else:
            # what the run adds to the text so far: alone, many tokenizers would drop the space it begins with
            before, alone = encoder.decode(text_ids), encoder.decode(ids[start:end])
            text_ids += ids[start:end]
            whole = encoder.decode(text_ids)
            yield Piece(kind, _visible(whole[len(before) :] if whole.startswith(before) else alone))  # type: ignore[arg-type]
        start = end


def as_text(shown: Shown, *, colour: bool) -> str:
    """The sample for a terminal: what is learned in colour, or in [[ ]]."""
    marks = _ANSI if colour else _MARKS
    return "".join(f"{marks[piece.kind][0]}{piece.text}{marks[piece.kind][1]}" for piece in shown.pieces)


def columns(views: Sequence[SourceView]) -> list[tuple[str, ...]]:
    """A heading and a row of cells a source; a column for each kind of bad sample that was met."""
    # these two are asked for most often, so they are always said
    kinds = [*dict.fromkeys(["too long", "no label", *(kind for view in views for kind in sorted(view.bad))])]
    heading = ("source", "rows", "looked at", "usable", "places: min", "median", "max", "learned", "images", *kinds)
    return [heading, *(_cells(view, kinds) for view in views)]


def table(views: Sequence[SourceView]) -> list[str]:
    """`columns` as lines."""
    return aligned(columns(views))


def _cells(view: SourceView, kinds: Sequence[str]) -> tuple[str, ...]:
    spread = [min(view.places), statistics.median_low(view.places), max(view.places)] if view.places else ["-"] * 3
    counts = [view.size, view.looked_at, len(view.places), *spread, sum(view.learned), view.images]
    return (view.name, *(f"{n:,}" if isinstance(n, int) else n for n in [*counts, *(view.bad[kind] for kind in kinds)]))


def _show(example: Example, encoder: Encoder, spec: ImageSpec) -> Shown:
    learned = int((example.labels != IGNORE_INDEX).sum())
    found = tuple(pieces(example, encoder))
    return Shown(example.sample_id, len(example.tokens), learned, found, load_pixels(example, spec))


def _visible(text: str) -> str:
    def escape(character: str) -> bool:
        return (unicodedata.category(character) == "Cc" and character not in "\n\t") or ord(character) in _REORDERING

    return "".join(c.encode("unicode_escape").decode() if escape(c) else c for c in text)
