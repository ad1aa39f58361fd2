"""What a report says, section by section: each a pure function of a `RunFolder` that gives its blocks.

What the run did not record is said to be so. A figure is never filled in.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mole_mega.report.document import (
    Block,
    Code,
    Document,
    Figure,
    Figures,
    Missing,
    Paragraph,
    Section,
    Table,
)
from mole_mega.report.run_folder import RunFolder, Series
from mole_mega.report.shapes import finite
from mole_mega.report.svg import NONE, heat_map, hundredths, line_chart, number
from mole_mega.wording import number_of

# Loads of one step are those of one global batch, and noisy: the maps show the mean of the last rows.
LAST_ROWS = 5
# A curve keeps at most so many points, each the mean of its neighbours.
MAX_POINTS = 400
_MAX_EVENTS = 200
# What a mixture's table begins with; whatever else mixture.json has follows.
_MIXTURE_FIRST = ("share_asked", "share_realised", "rows", "tokens", "labelled_tokens", "images", "epochs_begun")
_MAX_SIMILARITY_EXPERTS = 16
_MAX_LINES = 8
_HALF_WIDTH = 468  # of a line of the page
_LOSS_OR_GRADIENT = re.compile(r"grad_norm|(\w+_)?loss(/.*)?", re.DOTALL)

Loads = dict[int, dict[int, Series]]  # layer, expert


def describe(run: RunFolder) -> Document:
    """The whole report."""
    sections = [
        ("At a glance", at_a_glance(run)),
        ("Losses by source", losses(run)),
        ("Which expert serves what", serving(run)),
        ("Load over time", load_over_time(run)),
        ("Routers", routers(run)),
        ("Alarms", alarms(run)),
        ("What the experts became", experts(run)),
        ("Methods around the optimizer step", methods(run)),
        ("The mixture, asked and realised", mixture(run)),
        ("Answers", answers(run)),
        ("Throughput", throughput(run)),
        ("Checks", checks(run)),
        ("Config", [Code(run.config_text)] if run.config_text else [Missing("not recorded: there is no config.yaml")]),
    ]
    if run.problems:
        sections.insert(1, ("Could not be read", [Missing(problem) for problem in run.problems]))
    first, last = run.metrics.steps[0], run.metrics.steps[-1]
    lead = f"{number_of(len(run.metrics.steps), 'logged step')}, from {first:,} to {last:,}."
    return Document(f"Run {run.path.resolve().name}", lead, [Section(title, blocks) for title, blocks in sections])


def at_a_glance(run: RunFolder) -> list[Block]:
    metrics = run.metrics
    method, experts = run.setting("adapter", "method"), run.setting("adapter", "num_experts")
    rank, gate = run.setting("adapter", "rank"), run.setting("adapter", "gate")
    adapter = "not recorded"
    if method == "mole":
        adapter = f"{experts} LoRA experts of rank {rank} in the MLPs, gate {gate}{_mixture(run)}"
    elif method is not None:
        adapter = f"{method} of rank {rank}"
    layout = ", ".join(
        f"{axis} {run.setting('parallel', axis)}"
        for axis in ("tensor", "pipeline", "expert", "context")
        if run.setting("parallel", axis) not in (None, 1)
    )
    steps, last = run.setting("train", "steps"), metrics.steps[-1]
    rows = [
        ("adapter", adapter),
        ("layout", layout or "data parallel, or one process" if run.config else "not recorded"),
        ("steps", f"{last:,} of {steps:,}" if isinstance(steps, int) else f"{last:,}"),
        ("loss, last logged", _shown(metrics.last("loss"))),
    ]
    accuracies = metrics.named("validation_accuracy/")
    if accuracies:
        mean = sum(line[-1][1] for line in accuracies.values()) / len(accuracies)
        rows.append(("validation accuracy, mean of sources", f"{mean:.3f}"))
    speed = [value for _, value in metrics.series.get("tokens_per_second", ()) if value > 0]
    rows.append(("tokens/s, median", number(_median(speed)) if speed else "not recorded"))
    rows.append(("alarms", "not recorded" if run.events is None else f"{len(run.events):,}"))
    outcomes = [outcome for _, outcome, _ in _checks(run)]
    text = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in dict.fromkeys(outcomes))
    rows.append(("checks", text))
    return [Table(("", ""), rows, text_columns=2)]


def _mixture(run: RunFolder) -> str:
    """What the experts do otherwise than serve each token alone, sent by a router a block."""
    top_k, scope = run.setting("adapter", "top_k"), run.setting("adapter", "router_scope")
    words = [f"top {top_k}"] if top_k not in (None, 1) else []
    words += ["renormalized"] if run.setting("adapter", "renormalize") else []
    words += [f"routed by {scope}"] if scope not in (None, "block") else []
    words += ["one A for all"] if run.setting("adapter", "share_A") else []
    words += [f"{run.setting('adapter', 'shared_B')} B mixed"] if run.setting("adapter", "shared_B") else []
    words += ["whole MLPs"] if run.setting("adapter", "expert_form") == "mlp" else []
    words += ["scored by sigmoids"] if run.setting("adapter", "router_score") == "sigmoid" else []
    return "".join(f", {word}" for word in words)


def losses(run: RunFolder) -> list[Block]:
    metrics = run.metrics
    train, validation = metrics.named("loss/"), metrics.named("validation_loss/")
    accuracy = metrics.named("validation_accuracy/")
    blocks: list[Block] = []
    if "loss" in metrics.series:
        curves = {"all": metrics.series["loss"]} | train if len(train) != 1 else train
        blocks.append(_curves(curves, "Training loss: mean over labelled places of the logged batch.", "loss"))
    else:
        blocks.append(Missing("not recorded: no row has a training loss"))
    if not train:
        blocks.append(Missing("not recorded: training loss by source"))
    held_out_figures = []
    if validation:
        held_out_figures.append(_curves(validation, "Validation loss by source.", "loss", width=_HALF_WIDTH))
    if accuracy:
        text = "Validation accuracy by source: the share of samples whose every answer is right token for token."
        figure = _curves(accuracy, text, "accuracy", bounds=(0.0, 1.0), width=_HALF_WIDTH)
        held_out_figures.append(figure)
    if held_out_figures:
        blocks.append(Figures(held_out_figures))
    if not validation:
        every = run.setting("validation", "every")
        why = "validation.every is 0" if every == 0 else "no row has a validation loss"
        blocks.append(Missing(f"not recorded: validation by source ({why})"))
    sources = list(dict.fromkeys([*train, *validation, *accuracy]))
    header = ("source", "loss, first", "loss, last", "validation loss, last", "lowest", "validation accuracy, last")
    rows = []
    for source in sources:
        curve, held_out = train.get(source), validation.get(source)
        lowest = min(held_out, key=lambda point: point[1]) if held_out else None
        rows.append(
            (
                source,
                _at(curve[0] if curve else None),
                _at(curve[-1] if curve else None),
                _at(held_out[-1] if held_out else None),
                _at(lowest),
                _at(accuracy[source][-1] if source in accuracy else None),
            )
        )
    if rows:
        blocks += [Table(header, rows), Paragraph("@ is the step at which a figure was logged.")]
    skipped = sum(value > 0 for _, value in metrics.series.get("skipped", ()))
    if skipped or metrics.not_finite:
        worst = ", ".join(
            f"{key} at {number_of(len(steps), 'step')}" for key, steps in list(metrics.not_finite.items())[:8]
        )
        text = f"Skipped because a loss or gradient was not finite: {number_of(skipped, 'logged step')}."
        blocks.append(Missing(f"{text} Not finite, and left out of the curves: {worst or 'nothing else'}."))
    return blocks


def serving(run: RunFolder) -> list[Block]:
    everything = _loads(run, "load")
    if not everything:
        return [_no_experts(run, "the experts' loads")]
    groups = [("all tokens", everything)]
    by_source = _loads_by_source(run)
    groups += [(f"source {source}", loads) for source, loads in by_source.items()]
    by_modality = {name: _loads(run, f"load_{name}") for name in ("image", "text")}
    by_modality = {name: loads for name, loads in by_modality.items() if loads}
    groups += [(f"{name} tokens", loads) for name, loads in by_modality.items()]
    blocks: list[Block] = [
        Paragraph(
            f"Share of tokens that each layer's router sends to each expert, mean of the last {LAST_ROWS} logged steps "
            "or fewer. A row adds up to 1; an expert's number means nothing across layers."
        )
    ]
    blocks.append(Figures([_load_map(name, loads) for name, loads in groups]))
    for name, found in (("by source", by_source), ("by modality", by_modality)):
        if not found:
            blocks.append(Missing(f"not recorded: load {name}"))
    columns = [(name, _recent(loads)) for name, loads in groups[1:]]
    if columns:
        rows = []
        for layer in sorted(everything):
            cells = []
            for _, shares in columns:
                best = max(shares[layer].items(), key=lambda item: item[1]) if shares.get(layer) else None
                cells.append(NONE if best is None else f"{best[0]} ({best[1]:.2f})")
            apart = [_separation([shares.get(layer) for shares in map(_recent, found.values())])
                     for found in (by_source, by_modality)]  # fmt: skip
            rows.append((str(layer), *cells, *(NONE if value is None else f"{value:.2f}" for value in apart)))
        header = ("layer", *(name for name, _ in columns), "sources apart", "image and text apart")
        blocks.append(Paragraph("The expert that most tokens of a group go to, and their share:"))
        blocks.append(Table(header, rows))
        blocks.append(
            Paragraph(
                "Apart: Jensen-Shannon divergence of the groups' choices, all groups weighing alike, as a share of the "
                "largest possible, log min(groups, experts). 0: the router treats them the same; 1: no two share an "
                "expert, as far as there are experts enough."
            )
        )
    return blocks


def load_over_time(run: RunFolder) -> list[Block]:
    loads = _loads(run, "load")
    if not loads:
        return [_no_experts(run, "the experts' loads")]
    num_experts = max(len(experts) for experts in loads.values())
    figures = []
    for layer, by_expert in sorted(loads.items()):
        lines = {f"expert {expert}": line for expert, line in sorted(by_expert.items())}
        caption = f"Layer {layer}: share of tokens by expert."
        if num_experts <= _MAX_LINES:
            figures.append(_curves(lines, caption, "share", width=_HALF_WIDTH, height=200, low=0.0))
        else:
            figures.append(_time_map(lines, caption))
    return [Figures(figures)]


def routers(run: RunFolder) -> list[Block]:
    metrics = run.metrics
    measures = {
        "router/max_over_mean": "max / mean load",
        "router/cv": "variation of load",
        "router/dead_experts": "experts without a token",
        "router/load_entropy": "entropy of load, nats",
        "router/choice_entropy": "entropy of choice, nats",
        "router/gate_margin": "gate margin",
        "balance_loss": "balance loss",
        "z_loss": "z loss",
    }
    found = {key: metrics.matching(rf"{key}/layer_(\d+)") for key in measures}
    layers = sorted({int(layer) for lines in found.values() for (layer,) in lines})
    blocks: list[Block] = []
    if "balance_loss" in metrics.series:
        curve = {"balance loss": metrics.series["balance_loss"]}
        text = "Balance loss, unweighted: 1 / experts when all are used alike."
        blocks.append(_curves(curve, text, "balance loss", height=200))
    recorded = {key: lines for key, lines in found.items() if lines}
    if layers:
        rows = []
        for layer in layers:
            cells = [lines[str(layer),][-1][1] if (str(layer),) in lines else None for lines in recorded.values()]
            rows.append((str(layer), *map(_shown, cells)))
        blocks.append(Paragraph("By layer, as last logged:"))
        blocks.append(Table(("layer", *(measures[key] for key in recorded)), rows))
    if not blocks:
        return [_no_experts(run, "what the routers did")]
    missing = [name for key, name in measures.items() if not found[key]]
    if missing:
        blocks.append(Missing(f"not recorded: {', '.join(missing)}"))
    return blocks


def alarms(run: RunFolder) -> list[Block]:
    if run.events is None:
        return [
            Missing("not recorded: there is no events.jsonl, which a run has from its first step on, alarms or none")
        ]
    if not run.events:
        return [Paragraph("None was raised: events.jsonl is empty.")]
    keys = ("step", "kind", "layer", "expert", "value", "limit", "reaction")
    rows = [tuple(_field(event.get(key)) for key in keys) for event in run.events[:_MAX_EVENTS]]
    kinds = [event["kind"] for event in run.events]
    summary = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    blocks: list[Block] = [Paragraph(f"{len(kinds)} in all: {summary}."), Table(keys, rows)]
    if len(run.events) > _MAX_EVENTS:
        blocks.append(Paragraph(f"The first {_MAX_EVENTS} are shown; events.jsonl has them all."))
    return blocks


def experts(run: RunFolder) -> list[Block]:
    norms, tokens = _loads(run, "expert/delta_norm"), _loads(run, "expert/tokens")
    by_layer = _similarities(run)
    if not norms and not tokens and not by_layer:
        return [_no_experts(run, "the experts' deltas, their similarity and their tokens")]
    blocks: list[Block] = []
    maps = []
    if norms:
        maps.append(_expert_map(norms, "Norm of each expert's delta s B A over its frozen weight's, as last logged."))
    if tokens:
        maps.append(_expert_map(tokens, "Tokens that each expert has seen in training."))
    if maps:
        blocks.append(Figures(maps))
    if by_layer:
        most = 1 + max(second for pairs in by_layer.values() for _, second in pairs)
        if most <= _MAX_SIMILARITY_EXPERTS:
            blocks.append(Figures([_similarity_map(layer, pairs) for layer, pairs in sorted(by_layer.items())]))
        rows = []
        for layer, pairs in sorted(by_layer.items()):
            (first, second), highest = max(pairs.items(), key=lambda item: item[1])
            mean = sum(pairs.values()) / len(pairs)
            rows.append((str(layer), hundredths(mean), hundredths(highest), f"{first} and {second}"))
        blocks.append(Paragraph("Cosine between the deltas of two experts of a layer, as last logged:"))
        blocks.append(Table(("layer", "mean", "highest", "of experts"), rows))
    for name, found in (("delta norms", norms), ("tokens seen", tokens), ("similarity of experts", by_layer)):
        if not found:
            blocks.append(Missing(f"not recorded: {name}"))
    return blocks


def methods(run: RunFolder) -> list[Block]:
    asked, series = run.setting("adapter", "methods"), run.metrics.named("method/")
    named = [method for method in asked if isinstance(method, dict)] if isinstance(asked, list | tuple) else []
    if not named and not series:
        return [Paragraph("None was asked for.") if run.config else Missing("not recorded: there is no config.yaml")]
    blocks: list[Block] = []
    if named:
        rows = []
        for method in named:
            options = ", ".join(f"{key} {_field(value)}" for key, value in method.items() if key != "name")
            rows.append((_field(method.get("name")), options or "all as by default"))
        blocks.append(Table(("method", "options"), rows, text_columns=2))
    figures = [
        _curves({name: line}, f"{name}, at each logged step.", name.rpartition("/")[2], width=_HALF_WIDTH, height=200)
        for name, line in series.items()
    ]
    return [*blocks, Figures(figures)] if figures else blocks


def mixture(run: RunFolder) -> list[Block]:
    if run.mixture is None:
        return [Missing("not recorded: there is no mixture.json")]
    rows = [(name, _flat(entry)) for name, entry in run.mixture["sources"].items()]
    named = dict.fromkeys(key for _, row in rows for key in row)
    keys = [key for key in _MIXTURE_FIRST if key in named]
    keys += [key for key in named if key not in keys]
    header = ("source", *(key.replace("_", " ") for key in keys))
    blocks: list[Block] = [Table(header, [(name, *(_field(row.get(key)) for key in keys)) for name, row in rows])]
    rest = {key: value for key, value in run.mixture.items() if not isinstance(value, dict | list)}
    if rest:
        blocks.append(Paragraph(", ".join(f"{key.replace('_', ' ')} {_field(value)}" for key, value in rest.items())))
    phases = run.mixture.get("phases", [])
    if len(phases) > 1:
        header = ("steps", "source", "shares of", "share asked", "share realised")
        cells = [
            (f"{part['from_step']:,} to {part['to_step']:,}", name, part["shares_of"],
             *(_field(entry.get(key)) for key in ("share_asked", "share_realised")))
            for part in phases for name, entry in part["sources"].items()
        ]  # fmt: skip
        blocks += [Paragraph("The mixture was changed on the way:"), Table(header, cells, text_columns=3)]
    return blocks


def answers(run: RunFolder) -> list[Block]:
    if not run.answers:
        return [Missing("not recorded: there is no file in eval/")]
    measures = ("exact", "contains", "anls")
    rows = []
    for evaluation in run.answers:
        by_source: dict[str, list[dict[str, Any]]] = {}
        for row in evaluation.rows:
            by_source.setdefault(row["source"], []).append(row)
        for source, found in by_source.items():
            cells = []
            for measure in measures:
                scores = [float(row[measure]) for row in found if row.get(measure) is not None]
                cells.append(f"{sum(scores) / len(scores):.3f} of {len(scores):,}" if scores else "not recorded")
            rows.append((evaluation.name, source, *cells))
    if not rows:
        return [Missing("not recorded: no file in eval/ holds an answer")]
    blocks: list[Block] = [Table(("file", "source", *measures), rows, text_columns=2)]
    last = run.answers[-1]
    picked: dict[str, dict[str, Any]] = {}
    for row in last.rows:
        if "answer" in row:
            picked.setdefault(row["source"], row)
    if picked:
        columns = ("prompt", "true", "answer")
        shown = [(source, *(_field(row.get(key)) for key in columns)) for source, row in picked.items()]
        blocks.append(Paragraph(f"The first answer of each source in {last.name}:"))
        blocks.append(Table(("source", *columns), shown, text_columns=4))
    return blocks


def throughput(run: RunFolder) -> list[Block]:
    speed = [(step, value) for step, value in run.metrics.series.get("tokens_per_second", ()) if value > 0]
    seconds = [value for _, value in run.metrics.series.get("seconds_per_step", ()) if value > 0]
    if not speed:
        return [Missing("not recorded: tokens per second")]
    values = [value for _, value in speed]
    rows = [("tokens/s", *(number(value) for value in (_median(values), min(values), max(values))))]
    if seconds:
        rows.append(("seconds a step", *(number(value) for value in (_median(seconds), min(seconds), max(seconds)))))
    text = "Valid places a second, image places included: means over the last steps (at most 50) before each row."
    return [
        _curves({"tokens/s": tuple(speed)}, text, "tokens/s", low=0.0, height=200),
        Table(("over logged steps", "median", "lowest", "highest"), rows),
    ]


def checks(run: RunFolder) -> list[Block]:
    return [Table(("check", "outcome", ""), _checks(run), text_columns=3)]


def _checks(run: RunFolder) -> list[tuple[str, str, str]]:
    """(check, passed | FAILED | not recorded, what was found)."""
    # the trainer logs a step's row after its check
    proved = f"training stops before its first row otherwise, and this run has logged step {run.metrics.steps[-1]:,}"
    found = [("a gradient reached everything trainable at step 1", "passed", proved)]
    found += [_finite_check(run), _base_check(run)]
    for checkpoint in run.checkpoints:
        outcome = "FAILED" if checkpoint.trouble else "passed"
        text = checkpoint.trouble or "every file of its manifest is there in its size (contents are hashed on loading)"
        found.append((f"checkpoint of step {checkpoint.step:,} is complete", outcome, text))
    if not run.checkpoints:
        found.append(("checkpoints are complete", "not recorded", "there is none"))
    else:
        complete = [f"step_{checkpoint.step}" for checkpoint in run.checkpoints if not checkpoint.trouble]
        newest = run.latest in complete
        text = f"latest names {run.latest}" if run.latest is not None else "there is no file latest"
        found.append(("latest names a complete checkpoint", "passed" if newest else "FAILED", text))
    if run.layouts is None:
        how = "mole-mega verify-parallel RUN.yaml --json RUN/verify_parallel.json puts it here"
        found.append(("layouts compute the same", "not recorded", how))
    else:
        wrong = [row["case"] for row in run.layouts if not row["equal"]]
        text = (
            f"differing: {', '.join(wrong)}"
            if wrong
            else f"compared with one process: {number_of(len(run.layouts), 'layout')}"
        )
        found.append(("layouts compute the same", "FAILED" if wrong or not run.layouts else "passed", text))
    return found


def _finite_check(run: RunFolder) -> tuple[str, str, str]:
    """By what the rows hold, and by what the trainer skipped; either may have been logged without the other."""
    name, metrics = "every logged loss and gradient was finite", run.metrics
    logged = {step for key, line in metrics.series.items() if _LOSS_OR_GRADIENT.fullmatch(key) for step, _ in line}
    bad = {step for key, steps in metrics.not_finite.items() if _LOSS_OR_GRADIENT.fullmatch(key) for step in steps}
    bad |= {step for step, value in metrics.series.get("skipped", ()) if value}
    if not logged | bad:
        return name, "not recorded", ""
    text = f"{len(bad)} of {len(logged | bad):,} logged steps were not" + (f", the first at {min(bad)}" if bad else "")
    return name, "FAILED" if bad else "passed", text


def _base_check(run: RunFolder) -> tuple[str, str, str]:
    name = "one base, and the one that was asked for"
    hashes = sorted({checkpoint.base_hash for checkpoint in run.checkpoints if checkpoint.base_hash})
    asked = run.setting("model", "base_hash") or ""
    if not hashes:
        return name, "not recorded", "no checkpoint names its base's hash"
    wanted = [str(asked)] if asked else hashes[:1]
    text = f"hash {', '.join(value[:16] for value in hashes)}"
    text += f"; model.base_hash asks for {str(asked)[:16]}" if asked else "; model.base_hash asks for none"
    return name, "passed" if hashes == wanted else "FAILED", text


def _no_experts(run: RunFolder, what: str) -> Block:
    if run.setting("adapter", "method") == "lora":
        return Paragraph("This run trains plain LoRA: there are no experts.")
    return Missing(f"not recorded: {what}")


def _curves(
    curves: Mapping[str, Series],
    caption: str,
    y_label: str,
    *,
    bounds: tuple[float, float] | None = None,
    low: float | None = None,
    width: int = 980,
    height: int = 270,
) -> Figure:
    """A line chart, and for Markdown the values at a few steps. `low` pins the axis' lower end."""
    thinned = {name: _thin(line) for name, line in curves.items()}
    longest = max(len(line) for line in curves.values())
    if longest > MAX_POINTS:
        caption += f" {longest:,} logged steps, means of {math.ceil(longest / MAX_POINTS)} neighbours."
    if low is not None:
        bounds = low, 1.05 * max(value for line in thinned.values() for _, value in line) or 1.0
    figure = line_chart(thinned, label=caption, y_label=y_label, bounds=bounds, width=width, height=height,
                        legend=len(curves) > 1)  # fmt: skip
    steps = _spread(sorted({step for line in curves.values() for step, _ in line}), 8)
    values = {name: dict(line) for name, line in curves.items()}
    rows = [(name, *(_shown(values[name].get(step)) for step in steps)) for name in curves]
    return Figure(figure, caption, Table((f"{y_label} at step", *map(str, steps)), rows))


