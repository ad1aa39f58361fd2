"""Methods around the optimizer step, one file each. A new one is its file, a line below, a test and an example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection

from mole_mega.adapters.methods import bora, lorasculpt, riemannian
from mole_mega.adapters.methods.base import Method
from mole_mega.adapters.pairs import Pair
from mole_mega.adapters.sharding import sharded_entry
from mole_mega.config import ConfigError, RunConfig, build_section

METHODS: dict[str, type[Method]] = {
    "bora": bora.BoRA,
    "lorasculpt": lorasculpt.LoRASculpt,
    "riemannian": riemannian.Riemannian,
}


def check_methods(run: RunConfig) -> list[tuple[type[Method], Any]]:
    """The methods that `adapter.methods` names and their options, in order. Raises ConfigError for a name or an option
    that there is not, and for methods that do not go together or not with the run."""
    asked = _read(run)
    for kind, options in asked:
        kind.check(options, run)
    names = [tree["name"] for tree in run.adapter.methods]
    for index, (name, (kind, _)) in enumerate(zip(names, asked, strict=True)):
        if names.count(name) > 1:
            raise ConfigError(f"adapter.methods has {name!r} {names.count(name)} times")
        if kind.reshapes_gradients and index < len(names) - 1:
            raise ConfigError(
                f"adapter.methods has {', '.join(names)}: {name} reshapes the whole gradient, so it must be the last"
            )
    movers, waiters = (
        [name for name, (kind, _) in zip(names, asked, strict=True) if getattr(kind, mark)]
        for mark in ("moves_idle_experts", "wants_idle_experts_still")
    )
    if movers and waiters:
        raise ConfigError(
            f"adapter.methods has {', '.join(names)}: {waiters[0]} takes an expert whose B is 0 for one that had no "
            f"token yet, and {movers[0]} moves those too"
        )
    return asked


def shorten_methods(run: RunConfig, steps: int) -> RunConfig:
    """The run with methods that do all that they do within so many steps."""
    methods = tuple(
        {"name": tree["name"]} | asdict(kind.shortened(options, steps))
        for tree, (kind, options) in zip(run.adapter.methods, _read(run), strict=True)
    )
    return replace(run, adapter=replace(run.adapter, methods=methods))


def build_methods(
    run: RunConfig, pairs: Sequence[Pair], groups: ProcessGroupCollection, device: torch.device
) -> dict[str, Method]:
    """The run's methods by name, in order, over this rank's pairs. Raises ConfigError as `check_methods` does."""
    return {
        tree["name"]: kind(options, run, pairs, groups, device)
        for tree, (kind, options) in zip(run.adapter.methods, check_methods(run), strict=True)
    }


def _read(run: RunConfig) -> list[tuple[type[Method], Any]]:
    """Each method asked for and its options, by themselves."""
    asked = []
    for index, tree in enumerate(run.adapter.methods):
        where = f"adapter.methods[{index}]"
        name = tree.get("name")
        if name not in METHODS:
            raise ConfigError(f"{where}.name must be one of {', '.join(METHODS)}; got {name!r}")
        options = {key: value for key, value in tree.items() if key != "name"}
        asked.append((METHODS[name], build_section(METHODS[name].Options, options, where)))
    return asked


def method_entries(methods: dict[str, Method], groups: ProcessGroupCollection) -> ShardedStateDict:
    """The checkpoint entries of everything that the methods remember."""
    entries: ShardedStateDict = {}
    for name, method in methods.items():
        for key, (tensor, placement) in method.state().items():
            whole_key = f"methods.{name}.{key}"
            entries[whole_key] = sharded_entry(whole_key, tensor, placement, groups)
    return entries
