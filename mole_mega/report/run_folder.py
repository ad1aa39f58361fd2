"""What a run directory holds, read with care: a file that is missing, cut short or altered is told and not guessed at.

Every figure comes as it was written. What is not a finite number is no point of a curve, and is counted.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mole_mega.errors import ConfigError

METRICS = "metrics.jsonl"
_STEP = re.compile(r"step_(\d+)")
_NON_FINITE = {"nan", "inf", "-inf", "infinity", "-infinity"}

Series = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Metrics:
    """`series[key]`: (step, value) in order of steps. `not_finite[key]`: the steps at which it was NaN or infinite.
    `steps`: the logged steps."""

    series: Mapping[str, Series]
    not_finite: Mapping[str, tuple[int, ...]]
    steps: tuple[int, ...]

    def named(self, prefix: str) -> dict[str, Series]:
        """{what stands after the prefix: its series}, in the order of the file."""
        return {key.removeprefix(prefix): line for key, line in self.series.items() if key.startswith(prefix)}

    def matching(self, pattern: str) -> dict[tuple[str, ...], Series]:
        """{the groups of the pattern: the series} of the keys that it matches whole."""
        found = ((re.fullmatch(pattern, key, re.DOTALL), line) for key, line in self.series.items())
        return {match.groups(): line for match, line in found if match}

    def last(self, key: str) -> float | None:
        return self.series[key][-1][1] if self.series.get(key) else None


@dataclass(frozen=True)
class Checkpoint:
    """One `step_<n>`: what is wrong with it (nothing: all files are there, in their sizes), and its base's hash."""

    step: int
    trouble: str
    base_hash: str


@dataclass(frozen=True)
class Answers:
    """One `eval/*.jsonl`: rows with an answer, in order, and by how many lines could not be used."""

    name: str
    rows: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class RunFolder:
    """A run as its files tell it. None: the file is not there. `problems`: what could not be read, a line each."""

    path: Path
    metrics: Metrics
    config_text: str | None
    config: Mapping[str, Any]
    events: tuple[dict[str, Any], ...] | None
    mixture: Mapping[str, Any] | None
    layouts: Sequence[dict[str, Any]] | None
    answers: tuple[Answers, ...]
    checkpoints: tuple[Checkpoint, ...]
    latest: str | None
    problems: tuple[str, ...] = field(default=())

    def setting(self, *path: str) -> Any:
        """A value of the config, None where it is not there or not a mapping."""
        node: Any = self.config
        for key in path:
            node = node.get(key) if isinstance(node, Mapping) else None
        return node


def read_run(path: Path) -> RunFolder:
    """Raises ConfigError for a folder that is no run, and for a run whose metrics hold not one usable row."""
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder" if path.exists() else f"there is no folder {path}")
    if not any((path / name).exists() for name in (METRICS, "config.yaml", "checkpoints")):
        raise ConfigError(f"{path} is no run: it holds neither {METRICS} nor config.yaml nor checkpoints")
    if not (path / METRICS).exists():
        raise ConfigError(f"{path} has no {METRICS}: the run logged no step, so there is nothing to report")
    problems: list[str] = []
    metrics = _metrics(path / METRICS, problems)
    config_text = _text(path / "config.yaml", problems)
    try:
        config = yaml.safe_load(config_text or "")
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        problems.append(f"config.yaml is not YAML: {' '.join(str(error).split())}")
        config = {}
    checkpoints = path / "checkpoints"
    found = [entry for entry in sorted(checkpoints.glob("step_*")) if _STEP.fullmatch(entry.name) and entry.is_dir()]
    latest = _text(checkpoints / "latest", problems)
    return RunFolder(
        path=path,
        metrics=metrics,
        config_text=config_text,
        config=config if isinstance(config, dict) else {},
        events=_rows(path / "events.jsonl", problems),
        mixture=_object(path / "mixture.json", dict, problems),
        layouts=_object(path / "verify_parallel.json", list, problems),
        answers=tuple(_answers(path / "eval", problems)),
        checkpoints=tuple(sorted((_checkpoint(entry) for entry in found), key=lambda checkpoint: checkpoint.step)),
        latest=latest.strip() if latest is not None else None,
        problems=tuple(problems),
    )


