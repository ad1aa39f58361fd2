"""A Hugging Face model folder as files: its JSON files and its safetensors shards, read a tensor at a time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mole_mega.config import ConfigError
from mole_mega.convert.llava_hf import canonical_name

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What goes along with a converted model, where it is there: tokenizer, image processor, chat template, generation.
EXTRA_FILES = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)
_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class HfTensors:
    """The tensors of a folder's shards by the name table's names. Nothing is read before `read` asks for it."""

    def __init__(self, shards: dict[Path, Any]) -> None:
        """`shards` maps files to open safetensors handles. Raises ConfigError when two tensors have one name."""
        self._found: dict[str, tuple[Path, str, Any]] = {}
        for path, shard in shards.items():
            for stored in shard.keys():  # noqa: SIM118 - a handle, not a mapping
                name = canonical_name(stored)
                if name in self._found:
                    other, stored_there, _ = self._found[name]
                    raise ConfigError(f"{path}: {stored} is the same tensor as {stored_there} in {other.name}")
                self._found[name] = (path, stored, shard)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def where(self, name: str) -> str:
        """File and stored name of a tensor, for messages."""
        path, stored, _ = self._found[name]
        return f"{path}: {stored}"

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the header; no data is read."""
        _, stored, shard = self._found[name]
        return tuple(shard.get_slice(stored).get_shape())

    def check_dtype(self, name: str) -> None:
        """Raise ConfigError unless a tensor is stored as fp32, bf16 or fp16."""
        _, stored, shard = self._found[name]
        dtype = shard.get_slice(stored).get_dtype()
        if dtype not in _FLOATS:
            raise ConfigError(f"{self.where(name)} is stored as {dtype}; supported are {', '.join(_FLOATS)}")

    def read(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU, in its stored precision. It may share the file's memory: copy before keeping it."""
        _, stored, shard = self._found[name]
        return shard.get_tensor(stored)


@contextlib.contextmanager
def open_tensors(folder: Path) -> Iterator[HfTensors]:
    """Open the shards of a folder. Raises ConfigError naming the file that is missing or cut short."""
    listed = _listed_shards(folder)
    with contextlib.ExitStack() as stack:
        shards = {path: stack.enter_context(_open_shard(path)) for path in sorted(listed)}
        for path, names in listed.items():
            missing = names - set(shards[path].keys())
            if missing:
                raise ConfigError(f"{path} does not hold {min(missing)}, which {INDEX} says it does")
        yield HfTensors(shards)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping. Raises ConfigError naming the file."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping, found {type(tree).__name__}")
    return tree


def extra_files(folder: Path) -> list[Path]:
    """The files of `EXTRA_FILES` that a folder has."""
    return [folder / name for name in EXTRA_FILES if (folder / name).is_file()]


def _listed_shards(folder: Path) -> dict[Path, set[str]]:
    """{shard: names that the index promises in it}."""
    if (folder / WEIGHTS).is_file():
        return {folder / WEIGHTS: set()}
    index = folder / INDEX
    if not index.is_file():
        raise ConfigError(f"{folder} has neither {WEIGHTS} nor {INDEX}; other weight formats are not read")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index} has no weight_map")
    listed: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ConfigError(f"{index}: {name} is in {file!r}, which is not a file name")
        listed.setdefault(folder / file, set()).add(name)
    return listed


def _open_shard(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"{path} is missing; {INDEX} names it")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not a whole safetensors file: {reason}") from error
