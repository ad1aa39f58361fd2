"""The config tree of a run: load, override, validate, dump.

One YAML file a run, the same shape as the dataclasses of this room. It knows names and ranges; it does not know torch,
Megatron-Core or the machine. What needs the model's size (heads that do not divide, layers a stage) is checked where
the size is known, in `models/mcore_config.py`.
"""

from mole_mega.config.adapter import MIXTURE_KEYS, AdapterConfig
from mole_mega.config.checks import check_batch, validate
from mole_mega.config.data import DataConfig, SourceConfig
from mole_mega.config.model import Fp8Config, ModelConfig, ParallelConfig, ScaleOf
from mole_mega.config.run import RunConfig, describe_idle, idle_keys
from mole_mega.config.training import AlarmsConfig, CheckpointConfig, MonitorConfig, TrainConfig, ValidationConfig
from mole_mega.config.tree import build_section, dump, flat, from_dict, load, to_dict
from mole_mega.config.values import (
    LARGEST_COUNT,
    Count,
    NonNegative,
    Positive,
    PositiveInt,
    ProperShare,
    Range,
    Share,
    Size,
)
from mole_mega.errors import ConfigError

__all__ = [
    "LARGEST_COUNT",
    "MIXTURE_KEYS",
    "AdapterConfig",
    "AlarmsConfig",
    "CheckpointConfig",
    "ConfigError",
    "Count",
    "DataConfig",
    "Fp8Config",
    "ModelConfig",
    "MonitorConfig",
    "NonNegative",
    "ParallelConfig",
    "Positive",
    "PositiveInt",
    "ProperShare",
    "Range",
    "RunConfig",
    "ScaleOf",
    "Share",
    "Size",
    "SourceConfig",
    "TrainConfig",
    "ValidationConfig",
    "build_section",
    "check_batch",
    "describe_idle",
    "dump",
    "flat",
    "from_dict",
    "idle_keys",
    "load",
    "to_dict",
    "validate",
]
