"""Tensors written one by one in the distributed format that Megatron-Core loads: no model, no process groups, and never
more than a few tensors in memory.

torch's own writer keeps every tensor of a file until the file is whole. This one writes the same format: tensors as
`torch.save` writes them, one behind the other, and `.metadata` that says where each is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import pickle
import sys
import threading
from collections.abc import Buffer, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from tqdm import tqdm

TENSORS_JSON = "tensors.json"
# Written side by side. Not the number of cores: equal bases have equal files, wherever they are written.
NUM_FILES = 2
# Megatron-Core looks for this object, which holds what is no tensor. Here that is nothing.
COMMON_STATE = "common_state/shard_0_1"
NOTHING: list[dict[str, object]] = [{}]
SHOW_PROGRESS_FROM = 2**30  # bytes


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that `read` brings into memory: on the CPU, of this shape and dtype. Several threads call `read`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorRecord:
    """What `tensors.json` says of a tensor: `dtype` by torch's name, SHA-256 of its contiguous little-endian bytes."""

    shape: list[int]
    dtype: str
    sha256: str

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorRecord:
        tensor_bytes = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
        digest = hashlib.sha256(tensor_bytes).hexdigest()
        return TensorRecord(list(tensor.shape), str(tensor.dtype).removeprefix("torch."), digest)


def write_tensors(folder: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write a distributed checkpoint and its `tensors.json` into an existing folder.

    Raises what a tensor's `read` raises, and OSError; the folder is then left as it is.
    """
    files = _split(tensors)
    with _Work(folder, tensors) as work, _no_crc32(), ThreadPoolExecutor(NUM_FILES) as pool:
        running = [pool.submit(work.write, name, names) for name, names in files.items()]
        try:
            written = [future.result() for future in running]
        except BaseException:
            work.stop.set()  # or the pool would wait for the other files
            raise
    places = {name: place for file in written for name, (place, _) in file.items()}
    records = {name: record for file in written for name, (_, record) in file.items() if record}
    _write_metadata(folder, tensors, places)
    save_config(CheckpointingConfig("torch_dist"), str(folder))
    _write_records(folder, records)


def describe_tensors(folder: Path) -> None:
    """Write `tensors.json` into a folder to which this process, or its group, has just saved a checkpoint."""
    reader = FileSystemReader(folder)
    records = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
            load({name: tensor}, storage_reader=reader, no_dist=True)
            records[name] = TensorRecord.of(tensor)
    _write_records(folder, records)


class _Work(contextlib.AbstractContextManager["_Work"]):
    """What the threads share: the tensors, the progress, and the word to stop."""

    def __init__(self, folder: Path, tensors: Mapping[str, LazyTensor]) -> None:
        self.folder, self.tensors, self.stop = folder, tensors, threading.Event()
        total = sum(tensor.num_bytes for tensor in tensors.values())
        hidden = total < SHOW_PROGRESS_FROM or not sys.stderr.isatty()
        self.progress = tqdm(total=total, unit="B", unit_scale=True, desc="tensors", disable=hidden)

    def __exit__(self, *_: object) -> None:
        self.progress.close()

    def write(self, file_name: str, names: list[str]) -> dict[str, tuple[_StorageInfo, TensorRecord | None]]:
        """One file; {name: its place, its record}. Ends early when another file failed."""
        written: dict[str, tuple[_StorageInfo, TensorRecord | None]] = {}
        with _File(io.FileIO(self.folder / file_name, "w")) as file:
            for name in names:
                if self.stop.is_set():
                    break
                start, record = file.tell(), None
                if name == COMMON_STATE:
                    file.save(NOTHING)
                else:
                    tensor = self._read(name)
                    record = TensorRecord.of(tensor)
                    file.save(tensor)
                    self.progress.update(tensor.nbytes)
                    del tensor  # before the next is read
                written[name] = (_StorageInfo(file_name, start, file.tell() - start), record)
        return written

    def _read(self, name: str) -> torch.Tensor:
        expected = self.tensors[name]
        tensor = expected.read()
        assert tuple(tensor.shape) == expected.shape and tensor.dtype == expected.dtype, name
        if tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)  # torch.save writes the whole storage
        return tensor


class _File(io.BufferedWriter):
    """Remembers what the disk said, which `torch.save` replaces by words of its own."""

    disk_error: OSError | None = None

    def write(self, data: Buffer) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.disk_error = error
            raise

    def save(self, data: object) -> None:
        try:
            torch.save(data, self)
        except RuntimeError as error:
            raise self.disk_error or OSError(str(error)) from error


def _split(tensors: Mapping[str, LazyTensor]) -> dict[str, list[str]]:
    """{file: tensors}: runs of the given order, of about equal bytes, so that a source is read from front to back."""
    total = sum(tensor.num_bytes for tensor in tensors.values())
    files: dict[str, list[str]] = {f"__0_{index}.distcp": [] for index in range(NUM_FILES)}
    names = list(files)
    files[names[0]].append(COMMON_STATE)
    done = 0
    for name, tensor in tensors.items():
        files[names[done * NUM_FILES // max(total, 1)]].append(name)
        done += tensor.num_bytes
    return files


def _write_metadata(folder: Path, tensors: Mapping[str, LazyTensor], places: Mapping[str, _StorageInfo]) -> None:
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {COMMON_STATE: BytesStorageMetadata()}
    storage = {MetadataIndex(COMMON_STATE): places[COMMON_STATE]}
    for name, tensor in tensors.items():
        start, size = torch.Size([0] * len(tensor.shape)), torch.Size(tensor.shape)
        chunk = ChunkStorageMetadata(offsets=start, sizes=size)
        entries[name] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), size, [chunk])
        storage[MetadataIndex(name, start)] = places[name]
    metadata = Metadata(entries, storage_data=storage, version=CURRENT_DCP_VERSION)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _write_records(folder: Path, records: Mapping[str, TensorRecord]) -> None:
    tree = {name: dataclasses.asdict(record) for name, record in records.items()}
    (folder / TENSORS_JSON).write_text(json.dumps(tree, indent=1, sort_keys=True) + "\n")


@contextlib.contextmanager
def _no_crc32() -> Iterator[None]:
    """`torch.save` without its checksums, which loading does not look at: the manifest has better ones."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