def _time_map(lines: Mapping[str, Series], caption: str) -> Figure:
    """Many lines as a heat map: a row each, steps across."""
    steps = _spread(sorted({step for line in lines.values() for step, _ in line}), 28)
    values = [[dict(line).get(step) for step in steps] for line in lines.values()]
    return _map(values, list(lines), list(map(str, steps)), caption, column_title="step", highest=None)


def _load_map(name: str, loads: Loads) -> Figure:
    shares = _recent(loads)
    steps = sorted({step for experts in loads.values() for line in experts.values() for step, _ in line})[-LAST_ROWS:]
    span = f"steps {steps[0]:,} to {steps[-1]:,}" if len(steps) > 1 else f"step {steps[0]:,}"
    return _layer_map(shares, f"{name[0].upper()}{name[1:]}, {span}.", highest=1.0)


def _expert_map(values: Loads, caption: str) -> Figure:
    last = {layer: {expert: line[-1][1] for expert, line in experts.items()} for layer, experts in values.items()}
    return _layer_map(last, caption, highest=None)


def _layer_map(values: Mapping[int, Mapping[int, float]], caption: str, *, highest: float | None) -> Figure:
    experts = sorted({expert for row in values.values() for expert in row})
    layers = sorted(values)
    table = [[values[layer].get(expert) for expert in experts] for layer in layers]
    return _map(table, [str(layer) for layer in layers], [str(expert) for expert in experts], caption,
                row_title="layer", column_title="expert", highest=highest)  # fmt: skip


