"""Where a command is about to write: found out before the work, not after it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mole_mega.errors import ConfigError

_LOCK = ".lock"
_RELEASE_SECONDS = 5.0  # a process that was just killed may take so long to be gone


def check_folder(folder: Path, name: str) -> None:
    """Raise ConfigError, naming the setting and the folder, unless files can be written in it; it may still be made.
    Nothing is created."""
    there = folder
    try:
        while not there.exists():
            there = there.parent
        if not there.is_dir():
            raise ConfigError(f"{name}: {there} is a file, not a folder that can be written to")
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(f"{name}: {folder} cannot be written to: {error.strerror}") from error


def check_file(path: Path, name: str) -> None:
    """Raise ConfigError, naming the setting and the file, unless it can be written; its folder has to be there."""
    try:
        if path.is_dir():
            raise ConfigError(f"{name}: {path} is a folder, not a file that can be written")
        if not path.parent.is_dir():
            raise ConfigError(f"{name}: {path.resolve().parent} is not a folder")
        if path.exists():
            with open(path, "ab"):
                return
    except OSError as error:
        raise ConfigError(f"{name}: {path} cannot be written: {error.strerror}") from error
    check_folder(path.parent, name)


@contextlib.contextmanager
def holding(folder: Path, name: str) -> Iterator[None]:
    """Keep the folder, which is made, from other processes that ask for it like this; the system lets go of it when
    this one ends, however it ends. Raises ConfigError, naming the setting, the folder and who has it.

    On a file system without locks nothing is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK, "a+") as lock:
        _take(lock.fileno(), folder, name)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def _take(lock: int, folder: Path, name: str) -> None:
    give_up = time.monotonic() + _RELEASE_SECONDS
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up:
                who = (folder / _LOCK).read_text() or "another process"
                raise ConfigError(
                    f"{name}: {who} is already at work in {folder}; wait for it, or name another folder"
                ) from None
            time.sleep(0.1)
        except OSError:
            return None
