"""What the figures of the runs say: the table, and the claims with their answers. Pure functions of the figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student_t

CONFIDENCE = 0.95
RULE = (
    "two rows are compared seed by seed, so a comparison is a list of differences in accuracy, one a seed. It is shown "
    "when their mean less t x std / sqrt(seeds) lies above 0 (one-sided 95 %, Student's t; the figure after +- is that "
    "margin). A claim is answered yes when all of its comparisons are shown, and no otherwise: no says that these "
    "figures do not show it, and a comparison adds when they show its opposite. Losses are judged alike and told "
    "beside each answer, but decide nothing. Nothing is corrected for the number of claims."
)
COST_LIMIT = 1.05
METRICS = ("accuracy", "loss")

# {row: {"accuracy/<domain>" or "loss/<domain>": {seed: value}}}
Figures = Mapping[str, Mapping[str, Mapping[int, float]]]


@dataclass(frozen=True)
class Comparison:
    """Differences by seed, positive where they speak for the claim."""

    what: str
    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.differences)

    @property
    def margin(self) -> float:
        """Half the width of the interval; infinite when one seed alone says nothing of the spread."""
        n = len(self.differences)
        if n < 2:
            return math.inf
        return float(student_t.ppf(CONFIDENCE, n - 1)) * statistics.stdev(self.differences) / math.sqrt(n)

    @property
    def shown(self) -> bool:
        return self.mean - self.margin > 0

    @property
    def opposite_shown(self) -> bool:
        return self.mean + self.margin < 0

    def __str__(self) -> str:
        verdict = "shown" if self.shown else "the opposite is shown" if self.opposite_shown else "not shown"
        return f"{self.what} {self.mean:+.3f} +- {self.margin:.3f} {verdict}"


@dataclass(frozen=True)
class Claim:
    """A sentence and the comparisons that must all be shown for it; `by_loss` are told beside it and decide nothing."""

    text: str
    comparisons: tuple[Comparison, ...]
    by_loss: tuple[Comparison, ...] = ()

    @property
    def holds(self) -> bool:
        return all(comparison.shown for comparison in self.comparisons)

    def __str__(self) -> str:
        lines = [f"{'yes' if self.holds else 'no ':<3}  {self.text}"]
        lines += [f"       {comparison}" for comparison in self.comparisons]
        lines += [f"       by loss: {comparison}" for comparison in self.by_loss]
        return "\n".join(lines)


def better(figures: Figures, winner: str, loser: str, metric: str, domains: Sequence[str]) -> tuple[Comparison, ...]:
    """How far `winner` is ahead of `loser`, a comparison a domain. A loss is ahead when it is lower."""
    sign = -1 if metric == "loss" else 1
    return tuple(
        Comparison(domain, _differences(figures, winner, loser, f"{metric}/{domain}", sign)) for domain in domains
    )


def better_on_average(
    figures: Figures, winner: str, loser: str, metric: str, domains: Sequence[str]
) -> tuple[Comparison, ...]:
    """How far `winner` is ahead of `loser` in the mean over domains: one comparison."""
    by_domain = [comparison.differences for comparison in better(figures, winner, loser, metric, domains)]
    return (Comparison("mean", tuple(statistics.fmean(values) for values in zip(*by_domain, strict=True))),)


def _differences(figures: Figures, winner: str, loser: str, column: str, sign: int) -> tuple[float, ...]:
    one, other = figures[winner][column], figures[loser][column]
    if one.keys() != other.keys():
        raise ValueError(f"{winner} has seeds {sorted(one)} of {column}, {loser} has {sorted(other)}")
    return tuple(sign * (one[seed] - other[seed]) for seed in sorted(one))


def spread(values: Iterable[float]) -> tuple[float, float]:
    """(mean, standard deviation over seeds); one value has no deviation."""
    values = list(values)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def table(figures: Figures, titles: Mapping[str, str], domains: Sequence[str]) -> str:
    """Markdown: mean and standard deviation over seeds of each row's accuracy and loss, by domain and in the mean."""
    columns = [(metric, name) for metric in METRICS for name in (*domains, "mean")]
    lines = [
        "| " + " | ".join(["", *(f"{metric} {name}" for metric, name in columns)]) + " |",
        "|" + "---|" * (1 + len(columns)),
    ]
    for row, title in titles.items():
        cells = [cell(figures[row], metric, name, domains) for metric, name in columns]
        lines.append("| " + " | ".join([title, *cells]) + " |")
    return "\n".join(lines)


