"""The sections about what is read: sources and their mixture."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

from mole_mega.config.values import LARGEST_COUNT, Positive, PositiveInt, Range


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One data source: a LLaVA conversation file (.json, .jsonl) or a Hugging Face dataset on disk. Its name is the
    domain that losses and expert loads are reported by."""

    name: str
    path: str
    image_folder: str = ""
    # A number, or a schedule [[step, weight], ...]: straight lines between the points, level before the first and
    # after the last. A point holds once so many steps are done.
    weight: float | tuple[tuple[float, ...], ...] = 1.0
    # At most so many passes over the rows; the other sources then share the rest. None: as many as come.
    epochs: int | None = None

    @property
    def points(self) -> tuple[tuple[float, float], ...]:
        """The weight as a schedule; a plain number is one of one point."""
        if isinstance(self.weight, float | int):
            return ((0, self.weight),)
        return tuple((step, weight) for step, weight in self.weight)

    def weight_at(self, step: float) -> float:
        """The weight once `step` steps are done."""
        points = self.points
        for (start, low), (end, high) in pairwise(points):
            if start <= step < end:
                return low + (high - low) * (step - start) / (end - start)
        return points[0][1] if step < points[0][0] else points[-1][1]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The mixture. `max_length` counts places, image places included.

    A source's share is weight x size ** (1 / temperature), of the samples or of the tokens (places). At temperature 1
    shares follow the sizes, above it small sources gain (Raffel et al., arXiv 1910.10683, section 3.5.2); at None, its
    limit, sizes do not count. A size is in the same unit: rows, or rows x mean places.
    """

    sources: tuple[SourceConfig, ...]
    weights_in: Literal["samples", "tokens"] = "samples"
    temperature: Positive | None = None
    validation: tuple[SourceConfig, ...] = ()
    max_length: Annotated[int, Range(2, LARGEST_COUNT)] = 2048
    # A sample that cannot be used (broken image, no assistant turn, too long): leave it out and count it, or stop.
    on_bad_sample: Literal["skip", "stop"] = "skip"
    max_image_pixels: PositiveInt = 89_478_485
