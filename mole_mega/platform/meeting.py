"""How the processes of a run meet: within a set time, and with the same program and the same config."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from mole_mega.config import ConfigError

# what results depend on, beside Python, CUDA and our own files
_PACKAGES = ("torch", "megatron-core", "transformers", "numpy")
_ABSENT = "none"
_PAUSE_SECONDS = 0.5


def join_world(backend: str, timeout: datetime.timedelta, patience_seconds: float) -> None:
    """Start torch.distributed from torchrun's environment.

    All processes have `patience_seconds` to come. Raises ConfigError with host and port when this one reaches nobody
    there, or with the numbers when others stay away.
    """
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ConfigError(f"{name} is not set, which torchrun and --nproc set for every process")
    rank, host, port = int(os.environ["RANK"]), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    place = f"{host}:{port} (MASTER_ADDR:MASTER_PORT) within {patience_seconds:g} s"
    patience = datetime.timedelta(seconds=patience_seconds)
    if rank > 0 and (reason := _unreachable(host, int(port), patience_seconds)):
        raise ConfigError(f"nobody answered at {place}: {reason}")
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=patience))
    except dist.DistError as error:
        raise ConfigError(f"not all processes came to {place}: {str(error).splitlines()[0]}") from error
    # before init_process_group, which would wait for `timeout`, and not say how many came
    arrived, complete = "mole_mega/arrived", "mole_mega/complete"
    if store.add(arrived, 1) == world:
        store.set(complete, "yes")
    try:
        store.wait([complete], patience)
    except dist.DistError as error:
        raise ConfigError(f"{store.add(arrived, 0)} of {world} processes came to {place}") from error
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def versions() -> dict[str, str]:
    """The program that this process runs: versions, and a hash over this package's own files."""
    found = {name: _version(name) for name in _PACKAGES}
    found |= {"Python": platform.python_version(), "CUDA": torch.version.cuda or _ABSENT}
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return found | {"mole_mega's files": digest.hexdigest()[:12]}


def check_agreement(facts: Mapping[str, str]) -> None:
    """Raise ConfigError, on all ranks alike, unless all hold the same facts: the first rank that differs from rank 0,
    and in what. All ranks call it; a hash a rank is compared, and facts travel only when hashes differ."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    if len(set(digests)) == 1:
        return
    everyone: list[Mapping[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, facts)
    unlike = [rank for rank, other in enumerate(digests) if other != digests[0]]
    first, other = everyone[0], everyone[unlike[0]]
    names = [name for name in {**first, **other} if first.get(name, _ABSENT) != other.get(name, _ABSENT)]
    more = f", and {len(names) - 1} more" if len(names) > 1 else ""
    ranks = f" ({len(unlike)} ranks differ)" if len(unlike) > 1 else ""
    raise ConfigError(
        f"rank {unlike[0]} differs from rank 0 in {names[0]}: {other.get(names[0], _ABSENT)} there, "
        f"{first.get(names[0], _ABSENT)} on rank 0{more}{ranks}"
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return _ABSENT


def _unreachable(host: str, port: int, patience_seconds: float) -> str:
    """Why nothing listens there, after trying for so long; empty when something does. torch's own attempt would print
    pages when it fails."""
    deadline = time.monotonic() + patience_seconds
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((host, port), timeout=max(left, 0.1)).close()
            return ""
        except OSError as error:
            if left <= _PAUSE_SECONDS:
                return error.strerror or str(error)
        time.sleep(_PAUSE_SECONDS)