def _similarity_map(layer: int, pairs: Mapping[tuple[int, int], float]) -> Figure:
    experts = sorted({expert for pair in pairs for expert in pair})
    table = [[1.0 if i == j else pairs.get((min(i, j), max(i, j))) for j in experts] for i in experts]
    names = [str(expert) for expert in experts]
    figure = heat_map(table, names, names, label=f"layer {layer}: similarity of experts", bounds=(-1, 1),
                      scale="diverging", column_title="expert")  # fmt: skip
    return Figure(figure, f"Layer {layer}: cosine between experts.", _map_table(table, names, names, "expert"))


def _map(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    caption: str,
    *,
    row_title: str = "",
    column_title: str = "",
    highest: float | None,
) -> Figure:
    """A heat map from 0 to `highest`, or to its own highest value, which the caption then names."""
    if highest is None:
        highest = max((value for row in values for value in row if value is not None), default=0.0) or 1.0
        caption += f" Darkest: {number(highest)}."
    write = hundredths if 0.1 < highest <= 1 else number
    figure = heat_map(values, rows, columns, label=caption, row_title=row_title, column_title=column_title,
                      bounds=(0.0, highest), write=write)  # fmt: skip
    return Figure(figure, caption, _map_table(values, rows, columns, row_title or column_title))


