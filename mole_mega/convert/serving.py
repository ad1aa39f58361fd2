"""The files by which a server prompts a trained model as it was trained: its image processor and its chat template.

What came with a base need not say that: LLaVA is trained on pictures padded to a square, and CLIP's own processor,
which many folders carry, cuts their sides off instead; and many templates take only text, or only lists of parts.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from mole_mega.config import ConfigError
from mole_mega.convert.hf_files import CONFIG, extra_files, read_json
from mole_mega.data.conversation import Encoder
from mole_mega.data.image import ImageSpec
from mole_mega.data.sources import IMAGE_MARK
from mole_mega.models.sizes import LlavaSize

CHAT_TEMPLATE = "chat_template.jinja"
PROCESSOR = "processor_config.json"
IMAGE_PROCESSOR = "preprocessor_config.json"
TOKENIZER = "tokenizer_config.json"
_REPLACED = (CHAT_TEMPLATE, "chat_template.json", PROCESSOR, IMAGE_PROCESSOR, CONFIG)


def write_serving_files(base: Path, size: LlavaSize, folder: Path) -> None:
    """Carry a base's files (all but `config.json`) into an export of what was trained on it.

    Its processor becomes LLaVA's, with the base's own size and colours, and its chat template the one that training
    used. A base without a processor, or without a tokenizer, gives an export without one.
    """
    for path in extra_files(base):
        if path.name not in _REPLACED:
            shutil.copyfile(path, folder / path.name)
    template = _chat_template(base, size)
    if template is not None:
        (folder / CHAT_TEMPLATE).write_text(template)
        settings = read_json(folder / TOKENIZER) if (folder / TOKENIZER).is_file() else {}
        if settings.pop("chat_template", None) is not None:
            _write_json(folder / TOKENIZER, settings)
    image_processor = _image_processor(base)
    if image_processor is not None:
        _write_json(folder / IMAGE_PROCESSOR, image_processor | {"processor_class": "LlavaProcessor"})
        _write_json(
            folder / PROCESSOR,
            {
                "image_processor": image_processor,
                "image_token": IMAGE_MARK,
                "num_additional_image_tokens": 1,  # the class token, which is dropped
                "patch_size": size.vision.patch_size,
                "processor_class": "LlavaProcessor",
                "vision_feature_select_strategy": "default",
            },
        )


def _chat_template(base: Path, size: LlavaSize) -> str | None:
    """The template that training prompts this base with; None when it has no tokenizer to train with."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
        encoder = Encoder(
            tokenizer,
            image_token_id=size.image_token_id,
            places_per_image=size.vision.num_places,
            max_length=size.language.max_length,
        )
    except (OSError, ValueError):  # a ConfigError is a ValueError
        return None
    return encoder.chat_template


def _image_processor(base: Path) -> dict[str, Any] | None:
    """The settings by which transformers does what `data/image.py` does."""
    try:
        spec = ImageSpec.from_processor_files(base)
    except ConfigError:
        return None
    return {
        "image_processor_type": "LlavaImageProcessor",
        "do_convert_rgb": True,
        "do_pad": True,
        "do_resize": True,
        "size": {"shortest_edge": spec.size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": spec.size, "width": spec.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n")
