"""What an export is of: `base.json`, which no library reads, with the base's name, the hash of our checkpoint, and how
many steps adapters were trained for."""

from __future__ import annotations

import json
from pathlib import Path

from mole_mega.checkpoint import files
from mole_mega.checkpoint.trained import Trained
from mole_mega.convert.hf_files import CONFIG, read_json

BASE_JSON = "base.json"


def write_provenance(trained: Trained, folder: Path) -> None:
    """Into the folder of an export of what was trained on a base."""
    base = trained.base
    tree = {"base": origin(base), "base_hash": files.folder_hash(base), "trained_steps": trained.trained_steps}
    (folder / BASE_JSON).write_text(json.dumps(tree, indent=2) + "\n")


def base_hash(folder: Path) -> str | None:
    """The hash of the base that an export's folder names; None when it names none."""
    path = folder / BASE_JSON
    found = read_json(path).get("base_hash") if path.is_file() else None
    return found if isinstance(found, str) else None


def origin(base: Path) -> str | None:
    """What the base's own config calls the model that it came from."""
    path = base / CONFIG
    name = read_json(path).get("_name_or_path") if path.is_file() else None
    return name if isinstance(name, str) and name else None
