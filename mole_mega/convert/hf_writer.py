"""A Hugging Face folder written tensor by tensor: two are held at most, and the folder is whole or not there."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mole_mega.checkpoint import files
from mole_mega.checkpoint.stream import LazyTensor
from mole_mega.convert.hf_files import INDEX, TORCH_INDEX, WEIGHTS

# What transformers cuts checkpoints at.
MAX_SHARD_BYTES = 5_000_000_000
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_HEADER_ALIGN = 8


@contextlib.contextmanager
def new_folder(out: Path, finish: Callable[[Path, Path], object] = Path.rename) -> Iterator[Path]:
    """A folder to write into, which `finish` makes `out` when the block ends well; any error or Ctrl-C leaves nothing.

    Raises CheckpointError when `out` exists, or when the disk fails.
    """
    if out.exists():
        raise files.CheckpointError(f"{out} exists; choose another folder or remove it")
    folder = files.incomplete_name(out)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with files.shared_disk_errors("writing", out):
            folder.mkdir(parents=True)
            yield folder
            finish(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def write_tensors(
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    placement: Mapping[str, str] | None = None,
    *,
    index_metadata: dict[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write tensors into `folder`, and an index when they are in several files or `index_metadata` is given.

    `placement` says which file each is in; a file that does not end in `.safetensors` is written by `torch.save`.
    Without it the files are named as transformers names them, in the order of `tensors`. What a `read` returns must
    have the shape and dtype that were announced.
    """
    folder.mkdir(exist_ok=True)
    placement = placement or _place(tensors, max_shard_bytes)
    total = sum(tensor.num_bytes for tensor in tensors.values())
    by_file: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in tensors.items():
        by_file.setdefault(placement[name], {})[name] = tensor
    # a bar on a terminal only
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"writing {folder.name}", disable=None) as progress:
        for file_name, part in by_file.items():
            write = _write_safetensors if file_name.endswith(".safetensors") else _write_pickled
            write(folder / file_name, part, progress.update)
    if len(by_file) > 1 or index_metadata is not None:
        is_pickled = not all(name.endswith(".safetensors") for name in by_file)
        index = {
            "metadata": {"total_size": total} if index_metadata is None else index_metadata,
            "weight_map": {name: placement[name] for name in sorted(tensors)},
        }
        (folder / (TORCH_INDEX if is_pickled else INDEX)).write_text(json.dumps(index, indent=2) + "\n")


def copy_files(paths: Iterable[Path], folder: Path) -> None:
    """Copy files into a folder under their own names."""
    for path in paths:
        shutil.copyfile(path, folder / path.name)


def _place(tensors: Mapping[str, LazyTensor], max_shard_bytes: int) -> dict[str, str]:
    """{tensor: file}; a tensor larger than a shard has one of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.num_bytes
    if len(shards) == 1:
        return dict.fromkeys(shards[0], WEIGHTS)
    stem, suffix = Path(WEIGHTS).stem, Path(WEIGHTS).suffix
    return {
        name: f"{stem}-{index:05d}-of-{len(shards):05d}{suffix}"
        for index, names in enumerate(shards, start=1)
        for name in names
    }


def _write_safetensors(path: Path, tensors: Mapping[str, LazyTensor], done: Callable[[int], object]) -> None:
    """The library writes a file from tensors that are all in memory; this one writes each as it is read."""
    # wide types first, as the library has it: then every tensor starts at a multiple of its own width
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.num_bytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGN)
    with open(path, "wb") as file, ThreadPoolExecutor(1) as reader:
        file.write(len(text).to_bytes(8, "little") + text)
        # each is read while the one before is written
        coming: Future[torch.Tensor] | None = None
        for (name, tensor), following in zip(ordered, [*ordered[1:], None], strict=True):
            data = coming.result() if coming else _read(name, tensor)
            coming = reader.submit(_read, *following) if following else None
            if data.numel():
                file.write(data.reshape(-1).view(torch.uint8).numpy().data)
            del data  # before the next but one is read
            done(tensor.num_bytes)


def _write_pickled(path: Path, tensors: Mapping[str, LazyTensor], done: Callable[[int], object]) -> None:
    loaded = {}
    for name, tensor in tensors.items():
        # torch.save writes the whole storage that a view is of
        loaded[name] = _read(name, tensor).clone()
        done(tensor.num_bytes)
    torch.save(loaded, path)


def _read(name: str, tensor: LazyTensor) -> torch.Tensor:
    data = tensor.read().detach()
    assert (tuple(data.shape), data.dtype) == (tensor.shape, tensor.dtype), name
    return data.contiguous()
