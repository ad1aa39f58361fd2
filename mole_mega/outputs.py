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
    """Keep the folder from other processes that ask for it like this; the system lets go of it when this one ends,
    however it ends. A folder that was made for this and stayed empty is taken away again. Raises ConfigError, naming
    the setting, the folder and who has it.

    On a file system without locks nothing is kept.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    lock = _locked(folder, name)
    try:
        os.truncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty: a run is in it
            (folder / _LOCK).unlink()
            for each in made:
                each.rmdir()
        os.close(lock)


def _locked(folder: Path, name: str) -> int:
    """The folder's lock, open and taken."""
    give_up = time.monotonic() + _RELEASE_SECONDS
    path = folder / _LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # its last holder took the folder away just now
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            # a lock that was removed while it was waited for is nobody's
            if _take(lock) and path.exists() and os.path.samestat(path.stat(), os.fstat(lock)):
                return lock
            os.close(lock)
            if time.monotonic() > give_up:
                who = path.read_text() or "another process"
                raise ConfigError(f"{name}: {who} is already at work in {folder}; wait for it, or name another folder")
            time.sleep(0.1)


def _take(lock: int) -> bool:
    """Whether the lock is ours; always on a file system without locks, which fails in another way than a taken one."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError)
    return True
