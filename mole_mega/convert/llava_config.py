"""transformers' config of a base: the one that came with it, or one made from its size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mole_mega.convert import hf_config
from mole_mega.convert.hf_files import CONFIG, read_json
from mole_mega.models.sizes import LlavaSize


def llava_config(base: Path, size: LlavaSize) -> dict[str, Any]:
    """What a `LlavaForConditionalGeneration` of a base is built from.

    The base's own file when it is such a model's; the first LLaVA code's, or a decoder's own, is not.
    """
    own = read_json(base / CONFIG) if (base / CONFIG).is_file() else {}
    if own.get("model_type") == "llava" and own.get("architectures", [hf_config.ARCHITECTURE]) == [
        hf_config.ARCHITECTURE
    ]:
        return own
    return hf_config.llava_config(size)