def finite(value: Any) -> float | None:
    """A JSON value as a finite number, None when it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an int with more digits than a float has room for
        return None


def _is_non_finite(value: Any) -> bool:
    """JSON has no NaN and no infinity: metrics.jsonl holds their names."""
    if isinstance(value, str):
        return value.lower() in _NON_FINITE
    return isinstance(value, int | float) and not isinstance(value, bool)


def _metrics(path: Path, problems: list[str]) -> Metrics:
    rows = _rows(path, problems) or ()
    values: dict[str, dict[int, float]] = {}
    not_finite: dict[str, set[int]] = {}
    steps, stepless, odd = set(), 0, 0
    for row in rows:
        step = row.get("step")
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            stepless += 1
            continue
        steps.add(step)
        for key, value in row.items():
            number = finite(value)
            if key == "step":
                continue
            if number is not None:
                values.setdefault(key, {})[step] = number  # a step that was computed again counts as it was last
            elif _is_non_finite(value):
                not_finite.setdefault(key, set()).add(step)
            else:
                odd += 1
    if stepless:
        problems.append(f"{path.name}: {stepless} rows without a step were left out")
    if odd:
        problems.append(f"{path.name}: {odd} values that are no numbers were left out")
    if not steps:
        why = "; ".join(problems) or "it is empty"
        raise ConfigError(f"{path} has no usable row ({why}), so there is nothing to report")
    return Metrics(
        series={key: tuple(sorted(points.items())) for key, points in values.items()},
        not_finite={key: tuple(sorted(found)) for key, found in not_finite.items()},
        steps=tuple(sorted(steps)),
    )


def _rows(path: Path, problems: list[str]) -> tuple[dict[str, Any], ...] | None:
    """The objects of a file of JSON lines. Lines that are none are told with their numbers."""
    rows, bad, last = [], [], 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                last = number
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if isinstance(row, dict):
                    rows.append(row)
                else:
                    bad.append(number)
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.append(f"{path.name} could not be read: {error.strerror}")
        return None
    if bad == [last]:
        problems.append(f"{path.name}: the last line, {last}, is cut short or is not JSON, and was left out")
    elif bad:
        problems.append(f"{path.name}: {len(bad)} lines are not JSON objects and were left out, first line {bad[0]}")
    return tuple(rows)


def _object(path: Path, kind: type, problems: list[str]) -> Any:
    text = _text(path, problems)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, kind):
        return value
    problems.append(f"{path.name} could not be read: it is not a JSON {'object' if kind is dict else 'list'}")
    return None


def _text(path: Path, problems: list[str]) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        problems.append(f"{path.name} could not be read: {reason}")
        return None


def _answers(folder: Path, problems: list[str]) -> Iterator[Answers]:
    def order(path: Path) -> tuple[int, str]:
        match = _STEP.fullmatch(path.stem)
        return int(match[1]) if match else -1, path.name

    for path in sorted(folder.glob("*.jsonl"), key=order):
        rows = _rows(path, problems)
        if rows is not None:
            yield Answers(path.stem, rows)


def _checkpoint(folder: Path) -> Checkpoint:
    step = int(folder.name.removeprefix("step_"))
    problems: list[str] = []
    manifest = _object(folder / "manifest.json", dict, problems)
    state = _object(folder / "state.json", dict, problems) or {}
    base_hash = state.get("base_hash") if isinstance(state.get("base_hash"), str) else ""
    trouble = "; ".join(problems)
    if manifest is None and not trouble:
        trouble = "it has no manifest.json"
    for name, entry in (manifest or {}).items():
        size = entry.get("size") if isinstance(entry, dict) else None
        try:
            found = (folder / name).stat().st_size
        except (OSError, ValueError):
            trouble = f"{name} is missing"
            break
        if found != size:
            trouble = f"{name} has {found} bytes, its manifest says {size}"
            break
    return Checkpoint(step, trouble, base_hash or "")
