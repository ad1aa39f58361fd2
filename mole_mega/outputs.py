"""Where a command is about to write: found out before the work, not after it. Nothing is created here."""

from __future__ import annotations

import tempfile
from pathlib import Path

from mole_mega.errors import ConfigError


def check_folder(folder: Path, name: str) -> None:
    """Raise ConfigError, naming the setting and the folder, unless files can be written in it; it may still be made."""
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
