"""Checkpoint folders as files: complete or not there at all, unaltered, and never unpickled blindly.

A folder is written beside its final name and renamed when it is whole. Its `manifest.json` names every file with size
and SHA-256; the hash of the manifest is the folder's own.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import pickle
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import safe_globals
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from mole_mega.config import ConfigError

MANIFEST = "manifest.json"
# What saving and loading a distributed checkpoint raises. torch's is no Exception: `except Exception` lets it pass.
LIBRARY_ERRORS = (CheckpointingException, CheckpointException)
# What a disk without room is called, by the error that it gives.
_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}


class CheckpointError(ConfigError):
    """A checkpoint that is missing, cut short, altered, unsafe, or of another shape; the message names the file."""


def incomplete_name(final: Path) -> Path:
    """Where `final` is written until it is whole."""
    return final.parent / f".{final.name}.incomplete"


def publish(folder: Path, final: Path) -> str:
    """Give a wholly written `folder` its manifest and its final name, durably; returns its hash. One process calls it.

    An existing `final` is replaced. A kill at any moment leaves either the old folder, the new one or none, never a
    part of one.
    """
    paths = sorted(folder.iterdir())
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        entries = {path.name: entry for path, entry in zip(paths, pool.map(_describe, paths), strict=True)}
    manifest = json.dumps(entries, indent=1, sort_keys=True)
    with open(folder / MANIFEST, "w") as file:
        file.write(manifest)
        file.flush()
        os.fsync(file.fileno())
    _fsync_folder(folder)
    if final.exists():
        old = final.parent / f".{final.name}.replaced"
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        folder.rename(final)
        shutil.rmtree(old)
    else:
        folder.rename(final)
    _fsync_folder(final.parent)
    return hashlib.sha256(manifest.encode()).hexdigest()


def folder_hash(folder: Path) -> str:
    """The hash that names a folder: SHA-256 of its manifest. Raises CheckpointError when there is none."""
    try:
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {MANIFEST}") from error


def verify(folder: Path, *, alone: bool = False) -> None:
    """Check every file of a folder against its manifest; all ranks call it and share the reading, unless `alone`.

    Raises CheckpointError, on all ranks that called, naming the first file that is missing, cut short, altered or too
    many.
    """
    entries = read_manifest(folder)
    is_shared = dist.is_initialized() and not alone
    rank, world = (dist.get_rank(), dist.get_world_size()) if is_shared else (0, 1)
    problem = ""
    extra = {path.name for path in folder.iterdir()} - entries.keys() - {MANIFEST}
    if extra:
        problem = f"{folder / min(extra)} is not in the manifest"
    mine = sorted(entries.items())[rank::world]
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        found = pool.map(lambda entry: _compare(folder / entry[0], entry[1]), mine)
    problem = problem or next(filter(None, found), "")
    problems = [problem]
    if world > 1:
        problems = [""] * world
        dist.all_gather_object(problems, problem)
    for problem in problems:
        if problem:
            raise CheckpointError(problem)


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """{file name: {"size", "sha256"}}. Raises CheckpointError when the folder has none or it cannot be read."""
    try:
        entries = json.loads((folder / MANIFEST).read_bytes())
        assert all(isinstance(e["size"], int) and isinstance(e["sha256"], str) for e in entries.values())
        return entries
    except OSError as error:
        raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {MANIFEST}") from error
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read as a manifest") from error


def refuse_unsafe(folder: Path) -> None:
    """Read the pickled parts of a distributed checkpoint with an unpickler that knows only harmless types.

    torch.distributed.checkpoint unpickles its `.metadata` and its byte objects; after this they are known to hold
    nothing but what a checkpoint holds. Raises CheckpointError naming the file.
    """
    path = folder / ".metadata"
    try:
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        parts = {info.relative_path: Path(info.relative_path).name for info in metadata.storage_data.values()}
        objects = [
            (index.fqn, info)
            for index, info in metadata.storage_data.items()
            if type(metadata.state_dict_metadata.get(index.fqn)).__name__ == "BytesStorageMetadata"
        ]
    except OSError as error:
        raise CheckpointError(f"{folder} is not a distributed checkpoint: it has no .metadata") from error
    except Exception as error:  # a hostile pickle can raise anything
        raise CheckpointError(f"{path} does not hold checkpoint metadata: {error}") from error
    for written, name in parts.items():
        if written != name:
            raise CheckpointError(f"{path} names {written!r}, which is not a file of this checkpoint")
    safe_globals.register_safe_globals()
    for key, info in objects:
        part = folder / info.relative_path
        try:
            with open(part, "rb") as file:
                file.seek(info.offset)
                data = file.read(info.length)
            torch.load(io.BytesIO(data), weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{part} holds an object that is not plain data ({key})") from error


def reason(error: BaseException) -> str:
    """What went wrong, on one line; of torch's error, what the first rank met instead of every rank's traceback."""
    if isinstance(error, CheckpointException):
        if not error.failures:
            return "another rank could not"  # only the coordinator is told which one, and why
        error = error.failures[min(error.failures)][0]
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(text.split())[:500]


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of torch.distributed.checkpoint's metadata and plain containers, nothing else."""

    _MODULES = (
        "torch.distributed.checkpoint.metadata",
        "torch.distributed.checkpoint.filesystem",
        "torch.distributed.checkpoint.planner",
        "megatron.core.dist_checkpointing.strategies.filesystem_async",
    )
    _NAMES = frozenset(
        {
            ("torch", "Size"),
            ("torch", "device"),
            ("torch.serialization", "_get_layout"),
            ("collections", "OrderedDict"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),
            ("builtins", "set"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        value = None
        if "." not in name and (module, name) in self._NAMES:
            value = super().find_class(module, name)
        elif "." not in name and module in self._MODULES:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                value = found
        elif module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.memory_format):
            value = getattr(torch, name)
        if value is None:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return value


@contextlib.contextmanager
def shared_disk_errors(action: str, path: Path, needed: int = 0) -> Iterator[None]:
    """Run a block whose failure to write at `path`, on any rank, becomes a CheckpointError on all of them.

    The message is that of a rank that met the failure itself, not of one that was told, and says how much room there
    was beside what all ranks need, each `needed` bytes (0: not known).
    """
    fine = (2, "")
    mine = fine
    with _writer_errors() as logged:
        try:
            yield
        except (OSError, *LIBRARY_ERRORS) as error:
            met_here = isinstance(error, OSError) or bool(logged)
            mine = (0 if met_here else 1, logged[0] if logged else reason(error))
    everyone = [(mine, needed)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        everyone = [(fine, 0)] * dist.get_world_size()
        dist.all_gather_object(everyone, (mine, needed))
    worst, _ = min(everyone)
    if worst != fine:
        raise CheckpointError(f"{action} {path} failed: {_disk_trouble(worst[1], path, sum(n for _, n in everyone))}")


def _disk_trouble(told: str, path: Path, needed: int) -> str:
    """What a disk did by what was told of it: in plain words where it was full, which torch's writer of tensors never
    says (its file is shorter than it should be, "unexpected pos")."""
    free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
    written = [entry.stat().st_size for entry in incomplete_name(path).glob("*") if entry.is_file()]
    room = free + sum(written)
    full = next((words for number, words in _FULL.items() if os.strerror(number) in told), "")
    if "unexpected pos" in told and room < needed:
        full = _FULL[errno.ENOSPC]
    if not full:
        return f"{told} ({free / 2**20:.1f} MiB free on its disk)"
    wanted = f" where about {needed / 2**20:.1f} MiB are needed" if needed else ""
    return f"{full}: {room / 2**20:.1f} MiB free{wanted}"


@contextlib.contextmanager
def _writer_errors() -> Iterator[list[str]]:
    """What Megatron-Core's writer logs as errors in a block, kept out of the log. The exception that it raises then
    holds no more than the type of the error: the disk's own words are in the log alone."""
    logger = logging.getLogger("megatron.core.dist_checkpointing.strategies.filesystem_async")
    messages: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.levelno < logging.ERROR:
            return True
        messages.append(" ".join(record.getMessage().split()))
        return False

    logger.addFilter(keep)
    try:
        yield messages
    finally:
        logger.removeFilter(keep)


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = _digest(file)
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": digest}


def _digest(file: io.BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _compare(path: Path, expected: dict[str, Any]) -> str:
    """What is wrong with one file, or nothing."""
    try:
        size = path.stat().st_size
        if size != expected["size"]:
            return f"{path} has {size} bytes, its manifest says {expected['size']}"
        with open(path, "rb") as file:
            if _digest(file) != expected["sha256"]:
                return f"{path} was altered: its SHA-256 is not the manifest's"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return ""


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
