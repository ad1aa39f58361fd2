"""What an import reads: one folder of a whole LLaVA, or the folders of its parts. Told apart by what they hold."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mole_mega.config import ConfigError
from mole_mega.convert import llava_hf
from mole_mega.convert.hf_config import (
    KINDS,
    check_original,
    kind_of,
    language_from_config,
    size_from_config,
    vision_from_config,
)
from mole_mega.convert.hf_files import CONFIG, HfTensors, TensorInfo, index_metadata, open_shard, open_shards, read_json
from mole_mega.convert.source import Folder, Kind, Source
from mole_mega.models.sizes import LlavaSize, VisionSize

CLASS_TOKEN = "model.vision_tower.embeddings.class_embedding"
PROJECTOR = "model.multi_modal_projector."
# Of every CLIP ViT that OpenAI published; a head's width is in no tensor's shape.
CLIP_HEAD_WIDTH = 64

# {folder's part: its index's metadata}
Metadata = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Opened:
    """A source whose headers are read. `size.image_token_id` is the vocabulary's size where no config says one.

    `num_passed_over` tensors of the CLIP folder read text, which no LLaVA does. `fresh_projector`: initialised here.
    """

    kind: Kind
    size: LlavaSize
    tensors: HfTensors
    index_metadata: Metadata
    num_passed_over: int = 0
    fresh_projector: bool = False

    def source(self) -> Source:
        """What to remember of it."""
        computed = set(llava_hf.computed_names(self.size))
        stored = {
            name: self.tensors.stored(name)
            for name in self.tensors
            if name not in computed and not (self.fresh_projector and name.startswith(PROJECTOR))
        }
        return Source(self.kind, stored, self.index_metadata)


def open_source(hf_dir: Path, vision_tower: Path | None = None, projector: Path | None = None, seed: int = 0) -> Opened:
    """Open the folders and read their headers. Raises ConfigError naming file and key or tensor when they are no LLaVA
    that we can be, when a part is missing, or when one is given that the folder holds itself."""
    kind = kind_of(hf_dir / CONFIG)
    if projector is not None and kind != "parts":
        raise ConfigError(f"{hf_dir} holds a projector itself; another one, {projector}, cannot be given")
    if seed != 0 and (kind != "parts" or projector is not None):
        raise ConfigError(f"seed {seed} is of no use: no projector is initialised")
    if kind == "llava_hf":
        if vision_tower is not None:
            raise ConfigError(f"{hf_dir} holds a vision tower itself; another one, {vision_tower}, cannot be given")
        return _open_llava(hf_dir)
    if kind == "llava_original":
        return _open_original(hf_dir, vision_tower)
    return _open_parts(hf_dir, vision_tower, projector, seed)


class FreshProjector:
    """A projector as `torch.nn.Linear` initialises one: weights and biases uniform within 1 / sqrt(inputs), drawn in
    float32 from a generator of `seed`, layer by layer, the weight first. Looks like a file of weights."""

    path = Path("the fresh projector")

    def __init__(self, size: LlavaSize, dtype: torch.dtype, seed: int) -> None:
        inner, outer = size.vision.hidden_size, size.language.hidden_size
        generator = torch.Generator().manual_seed(seed)
        self._tensors: dict[str, torch.Tensor] = {}
        for layer, inputs in ((0, inner), (2, outer)):
            bound = 1 / math.sqrt(inputs)
            for name, shape in (("weight", (outer, inputs)), ("bias", (outer,))):
                values = torch.empty(shape).uniform_(-bound, bound, generator=generator)
                self._tensors[f"mm_projector.{layer}.{name}"] = values.to(dtype)
        self.tensors = {name: TensorInfo(tuple(t.shape), dtype, str(dtype)) for name, t in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def _open_llava(hf_dir: Path) -> Opened:
    tensors, metadata = HfTensors(), Metadata()
    _add_folder(tensors, metadata, hf_dir, "model", llava_hf.PREFIXES)
    vocab_size = _vocab_size(hf_dir, tensors)
    return Opened("llava_hf", size_from_config(hf_dir / CONFIG, vocab_size), tensors, metadata)


def _open_original(hf_dir: Path, vision_tower: Path | None) -> Opened:
    tensors, metadata, num_passed_over = HfTensors(), Metadata(), 0
    _add_folder(tensors, metadata, hf_dir, "model", llava_hf.ORIGINAL_PREFIXES)
    language, pad_token_id = language_from_config(hf_dir / CONFIG, _vocab_size(hf_dir, tensors))
    holds_tower = CLASS_TOKEN in tensors
    if vision_tower is not None:
        vision = vision_from_config(vision_tower / CONFIG)
        if not holds_tower:
            num_passed_over = _add_tower(tensors, metadata, vision_tower)
    elif holds_tower:
        vision = _vision_from_shapes(tensors)
    else:
        named = read_json(hf_dir / CONFIG).get("mm_vision_tower")
        raise ConfigError(
            f"{hf_dir} does not hold the vision tower, which its {CONFIG} calls {named!r}; "
            "give that CLIP model's folder with --vision-tower"
        )
    vision = check_original(hf_dir / CONFIG, vision, holds_tower=holds_tower)
    size = LlavaSize(vision=vision, language=language, image_token_id=language.vocab_size, pad_token_id=pad_token_id)
    return Opened("llava_original", size, tensors, metadata, num_passed_over)


def _open_parts(hf_dir: Path, vision_tower: Path | None, projector: Path | None, seed: int) -> Opened:
    tensors, metadata = HfTensors(), Metadata()
    _add_folder(tensors, metadata, hf_dir, "language", llava_hf.LLAMA_PREFIXES)
    language, pad_token_id = language_from_config(hf_dir / CONFIG, _vocab_size(hf_dir, tensors))
    if vision_tower is None:
        raise ConfigError(f"{hf_dir} is a Llama without a vision tower; give a CLIP model's folder with --vision-tower")
    vision = vision_from_config(vision_tower / CONFIG)
    num_passed_over = _add_tower(tensors, metadata, vision_tower)
    size = LlavaSize(vision=vision, language=language, image_token_id=language.vocab_size, pad_token_id=pad_token_id)
    if projector is None:
        shard = FreshProjector(size, tensors.dtype(llava_hf.EMBEDDING), seed)
        tensors.add([shard], "projector", llava_hf.PROJECTOR_PREFIXES)
    else:
        tensors.add([open_shard(projector)], "projector", llava_hf.PROJECTOR_PREFIXES)
    return Opened("parts", size, tensors, metadata, num_passed_over, fresh_projector=projector is None)


def _add_folder(
    tensors: HfTensors,
    metadata: Metadata,
    folder: Path,
    part: Folder,
    prefixes: llava_hf.Prefixes,
    but: tuple[str, ...] = (),
) -> int:
    num_left_out = tensors.add(open_shards(folder), part, prefixes, but=but)
    index = index_metadata(folder)
    if index is not None:
        metadata[part] = index
    return num_left_out


def _add_tower(tensors: HfTensors, metadata: Metadata, folder: Path) -> int:
    return _add_folder(tensors, metadata, folder, "vision", llava_hf.CLIP_PREFIXES, but=llava_hf.CLIP_TEXT)


def _vocab_size(hf_dir: Path, tensors: HfTensors) -> int:
    if llava_hf.EMBEDDING not in tensors:
        # the config says better than a missing tensor that this is another model
        kind = kind_of(hf_dir / CONFIG)
        if kind == "llava_hf":
            size_from_config(hf_dir / CONFIG, vocab_size=1)
        architecture, _ = KINDS[kind]
        raise ConfigError(
            f"{hf_dir} has no tensor {llava_hf.EMBEDDING} under any name of a {architecture}, "
            f"which its {CONFIG} describes"
        )
    shape = tensors.shape(llava_hf.EMBEDDING)
    if len(shape) != 2 or not shape[0]:
        raise ConfigError(f"{tensors.where(llava_hf.EMBEDDING)} has shape {list(shape)}, not [vocabulary, hidden]")
    return shape[0]


def _vision_from_shapes(tensors: HfTensors) -> VisionSize:
    """Of a tower that a LLaVA folder holds without its config: CLIP's, whose heads are 64 wide."""
    embeddings, layer = "model.vision_tower.embeddings.", "model.vision_tower.encoder.layers.{}.mlp.fc1.weight"
    hidden_size = _axis(tensors, CLASS_TOKEN, 0, of=1)
    if hidden_size % CLIP_HEAD_WIDTH:
        raise ConfigError(
            f"{tensors.where(CLASS_TOKEN)} has width {hidden_size}, no multiple of {CLIP_HEAD_WIDTH} as CLIP's are; "
            "give the tower's folder with --vision-tower for its config.json"
        )
    patch_size = _axis(tensors, embeddings + "patch_embedding.weight", -1, of=4)
    num_places = _axis(tensors, embeddings + "position_embedding.weight", 0, of=2) - 1
    return VisionSize(
        num_layers=next(number for number in itertools.count() if layer.format(number) not in tensors),
        hidden_size=hidden_size,
        ffn_hidden_size=_axis(tensors, layer.format(0), 0, of=2),
        num_heads=hidden_size // CLIP_HEAD_WIDTH,
        image_size=math.isqrt(num_places) * patch_size,
        patch_size=patch_size,
    )


def _axis(tensors: HfTensors, name: str, axis: int, *, of: int) -> int:
    """The length of one axis `of` so many. Raises ConfigError when the tensor is missing or has another number."""
    if name not in tensors:
        raise ConfigError(f"the vision tower inside has no tensor {name}")
    shape = tensors.shape(name)
    if len(shape) != of:
        raise ConfigError(f"{tensors.where(name)} has shape {list(shape)}, not one of {of} axes")
    return shape[axis]
