"""From sums over batches to a verdict: pure numbers, no model.

Gradients of batches are a source's true gradient plus noise, and noise alone makes any two of them look unlike each
other. So cosines are corrected for it, come with an uncertainty, and stand beside a control: the cosine between halves
of one source.

Shapes: S sources, K batches of each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

# Where a gradient sits: ("mlp", 3), ("attention", 3), ("projector", None).
Place = tuple[str, int | None]
State = Literal["opposed", "aligned", "unclear"]
KINDS = ("alone", "mix", "alone_samples", "mix_samples")
Verdict = Literal["conflict", "gradients only", "losses only", "none", "too noisy"]


@dataclass(frozen=True)
class Measurement:
    """What was measured.

    products[place]: inner products of all batches' gradients there, [S, K, S, K].
    losses[kind][s]: [repeats, chunks, 2], sum of the loss and number of labelled places of each chunk of held-out rows,
    the same in every repeat of the runs with rows in another order. KINDS: `alone` and `mix` after `steps` steps, and
    at the same number of samples of the source, `alone_samples` (after own_steps[s]) and `mix_samples` (after
    mix_steps, which read mix_samples[s] of them).
    held_out: where held-out rows come from; seen: of each source's, the share that training had read too.
    repeated: of each source's rows in `products`, the share that is not new.
    left_out: which samples could not be used, in words.
    """

    sources: tuple[str, ...]
    steps: int
    mix_steps: int
    warm_steps: int
    batch_size: int
    own_steps: tuple[int, ...]
    mix_samples: tuple[int, ...]
    products: Mapping[Place, np.ndarray]
    losses: Mapping[str, Sequence[np.ndarray]]
    held_out: str
    seen: tuple[float, ...]
    repeated: tuple[float, ...]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rule:
    """When gradients count as opposed (at a cosine of -`cosine`) and a source as losing (`margin`, of its loss); both
    have to exceed twice their standard error too. A pair is opposed when its MLP gradients are, over all layers
    together or in the share `layers` of them. Above `error`, a standard error is too large to speak of no conflict."""

    cosine: float = 0.1
    margin: float = 0.02
    layers: float = 0.25
    error: float = 0.25


@dataclass(frozen=True)
class Cosine:
    """Of two sources' gradients: the noise-corrected cosine with its standard error (NaN: noise hides it), and the
    plain cosine of the mean gradients."""

    value: float
    error: float
    plain: float

    def state(self, rule: Rule) -> State:
        if self.value <= -rule.cosine and self.value + 2 * self.error < 0:
            return "opposed"
        if self.value >= rule.cosine and self.value - 2 * self.error > 0:
            return "aligned"
        return "unclear"


@dataclass(frozen=True)
class Loss:
    """Of one source: its loss alone and on the mix, the difference (mix - alone) and that one's standard error, which
    holds what differs between rows and, with two repeats or more, between runs."""

    alone: float
    mix: float
    difference: float
    error: float

    def state(self, rule: Rule) -> Literal["loses", "gains", "even"]:
        if abs(self.difference) <= rule.margin or not abs(self.difference) > 2 * self.error:
            return "even"
        return "loses" if self.difference > 0 else "gains"


@dataclass(frozen=True)
class Findings:
    """`cosines[place][pair]`, also for ("mlp", None) and ("attention", None), all layers together; `halves[place][s]`:
    the plain cosine between the mean gradients of the even and the odd batches of one source. `same_steps` and
    `same_samples`: a Loss a source. `layers[pair]`: the layers whose MLP gradients are opposed."""

    pairs: tuple[tuple[int, int], ...]
    cosines: Mapping[Place, Mapping[tuple[int, int], Cosine]]
    halves: Mapping[Place, tuple[float, ...]]
    same_steps: tuple[Loss, ...]
    same_samples: tuple[Loss, ...]
    opposed_pairs: tuple[tuple[int, int], ...]
    layers: Mapping[tuple[int, int], tuple[int, ...]]
    losing: tuple[int, ...]
    verdict: Verdict


def find(measured: Measurement, rule: Rule) -> Findings:
    """Cosines, losses and verdict. Raises ValueError for fewer than 3 batches a source or 2 chunks of held-out rows."""
    num_sources = len(measured.sources)
    pairs = tuple(itertools.combinations(range(num_sources), 2))
    products = dict(measured.products) | _over_layers(measured.products)
    cosines = {place: {pair: corrected_cosine(table, *pair) for pair in pairs} for place, table in products.items()}
    halves = {place: tuple(half_cosine(table, s) for s in range(num_sources)) for place, table in products.items()}
    same_steps = _losses(measured.losses["alone"], measured.losses["mix"])
    same_samples = _losses(measured.losses["alone_samples"], measured.losses["mix_samples"])
    mlp_layers = sorted(layer for group, layer in measured.products if group == "mlp" and layer is not None)
    whole = cosines["mlp", None]
    layers = {
        pair: tuple(layer for layer in mlp_layers if cosines["mlp", layer][pair].state(rule) == "opposed")
        for pair in pairs
    }
    opposed = tuple(
        pair
        for pair in pairs
        if whole[pair].state(rule) == "opposed" or len(layers[pair]) >= rule.layers * len(mlp_layers)
    )
    losing = tuple(s for s, loss in enumerate(same_samples) if loss.state(rule) == "loses")
    verdict: Verdict
    if opposed:
        verdict = "conflict" if losing else "gradients only"
    elif losing:
        verdict = "losses only"
    else:
        verdict = "none" if all(whole[pair].error <= rule.error for pair in pairs) else "too noisy"
    return Findings(
        pairs=pairs,
        cosines=cosines,
        halves=halves,
        same_steps=same_steps,
        same_samples=same_samples,
        opposed_pairs=opposed,
        layers=layers,
        losing=losing,
        verdict=verdict,
    )


def corrected_cosine(products: np.ndarray, first: int, second: int) -> Cosine:
    """Cosine of two sources' true gradients from [S, K, S, K] inner products of their batches' gradients.

    Noise is independent between batches, so products of different batches estimate <mu_s, mu_t> without bias, and
    |mu_s|^2 for s = t; only a batch with itself does not:

        cos = mean_ij <g_si, g_tj> / sqrt(P_s P_t),     P_s = mean_{i != j} <g_si, g_sj>

    This is the correction for attenuation (Spearman 1904), with all pairs of batches in the place of two halves. The
    standard error is the delete-one jackknife over the batches of both sources. NaN where a P is not above 0, with all
    batches or without one: the gradient then cannot be told from noise. Values beyond 1 are possible and left.
    """
    num_batches = products.shape[1]
    if num_batches < 3:
        raise ValueError(f"{num_batches} batches a source; a cosine with its uncertainty needs at least 3")
    own_first, own_second = products[first, :, first, :], products[second, :, second, :]
    cross = products[first, :, second, :]
    everything = np.arange(num_batches)

    def cosine(rows: np.ndarray, columns: np.ndarray) -> float:
        power = _power(own_first[np.ix_(rows, rows)]) * _power(own_second[np.ix_(columns, columns)])
        return float(cross[np.ix_(rows, columns)].mean() / math.sqrt(power)) if power > 0 else math.nan

    value = cosine(everything, everything) if min(_power(own_first), _power(own_second)) > 0 else math.nan
    variance = sum(
        jackknife_variance(num_batches, leave_one_out)
        for leave_one_out in (lambda kept: cosine(kept, everything), lambda kept: cosine(everything, kept))
    )
    length = float(own_first.mean() * own_second.mean())
    plain = float(cross.mean()) / math.sqrt(length) if length > 0 else math.nan
    error = math.sqrt(variance) if math.isfinite(variance) else math.nan
    return Cosine(value if math.isfinite(error) else math.nan, error, plain)


def half_cosine(products: np.ndarray, source: int) -> float:
    """The control: plain cosine between the mean gradients of a source's even and odd batches. 1 without noise."""
    own = products[source, :, source, :]
    even, odd = own[::2, ::2].mean(), own[1::2, 1::2].mean()
    return float(own[::2, 1::2].mean() / math.sqrt(even * odd)) if even > 0 and odd > 0 else math.nan


