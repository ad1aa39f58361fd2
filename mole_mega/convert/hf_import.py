"""`mole-mega convert hf-to-megatron`: Hugging Face folders become a base checkpoint, a tensor at a time."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from mole_mega.checkpoint.base import write_base
from mole_mega.checkpoint.files import CheckpointError
from mole_mega.checkpoint.stream import LazyTensor
from mole_mega.config import ConfigError
from mole_mega.convert import carried_files, llava_hf
from mole_mega.convert.carried_files import IMAGE_TOKEN
from mole_mega.convert.hf_files import CONFIG, HfTensors, extra_files
from mole_mega.convert.hf_sources import Opened, open_source
from mole_mega.convert.source import SOURCE_FILE
from mole_mega.models.mcore_config import DTYPES
from mole_mega.models.sizes import LlavaSize

# Weights of the source that the model has no place for, kept in the base folder so that an export is whole again.
UNUSED_FILE = "unused_hf.safetensors"


def read_size(hf_dir: Path, vision_tower: Path | None = None) -> LlavaSize:
    """The size of a Hugging Face LLaVA. Raises ConfigError naming file and key when it is not one that we can be."""
    return open_source(hf_dir, vision_tower).size


def import_hf(
    hf_dir: Path,
    out: Path,
    dtype: Literal["fp32", "bf16"] | None = None,
    *,
    vision_tower: Path | None = None,
    projector: Path | None = None,
    image_token: str = IMAGE_TOKEN,
    seed: int = 0,
) -> str:
    """Write the base checkpoint `out`; returns its hash. `out` must not exist.

    `hf_dir` is a LLaVA as transformers or as the first LLaVA code saves it, or a Llama. `vision_tower` is the folder of
    its CLIP, where `hf_dir` holds none; `projector` a file of that code's `mm_projector` weights for a Llama, without
    which a projector is initialised by `seed`. `image_token` is what a tokenizer of the latter two calls an image.
    `dtype` None keeps the precision that each tensor is stored in (fp16 too: models of either precision load it).

    Raises ConfigError, one line that names file and tensor or key; nothing is left behind then. Holds a few tensors in
    memory, never the model.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists; choose another folder or remove it")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"conversion runs on one process, started on {os.environ['WORLD_SIZE']}")
    opened = open_source(hf_dir, vision_tower, projector, seed)
    if opened.kind == "llava_hf" and image_token != IMAGE_TOKEN:
        raise ConfigError(f"{hf_dir / CONFIG} says which token is the image's; {image_token!r} cannot be given")
    if opened.kind == "llava_hf":
        _check_image_token(hf_dir, opened.size)
    check_names(hf_dir, opened.tensors, opened.size)
    check_shapes(opened.tensors, opened.size)
    precision = None if dtype is None else DTYPES[dtype]
    with tempfile.TemporaryDirectory() as folder:
        scratch, size = Path(folder), opened.size
        if opened.kind == "llava_hf":
            files = extra_files(hf_dir)
        else:
            size, files = carried_files.gather(hf_dir, vision_tower, size, image_token, scratch)
        _say_passed_over(opened, vision_tower)
        opened.source().write(scratch)
        files = [*files, scratch / SOURCE_FILE, *_write_unused(scratch, opened.tensors, size, precision)]
        return write_base(size, pending_tensors(opened.tensors, size, precision), out, files)


def _check_image_token(hf_dir: Path, size: LlavaSize) -> None:
    """The config and the tokenizer must mean the same token, or a server puts images where the model sees text."""
    token_id, vocab_size = size.image_token_id, size.language.vocab_size
    if token_id >= vocab_size:
        raise ConfigError(f"{hf_dir / CONFIG}: image_token_index {token_id} is behind the vocabulary of {vocab_size}")
    path, known = hf_dir / "tokenizer.json", None
    with contextlib.suppress(Exception):  # none, or a broken one: training will say so
        known = Tokenizer.from_file(str(path)).token_to_id(IMAGE_TOKEN)
    if known not in (None, token_id):
        raise ConfigError(
            f"{hf_dir / CONFIG}: image_token_index is {token_id}, {path.name} has {IMAGE_TOKEN} as {known}"
        )


