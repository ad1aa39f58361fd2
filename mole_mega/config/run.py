"""A whole run: its sections, and which of its keys nothing hears."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

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
    """The whole keys of sections adapter and train that nothing hears beside the others."""
    adapter = config.adapter
    has_routers = adapter.method == "mole" and adapter.router_scope != "task"
    unheard = {f"adapter.{key}" for key in adapter.without_effect}
    return frozenset(unheard if has_routers else unheard | {"train.router_lr"})


def describe_idle(config: RunConfig) -> list[str]:
    """For people, a line a reason: what is set, to something else than its default, and changes nothing."""
    idle, lines = idle_keys(config), []
    unheard = [
        f"{name}.{entry.name} {str(plain(getattr(section, entry.name))).lower()}"
        for name, section in (("adapter", config.adapter), ("train", config.train))
        for entry in dataclasses.fields(section)
        if f"{name}.{entry.name}" in idle and getattr(section, entry.name) != entry.default
    ]
    if unheard:
        why = "adapter.method lora: " if config.adapter.method == "lora" else ""
        lines.append(f"{why}these keys have no effect: {', '.join(unheard)}")
    if config.validation.every and not config.data.validation:
        lines.append(
            f"validation.every is {config.validation.every}, but data.validation is empty: nothing is validated"
        )
    return lines
