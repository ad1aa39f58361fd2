"""A whole run: its sections, and which of its keys nothing hears."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from mole_mega.config.adapter import AdapterConfig
from mole_mega.config.data import DataConfig
from mole_mega.config.model import Fp8Config, ModelConfig, ParallelConfig
from mole_mega.config.training import CheckpointConfig, MonitorConfig, TrainConfig, ValidationConfig
from mole_mega.config.values import plain


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    run_dir: str
    model: ModelConfig
    train: TrainConfig
    data: DataConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)


def idle_keys(config: RunConfig) -> frozenset[str]:
    """The whole keys of sections adapter, train and fp8 that nothing hears beside the others."""
    adapter, in_fp8, stored = config.adapter, config.train.precision == "fp8", config.fp8.store_base
    unheard = {f"adapter.{key}" for key in adapter.without_effect}
    if adapter.method != "mole" or adapter.router_scope == "task":
        unheard.add("train.router_lr")
    if not in_fp8:
        unheard.add("fp8.recipe")
    if in_fp8 or not stored:
        unheard.add("fp8.scale")
    if not in_fp8 and not stored:
        unheard.add("fp8.first_last_layers_bf16")
    return frozenset(unheard)


def describe_idle(config: RunConfig) -> list[str]:
    """For people, a line a reason: what is set, to something else than its default, and changes nothing."""
    idle, lines = idle_keys(config), []
    sections: dict[str, Any] = {"adapter": config.adapter, "train": config.train, "fp8": config.fp8}
    of_adapters = "adapter.method lora: " if config.adapter.method == "lora" else ""
    of_fp8 = f"train.precision {config.train.precision}, fp8.store_base {str(config.fp8.store_base).lower()}: "
    for why, names in ((of_adapters, ("adapter", "train")), (of_fp8, ("fp8",))):
        unheard = [
            f"{name}.{entry.name} {str(plain(getattr(sections[name], entry.name))).lower()}"
            for name in names
            for entry in dataclasses.fields(sections[name])
            if f"{name}.{entry.name}" in idle and getattr(sections[name], entry.name) != entry.default
        ]
        if unheard:
            lines.append(f"{why}these keys have no effect: {', '.join(unheard)}")
    if config.validation.every and not config.data.validation:
        lines.append(
            f"validation.every is {config.validation.every}, but data.validation is empty: nothing is validated"
        )
    train = config.train
    if (last := train.last_moving_step) < train.steps:
        lines.append(
            f"train.schedule_steps {train.schedule_steps} ends before train.steps {train.steps}: from step {last + 1} "
            "on the learning rate is 0 and nothing trains"
        )
    return lines
