"""The config as a tree of keys: read from YAML, overridden, built into the frozen sections, written again."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from mole_mega.config.checks import check_ranges, validate
from mole_mega.config.run import RunConfig
from mole_mega.config.values import plain
from mole_mega.errors import ConfigError


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, apply `key.path=value` overrides (values are YAML), check it.

    Relative paths in the file are taken from the file's own folder, except those that an override gives, which are
    taken from the current one. Raises ConfigError with the key and the numbers.
    """
    path = Path(path)
    try:
        tree = _unshared(yaml.load(path.read_text(), Loader=_UniqueKeyLoader))
    except RecursionError as error:
        raise ConfigError(f"{path}: a section holds itself, or sections lie too deep") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, found {type(tree).__name__}")
    _resolve_paths(tree, path.parent.resolve())
    for override in overrides:
        _apply_override(tree, override)
    _resolve_paths(tree, Path.cwd())
    return from_dict(tree)


def from_dict(tree: dict[str, Any]) -> RunConfig:
    """Build and check the config from nested dicts; the inverse of `to_dict`."""
    config = _build(RunConfig, tree, "")
    validate(config)
    return config


def build_section(kind: type, tree: dict[str, Any], where: str) -> Any:
    """Build a frozen dataclass from a mapping that stands at `where`, and check its ranges. Raises ConfigError."""
    section = _build(kind, tree, where)
    check_ranges(section, f"{where}.")
    return section


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested plain dicts, lists and scalars, every default filled in."""
    return plain(dataclasses.asdict(config))


def flat(config: RunConfig) -> dict[str, str]:
    """{"train.lr": "0.0002", ...}: every value as text, lists whole."""

    def walk(node: Any, key: str) -> dict[str, str]:
        if not isinstance(node, dict):
            return {key: str(node)}
        return {name: text for part, value in node.items() for name, text in walk(value, f"{key}.{part}").items()}

    return {key.removeprefix("."): text for key, text in walk(to_dict(config), "").items()}


def dump(config: RunConfig) -> str:
    """The resolved config as YAML; `load` of it gives an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys without a word; a run file that says a thing twice is a mistake. (What a
    merge `<<` brings is not said twice, so that the keys are compared before it.)"""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"the key {key[1]!r} stands {keys.count(key)} times in one section")
        return node


def _unshared(node: Any) -> Any:
    """A copy in which an alias has a section of its own, so that an override changes what it names and nothing else."""
    if isinstance(node, dict):
        return {key: _unshared(value) for key, value in node.items()}
    return [_unshared(item) for item in node] if isinstance(node, list) else node


def _resolve_paths(tree: dict[str, Any], folder: Path) -> None:
    def resolve(node: Any, key: str) -> None:
        if isinstance(node, dict) and isinstance(node.get(key), str) and node[key]:
            node[key] = str((folder / Path(node[key]).expanduser()).resolve())

    resolve(tree, "run_dir")
    resolve(tree.get("model"), "base")
    resolve(tree.get("checkpoint"), "init_from")
    data = tree.get("data")
    for kind in ("sources", "validation"):
        sources = data.get(kind) if isinstance(data, dict) else None
        for source in sources if isinstance(sources, list) else []:
            resolve(source, "path")
            resolve(source, "image_folder")


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form key.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML") from error
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        if isinstance(node, list):
            node = node[_index(node, part, override)]
        else:
            node = node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise ConfigError(f"override {override!r}: {part!r} holds a value, not a section")
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    else:
        node[last] = value


def _index(items: list[Any], part: str, override: str) -> int:
    """Where the item is that a part of a key means: by its number, or by its name."""
    names = [str(item["name"]) for item in items if isinstance(item, dict) and "name" in item]
    if part.isdecimal() and int(part) < len(items):
        return int(part)
    if len(names) == len(items) and part in names:
        return names.index(part)
    known = f", nor a name of {', '.join(names)}" if names else ""
    raise ConfigError(f"override {override!r}: {part!r} is not an index below {len(items)}{known}")


def _build(kind: type, tree: Any, where: str) -> Any:
    if not isinstance(tree, dict):
        raise ConfigError(f"{where or 'the config'} must be a mapping of keys, got {tree!r}")
    hints = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    for key in tree:
        if key not in hints:
            raise ConfigError(f"unknown config key {prefix}{key}; {_hint(str(key), hints, prefix)}")
    for entry in dataclasses.fields(kind):
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and entry.name not in tree:
            raise ConfigError(f"config key {prefix}{entry.name} is missing")
    return kind(**{key: _convert(hints[key], value, f"{prefix}{key}") for key, value in tree.items()})


def _hint(key: str, known: Iterable[str], prefix: str) -> str:
    """What may have been meant by a key that is not one of the `known` below `prefix`: the keys of its name elsewhere
    in the tree; else the one spelt like it, here or elsewhere; else the nearest here."""
    places = _places(RunConfig)
    alike = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    found = [key] if key in places else difflib.get_close_matches(key, places, n=1, cutoff=0.8) if not alike else []
    if found:
        return f"did you mean {' or '.join(places[found[0]])}?"
    (near,) = alike or difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"the nearest valid key is {prefix}{near}"


def _places(kind: type, prefix: str = "") -> dict[str, list[str]]:
    """{last name: the whole keys that end with it} of a section and of those in it, a list's by its items' names."""
    places: dict[str, list[str]] = {}
    for name, hint in typing.get_type_hints(kind).items():
        places.setdefault(name, []).append(f"{prefix}{name}")
        items = typing.get_origin(hint) is tuple
        inner = typing.get_args(hint)[0] if items else hint
        if dataclasses.is_dataclass(inner):
            below = _places(typing.cast(type, inner), f"{prefix}{name}.{'NAME.' * items}")
            for last, keys in below.items():
                places.setdefault(last, []).extend(keys)
    return places


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check `value` against a type hint and bring it into the frozen form (lists become tuples)."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        problems = []
        for option in args:
            if option is type(None) and value is not None:
                continue
            try:
                return _convert(option, value, where)
            except ConfigError as error:
                problems.append(str(error))
        wrong_kind = f"{where} must be "
        if further := [problem for problem in problems if not problem.startswith(wrong_kind)]:
            raise ConfigError(further[0])
        kinds = [re.split("[,;] got ", problem.removeprefix(wrong_kind))[0] for problem in problems]
        raise ConfigError(f"{wrong_kind}{' or '.join(kinds)}, got {value!r}")
    if origin is Literal:
        # type() too: YAML's `1` and `true` compare equal in Python
        if any(value == option and type(value) is type(option) for option in args):
            return value
        raise ConfigError(f"{where} must be one of {', '.join(map(str, args))}; got {value!r}")
    if origin is dict:
        # sections whose keys another room knows
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise ConfigError(f"{where} must be a mapping of keys with a name, got {value!r}")
        return dict(value)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if hint is type(None):
        if value is None:
            return None
    elif hint is bool:
        if isinstance(value, bool):
            return value
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint is float:
        number = _number(value)
        if number is not None:
            if not math.isfinite(number):
                raise ConfigError(f"{where} must be a finite number, got {value}")
            return number
    elif hint is str and isinstance(value, str):
        return value
    raise ConfigError(f"{where} must be {getattr(hint, '__name__', hint)}, got {value!r}")


def _number(value: Any) -> float | None:
    """The value as a float, None when it is not one. Text too: YAML 1.1 reads 1e-4 (no point) as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None
    except OverflowError:  # an int with more digits than a float has room for
        return math.inf
