"""Findings in words, tables and maps: for the terminal and for a page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from mole_mega.conflict.statistics import Cosine, Findings, Loss, Measurement, Place, Rule
from mole_mega.report.document import Document, Figure, Missing, Paragraph, Section, Table
from mole_mega.report.svg import heat_map
from mole_mega.wording import number_of

_GROUPS = ("mlp", "attention", "projector")
_ABOUT = {
    "mlp": "LoRA in the MLPs, which a mixture gives to experts",
    "attention": "LoRA in the attention, which a mixture leaves shared",
    "projector": "the projector, which a mixture leaves shared",
}
_ANSI = {"opposed": "\033[41;97m", "aligned": "\033[44;97m", "unclear": ""}
_MARKS = {"opposed": "-", "aligned": "+", "unclear": " "}


def verdict(measured: Measurement, found: Findings, rule: Rule) -> str:
    """One plain paragraph: is a mixture of experts likely to help here, and in which layers?"""
    layers = sorted({layer for pair in found.opposed_pairs for layer in found.layers[pair]})
    where = (
        f"in the MLPs of {_layers(layers)}" if layers else "over all layers together, though in no single MLP clearly"
    )
    pairs = _list(f"{measured.sources[a]} and {measured.sources[b]}" for a, b in found.opposed_pairs)
    losing = _list(
        f"{measured.sources[s]} ({found.same_samples[s].difference:+.3f} ± {found.same_samples[s].error:.3f})"
        for s in found.losing
    )
    return {
        "conflict": (
            f"Conflict. Gradients of {pairs} oppose each other {where}, and with as many samples of its own the mix "
            f"costs in loss: {losing}. A mixture of experts is likely to help here, first in those layers."
        ),
        "gradients only": (
            f"Gradients of {pairs} oppose each other {where}, but with as many samples of its own no source loses more "
            f"than {rule.margin:g} on the mix within these steps. A mixture of experts may help in a longer run; this "
            "measurement does not show it."
        ),
        "losses only": (
            f"On the mix there is a loss for {losing}, with as many samples of its own, but no pair of sources has "
            "clearly opposed gradients. The sources may compete for the adapter's rank: try a larger rank first; a "
            "mixture of experts may help too."
        ),
        "none": (
            f"No conflict found: no pair of sources has opposed gradients (cosine at or below {-rule.cosine:g}), and "
            f"no source loses more than {rule.margin:g} on the mix. Plain LoRA on the mix is likely to do; a mixture "
            "of experts would cost more and is not shown to help."
        ),
        "too noisy": (
            "Cannot tell: no source loses on the mix, and the gradients are too noisy to tell opposed from aligned. "
            f"Measure with more batches than {_batches(measured)} (--batches) or a larger train.global_batch_size."
        ),
    }[found.verdict]


def explain(measured: Measurement, rule: Rule) -> list[str]:
    """What was done and what the figures mean, a paragraph each."""
    once = _repeats(measured) == 1
    return [
        f"One plain LoRA was trained again and again from one start, each time to the end of a learning rate that goes "
        f"down to 0: on the mix for {measured.steps} and {number_of(measured.mix_steps, 'step')} of "
        f"{measured.batch_size} samples, and on each source alone for {measured.steps} and as many as read the "
        "mix's samples of it; "
        f"{'all of it once' if once else f'all of it {_repeats(measured)} times, each with rows in another order'}.",
        f"Cosines: {_batches(measured)} batches of each source, gradients taken after "
        f"{number_of(measured.warm_steps, 'step')} on the mix: "
        "at the very start B = 0 and A has no gradient, and then all sources learn what they share; near the "
        "mix's optimum all that is left is disagreement, however small, and the losses say whether it matters. "
        "Corrected for the batches' noise, ± one standard error (jackknife over batches). `same source` is the "
        "control: the plain, uncorrected cosine between halves of one source's batches; where it is low, noise is "
        "high.",
        f"Opposed (-): cosine at or below {-rule.cosine:g} and two standard errors below 0; aligned (+): the mirror "
        f"image. A pair counts as opposed when its MLP gradients are so over all layers together, or in "
        f"{rule.layers:.0%} of the layers.",
        f"A source loses when its loss on the mix is more than {rule.margin:g}, and two standard errors, above that "
        "alone after as many of its samples. This favours the mix, which has taken more steps by then; after equal "
        "steps the source alone is favoured, which has read more of its samples. The errors tell of rows and, with "
        "two repeats or more, of runs.",
    ]


def warnings(measured: Measurement) -> list[str]:
    """What makes the figures less sure than they look."""
    found = list(measured.left_out)
    for source, share in zip(measured.sources, measured.repeated, strict=True):
        if share > 0.01:
            found.append(
                f"{source}: {share:.0%} of its rows in the gradients' batches are repeats; its noise is underestimated"
            )
    for source, share in zip(measured.sources, measured.seen, strict=True):
        if share > 0.01:
            found.append(f"{source}: {share:.0%} of the rows it is judged by were trained on too; it has too few rows")
    for source, own in zip(measured.sources, measured.own_steps, strict=True):
        if own < 5:
            found.append(
                f"{source}: the mix read no more of it than {number_of(own, 'step')} alone; same-sample losses say "
                "little (--steps)"
            )
    if _repeats(measured) == 1:
        found.append("every run was made once: how much losses differ from run to run is not known (--repeats)")
    return found


def loss_table(measured: Measurement, found: Findings, rule: Rule) -> Table:
    """Losses alone and on the mix, at the same steps and at the same samples."""
    steps = number_of(measured.steps, "step")
    header = (
        "source", f"alone, {steps}", f"mix, {steps}", "mix - alone", "alone, steps",
        "alone, same samples", f"mix, {number_of(measured.mix_steps, 'step')}", "mix - alone", "",
    )  # fmt: skip
    rows = []
    for s, source in enumerate(measured.sources):
        samples, own = found.same_samples[s], str(measured.own_steps[s])
        rows.append((source, *_loss_cells(found.same_steps[s]), own, *_loss_cells(samples), samples.state(rule)))
    return Table(header, rows)


def cosine_table(measured: Measurement, found: Findings, rule: Rule, group: str) -> Table:
    """A row a layer and one for all together; a column a pair, then the controls."""
    header = ("layer", *(_pair(measured, pair) for pair in found.pairs))
    header += tuple(f"same source: {source}" for source in measured.sources)
    rows = []
    for place in _places(found, group):
        cells = [_cosine_cell(found.cosines[place][pair], rule) for pair in found.pairs]
        cells += [_number(half) for half in found.halves[place]]
        rows.append(("all" if place[1] is None else str(place[1]), *cells))
    return Table(header, rows)


def cosine_map(measured: Measurement, found: Findings, group: str) -> str:
    """The corrected cosines of a group as SVG."""
    places = _places(found, group)
    values = [[_shown(found.cosines[place][pair].value) for pair in found.pairs] for place in places]
    names = ["all" if layer is None else f"{layer}" for _, layer in places]
    pairs = [_pair(measured, pair) for pair in found.pairs]
    return heat_map(values, names, pairs, label=f"cosines of gradients, {group}", row_title="layer",
                    bounds=(-1.0, 1.0), scale="diverging")  # fmt: skip


def groups(found: Findings) -> list[str]:
    """The groups that were measured: mlp, attention, projector."""
    return [group for group in _GROUPS if any(place[0] == group for place in found.cosines)]


def document(measured: Measurement, found: Findings, rule: Rule) -> Document:
    """The page."""
    sections = [
        Section("Verdict", [Paragraph(verdict(measured, found, rule)), *map(Missing, warnings(measured))]),
        Section("Loss alone and on the mix", [loss_table(measured, found, rule), Paragraph(_held_out(measured))]),
    ]
    for group in groups(found):
        caption = "Noise-corrected cosine of the sources' gradients. Red: opposed; blue: aligned; grey: noise hides it."
        table = cosine_table(measured, found, rule, group)
        figure = Figure(cosine_map(measured, found, group), caption)
        about = _ABOUT[group]
        sections.append(Section(f"Gradients, {group}", [Paragraph(f"{about[0].upper()}{about[1:]}."), figure, table]))
    sections.append(Section("How it was measured", [Paragraph(text) for text in explain(measured, rule)]))
    lead = f"Sources: {', '.join(measured.sources)}."
    return Document("Do the sources of this mixture fight over one LoRA?", lead, sections)


def text(measured: Measurement, found: Findings, rule: Rule, *, colour: bool) -> str:
    """All of it for the terminal; `colour` paints opposed and aligned cells."""
    parts = [_lines(loss_table(measured, found, rule)), _held_out(measured)]
    for group in groups(found):
        states = [
            ["", *(found.cosines[place][pair].state(rule) for pair in found.pairs), *("" for _ in measured.sources)]
            for place in _places(found, group)
        ]
        paint = states if colour else None
        parts.append(f"{_ABOUT[group]}:\n{_lines(cosine_table(measured, found, rule, group), paint)}")
    parts += explain(measured, rule)
    parts += [f"WARNING: {warning}" for warning in warnings(measured)]
    parts.append(verdict(measured, found, rule))
    return "\n\n".join(parts)


def rows(measured: Measurement, found: Findings, rule: Rule) -> dict[str, Any]:
    """The figures as JSON takes them: NaN as null."""
    return {
        "verdict": found.verdict,
        "sentence": verdict(measured, found, rule),
        "warnings": warnings(measured),
        "rule": vars(rule),
        "steps": measured.steps,
        "mix_steps": measured.mix_steps,
        "warm_steps": measured.warm_steps,
        "losses": [
            {"source": source, "own_steps": measured.own_steps[s], "mix_samples": measured.mix_samples[s]}
            | {f"{kind}_{key}": _plain(value) for kind, loss in (("same_steps", found.same_steps[s]),
               ("same_samples", found.same_samples[s])) for key, value in vars(loss).items()}
            | {"state": found.same_samples[s].state(rule)}
            for s, source in enumerate(measured.sources)
        ],
        "cosines": [
            {"group": group, "layer": layer, "sources": [measured.sources[s] for s in pair],
             "cosine": _plain(cosine.value), "error": _plain(cosine.error), "plain": _plain(cosine.plain),
             "state": cosine.state(rule)}
            for (group, layer), by_pair in found.cosines.items() for pair, cosine in by_pair.items()
        ],
        "same_source": [
            {"group": group, "layer": layer, "source": source, "cosine": _plain(half)}
            for (group, layer), halves in found.halves.items()
            for source, half in zip(measured.sources, halves, strict=True)
        ],
    }  # fmt: skip


def _places(found: Findings, group: str) -> list[Place]:
    """By layer, all together last."""
    places = [place for place in found.cosines if place[0] == group]
    return sorted(places, key=lambda place: math.inf if place[1] is None else place[1])


def _held_out(measured: Measurement) -> str:
    mix = ", ".join(
        f"{count:,} of {source}" for source, count in zip(measured.sources, measured.mix_samples, strict=True)
    )
    return (
        f"Loss a labelled place on held-out rows ({measured.held_out}). Samples in the mix's {measured.mix_steps} "
        f"steps: {mix}; alone, a step reads {measured.batch_size}."
    )


def _batches(measured: Measurement) -> int:
    return next(iter(measured.products.values())).shape[1]


def _repeats(measured: Measurement) -> int:
    return len(measured.losses["mix"][0])


def _pair(measured: Measurement, pair: tuple[int, int]) -> str:
    return f"{measured.sources[pair[0]]} / {measured.sources[pair[1]]}"


def _cosine_cell(cosine: Cosine, rule: Rule) -> str:
    if not math.isfinite(cosine.value):
        return "noise  "
    return f"{cosine.value:+.2f} ± {cosine.error:.2f} {_MARKS[cosine.state(rule)]}"


def _loss_cells(loss: Loss) -> tuple[str, str, str]:
    return _number(loss.alone, 3), _number(loss.mix, 3), f"{loss.difference:+.3f} ± {loss.error:.3f}"


def _number(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "noise"


def _shown(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _list(items: Iterable[str]) -> str:
    *most, last = list(items) or [""]
    return f"{', '.join(most)} and {last}" if most else last


def _layers(layers: Sequence[int]) -> str:
    """ "layer 3", "layers 0 to 3 and 7"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    names = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return f"layer{'s' if len(layers) > 1 else ''} {_list(names)}"


def _lines(table: Table, states: Sequence[Sequence[str]] | None = None) -> str:
    """A table in columns, its cells painted by their states."""
    widths = [max(len(row[i]) for row in (table.header, *table.rows)) for i in range(len(table.header))]
    lines = []
    for number, row in enumerate((table.header, *table.rows)):
        cells = [
            f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        if states and number:
            cells = [
                f"{_ANSI[s]}{cell}\033[0m" if _ANSI.get(s) else cell
                for cell, s in zip(cells, states[number - 1], strict=True)
            ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
