"""What a run directory holds, read with care: a file that is missing, cut short or altered is told and not guessed at.

Every figure comes as it was written. What is not a finite number is no point of a curve, and is counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mole_mega.errors import ConfigError
from mole_mega.report import shapes
from mole_mega.report.shapes import finite
from mole_mega.wording import number_of

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
    checkpoints = path / "checkpoints"
    found = [entry for entry in sorted(checkpoints.glob("step_*")) if _STEP.fullmatch(entry.name) and entry.is_dir()]
    latest = _text(checkpoints / "latest", problems)
    return RunFolder(
        path=path,
        metrics=metrics,
        config_text=config_text,
        config=_settings(config_text, problems) if config_text is not None else {},
        events=_rows(path / "events.jsonl", problems, shapes.event),
        mixture=_object(path / "mixture.json", dict, problems, shapes.mixture),
        layouts=_object(path / "verify_parallel.json", list, problems, shapes.layouts),
        answers=tuple(_answers(path / "eval", problems)),
        checkpoints=tuple(sorted((_checkpoint(entry) for entry in found), key=lambda checkpoint: checkpoint.step)),
        latest=latest.strip() if latest is not None else None,
        problems=tuple(problems),
    )


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
        problems.append(f"{path.name}: {number_of(stepless, 'row')} without a step left out")
    if odd:
        problems.append(f"{path.name}: {number_of(odd, 'value')} left out that {'is' if odd == 1 else 'are'} no number")
    if not steps:
        why = "; ".join(problems) or "it is empty"
        raise ConfigError(f"{path} has no usable row ({why}), so there is nothing to report")
    return Metrics(
        series={key: tuple(sorted(points.items())) for key, points in values.items()},
        not_finite={key: tuple(sorted(found)) for key, found in not_finite.items()},
        steps=tuple(sorted(steps)),
    )


def _rows(
    path: Path, problems: list[str], fits: Callable[[dict[str, Any]], str] = lambda _: ""
) -> tuple[dict[str, Any], ...] | None:
    """The objects of a file of JSON lines. Lines that are none, and objects whose shape `fits` finds wrong, are left
    out and told, the first with its number and the reason."""
    rows, bad = [], []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                row, why = _row(line, fits)
                if why:
                    bad.append(f"line {number}, which was left out: {why}")
                else:
                    rows.append(row)
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.append(f"{path.name} could not be read: {error.strerror}")
        return None
    if bad:
        more = f" ({len(bad)} lines were left out in all)" if len(bad) > 1 else ""
        problems.append(f"{path.name}: {bad[0]}{more}")
    return tuple(rows)


def _row(line: bytes, fits: Callable[[dict[str, Any]], str]) -> tuple[dict[str, Any], str]:
    """(a line's object, why it cannot be used)."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        # only the end of a file can lack its line's end: what a kill leaves of a row
        return {}, "it is not JSON" if line.endswith(b"\n") else "it is cut short or is not JSON"
    return (row, fits(row)) if isinstance(row, dict) else ({}, "it is JSON, but not an object")


def _settings(text: str, problems: list[str]) -> dict[str, Any]:
    """The sections of a config, without the settings that are not what they should be."""
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        problems.append(f"config.yaml is not YAML: {' '.join(str(error).split())}")
        return {}
    if not isinstance(config, dict):
        problems.append(f"config.yaml has no settings: it holds no mapping of keys but {type(config).__name__}")
        return {}
    sections = {key: dict(value) for key, value in config.items() if isinstance(value, dict)}
    found = {path: why for path in shapes.SETTINGS if (why := shapes.setting(path, config))}
    for section, key in found:
        sections.get(section, {}).pop(key, None)
    problems += [f"config.yaml: {why}, and counts as not recorded" for why in dict.fromkeys(found.values())]
    return sections


def _object(path: Path, kind: type, problems: list[str], fits: Callable[[Any], str] = lambda _: "") -> Any:
    text = _text(path, problems)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    name = "object" if kind is dict else "list"
    why = fits(value) if isinstance(value, kind) else f"it is not a JSON {name}"
    if not why:
        return value
    problems.append(f"{path.name} could not be used: {why}")
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
        rows = _rows(path, problems, shapes.answer)
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