def check_names(hf_dir: Path, tensors: HfTensors, size: LlavaSize) -> None:
    """Raise ConfigError unless the tensors are those of the table: none unknown, none missing."""
    used = {name: row.ours for row in llava_hf.rows(size) for name in row.hf}
    weights = {*used, *llava_hf.unused_names(size)}
    known = weights.union(llava_hf.computed_names(size))
    if size.language.tied_embeddings:
        known.add(llava_hf.OUTPUT)
    for name in tensors:
        if name not in known:
            raise ConfigError(f"{tensors.where(name)} is not a tensor of this model")
        if name in weights:
            tensors.dtype(name)
    for name, ours in used.items():
        if name not in tensors:
            raise ConfigError(f"{hf_dir} has no tensor {name}; {ours} is made of it")
    if size.language.tied_embeddings and llava_hf.OUTPUT in tensors:
        _check_tied(tensors)


def check_shapes(tensors: HfTensors, size: LlavaSize) -> None:
    """Raise ConfigError naming a tensor of another shape than the config makes it."""
    for name, shape in llava_hf.hf_shapes(size).items():
        if name in tensors and tensors.shape(name) != shape:
            raise ConfigError(
                f"{tensors.where(name)} has shape {list(tensors.shape(name))}, {CONFIG} makes it {list(shape)}"
            )


def pending_tensors(tensors: HfTensors, size: LlavaSize, precision: torch.dtype | None = None) -> dict[str, LazyTensor]:
    """Every tensor of ours, read and rearranged when it is asked for; `precision` None keeps the stored one."""
    rules = llava_hf.rules_by_name(size)
    shapes = llava_hf.hf_shapes(size)

    def read(row: llava_hf.Row) -> torch.Tensor:
        return _in_precision(rules[row.rule].to_ours(*(tensors.read(name) for name in row.hf)), precision)

    def pending(row: llava_hf.Row) -> LazyTensor:
        ours = rules[row.rule].to_ours(*(torch.empty(shapes[name], device="meta") for name in row.hf))
        stored = functools.reduce(torch.promote_types, (tensors.dtype(name) for name in row.hf))
        return LazyTensor(tuple(ours.shape), precision or stored, functools.partial(read, row))

    return {row.ours: pending(row) for row in llava_hf.rows(size)}


def _check_tied(tensors: HfTensors) -> None:
    """A stored copy of tied embeddings must be one."""
    if not torch.equal(tensors.read(llava_hf.OUTPUT), tensors.read(llava_hf.EMBEDDING)):
        raise ConfigError(
            f"{tensors.where(llava_hf.OUTPUT)} differs from the embedding, but {CONFIG} says that they are tied"
        )


def _write_unused(folder: Path, tensors: HfTensors, size: LlavaSize, precision: torch.dtype | None) -> list[Path]:
    kept = {
        name: _in_precision(tensors.read(name), precision).clone(memory_format=torch.contiguous_format)
        for name in llava_hf.unused_names(size)
        if name in tensors
    }
    if not kept:
        return []
    save_file(kept, folder / UNUSED_FILE, metadata={"format": "pt"})
    return [folder / UNUSED_FILE]


def _in_precision(tensor: torch.Tensor, precision: torch.dtype | None) -> torch.Tensor:
    return tensor.to(precision or tensor.dtype)


def _say_passed_over(opened: Opened, vision_tower: Path | None) -> None:
    if opened.num_passed_over:
        print(f"passed over {opened.num_passed_over} tensors of {vision_tower} that read text", file=sys.stderr)
    if opened.fresh_projector:
        print("the projector starts fresh, from --seed: no --projector was given", file=sys.stderr)