def _map_table(
    values: Sequence[Sequence[float | None]], rows: Sequence[str], columns: Sequence[str], corner: str
) -> Table:
    return Table((corner, *columns), [(name, *map(_shown, row)) for name, row in zip(rows, values, strict=True)])


def _loads(run: RunFolder, prefix: str) -> Loads:
    """{layer: {expert: series}} of `prefix/layer_<l>/expert_<e>`."""
    loads: dict[int, dict[int, Series]] = {}
    for (layer, expert), line in run.metrics.matching(rf"{prefix}/layer_(\d+)/expert_(\d+)").items():
        loads.setdefault(int(layer), {})[int(expert)] = line
    return loads


def _loads_by_source(run: RunFolder) -> dict[str, Loads]:
    loads: dict[str, dict[int, dict[int, Series]]] = {}
    pattern = r"load_source/(.+)/layer_(\d+)/expert_(\d+)"
    for (source, layer, expert), line in run.metrics.matching(pattern).items():
        loads.setdefault(source, {}).setdefault(int(layer), {})[int(expert)] = line
    return loads


def _similarities(run: RunFolder) -> dict[int, dict[tuple[int, int], float]]:
    """{layer: {pair of experts: cosine of their deltas, as last logged}}."""
    by_layer: dict[int, dict[tuple[int, int], float]] = {}
    pattern = r"expert/similarity/layer_(\d+)/expert_(\d+)_(\d+)"
    for (layer, first, second), line in run.metrics.matching(pattern).items():
        by_layer.setdefault(int(layer), {})[int(first), int(second)] = line[-1][1]
    return by_layer


