"""Tiny trained models for tests of export: a Hugging Face folder, the base of it, and a step with random adapters."""

import json
from pathlib import Path

import torch
from megatron.core import dist_checkpointing

from mole_mega import config as run_config
from mole_mega.checkpoint import base, files
from mole_mega.checkpoint.store import weight_entries
from mole_mega.checkpoint.trained import Trained, find_trained
from mole_mega.config import AdapterConfig, DataConfig, ModelConfig, RunConfig, SourceConfig, TrainConfig
from mole_mega.models.llava import LLaVA


def run_of(base_dir: Path, adapter: AdapterConfig, *, projector: bool = True, precision: str = "fp32") -> RunConfig:
    return RunConfig(
        run_dir="unused",
        model=ModelConfig(base=str(base_dir)),
        data=DataConfig(sources=(SourceConfig(name="none", path="none"),), max_length=64),
        train=TrainConfig(steps=1, precision=precision, projector=projector),
        adapter=adapter,
    )


def randomise(model: LLaVA, scale: float = 0.3) -> None:
    """Give everything trainable random values: B too, which starts at 0."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(scale * values / parameter.shape[-1] ** 0.5)


def train(base_dir: Path, out: Path, parallel, adapter: AdapterConfig, **options) -> tuple[Trained, LLaVA]:
    """A step at `out` as a run would have written it, and the model that it is of."""
    run = run_of(base_dir, adapter, **options)
    model = LLaVA(run, base.read_size(base_dir), parallel).eval()
    base.load_base(model, base_dir)
    randomise(model)
    save_step(model, run, base_dir, out)
    return find_trained(out), model


def save_step(model: LLaVA, run: RunConfig, base_dir: Path, out: Path) -> None:
    folder = files.incomplete_name(out)
    folder.mkdir(parents=True)
    dist_checkpointing.save(weight_entries(model), str(folder), async_sharded_save=False)
    (folder / "config.yaml").write_text(run_config.dump(run))
    state = {"step": 1, "base_hash": files.folder_hash(base_dir), "applied_steps": 1}
    (folder / "state.json").write_text(json.dumps(state))
    files.publish(folder, out)
