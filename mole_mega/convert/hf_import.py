"""`mole-mega convert hf-to-megatron`: a Hugging Face LLaVA folder becomes a base checkpoint."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from mole_mega.checkpoint.base import save_base
from mole_mega.checkpoint.files import CheckpointError
from mole_mega.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from mole_mega.convert import llava_hf
from mole_mega.convert.hf_config import size_from_config
from mole_mega.convert.hf_files import CONFIG, HfTensors, extra_files, open_tensors
from mole_mega.models.llava import LLaVA
from mole_mega.models.mcore_config import DTYPES
from mole_mega.models.sizes import LlavaSize
from mole_mega.platform import parallel as platform
from mole_mega.platform.parallel import Parallel

# Weights of the source that the model has no place for, kept in the base folder so that an export is whole again.
UNUSED_FILE = "unused_hf.safetensors"


def read_size(hf_dir: Path) -> LlavaSize:
    """The size of a Hugging Face LLaVA. Raises ConfigError naming file and key when it is not one that we can be."""
    with open_tensors(hf_dir) as tensors:
        return _size(hf_dir, tensors)


def import_hf(hf_dir: Path, out: Path, dtype: Literal["fp32", "bf16"] | None = None) -> str:
    """Write the base checkpoint `out` from a Hugging Face folder; returns its hash. `out` must not exist.

    `dtype` None keeps the precision that each tensor is stored in (fp16 too: models of either precision load it).
    Raises ConfigError, one line that names file and tensor or key; nothing is left behind then.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists; choose another folder or remove it")
    precision = None if dtype is None else DTYPES[dtype]
    with open_tensors(hf_dir) as tensors, _alone() as parallel:
        size = _size(hf_dir, tensors)
        check_names(hf_dir, tensors, size)
        model = _empty_model(size, parallel)
        fill(model, tensors, precision)
        with tempfile.TemporaryDirectory() as scratch:
            files = [*extra_files(hf_dir), *_write_unused(Path(scratch), tensors, size, precision)]
            return save_base(model, out, files)


def check_names(hf_dir: Path, tensors: HfTensors, size: LlavaSize) -> None:
    """Raise ConfigError unless the folder's tensors are those of the table: none unknown, none missing."""
    used = {name: row.ours for row in llava_hf.rows(size) for name in row.hf}
    weights = {*used, *llava_hf.unused_names(size)}
    known = weights.union(llava_hf.computed_names(size))
    if size.language.tied_embeddings:
        known.add(llava_hf.OUTPUT)
    for name in tensors:
        if name not in known:
            raise ConfigError(f"{tensors.where(name)} is not a tensor of this model")
        if name in weights:
            tensors.check_dtype(name)
    for name, ours in used.items():
        if name not in tensors:
            raise ConfigError(f"{hf_dir} has no tensor {name}; {ours} is made of it")
    if size.language.tied_embeddings and llava_hf.OUTPUT in tensors:
        _check_tied(tensors)


def fill(model: LLaVA, tensors: HfTensors, precision: torch.dtype | None) -> None:
    """Put every tensor into the model, one at a time; `precision` None keeps the stored one.

    Raises ConfigError naming a tensor of the wrong shape, before any data is read.
    """
    rules = llava_hf.rules_by_name(model.size)
    parameters = dict(model.named_parameters())
    rows = list(llava_hf.rows(model.size))
    without = parameters.keys() ^ {row.ours for row in rows}
    assert not without, f"the model and the name table differ in {sorted(without)}"
    for row in rows:
        expected = rules[row.rule].to_hf(torch.empty_like(parameters[row.ours], device="meta"))
        for name, part in zip(row.hf, expected, strict=True):
            if tensors.shape(name) != tuple(part.shape):
                raise ConfigError(
                    f"{tensors.where(name)} has shape {list(tensors.shape(name))}, {CONFIG} makes it {list(part.shape)}"
                )
    for row in rows:
        tensor = rules[row.rule].to_ours(*(tensors.read(name) for name in row.hf))
        parameters[row.ours].data = _owned(tensor, precision)


def _size(hf_dir: Path, tensors: HfTensors) -> LlavaSize:
    if llava_hf.EMBEDDING not in tensors:
        # the config says better than a missing tensor that this is another model
        size_from_config(hf_dir / CONFIG, vocab_size=1)
        raise ConfigError(f"{hf_dir} has no tensor {llava_hf.EMBEDDING}")
    shape = tensors.shape(llava_hf.EMBEDDING)
    if len(shape) != 2 or not shape[0]:
        raise ConfigError(f"{tensors.where(llava_hf.EMBEDDING)} has shape {list(shape)}, not [vocabulary, hidden]")
    return size_from_config(hf_dir / CONFIG, vocab_size=shape[0])


def _check_tied(tensors: HfTensors) -> None:
    """A stored copy of tied embeddings must be one."""
    if not torch.equal(tensors.read(llava_hf.OUTPUT), tensors.read(llava_hf.EMBEDDING)):
        raise ConfigError(
            f"{tensors.where(llava_hf.OUTPUT)} differs from the embedding, but {CONFIG} says that they are tied"
        )


def _empty_model(size: LlavaSize, parallel: Parallel) -> LLaVA:
    """The base alone, its weights not yet there; bf16 because `fill` replaces them all anyway."""
    run = RunConfig(
        run_dir="",
        model=ModelConfig(base=""),
        train=TrainConfig(steps=1, precision="bf16"),
        data=DataConfig(sources=(), max_length=2),
    )
    return LLaVA(run, size, parallel, adapters=False)


def _write_unused(folder: Path, tensors: HfTensors, size: LlavaSize, precision: torch.dtype | None) -> list[Path]:
    kept = {name: _owned(tensors.read(name), precision) for name in llava_hf.unused_names(size) if name in tensors}
    if not kept:
        return []
    save_file(kept, folder / UNUSED_FILE, metadata={"format": "pt"})
    return [folder / UNUSED_FILE]


def _owned(tensor: torch.Tensor, precision: torch.dtype | None) -> torch.Tensor:
    """A contiguous copy that shares no memory with the file."""
    return tensor.to(precision or tensor.dtype, copy=True, memory_format=torch.contiguous_format)


@contextlib.contextmanager
def _alone() -> Iterator[Parallel]:
    """The process groups of one process, left again unless they were there before."""
    was_there = dist.is_initialized()
    parallel = platform.initialize(ParallelConfig(), seed=0)
    try:
        if parallel.world_size > 1:
            raise ConfigError(f"conversion runs on one process, started on {parallel.world_size}")
        yield parallel
    finally:
        if not was_there:
            platform.shutdown()
