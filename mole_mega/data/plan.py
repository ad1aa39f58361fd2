"""What a run's data section asks for, as a `Mixture`: shares, schedules and passes become positions of the stream."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mole_mega.config import ConfigError, DataConfig
from mole_mega.data.conversation import Encoder
from mole_mega.data.mixture import Mixture, shuffled_row
from mole_mega.data.sources import BadSample, Source

# Rows of a source whose places are counted to tell its tokens from its rows.
_ROWS_MEASURED = 512
# A slope of a schedule becomes so many stretches of level weights at most, each as high as the slope's mean over it.
_STAIRS = 256
# of e, so that sums of sizes to a power times weights stay finite
_LARGEST_EXPONENT = 400.0


@dataclass(frozen=True)
class Places:
    """How many places a row of a source takes: the mean over `rows` usable rows, and that mean's standard error (0 when
    every row was counted)."""

    mean: float
    error: float
    rows: int

    def describe(self, size: int) -> str:
        """For people, of a source of `size` rows: with its error, in digits enough to show it, unless all rows were
        counted."""
        if size <= _ROWS_MEASURED:
            return f"{self.mean:.1f}"
        if not self.error:
            return f"{self.mean:.1f} (as {self.rows} rows have, all alike)"
        digits = max(1, -math.floor(math.log10(self.error)))
        return f"{self.mean:.{digits}f} +- {self.error:.{digits}f}"


@dataclass(frozen=True)
class MixturePlan:
    """The mixture of a run. `sizes`: rows by source; `places` by source, None where nothing had to be measured;
    `batch`: samples a step."""

    config: DataConfig
    sizes: tuple[int, ...]
    places: tuple[Places | None, ...]
    batch: int
    seed: int
    mixture: Mixture

    def check(self, steps: int) -> None:
        """Raise ConfigError if the sources run out before `steps` steps are done."""
        length = self.mixture.length
        if length is None or length >= steps * self.batch:
            return
        passes = [
            f"{source.name} {source.epochs} x {size} rows"
            for source, size in zip(self.config.sources, self.sizes, strict=True)
            if source.epochs is not None
        ]
        raise ConfigError(
            f"data.sources run out after {length} samples ({', '.join(passes)}): {length // self.batch} of {steps} "
            f"steps of {self.batch} are possible; set train.steps to that, or raise epochs"
        )

    def asked_shares(self, steps: int, first: int = 0) -> list[float]:
        """Each source's asked share in the steps after step `first` up to `steps`, of the samples or the tokens,
        whichever weights are in."""
        before, until = (self.mixture.asked(step * self.batch) for step in (first, steps))
        rows = [b - a for a, b in zip(before, until, strict=True)]
        amounts = [n * (places.mean if places else 1.0) for n, places in zip(rows, self.places, strict=True)]
        total = math.fsum(amounts)
        return [amount / total if total else 0.0 for amount in amounts]

    def drawn(self, steps: int, first: int = 0) -> list[int]:
        """How often the stream draws each source in the steps after step `first` up to `steps`."""
        before, until = (self.mixture.counts(step * self.batch) for step in (first, steps))
        return [b - a for a, b in zip(before, until, strict=True)]

    def describe(self, steps: int, first: int = 0) -> list[str]:
        """A line a source: what was asked, and what that comes to in the steps after step `first` up to `steps`."""
        samples, ends = (steps - first) * self.batch, self.mixture.ends()
        planned, shares = self.drawn(steps, first), self.asked_shares(steps, first)
        lines = []
        for index, (source, share) in enumerate(zip(self.config.sources, shares, strict=True)):
            rows, size, places = planned[index], self.sizes[index], self.places[index]
            line = f"source {source.name}: {size} rows"
            if places is not None:
                line += f" of {places.describe(size)} places"
            line += f", asked {share:.1%} of the {self.config.weights_in}"
            line += f", planned {rows} of {samples} samples = {rows / size:.2f} epochs"
            if ends.get(index, steps * self.batch) < steps * self.batch:
                line += f"; runs out in step {(ends[index] - 1) // self.batch + 1} (epochs: {source.epochs})"
            lines.append(line)
        return lines


def plan_mixture(
    config: DataConfig, sources: Sequence[Source], encoder: Encoder, seed: int, batch: int | None
) -> MixturePlan:
    """Measure what has to be measured and build the mixture. The same files, config and seed give the same one.

    `batch`: samples a step; None will do where no weight changes over the steps. Raises ConfigError for a source whose
    weight is above 0 and of whose rows none can be used.
    """
    sizes = tuple(len(source) for source in sources)
    in_tokens = config.weights_in == "tokens"
    for index, (source, asked) in enumerate(zip(sources, config.sources, strict=True)):
        if len(source) and any(w for _, w in asked.points):
            _check_usable(source, encoder, seed, index)
    places = tuple(
        measure_places(source, encoder, seed, index) if in_tokens and any(w for _, w in asked.points) else None
        for index, (source, asked) in enumerate(zip(sources, config.sources, strict=True))
    )
    # samples a unit of weight
    factors = [_size_factor(config, size, p) / (p.mean if p else 1.0) for size, p in zip(sizes, places, strict=True)]
    stretches: list[tuple[int, list[float]]] = []
    for step, at in _stretches(config):
        weights = [source.weight_at(at) * factor for source, factor in zip(config.sources, factors, strict=True)]
        if not stretches or weights != stretches[-1][1]:
            stretches.append((step, weights))
    (_, weights), *changes = stretches
    if changes and batch is None:
        raise ValueError("a schedule of weights counts steps, so it needs the samples a step")
    limits = [None if s.epochs is None else s.epochs * size for s, size in zip(config.sources, sizes, strict=True)]
    mixture = Mixture(
        sizes,
        weights,
        seed,
        changes=[(step * (batch or 1), weights) for step, weights in changes],
        limits=limits,
    )
    return MixturePlan(config, sizes, places, batch or 1, seed, mixture)


def measure_places(source: Source, encoder: Encoder, seed: int, index: int) -> Places:
    """The mean places of a source's usable rows: of all if they are few, else of those that the first epoch of the
    source with that index begins with. Opens no image. At least one row can be used."""
    lengths = list(_lengths(source, encoder, _first_rows(source, seed, index)))
    measured = min(_ROWS_MEASURED, len(source))
    mean = math.fsum(lengths) / len(lengths)
    if measured == len(source):
        return Places(mean, 0.0, len(lengths))
    variance = math.fsum((length - mean) ** 2 for length in lengths) / max(1, len(lengths) - 1)
    return Places(mean, math.sqrt(variance / len(lengths)), len(lengths))


def _check_usable(source: Source, encoder: Encoder, seed: int, index: int) -> None:
    """Raise ConfigError if none of the rows that the source begins with can be used: others would take its place in the
    mixture. As a rule the first one can. Opens no image."""
    bad: list[BadSample] = []
    if next(_lengths(source, encoder, _first_rows(source, seed, index), bad), None) is None:
        raise ConfigError(
            f"source {source.name!r}: none of the {len(bad)} rows that were looked at can be used; "
            f"sample {bad[0].sample_id}, for example: {bad[0].reason}"
        )


def _first_rows(source: Source, seed: int, index: int) -> Iterator[int]:
    return (shuffled_row(len(source), n, index, seed) for n in range(min(_ROWS_MEASURED, len(source))))


def _lengths(
    source: Source, encoder: Encoder, rows: Iterable[int], bad: list[BadSample] | None = None
) -> Iterator[int]:
    """The places of each row that can be used; why another one cannot is added to `bad`."""
    for row in rows:
        try:
            yield len(encoder.encode(source[row]).tokens)
        except BadSample as problem:  # training leaves it out too, and counts it
            if bad is not None:
                bad.append(problem)


def _size_factor(config: DataConfig, size: int, places: Places | None) -> float:
    """size ** (1 / temperature), the size in the unit of the weights; 1 where sizes do not count."""
    if config.temperature is None:
        return 1.0
    amount = size * (places.mean if places else 1.0)
    exponent = 1 / config.temperature
    if exponent * math.log(max(amount, 1.0)) > _LARGEST_EXPONENT:
        least = math.log(amount) / _LARGEST_EXPONENT
        raise ConfigError(
            f"data.temperature {config.temperature:g} takes a source of {amount:.0f} {config.weights_in} to the power "
            f"of {exponent:g}, more than numbers hold; it must be at least {least:.2g} here"
        )
    # Rounded, as the last bit of a power is the C library's own affair and all hosts of a run must agree on the stream.
    return float(f"{amount**exponent:.12g}")


def _stretches(config: DataConfig) -> list[tuple[int, float]]:
    """(first step, step at which to ask for the weights) of each stretch of level weights, steps counted from 0."""
    knots = sorted({0, *(int(step) for source in config.sources for step, _ in source.points)})
    stretches: list[tuple[int, float]] = []
    for start, end in pairwise(knots):
        level = all(source.weight_at(start) == source.weight_at(end) for source in config.sources)
        stairs = 1 if level else min(_STAIRS, end - start)
        edges = [start + (end - start) * i // stairs for i in range(stairs + 1)]
        # the mean of a straight line over whole steps is its value halfway between the first and the last
        stretches += [(first, (first + past - 1) / 2) for first, past in pairwise(edges)]
    return [*stretches, (knots[-1], float(knots[-1]))]
