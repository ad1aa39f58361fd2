"""What may stand in a run file: ranges of numbers, which stand in the types of fields, and values as YAML has them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Range:
    """Where a number of the config may lie; the bounds belong to it unless they are open."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:  # NaN lies nowhere
        return (value > self.low if self.low_open else value >= self.low) and (
            value < self.high if self.high_open else value <= self.high
        )

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'above' if self.low_open else 'at least'} {self.low}"
        if self.high > 1 and not self.low_open and not self.high_open:
            return f"from {self.low} to {self.high:,}"
        return f"in {'(' if self.low_open else '['}{self.low}, {self.high}{')' if self.high_open else ']'}"


# of steps, samples, pixels, processes: two of them multiplied fit in 64 bits
LARGEST_COUNT = 10**9
# of ranks and experts: a bank of them, as wide as any model, has a number of numbers that fits in 64 bits
LARGEST_SIZE = 2**16
# what processes and steps add to it fits in 64 bits too
LARGEST_SEED = 10**18

Count = Annotated[int, Range(0, LARGEST_COUNT)]
PositiveInt = Annotated[int, Range(1, LARGEST_COUNT)]
Size = Annotated[int, Range(1, LARGEST_SIZE)]
NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, low_open=True)]
Share = Annotated[float, Range(0, 1)]
ProperShare = Annotated[float, Range(0, 1, high_open=True)]


def plain(node: Any) -> Any:
    """A value as YAML has it: lists, where the config has tuples."""
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [plain(value) for value in node]
    return node