def _recent(loads: Loads) -> dict[int, dict[int, float]]:
    """Means of each expert's share over the last rows that logged it."""
    return {
        layer: {
            expert: sum(value for _, value in line[-LAST_ROWS:]) / len(line[-LAST_ROWS:])
            for expert, line in sorted(experts.items())
        }
        for layer, experts in loads.items()
    }


def _separation(groups: Sequence[Mapping[int, float] | None]) -> float | None:
    """Jensen-Shannon divergence of the groups' shares over experts (Lin 1991), over its largest possible value."""
    shares = [group for group in groups if group and sum(group.values()) > 0]
    experts = sorted({expert for group in shares for expert in group})
    most = min(len(shares), len(experts))
    if most < 2:
        return None
    rows = [[group.get(expert, 0.0) / sum(group.values()) for expert in experts] for group in shares]
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return max(0.0, _entropy(mean) - sum(map(_entropy, rows)) / len(rows)) / math.log(most)


def _entropy(shares: Iterable[float]) -> float:
    return -sum(share * math.log(share) for share in shares if share > 0)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key} ") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _thin(line: Series) -> list[tuple[float, float]]:
    """At most MAX_POINTS points, means of neighbours."""
    size = math.ceil(len(line) / MAX_POINTS)
    if size <= 1:
        return list(line)
    chunks = [line[start : start + size] for start in range(0, len(line), size)]
    return [
        (sum(step for step, _ in chunk) / len(chunk), sum(value for _, value in chunk) / len(chunk)) for chunk in chunks
    ]


def _spread(items: Sequence[int], most: int) -> list[int]:
    """At most `most` of them, evenly apart, first and last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _at(point: tuple[int, float] | None) -> str:
    return NONE if point is None else f"{number(point[1])} @ {point[0]:,}"


def _shown(value: float | None) -> str:
    return NONE if value is None else number(value)


def _field(value: Any) -> str:
    """A JSON value for people."""
    shown = finite(value)
    if shown is not None:
        return number(shown)
    return NONE if value is None else value if isinstance(value, str) else _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, indent=1 if isinstance(value, dict) and len(value) > 4 else None, default=str)
