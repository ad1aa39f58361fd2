"""What a run has taken from its sources so far, and how that stands to what was asked (`RUN/mixture.json`)."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mole_mega.data.conversation import IGNORE_INDEX, Example
from mole_mega.data.plan import MixturePlan
from mole_mega.data.sources import BadSample
from mole_mega.wording import number_of

# {source: {"rows" | "tokens" | "labelled_tokens" | "images" | "left_out/<kind>": how many}}
Tally = dict[str, dict[str, int]]
_LEFT_OUT = "left_out/"
# A `phase` as JSON has it.
Phase = Mapping[str, Any]
_ASKED = ("samples_a_step", "shares_of", "temperature", "seed")
_ASKED_OF_SOURCE = ("size", "weight", "epochs", "measured_places")
# What is counted of each unit that weights are in.
_UNITS = {"samples": "rows", "tokens": "tokens"}


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


def phase(plan: MixturePlan, first: int, step: int, counted: Mapping[str, Mapping[str, int]]) -> Phase:
    """The steps after step `first` up to `step`, all under one plan: what was asked, and `counted`, what came in them.
    As JSON gives it back."""
    drawn, asked = plan.drawn(step, first), plan.asked_shares(step, first)
    unit = _UNITS[plan.config.weights_in]
    whole = sum(count.get(unit, 0) for count in counted.values())
    sources: dict[str, dict[str, Any]] = {}
    for index, source in enumerate(plan.config.sources):
        count, places = counted.get(source.name, {}), plan.places[index]
        sources[source.name] = {
            "size": plan.sizes[index],
            "weight": source.weight,
            "epochs": source.epochs,
            "measured_places": None if places is None else vars(places),
            "share_asked": asked[index],
            "share_realised": count.get(unit, 0) / whole if whole else 0.0,
            "drawn": drawn[index],
            "rows": count.get("rows", 0),
            "tokens": count.get("tokens", 0),
        }
    tree = {
        "from_step": first + 1,
        "to_step": step,
        "samples_a_step": plan.batch,
        "shares_of": plan.config.weights_in,
        "temperature": plan.config.temperature,
        "seed": plan.seed,
        "sources": sources,
    }
    return json.loads(json.dumps(tree))


def ask_the_same(one: Phase, other: Phase) -> bool:
    """Whether two phases are of one plan."""

    def asked(tree: Phase) -> list[Any]:
        sources = [[name, *(entry[key] for key in _ASKED_OF_SOURCE)] for name, entry in tree["sources"].items()]
        return [*(tree[key] for key in _ASKED), sources]

    return asked(one) == asked(other)


def taken_since(phases: Sequence[Phase], counted: Mapping[str, Mapping[str, int]]) -> Tally:
    """Of the rows and tokens counted, those that none of the phases holds."""
    rest = {name: dict(count) for name, count in counted.items()}
    for before in phases:
        for name, entry in before["sources"].items():
            for key in rest.get(name, {}).keys() & {"rows", "tokens"}:
                rest[name][key] -= entry[key]
    return rest


def manifest(phases: Sequence[Phase], counted: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """What `mixture.json` holds: by source, what was asked and what came, over the whole run and by phase.

    A phase ends where a run goes on with another mixture than before. Shares are of the unit that the last phase's
    weights are in; what was asked over the whole run is the mean of the phases' asked shares, each weighing what the
    run took in it, and None where the phases' units differ. `drawn` and `epochs_begun` count the stream's own draws,
    `rows` the samples that were trained on, replacements of bad ones included. `samples_counted` is below `samples`
    when the run goes on from a checkpoint that kept no counts.
    """
    last = phases[-1]
    unit = _UNITS[last["shares_of"]]
    whole = sum(count.get(unit, 0) for count in counted.values())
    weights = _weights(phases, unit)
    sources: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys([*last["sources"], *(n for tree in phases for n in tree["sources"]), *sorted(counted)]):
        asked = [tree["sources"].get(name) for tree in phases]
        entry, count = last["sources"].get(name, {}), counted.get(name, {})
        sizes = [one["size"] for one in asked if one]
        drawn = sum(one["drawn"] for one in asked if one) if sizes else None
        shares = [weight * one["share_asked"] for weight, one in zip(weights or [], asked, strict=False) if one]
        sources[name] = {
            "size": entry.get("size"),
            "weight": entry.get("weight"),
            "epochs": entry.get("epochs"),
            "measured_places": entry.get("measured_places"),
            "share_asked": None if weights is None else math.fsum(shares),
            "drawn": drawn,
            "epochs_begun": None if drawn is None else -(-drawn // sizes[-1]),
            **{key: count.get(key, 0) for key in ("rows", "tokens", "labelled_tokens", "images")},
            "share_realised": count.get(unit, 0) / whole if whole else 0.0,
            "left_out": {k.removeprefix(_LEFT_OUT): n for k, n in count.items() if k.startswith(_LEFT_OUT)},
        }
    return {
        "step": last["to_step"],
        "samples": sum(map(_samples, phases)),
        "samples_counted": sum(entry["rows"] for entry in sources.values()),
        "shares_of": last["shares_of"],
        "temperature": last["temperature"],
        "seed": last["seed"],
        "sources": sources,
        "phases": list(phases),
    }


def _weights(phases: Sequence[Phase], unit: str) -> list[float] | None:
    """What each phase weighs in the whole run's shares, summing to 1; None where they are of different units."""
    if len({tree["shares_of"] for tree in phases}) > 1:
        return None
    if len(phases) == 1:
        return [1.0]
    tokens = [sum(entry["tokens"] for entry in tree["sources"].values()) for tree in phases]
    amounts = tokens if unit == "tokens" and sum(tokens) else list(map(_samples, phases))
    return [amount / sum(amounts) for amount in amounts]


def _samples(tree: Phase) -> int:
    return (tree["to_step"] - tree["from_step"] + 1) * tree["samples_a_step"]


def table(tree: Mapping[str, Any]) -> list[str]:
    """A `manifest` as lines for people."""
    rows = [("source", "asked", "realised", "rows", "tokens", "learned", "images", "epochs begun", "left out")]
    for name, entry in tree["sources"].items():
        counts = [f"{entry[key]:,}" for key in ("rows", "tokens", "labelled_tokens", "images")]
        begun = "-" if entry["epochs_begun"] is None else f"{entry['epochs_begun']}"
        shares = [_percent(entry["share_asked"]), _percent(entry["share_realised"])]
        rows.append((name, *shares, *counts, begun, f"{sum(entry['left_out'].values()):,}"))
    lines = [f"mixture after {number_of(tree['step'], 'step')}, shares of {tree['shares_of']}:", *aligned(rows)]
    if tree["samples_counted"] != tree["samples"]:
        lines.append(
            f"  counted: {tree['samples_counted']:,} of {tree['samples']:,} samples; no counts were kept of the rest"
        )
    if len(tree["phases"]) > 1:
        for part in tree["phases"]:
            shares = [
                f"{name} {_percent(entry['share_asked'])} / {_percent(entry['share_realised'])}"
                for name, entry in part["sources"].items()
            ]
            span = f"steps {part['from_step']} to {part['to_step']}"
            lines.append(f"  {span}, asked / realised of the {part['shares_of']}: {', '.join(shares)}")
    return lines


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Rows of cells as lines: the first column to the left, the others to the right."""
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
