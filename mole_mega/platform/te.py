"""Whether this process can compute with Transformer Engine, as a run asks."""

from __future__ import annotations

import importlib

import torch

from mole_mega.config import RunConfig
from mole_mega.errors import ConfigError
from mole_mega.platform.recipes import RECIPES, dotted, recipe_of

_INSTEAD = (
    "model.backend local with train.precision bf16 runs on any hardware, and fp8.store_base true keeps its base in FP8"
)


def check_machine(run: RunConfig) -> None:
    """Raise ConfigError, which says what to use instead, where this process cannot compute as the run asks."""
    if run.model.backend == "local":
        return
    asked = "train.precision fp8" if run.train.precision == "fp8" else "model.backend transformer_engine"
    if not torch.cuda.is_available():
        raise ConfigError(f"{asked} needs a CUDA GPU, and torch sees none; {_INSTEAD}")
    if why := why_unusable():
        raise ConfigError(f"{asked} needs Transformer Engine, which {why}; {_INSTEAD}")
    check_precision(run)
    recipe = recipe_of(run)
    if recipe is None:
        return
    capability, cuda = torch.cuda.get_device_capability(), _version(torch.version.cuda or "0.0")
    if why := recipe.why_not(capability, cuda):
        usable = [name for name, other in RECIPES.items() if not other.why_not(capability, cuda)]
        instead = f"this GPU takes fp8.recipe {' or '.join(usable)}" if usable else _INSTEAD
        gpu = f"{torch.cuda.get_device_name()} of {dotted(capability)}"
        raise ConfigError(f"fp8.recipe {run.fp8.recipe} {why}; this is {gpu}. {instead}")


def check_precision(run: RunConfig) -> None:
    """Raise ConfigError where no machine computes as the run asks."""
    if run.parallel.context > 1 and run.train.precision == "fp32":
        raise ConfigError(
            f"parallel.context {run.parallel.context}: Transformer Engine's attention over ranks computes in half "
            "precision alone; train.precision is fp32"
        )


def why_unusable() -> str:
    """Why Transformer Engine cannot be imported; empty where it can."""
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a build for another torch raises whatever it likes
        if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("transformer_engine"):
            return "is not installed"
        return f"cannot be imported: {' '.join(str(error).split())[:200]}"
    return ""


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)
