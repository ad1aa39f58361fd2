"""Which row comes at which position of the training stream: a pure function, no state to save or to lose.

Three steps, each computable for one position alone. The weights cut the stream into sources so that every prefix holds
nearly the asked shares. Blocks of four positions are shuffled, lest a regular pattern (A B A B) meets a regular
assignment of positions to ranks and each rank sees one source only. The n-th draw from a source goes through a keyed
permutation of its rows, a new one each epoch.

Where weights change, or a source has given all it may, a new phase of the stream begins. What stands before a phase is
known when the mixture is built, so a position is as cheap to find in the last phase as in the first.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from mole_mega.config import ConfigError

_BLOCK = 4
_ROUNDS = 6
# Replacements are first sought in the bad sample's own source; then, as that one may be wholly unusable, in any.
_OWN_SOURCE_ATTEMPTS = 8
# What a source is behind its share when a phase ends goes into the next one, in units of 2^-64 samples.
_CARRY_BITS = 64


@dataclass(frozen=True)
class _Phase:
    """A part of the unshuffled stream in which shares stand still. `before[s]`: how often s was drawn until `start`.

    Of `used` sources the first one of share part / whole takes the n-th item where floor((n + 1) part / whole) >
    floor(n part / whole), so it took floor(n part / whole) before; the others share the rest, which to them is a stream
    of its own. `carry` / whole is what the phases before left a source short of, below 1.
    """

    start: int
    before: tuple[int, ...]
    used: tuple[int, ...]
    shares: tuple[tuple[int, int, int], ...]  # part, whole, carry

    def draw(self, n: int) -> tuple[int, int]:
        """(source, how many times it was drawn before) for the n-th item of the phase."""
        for source, (part, whole, carry) in zip(self.used, self.shares, strict=True):
            taken = (carry + n * part) // whole
            if (carry + (n + 1) * part) // whole > taken:
                return source, self.before[source] + taken
            n -= taken
        raise AssertionError("the last share is 1 and takes whatever reaches it")

    def counts(self, n: int) -> list[int]:
        """How often each source is drawn until the n-th item of the phase."""
        counts = list(self.before)
        for source, (part, whole, carry) in zip(self.used, self.shares, strict=True):
            taken = (carry + n * part) // whole
            counts[source] += taken
            n -= taken
        return counts

    def carries(self, n: int) -> dict[int, int]:
        """What each used source is short of at the n-th item, in units of 2^-_CARRY_BITS."""
        carries = {}
        for source, (part, whole, carry) in zip(self.used, self.shares, strict=True):
            taken, rest = divmod(carry + n * part, whole)
            carries[source] = (rest << _CARRY_BITS) // whole
            n -= taken
        return carries


class Mixture:
    """A stream over sources of `sizes` rows in shares of `weights` (of samples; any positive scale).

    `changes`: (position, weights) in order; from that position on those weights hold. `limits[s]`: how many draws
    source s may give; the others then share the rest, and where none is left the stream ends (`length`; None: never).
    In every prefix of unchanging weights each source's count is within len(sizes) of its share. Memory and time per
    position are O(number of sources), and the logarithm of the number of changes.
    Raises ConfigError for negative, non-finite or all-zero weights, and for an empty source that is used.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        seed: int,
        *,
        changes: Sequence[tuple[int, Sequence[float]]] = (),
        limits: Sequence[int | None] | None = None,
    ):
        self._stretches = [(0, weights), *changes]
        for start, these in self._stretches:
            _check_weights(sizes, these, "" if start == 0 else f" from sample {start} on")
        if any(later <= start for (start, _), (later, _) in pairwise(self._stretches)):
            raise ConfigError(f"changes of weights must come in order, got {[start for start, _ in self._stretches]}")
        self._sizes, self._seed = tuple(sizes), seed
        self._limits = tuple(limits) if limits is not None else (None,) * len(sizes)
        self._phases, self.length = self._build()
        self._starts = [phase.start for phase in self._phases]

    def locate(self, position: int, attempt: int = 0) -> tuple[int, int]:
        """(source index, row) at a position of the stream; with attempt > 0, of that position's n-th replacement.
        Raises ConfigError at the end of the stream."""
        if position < 0 or attempt < 0:
            raise ValueError(f"position and attempt must be at least 0, got {position} and {attempt}")
        if self.length is not None and position >= self.length:
            raise ConfigError(f"all sources have run out: the stream ends after {self.length} samples")
        source, draw = self._draw(position)
        if attempt == 0:
            return source, self.row(source, draw)
        lot = _hash(self._seed, position, attempt)
        if attempt > _OWN_SOURCE_ATTEMPTS:
            used = self._phase(position).used
            source = used[_hash(lot) % len(used)]
        return source, lot % self._sizes[source]

    def row(self, source: int, draw: int) -> int:
        """The row that a source's n-th draw is."""
        return shuffled_row(self._sizes[source], draw, source, self._seed)

    def counts(self, position: int) -> list[int]:
        """How often each source stands in the first `position` positions, or in the whole stream if it ends before."""
        position = position if self.length is None else min(position, self.length)
        whole = position - position % _BLOCK
        counts = self._phase(whole).counts(whole - self._phase(whole).start)
        for later in range(whole, position):
            counts[self._draw(later)[0]] += 1
        return counts

    def asked(self, position: int) -> list[float]:
        """How often each source should stand in the first `position` positions by its weights alone, limits aside."""
        asked = [0.0] * len(self._sizes)
        ends = [start for start, _ in self._stretches[1:]] + [position]
        for (start, weights), end in zip(self._stretches, ends, strict=True):
            length, total = max(0, min(end, position) - start), math.fsum(weights)
            asked = [sum_ + length * weight / total for sum_, weight in zip(asked, weights, strict=True)]
        return asked

    def ends(self) -> dict[int, int]:
        """{source: position} of the sources that reach their limit: none of their rows stands there or later."""
        ends: dict[int, int] = {}
        for phase in self._phases:
            for source, limit in enumerate(self._limits):
                if limit is not None and phase.before[source] >= limit:
                    ends.setdefault(source, phase.start)
        if self.length is not None:
            ends |= {source: self.length for source, limit in enumerate(self._limits) if limit and source not in ends}
        return ends

    def _build(self) -> tuple[list[_Phase], int | None]:
        phases: list[_Phase] = []
        before, carries = (0,) * len(self._sizes), dict.fromkeys(range(len(self._sizes)), 0)
        ends: list[int | None] = [start for start, _ in self._stretches[1:]] + [None]
        for (position, weights), end in zip(self._stretches, ends, strict=True):
            while end is None or position < end:
                left = [None if limit is None else limit - n for limit, n in zip(self._limits, before, strict=True)]
                used = tuple(s for s, weight in enumerate(weights) if weight > 0 and left[s] != 0)
                if not used:
                    return phases, position
                phases.append(_phase(position, before, used, weights, carries))
                length = _until_one_runs_out(phases[-1], left, None if end is None else end - position)
                if length is None:
                    return phases, None
                before, carries = tuple(phases[-1].counts(length)), carries | phases[-1].carries(length)
                position += length
        raise AssertionError("the last stretch has no end")

    def _phase(self, position: int) -> _Phase:
        """The phase of a position; of the end of the stream, its last one."""
        return self._phases[bisect.bisect_right(self._starts, position) - 1]

    def _draw(self, position: int) -> tuple[int, int]:
        """(source, how many times it was drawn before)."""
        block, place = divmod(position, _BLOCK)
        first = block * _BLOCK
        size = _BLOCK if self.length is None else min(_BLOCK, self.length - first)
        draws = [(phase := self._phase(first + i)).draw(first + i - phase.start) for i in range(size)]
        # Only the sources are shuffled; each source's own draws stay in order, so its epochs do not interleave.
        order = [draws[_permute(i, size, (self._seed, block))][0] for i in range(size)]
        source = order[place]
        drawn_before = min(draw for drawn, draw in draws if drawn == source)
        return source, drawn_before + order[:place].count(source)


