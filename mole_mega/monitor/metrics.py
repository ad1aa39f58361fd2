"""One row of scalars a logged step, and the file that holds them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mole_mega.adapters.routing import IMAGE, TEXT, RoutingSummary, shares

# What depends on the machine and the moment; everything else in a row is the same for the same run.
TIMING_KEYS = ("tokens_per_second", "seconds_per_step")

Row = dict[str, int | float]


@dataclass(frozen=True)
class StepResult:
    """What one step did; every rank holds the same. `loss` is the mean over labelled places of the global batch,
    `domain_loss` and `domain_tokens` [D]; `places` counts all valid places. `applied` is False when a loss or gradient
    was not finite and the weights stayed as they were. `methods`: the methods' own scalars by "method/name"."""

    loss: float
    domain_loss: torch.Tensor
    domain_tokens: torch.Tensor
    places: int
    grad_norm: float
    applied: bool
    routing: RoutingSummary | None
    methods: Mapping[str, float] = field(default_factory=dict)


def step_row(step: int, result: StepResult, lrs: Mapping[str, float], domains: Sequence[str]) -> Row:
    """The scalars of one step (DESIGN section 5). `tokens` counts valid places, image places included;
    `loss_tokens` those that are learned from. A domain without labels in this step has no loss."""
    row: Row = {
        "step": step,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": lrs["adapters"],
        **{f"lr/{group}": lr for group, lr in lrs.items() if group != "adapters"},
        "tokens": result.places,
        "loss_tokens": int(result.domain_tokens.sum()),
        "skipped": int(not result.applied),
    }
    for domain, loss, tokens in zip(domains, result.domain_loss, result.domain_tokens, strict=True):
        if tokens:
            row[f"loss/{domain}"] = float(loss)
    if result.routing is not None:
        row |= routing_row(result.routing, domains)
    return row | {f"method/{name}": value for name, value in result.methods.items()}


def routing_row(routing: RoutingSummary, domains: Sequence[str]) -> Row:
    """The routers' scalars of one step, of the tokens of its global batch. Layers are numbered from 0 over the whole
    model. Every `load...` sums to 1 over a layer's experts; where a group has no token, its loads are left out."""
    row: Row = {"balance_loss": routing.balance_loss, "z_loss": routing.z_loss}
    load_LE = routing.load_LE
    columns = {
        "balance_loss": routing.balance_L,
        "z_loss": routing.z_L,
        "router/max_over_mean": routing.max_over_mean_L,
        # std over mean, of the experts' tokens
        "router/cv": load_LE.std(-1, correction=0) * load_LE.shape[-1],
        "router/dead_experts": (routing.counts_LE == 0).sum(-1),
        "router/load_entropy": routing.load_entropy_L,
        "router/choice_entropy": routing.entropy_L,
        "router/gate_margin": routing.margin_L,
    }
    for name, values_L in columns.items():
        row |= {f"{name}/layer_{layer}": value for layer, value in zip(routing.layers, values_L.tolist(), strict=True)}
    tables = {
        "load": routing.counts_LE,
        "load_image": routing.counts_by_modality(IMAGE),
        "load_text": routing.counts_by_modality(TEXT),
    }
    tables |= {
        f"load_source/{domain}": counts_LE
        for domain, counts_LE in zip(domains, routing.counts_by_domain(), strict=True)
    }
    for name, counts_LE in tables.items():
        if counts_LE.any():
            for layer, loads_E in zip(routing.layers, shares(counts_LE).tolist(), strict=True):
                row |= {f"{name}/layer_{layer}/expert_{expert}": load for expert, load in enumerate(loads_E)}
    return row


class MetricsFile:
    """`metrics.jsonl`, and `events.jsonl`: one JSON object with a `step` a line, appended and flushed as it comes."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Opens the file for a run that goes on after `resume_step`: later rows, and a half-written last one, are
        dropped, since they are about to be computed again. Raises OSError, naming the line, for a file of which
        anything else cannot be read: nothing of it is dropped then."""
        kept = [row for row in read_rows(path) if row["step"] <= resume_step] if path.exists() else []
        beside = path.with_name(f".{path.name}.new")
        beside.write_text("".join(_line(row) for row in kept))
        beside.replace(path)
        self._path = path
        self._file = open(path, "a")  # noqa: SIM115 - open for the run's length

    def write(self, row: Mapping[str, Any]) -> None:
        """Raises OSError, naming the file."""
        try:
            self._file.write(_line(row))
            self._file.flush()
        except OSError as error:  # of a write it does not say where
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def close(self) -> None:
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The complete rows of a metrics file, in order. Raises OSError, naming the line, for one that is no row."""
    *lines, _ = path.read_bytes().split(b"\n")  # a kill can leave half a line at the end
    return [_row(path, number, line) for number, line in enumerate(lines, start=1) if line]


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:  # neither UTF-8 nor JSON
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise OSError(f"line {number} of {path} is no row with a step; mend the file or move it away")
    return row


def _line(row: Mapping[str, Any]) -> str:
    # JSON has no NaN: strict readers refuse the file
    return json.dumps({k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in row.items()}) + "\n"
