"""A Hugging Face model folder as files: its JSON files and its weight files, read a tensor at a time."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from mole_mega.config import ConfigError
from mole_mega.convert.llava_hf import PREFIXES, Prefixes, canonical_name
from mole_mega.convert.source import Folder, Stored

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH_WEIGHTS = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"
# What goes along with a converted model, where it is there: tokenizer, image processor, chat template, generation.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
EXTRA_FILES = (CONFIG, "generation_config.json", *TOKENIZER_FILES, *PROCESSOR_FILES)
_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of a tensor. `stored_as` is the file's word for the dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    stored_as: str


class Shard(Protocol):
    """One file of weights. `tensors` is in the file's order."""

    path: Path
    tensors: dict[str, TensorInfo]

    def read(self, name: str) -> torch.Tensor:
        """On the CPU, as stored. It shares the file's memory: copy before keeping it. Several threads may call it."""


class SafetensorsShard:
    """Opened for each read and let go after it: pages of a file that stays mapped would count as ours."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as handle:
            slices = {name: handle.get_slice(name) for name in handle.offset_keys()}
            self.tensors = {
                name: TensorInfo(tuple(part.get_shape()), _FLOATS.get(part.get_dtype()), part.get_dtype())
                for name, part in slices.items()
            }

    def read(self, name: str) -> torch.Tensor:
        with self._open() as handle:
            return handle.get_tensor(name)

    def _open(self) -> Any:
        try:
            return safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{self.path} is not a whole safetensors file: {_one_line(error)}") from error


class TorchShard:
    """A file that `torch.save` wrote. Read as plain tensors only: code in it is not run but refused."""

    # After so many bytes the file is let go, and the pages read with it; the next tensor maps it anew. (Not each:
    # mapping reads the description of all of them.)
    LET_GO_AFTER = 2**26

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._mapped: dict[str, torch.Tensor] | None = None
        self._num_bytes = 0  # read since the file was mapped
        self.tensors = {
            name: TensorInfo(tuple(tensor.shape), tensor.dtype, str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self._map().items()
        }
        self._unread = set(self.tensors)

    def read(self, name: str) -> torch.Tensor:
        with self._lock:
            if self._mapped is None:
                self._mapped, self._num_bytes = self._map(), 0
            tensor = self._mapped[name]
            self._num_bytes += tensor.nbytes
            self._unread.discard(name)
            if self._num_bytes > self.LET_GO_AFTER or not self._unread:
                self._mapped = None
        return tensor

    def _map(self) -> dict[str, torch.Tensor]:
        try:
            tree = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise ConfigError(f"{self.path} holds code, not only tensors; it was not run") from error
        except Exception as error:  # a broken or hostile pickle can raise anything
            raise ConfigError(
                f"{self.path} is not a whole file of torch.save's zip format: {_one_line(error)}"
            ) from error
        if not isinstance(tree, dict):
            raise ConfigError(f"{self.path} holds {type(tree).__name__}, not tensors by name")
        for name, tensor in tree.items():
            if not isinstance(tensor, torch.Tensor):
                raise ConfigError(f"{self.path}: {name} is {type(tensor).__name__}, not a tensor")
        return tree


class HfTensors:
    """The tensors of one or more folders by the name table's names. No data is read before `read` asks for it."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[Shard, str, Folder]] = {}

    def add(self, shards: list[Shard], folder: Folder, prefixes: Prefixes, *, but: tuple[str, ...] = ()) -> int:
        """Take in a folder's tensors, except those whose stored names start with one of `but`; returns how many these
        are. Raises ConfigError when two tensors have one name."""
        num_left_out = 0
        for shard in shards:
            for stored in shard.tensors:
                if but and stored.startswith(but):
                    num_left_out += 1
                    continue
                name = canonical_name(stored, prefixes)
                if name in self._found:
                    other, stored_there, _ = self._found[name]
                    raise ConfigError(
                        f"{shard.path}: {stored} is the same tensor as {stored_there} in {other.path.name}"
                    )
                self._found[name] = (shard, stored, folder)
        return num_left_out

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def where(self, name: str) -> str:
        """File and stored name of a tensor, for messages."""
        shard, stored, _ = self._found[name]
        return f"{shard.path}: {stored}"

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the header; no data is read."""
        return self._info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Of the header. Raises ConfigError unless a tensor is stored as fp32, bf16 or fp16."""
        info = self._info(name)
        if info.dtype is None or info.dtype not in _FLOATS.values():
            raise ConfigError(f"{self.where(name)} is stored as {info.stored_as}; supported are {', '.join(_FLOATS)}")
        return info.dtype

    def stored(self, name: str) -> Stored:
        """Where a tensor of a supported dtype came from, to be remembered."""
        shard, stored, folder = self._found[name]
        return Stored(stored, shard.path.name, folder, str(self.dtype(name)).removeprefix("torch."))

    def read(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU, in its stored precision. It shares the file's memory: copy before keeping it."""
        shard, stored, _ = self._found[name]
        try:
            return shard.read(stored)
        except (SafetensorError, OSError, KeyError) as error:
            raise ConfigError(f"{self.where(name)} cannot be read any more: {_one_line(error)}") from error

    def _info(self, name: str) -> TensorInfo:
        shard, stored, _ = self._found[name]
        return shard.tensors[stored]


def open_tensors(folder: Path, prefixes: Prefixes = PREFIXES) -> HfTensors:
    """The tensors of one folder. Raises ConfigError naming the file that is missing or cut short."""
    tensors = HfTensors()
    tensors.add(open_shards(folder), "model", prefixes)
    return tensors


def open_shards(folder: Path) -> list[Shard]:
    """The weight files of a folder, by name. Raises ConfigError naming the file that is missing or cut short."""
    index, listed = _listed_shards(folder)
    shards = []
    for path, names in sorted(listed.items()):
        if not path.is_file():
            raise ConfigError(f"{path} is missing; {index} names it")
        shards.append(open_shard(path))
        missing = names - shards[-1].tensors.keys()
        if missing:
            raise ConfigError(f"{path} does not hold {min(missing)}, which {index} says it does")
    return shards


def open_shard(path: Path) -> Shard:
    """One weight file, its format told by its name as everywhere in this field."""
    if not path.is_file():
        raise ConfigError(f"{path} is not a file")
    return SafetensorsShard(path) if path.suffix == ".safetensors" else TorchShard(path)


def index_metadata(folder: Path) -> dict[str, Any] | None:
    """The `metadata` of the index that names a folder's weight files; None when there is no index."""
    index, _ = _listed_shards(folder)
    if not index:
        return None
    metadata = read_json(folder / index).get("metadata", {})
    return metadata if isinstance(metadata, dict) else {}


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


def extra_files(folder: Path, names: tuple[str, ...] = EXTRA_FILES) -> list[Path]:
    """Those of `names` that a folder has."""
    return [folder / name for name in names if (folder / name).is_file()]


def _listed_shards(folder: Path) -> tuple[str, dict[Path, set[str]]]:
    """The index's file name, empty without one, and {shard: names that the index promises in it}."""
    for weights, index in ((WEIGHTS, INDEX), (TORCH_WEIGHTS, TORCH_INDEX)):
        if (folder / weights).is_file():
            return "", {folder / weights: set()}
        if (folder / index).is_file():
            return index, _weight_map(folder / index)
    raise ConfigError(
        f"{folder} has neither {WEIGHTS} nor {INDEX}, {TORCH_WEIGHTS} or {TORCH_INDEX}; other formats are not read"
    )


def _weight_map(index: Path) -> dict[Path, set[str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index} has no weight_map")
    listed: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ConfigError(f"{index}: {name} is in {file!r}, which is not a file name")
        listed.setdefault(index.parent / file, set()).add(name)
    return listed


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