def shuffled_row(size: int, draw: int, source: int, seed: int) -> int:
    """The row that the n-th draw from the source with that index and that many rows is, in every mixture of the seed:
    each epoch is a permutation of its own."""
    epoch, offset = divmod(draw, size)
    return _permute(offset, size, (seed, source, epoch))


def _check_weights(sizes: Sequence[int], weights: Sequence[float], where: str) -> None:
    if len(sizes) != len(weights):
        raise ConfigError(f"{len(sizes)} sources but {len(weights)} weights{where}")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise ConfigError(f"weights must be finite, at least 0 and not all 0, got {list(weights)}{where}")
    if any(size < 1 and weight > 0 for size, weight in zip(sizes, weights, strict=True)):
        raise ConfigError(f"a source with a weight above 0 must have rows; sizes are {list(sizes)}")


def _phase(
    start: int, before: tuple[int, ...], used: tuple[int, ...], weights: Sequence[float], carries: dict[int, int]
) -> _Phase:
    # Share of each used source among itself and those after it, exact, so that counts never drift with rounding.
    exact = [Fraction(weights[source]) for source in used]
    shares = []
    for i, source in enumerate(used):
        part, whole = (exact[i] / sum(exact[i:])).as_integer_ratio()
        shares.append((part << _CARRY_BITS, whole << _CARRY_BITS, carries[source] * whole))
    return _Phase(start, before, used, tuple(shares))


def _until_one_runs_out(phase: _Phase, left: Sequence[int | None], longest: int | None) -> int | None:
    """How many items the phase has: until a source has none left, at most `longest`; None: without end."""

    most = {source: phase.before[source] + n for source in phase.used if (n := left[source]) is not None}

    def over(length: int) -> bool:
        counts = phase.counts(length)
        return any(counts[source] >= most[source] for source in most)

    if not most:
        return longest
    high = 1
    while not over(high):
        if longest is not None and high >= longest:
            return longest
        high *= 2
    length = bisect.bisect_left(range(high), True, key=over)
    return length if longest is None else min(length, longest)


def _permute(index: int, size: int, key: tuple[int, ...]) -> int:
    """Where a keyed random permutation of range(size) sends `index`.

    A Feistel network permutes the next power of four; what falls outside of range(size) is sent on until it falls
    inside (cycle walking), which keeps it a permutation. Expected cost: below four walks.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (_hash(*key, turn, right) & mask)
        index = left << half | right
        if index < size:
            return index


def _hash(*numbers: int) -> int:
    """64 bits that depend on all the numbers and, unlike Python's hash, on nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big")
