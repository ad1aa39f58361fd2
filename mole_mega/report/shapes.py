"""Whether what a run's files say has the shape that a run writes: pure functions that give the reason why not, or "".

A well-formed file of another shape would otherwise read as a run that recorded nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Shape = Callable[[Any], bool]

# What a report reads of the config.
SETTINGS = {
    ("adapter", "method"): str, ("adapter", "num_experts"): int, ("adapter", "rank"): int, ("adapter", "gate"): str,
    ("parallel", "tensor"): int, ("parallel", "pipeline"): int, ("parallel", "expert"): int,
    ("parallel", "context"): int, ("train", "steps"): int, ("validation", "every"): int, ("model", "base_hash"): str,
}  # fmt: skip
_MEASURES = ("exact", "contains", "anls")


def finite(value: Any) -> float | None:
    """A JSON value as a finite number, None when it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an int with more digits than a float has room for
        return None


def event(row: Mapping[str, Any]) -> str:
    """Of a row of `events.jsonl`."""
    whole = ("step", _is_count), ("kind", _is_text), ("layer", _is_count), ("value", _is_number), ("limit", _is_number)
    return _misfit(row, dict(whole)) or _misfit(row, {"expert": _is_count, "reaction": _is_text}, optional=True)


def answer(row: Mapping[str, Any]) -> str:
    """Of a row of `eval/*.jsonl`: an answer, its scores, or both."""
    if not row.keys() & {"answer", *_MEASURES}:
        return f"it has neither an answer nor one of {', '.join(_MEASURES)}"
    scores = dict.fromkeys(_MEASURES, _is_share)
    return _misfit(row, {"source": _is_text}) or _misfit(row, {"answer": _is_text, **scores}, optional=True)


def layouts(rows: list[Any]) -> str:
    """Of `verify_parallel.json`, of use as a whole alone: an entry that is left out could be the one that differs."""
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            return f"entry {number} is no object"
        if why := _misfit(row, {"case": _is_text, "equal": lambda value: isinstance(value, bool)}):
            return f"entry {number}: {why}"
    return ""


def mixture(tree: Mapping[str, Any]) -> str:
    """Of `mixture.json`."""
    phases = tree.get("phases", [])
    if not isinstance(phases, list):
        return "phases is no list"
    for name, part in [("", tree), *((f"phases[{index}]: ", part) for index, part in enumerate(phases))]:
        sources = part.get("sources") if isinstance(part, dict) else None
        if not isinstance(sources, dict) or not sources:
            return f"{name}sources is no object that names one or more"
        for source, entry in sources.items():
            if not isinstance(entry, dict):
                return f"{name}source {source!r} is no object"
            shares = dict.fromkeys(("share_asked", "share_realised"), _is_share)
            counts = dict.fromkeys(("size", "tokens", "labelled_tokens", "images", "drawn", "epochs_begun"), _is_count)
            why = _misfit(entry, {"rows": _is_count}) or _misfit(entry, shares | counts, optional=True)
            if why:
                return f"{name}source {source!r}: {why}"
        if name and (why := _misfit(part, {"from_step": _is_count, "to_step": _is_count, "shares_of": _is_text})):
            return f"{name}{why}"
    return ""


def setting(path: tuple[str, str], config: Mapping[str, Any]) -> str:
    """Of one of SETTINGS."""
    section, key = path
    inside = config.get(section, {})
    if not isinstance(inside, dict):
        return f"{section} is no section of keys"
    value, kind = inside.get(key), SETTINGS[path]
    if value is None or (isinstance(value, kind) and not isinstance(value, bool)):
        return ""
    return f"{section}.{key} is {_quoted(value)}, no {'text' if kind is str else 'whole number'}"


def _misfit(row: Mapping[str, Any], shapes: Mapping[str, Shape], *, optional: bool = False) -> str:
    for key, fits in shapes.items():
        value = row.get(key)
        if value is None and optional:
            continue
        if not fits(value):
            return f"{key} is {_quoted(value)}" if key in row else f"it has no {key}"
    return ""


def _quoted(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and finite(value) is not None and value >= 0


def _is_number(value: Any) -> bool:
    return finite(value) is not None


def _is_share(value: Any) -> bool:
    number = float(value) if isinstance(value, bool) else finite(value)
    return number is not None and -1e-9 <= number <= 1 + 1e-9


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
