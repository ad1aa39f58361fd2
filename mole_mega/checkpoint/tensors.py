"""The tensors of a distributed checkpoint by name, each read whole when asked for; no model, no process groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from mole_mega.checkpoint import files


class StoredTensors:
    """A base's or a step's tensors, under the names and with the shapes that they have in the whole model. Any process
    may open them by itself.

    Every file is checked against the manifest first; reading unpickles harmless types only. Raises CheckpointError
    naming the file.
    """

    def __init__(self, folder: Path) -> None:
        files.verify(folder, alone=True)
        files.refuse_unsafe(folder)
        self.folder = folder
        self._reader = _Reader(folder)
        entries = self._reader.read_metadata().state_dict_metadata
        self._tensors = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor; no data is read."""
        return tuple(self._tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        """As stored; no data is read."""
        return self._tensors[name].properties.dtype

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU, as stored. Raises CheckpointError when there is none of that name."""
        if name not in self._tensors:
            raise files.CheckpointError(f"{self.folder} has no tensor {name}")
        tensor = torch.empty(self.shape(name), dtype=self.dtype(name))
        load({name: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor


class _Reader(FileSystemReader):
    """Reads the metadata once, and not again for every tensor."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata
