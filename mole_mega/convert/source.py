"""What a base was imported from, tensor by tensor, so that an export can give the source's files back as they came."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from mole_mega.checkpoint.files import CheckpointError

SOURCE_FILE = "source.json"

Kind = Literal["llava_hf", "llava_original", "parts"]
Folder = Literal["model", "language", "vision", "projector"]


@dataclass(frozen=True)
class Stored:
    """Where one tensor was stored: its name there, the file's name, the folder's part in the import, the dtype.

    `folder` is "model" for the folder of a whole LLaVA (kinds `llava_hf` and `llava_original`), "language" for the
    decoder's of kind `parts`, "vision" for a CLIP folder given beside either, "projector" for a projector file or its
    folder. `dtype` is torch's name: float32, bfloat16 or float16. A `file` that ends in `.safetensors` was of that
    format, any other was written by `torch.save`.
    """

    name: str
    file: str
    folder: Folder
    dtype: str


@dataclass(frozen=True)
class Source:
    """The files that a base was made of.

    `kind`: `llava_hf` a `LlavaForConditionalGeneration`; `llava_original` the first LLaVA code's layout; `parts` a
    Llama folder and a CLIP folder. Of the latter two, the base's `config.json` is that of a
    `LlavaForConditionalGeneration` made for it, and `source_config.json` is the one that came.

    `tensors` maps the names of the table (convert/llava_hf.py) to where they were stored, folder by folder and file by
    file, in each file's own order. Those that the model has no place for are in it too: their data is in the base
    folder's `unused_hf.safetensors`. So is the copy of the embedding that some tied models store as `lm_head`. Not in
    it: what the base cannot give back (computed buffers, CLIP's text tower), and a projector initialised at import.

    `index_metadata` holds, for each folder whose files an index named, that index's `metadata`.
    """

    kind: Kind
    tensors: dict[str, Stored]
    index_metadata: dict[str, dict[str, Any]] = field(default_factory=dict)

    @staticmethod
    def read(base: Path) -> Source | None:
        """Of a base folder; None when it was not imported. Raises CheckpointError when the file does not hold one."""
        path = base / SOURCE_FILE
        if not path.is_file():
            return None
        try:
            tree = json.loads(path.read_text())
            source = Source(**{**tree, "tensors": {name: Stored(**stored) for name, stored in tree["tensors"].items()}})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path} does not say what the base was made of: {error}") from error
        if source.kind not in get_args(Kind):
            raise CheckpointError(f"{path}: kind is {source.kind!r}; known are {', '.join(get_args(Kind))}")
        return source

    def write(self, folder: Path) -> None:
        """Into a base folder that is being written."""
        (folder / SOURCE_FILE).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
