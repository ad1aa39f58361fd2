"""What a run has taken from its sources so far, and how that stands to what was asked (`RUN/mixture.json`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from mole_mega.data.conversation import IGNORE_INDEX, Example
from mole_mega.data.plan import MixturePlan
from mole_mega.data.sources import BadSample

# {source: {"rows" | "tokens" | "labelled_tokens" | "images" | "left_out/<kind>": how many}}
Tally = dict[str, dict[str, int]]
_LEFT_OUT = "left_out/"


def tally(examples: Iterable[Example], left_out: Iterable[BadSample] = ()) -> Tally:
    """Count samples by source; `tokens` counts their places, those of images included."""
    counts: dict[str, Counter[str]] = {}
    for example in examples:
        counts.setdefault(example.domain, Counter()).update(
            rows=1,
            tokens=len(example.tokens),
            labelled_tokens=int((example.labels != IGNORE_INDEX).sum()),
            images=len(example.images),
        )
    for bad in left_out:
        counts.setdefault(bad.source, Counter())[_LEFT_OUT + bad.kind] += 1
    return {source: dict(count) for source, count in counts.items()}


def add(tallies: Iterable[Mapping[str, Mapping[str, int]]]) -> Tally:
    """The sum of several tallies."""
    total: dict[str, Counter[str]] = {}
    for part in tallies:
        for source, count in part.items():
            total.setdefault(source, Counter()).update(count)
    return {source: dict(sorted(count.items())) for source, count in sorted(total.items())}


def manifest(plan: MixturePlan, step: int, counted: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """What `mixture.json` holds after `step` steps: by source, what was asked and what came.

    Shares are of the unit that weights are in. `drawn` and `epochs_begun` count the stream's own draws, `rows` the
    samples that were trained on, replacements of bad ones included. `samples_counted` is below `samples` when the run
    goes on from a checkpoint that kept no counts. A run whose mixture was changed on the way is held against the one
    that it has now.
    """
    drawn, asked = plan.mixture.counts(step * plan.batch), plan.asked_shares(step)
    unit = "rows" if plan.config.weights_in == "samples" else "tokens"
    whole = sum(count.get(unit, 0) for count in counted.values())
    sources: dict[str, dict[str, Any]] = {}
    for index, source in enumerate(plan.config.sources):
        size, places = plan.sizes[index], plan.places[index]
        sources[source.name] = {
            "size": size,
            "weight": source.weight,
            "epochs": source.epochs,
            "measured_places": None if places is None else vars(places),
            "share_asked": asked[index],
            "drawn": drawn[index],
            "epochs_begun": -(-drawn[index] // size),
        }
    for name in counted.keys() - sources.keys():  # what the run had before its config was changed
        sources[name] = {"size": None, "share_asked": 0.0, "drawn": None, "epochs_begun": None}
    for name, entry in sources.items():
        count = counted.get(name, {})
        entry |= {key: count.get(key, 0) for key in ("rows", "tokens", "labelled_tokens", "images")}
        entry["share_realised"] = count.get(unit, 0) / whole if whole else 0.0
        entry["left_out"] = {k.removeprefix(_LEFT_OUT): n for k, n in count.items() if k.startswith(_LEFT_OUT)}
    return {
        "step": step,
        "samples": step * plan.batch,
        "samples_counted": sum(entry["rows"] for entry in sources.values()),
        "shares_of": plan.config.weights_in,
        "temperature": plan.config.temperature,
        "seed": plan.seed,
        "sources": sources,
    }


def table(tree: Mapping[str, Any]) -> list[str]:
    """A `manifest` as lines for people."""
    rows = [("source", "asked", "realised", "rows", "tokens", "learned", "images", "epochs begun", "left out")]
    for name, entry in tree["sources"].items():
        counts = [f"{entry[key]:,}" for key in ("rows", "tokens", "labelled_tokens", "images")]
        begun = "-" if entry["epochs_begun"] is None else f"{entry['epochs_begun']}"
        shares = [f"{entry['share_asked']:.2%}", f"{entry['share_realised']:.2%}"]
        rows.append((name, *shares, *counts, begun, f"{sum(entry['left_out'].values()):,}"))
    lines = [f"mixture after {tree['step']} steps, shares of {tree['shares_of']}:", *aligned(rows)]
    if tree["samples_counted"] != tree["samples"]:
        lines.append(
            f"  counted: {tree['samples_counted']:,} of {tree['samples']:,} samples; no counts were kept of the rest"
        )
    return lines


def aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Rows of cells as lines: the first column to the left, the others to the right."""
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