def cell(row: Mapping[str, Mapping[int, float]], metric: str, name: str, domains: Sequence[str]) -> str:
    """Mean and standard deviation over seeds of a row's metric on a domain, or on their mean; empty if it has none."""
    wanted = domains if name == "mean" else (name,)
    if any(f"{metric}/{domain}" not in row for domain in wanted):
        return ""
    by_domain = [row[f"{metric}/{domain}"] for domain in wanted]
    mean, deviation = spread(statistics.fmean(values[seed] for values in by_domain) for seed in by_domain[0])
    return f"{mean:.3f} ± {deviation:.3f}"


def claims(
    figures: Figures, seconds: Mapping[str, Sequence[float]], domains: Sequence[str], experts: int, gates: Sequence[str]
) -> list[Claim]:
    """The paper's claims on these rows (their keys: runs.table_rows), MoLE's once a gate mode; without those that
    need a row, or step times, that are not there."""

    def claim(text: str, compare: Callable[..., tuple[Comparison, ...]], winner: str, loser: str) -> Claim:
        by_accuracy, by_loss = (compare(figures, winner, loser, metric, domains) for metric in METRICS)
        return Claim(text, by_accuracy, by_loss)

    mole = {gate: f"mole-{gate}-{experts}" for gate in gates}
    called = {gate: f"MoLE (gate {gate}, {experts} experts) on the mix" for gate in gates}
    asked = [
        ("The mix hurts plain LoRA, against each domain alone on the same samples of it",
         better_on_average, "alone_samples", "mix"),
        ("The mix hurts plain LoRA, against each domain alone for the same number of steps",
         better_on_average, "alone_steps", "mix"),
    ]  # fmt: skip
    for gate in gates:
        asked += [
            (f"{called[gate]} beats plain LoRA on the mix in every domain", better, mole[gate], "mix"),
            (f"{called[gate]} beats plain LoRA on twice the samples", better_on_average, mole[gate], "mix_twice"),
            (f"{called[gate]} beats plain LoRA of {experts} times the rank", better_on_average, mole[gate], "mix_wide"),
        ]
    found = [claim(*question) for question in asked if figures.keys() >= set(question[2:])]
    if not seconds:
        return found
    step_ratios = ratios(seconds, f"mole-prob-{experts}", "mix")
    room = Comparison(f"{COST_LIMIT} less the ratio", tuple(COST_LIMIT - ratio for ratio in step_ratios))
    text = f"MoLE ({experts} experts) costs at most {COST_LIMIT} of plain LoRA's step, at this size"
    return [*found, Claim(text, (room,))]


def ratios(seconds: Mapping[str, Sequence[float]], row: str, base: str) -> list[float]:
    """A row's step time as a multiple of another's, a ratio a block of steps taken in turn."""
    return [mine / other for mine, other in zip(seconds[row], seconds[base], strict=True)]


def cost_table(seconds: Mapping[str, Sequence[float]], base: str) -> str:
    """Markdown: the median step of each row in milliseconds, and its ratio to `base`'s (mean and std over blocks)."""
    lines = ["| | ms a step | of plain LoRA |", "|---|---|---|"]
    for row, blocks in seconds.items():
        mean, deviation = spread(ratios(seconds, row, base))
        lines.append(f"| {row} | {1000 * statistics.median(blocks):.1f} | {mean:.2f} ± {deviation:.2f} |")
    return "\n".join(lines)