def jackknife_variance(size: int, leave_one_out: Callable[[np.ndarray], float]) -> float:
    """Delete-one jackknife: (n - 1) / n times the sum of squares of `leave_one_out(indices kept)` about their mean."""
    everything = np.arange(size)
    values = np.array([leave_one_out(np.delete(everything, index)) for index in everything])
    return float((size - 1) / size * ((values - values.mean()) ** 2).sum())


def _power(own: np.ndarray) -> float:
    """|mu|^2 without bias: the mean of the products of different batches."""
    size = len(own)
    return float((own.sum() - np.trace(own)) / (size * (size - 1)))


def _over_layers(products: Mapping[Place, np.ndarray]) -> dict[Place, np.ndarray]:
    """Inner products over all layers together, by group."""
    totals: dict[Place, np.ndarray] = {}
    for (group, layer), table in products.items():
        if layer is not None:
            totals[group, None] = totals.get((group, None), 0) + table
    return totals


def _losses(alone: Sequence[np.ndarray], mix: Sequence[np.ndarray]) -> tuple[Loss, ...]:
    """A Loss a source, from [repeats, chunks, 2] each. The same rows are read under both models, so that rows are
    compared pair by pair; the variance between repeats, which are few, is pooled over the sources."""
    repeats, chunks = alone[0].shape[:2]
    if min(len(table[0]) for table in alone) < 2:
        raise ValueError(f"{chunks} chunks of held-out rows; an uncertainty needs 2")
    differences = [
        [_mean_loss(m[r : r + 1]) - _mean_loss(a[r : r + 1]) for r in range(repeats)]
        for a, m in zip(alone, mix, strict=True)
    ]
    between = float(np.var(differences, axis=1, ddof=1).mean() / repeats) if repeats > 1 else 0.0
    found = []
    for a, m in zip(alone, mix, strict=True):
        within = jackknife_variance(
            a.shape[1],
            lambda kept, a=a, m=m: _mean_loss(m[:, kept]) - _mean_loss(a[:, kept]),  # type: ignore[misc]
        )
        loss_alone, loss_mix, variance = _mean_loss(a), _mean_loss(m), within + between
        error = math.sqrt(variance) if math.isfinite(variance) else math.nan
        found.append(Loss(loss_alone, loss_mix, loss_mix - loss_alone, error))
    return tuple(found)


def _mean_loss(table: np.ndarray) -> float:
    """Loss a labelled place over repeats and chunks, [..., 2]; NaN where no place is labelled."""
    loss, places = table.reshape(-1, 2).sum(axis=0)
    return float(loss / places) if places else math.nan
