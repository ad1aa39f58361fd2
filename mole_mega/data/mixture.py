"""Which row comes at which position of the training stream: a pure function, no state to save or to lose.

Three steps, each computable for one position alone. The weights cut the stream into sources so that every prefix holds
nearly the asked shares. Blocks of four positions are shuffled, lest a regular pattern (A B A B) meets a regular
assignment of positions to ranks and each rank sees one source only. The n-th draw from a source goes through a keyed
permutation of its rows, a new one each epoch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction

from mole_mega.config import ConfigError

_BLOCK = 4
_ROUNDS = 6
# Replacements are first sought in the bad sample's own source; then, as that one may be wholly unusable, in any.
_OWN_SOURCE_ATTEMPTS = 8


class Mixture:
    """An endless stream over sources of `sizes` rows in shares of `weights` (of samples; any positive scale).

    In every prefix each source's count is within len(sizes) of its share. Memory and time per position are O(number of
    sources). Raises ConfigError for negative, non-finite or all-zero weights, and for an empty source that is used.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int):
        if len(sizes) != len(weights):
            raise ConfigError(f"{len(sizes)} sources but {len(weights)} weights")
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
            raise ConfigError(f"weights must be finite, at least 0 and not all 0, got {list(weights)}")
        self._used = [source for source, weight in enumerate(weights) if weight > 0]
        if any(sizes[source] < 1 for source in self._used):
            raise ConfigError(f"a source with a weight above 0 must have rows; sizes are {list(sizes)}")
        self._sizes, self._seed = list(sizes), seed
        # Share of each used source among itself and those after it, exact, so that counts never drift with rounding.
        exact = [Fraction(weights[source]) for source in self._used]
        self._shares = [(exact[i] / sum(exact[i:])).as_integer_ratio() for i in range(len(exact))]

    def locate(self, position: int, attempt: int = 0) -> tuple[int, int]:
        """(source index, row) at a position of the stream; with attempt > 0, of that position's n-th replacement."""
        if position < 0 or attempt < 0:
            raise ValueError(f"position and attempt must be at least 0, got {position} and {attempt}")
        source, draw = self._draw(position)
        if attempt == 0:
            epoch, offset = divmod(draw, self._sizes[source])
            return source, _permute(offset, self._sizes[source], (self._seed, source, epoch))
        lot = _hash(self._seed, position, attempt)
        if attempt > _OWN_SOURCE_ATTEMPTS:
            source = self._used[_hash(lot) % len(self._used)]
        return source, lot % self._sizes[source]

    def _draw(self, position: int) -> tuple[int, int]:
        """(source, how many times it was drawn before)."""
        block, place = divmod(position, _BLOCK)
        draws = [self._split(block * _BLOCK + i) for i in range(_BLOCK)]
        # Only the sources are shuffled; each source's own draws stay in order, so its epochs do not interleave.
        order = [draws[_permute(i, _BLOCK, (self._seed, block))][0] for i in range(_BLOCK)]
        source = order[place]
        first = min(draw for drawn, draw in draws if drawn == source)
        return source, first + order[:place].count(source)

    def _split(self, n: int) -> tuple[int, int]:
        """(source, how many times it was drawn before) for the n-th item of the unshuffled stream.

        The first source of share a takes item n where floor((n + 1) a) > floor(n a), so it took floor(n a) before; the
        others share the rest, which to them is a stream of its own.
        """
        for source, (part, whole) in zip(self._used, self._shares, strict=True):
            taken = n * part // whole
            if (n + 1) * part // whole > taken:
                return source, taken
            n -= taken
        raise AssertionError("the last share is 1 and takes whatever reaches it")


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
