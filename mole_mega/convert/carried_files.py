"""The files that go along with imported weights: what training needs beside them, and what the source itself had."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from mole_mega.config import ConfigError
from mole_mega.convert.hf_config import llava_config
from mole_mega.convert.hf_files import CONFIG, PROCESSOR_FILES, TOKENIZER_FILES, extra_files, read_json
from mole_mega.models.sizes import LlavaSize

IMAGE_TOKEN = "<image>"
# The source's own `config.json`, and its tower's, where the base has another: a base is described as a
# `LlavaForConditionalGeneration`.
SOURCE_CONFIG, SOURCE_VISION_CONFIG = "source_config.json", "source_vision_config.json"
GENERATION = "generation_config.json"
# What OpenAI trained its CLIP models with.
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def gather(
    hf_dir: Path, vision_tower: Path | None, size: LlavaSize, image_token: str, scratch: Path
) -> tuple[LlavaSize, list[Path]]:
    """The files that go along with a decoder and a tower that were no `LlavaForConditionalGeneration`, those that had
    to be made in `scratch`; and the size, which now knows the image token.

    That token's id is the tokenizer's, which gets the token when it has none; without a tokenizer it is the first id
    behind the vocabulary. The model never embeds it. Raises ConfigError when the tokenizer files hold no tokenizer.
    """
    token_id, tokenizer = _tokenizer(hf_dir, image_token, scratch)
    if token_id is not None:
        size = replace(size, image_token_id=token_id)
    source = read_json(hf_dir / CONFIG)
    ids = {key: source[key] for key in ("bos_token_id", "eos_token_id") if isinstance(source.get(key), int)}
    (scratch / CONFIG).write_text(json.dumps(llava_config(size, **ids), indent=2) + "\n")
    shutil.copyfile(hf_dir / CONFIG, scratch / SOURCE_CONFIG)
    own = [scratch / CONFIG, scratch / SOURCE_CONFIG]
    if vision_tower is not None:
        shutil.copyfile(vision_tower / CONFIG, scratch / SOURCE_VISION_CONFIG)
        own.append(scratch / SOURCE_VISION_CONFIG)
    return size, [
        *own,
        *extra_files(hf_dir, (GENERATION,)),
        *tokenizer,
        _processor(hf_dir, vision_tower, size, scratch),
    ]


def _tokenizer(hf_dir: Path, image_token: str, scratch: Path) -> tuple[int | None, list[Path]]:
    carried = extra_files(hf_dir, TOKENIZER_FILES)
    if not carried:
        print(f"{hf_dir} has no tokenizer; the base cannot be trained before it gets one", file=sys.stderr)
        return None, []
    tokenizer = _load_tokenizer(hf_dir, carried, scratch / "tokenizer")
    if image_token in tokenizer.get_vocab():
        return tokenizer.convert_tokens_to_ids(image_token), carried
    tokenizer.add_tokens([AddedToken(image_token, special=True, normalized=False)])
    saved = scratch / "with_image_token"
    tokenizer.save_pretrained(saved)
    made = extra_files(saved, TOKENIZER_FILES)
    others = [path for path in carried if path.name == "tokenizer.model" and not (saved / path.name).exists()]
    return tokenizer.convert_tokens_to_ids(image_token), [*made, *others]


def _load_tokenizer(hf_dir: Path, carried: list[Path], folder: Path) -> Any:
    from transformers import AutoTokenizer

    # apart from config.json, whose model type may be one that transformers does not know
    folder.mkdir()
    for path in carried:
        shutil.copyfile(path, folder / path.name)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the libraries behind it raise
        reason = " ".join(str(error).replace(str(folder), str(hf_dir)).split())[:300]
        raise ConfigError(f"{hf_dir} holds no usable tokenizer: {reason}") from error


def _processor(hf_dir: Path, vision_tower: Path | None, size: LlavaSize, scratch: Path) -> Path:
    """The image settings: the tower's, or those that a LLaVA's folder has, or what CLIP was trained with."""
    for folder in (vision_tower, hf_dir):
        found = [] if folder is None else extra_files(folder, PROCESSOR_FILES)
        if found:
            return found[0]
    side = size.vision.image_size
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "do_convert_rgb": True,
    }
    (scratch / PROCESSOR_FILES[0]).write_text(json.dumps(settings, indent=2) + "\n")
    return scratch / PROCESSOR_FILES[0]
