"""A model that a path names: a base, a run, or one step of a run. Told apart by what the folder holds."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from mole_mega import config
from mole_mega.checkpoint import files
from mole_mega.checkpoint.base import MODEL_JSON, load_base, model_entries, read_size
from mole_mega.checkpoint.store import (
    ADAPTER_FILE,
    LATEST,
    latest_checkpoint,
    load_weights,
    read_adapter,
    warm_start,
)
from mole_mega.checkpoint.tensors import StoredTensors
from mole_mega.config import (
    AdapterConfig,
    ConfigError,
    DataConfig,
    Fp8Config,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from mole_mega.models.backend import on_local_backend
from mole_mega.models.llava import LLaVA
from mole_mega.models.sizes import LlavaSize
from mole_mega.platform.parallel import Parallel


@dataclass(frozen=True)
class Trained:
    """A base and, unless `step` is None, the adapters that a run trained on it. `run` is that run's config, or one that
    says nothing but how the base is built."""

    base: Path
    step: Path | None
    run: RunConfig
    size: LlavaSize

    @property
    def adapter(self) -> AdapterConfig | None:
        """What the adapters are; None for a base alone."""
        return None if self.step is None else self.run.adapter

    @property
    def trained_steps(self) -> int | None:
        """How many steps a run trained the adapters for; None for a base alone and for converted adapters."""
        state = None if self.step is None else self.step / "state.json"
        return json.loads(state.read_text())["step"] if state is not None and state.is_file() else None


def find_trained(path: Path, base: Path | None = None) -> Trained:
    """What `path` names: a base folder, a run directory (its newest complete step), a step, or converted adapters.
    `base` says where the base is, if it is no longer where the run had it; converted adapters need it.

    Raises ConfigError when the path is none of these, its newest step is not complete, or the base is not the one that
    the run was trained on.
    """
    if path.name == LATEST and path.is_file():
        path = path.parent / path.read_text().strip()
    if (path / MODEL_JSON).is_file():
        if base is not None:
            raise ConfigError(f"{path} is a base itself; another base cannot be given")
        size = read_size(path)
        return Trained(path, None, _run_of_base(path), size)
    if (path / ADAPTER_FILE).is_file():
        return _converted(path, base)
    step = path
    if not (path / "state.json").is_file():
        newest = latest_checkpoint(path / "checkpoints")
        if newest is None:
            raise ConfigError(f"{path} is no base ({MODEL_JSON}), no run with a complete checkpoint and no step")
        step = newest
    run = config.load(step / "config.yaml")
    base = base or Path(run.model.base)
    if not (base / MODEL_JSON).is_file():
        raise ConfigError(f"{step} was trained on the base {base}, which is not there; say where it is with --base")
    trained_on = json.loads((step / "state.json").read_text())["base_hash"]
    if files.folder_hash(base) != trained_on:
        raise ConfigError(f"{step} was trained on a base with hash {trained_on}; {base} has {files.folder_hash(base)}")
    return Trained(base, step, replace(run, model=replace(run.model, base=str(base))), read_size(base))


def build_trained(
    trained: Trained,
    parallel: Parallel,
    layout: ParallelConfig,
    precision: Literal["fp32", "bf16", "stored"] | None = None,
) -> LLaVA:
    """This rank's part of the model under `layout`, weights loaded, in evaluation mode.

    `precision` (None: the run's) is that of the whole model. "stored" is for proofs: the model computes in fp32, and
    the base's weights keep the dtypes that they are stored in, for the caller to widen as they are used; also a base
    that training kept in FP8. A run that trained with Transformer Engine needs none here: its weights are the local
    backend's, whose attention knows a cache.
    """
    run = replace(on_local_backend(trained.run), parallel=layout)
    if precision is not None:
        run = replace(run, train=replace(run.train, precision="fp32" if precision == "stored" else precision))
    if precision == "stored":
        run = replace(run, fp8=Fp8Config())
    model = LLaVA(run, trained.size, parallel, adapters=trained.step is not None)
    if precision == "stored":
        _take_stored_dtypes(model, StoredTensors(trained.base))
    load_base(model, trained.base)
    if trained.step is not None and (trained.step / ADAPTER_FILE).is_file():
        warm_start(model, trained.step, run.adapter)  # they need not have routers
    elif trained.step is not None:
        load_weights(model, trained.step)
    return model.eval()


def _converted(path: Path, base: Path | None) -> Trained:
    if base is None:
        raise ConfigError(f"{path} holds adapters without the base that they are of; say where it is with --base")
    size, stored = read_size(base), StoredTensors(path)
    has_projector = any(name.startswith("vision_projection.") for name in stored)
    run = _run_of_base(base)
    run = replace(run, adapter=read_adapter(path), train=replace(run.train, projector=has_projector))
    return Trained(base, path, run, size)


def _take_stored_dtypes(model: LLaVA, stored: StoredTensors) -> None:
    parameters = dict(model.named_parameters())
    for name, entry in model_entries(model, trainable=False).items():
        if parameters[name].requires_grad:  # the projector, when the run trained it: it comes from the run
            continue
        parameters[name].data = torch.empty_like(parameters[name], dtype=stored.dtype(entry.key))


def _run_of_base(base: Path) -> RunConfig:
    return RunConfig(
        run_dir=str(base),
        model=ModelConfig(base=str(base)),
        train=TrainConfig(steps=1, precision="fp32", projector=False),
        data=DataConfig(sources=(), max_length=2),
    )
