"""Sizes of a LLaVA as data: what a base folder's `model.json` holds, and the sizes known by name."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mole_mega.config import ConfigError

# The file of a base folder that holds its size.
MODEL_JSON = "model.json"
# What Megatron-Core's Llama 3 scaling is made for, under transformers' names; only its factor can be chosen.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True, kw_only=True)
class VisionSize:
    """A CLIP ViT: pre-LN, quick-GELU. `num_layers` is the tower's own; `feature_layer` counts from its end (-2: the
    penultimate layer's output), and the layers behind it are not built."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    image_size: int
    patch_size: int
    norm_eps: float = 1e-5
    feature_layer: int = -2

    @property
    def num_places(self) -> int:
        """Features an image gives, the class token dropped."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_built_layers(self) -> int:
        return self.num_layers + 1 + self.feature_layer


@dataclass(frozen=True, kw_only=True)
class LanguageSize:
    """A Llama/Vicuna decoder: RMSNorm, SwiGLU, RoPE, grouped-query attention when num_kv_heads < num_heads.

    `rope_scaling` stretches positions by `rope_factor`: all of them ("linear"), or as Llama 3.1 does for a context of
    8192 ("llama3": `LLAMA3_ROPE`).
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    max_length: int
    head_dim: int | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Literal["linear", "llama3"] | None = None
    rope_factor: float = 1.0
    tied_embeddings: bool = False

    @property
    def kv_channels(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads


@dataclass(frozen=True, kw_only=True)
class LlavaSize:
    """A whole LLaVA: tower, two-layer GELU projector, decoder, and the token ids that the model itself knows."""

    vision: VisionSize
    language: LanguageSize
    image_token_id: int
    pad_token_id: int = 0

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(path: Path) -> LlavaSize:
        """Read `model.json`. Raises ConfigError when the file is missing or is not one."""
        try:
            tree = json.loads(path.read_text())
            return LlavaSize(
                **{**tree, "vision": VisionSize(**tree["vision"]), "language": LanguageSize(**tree["language"])}
            )
        except OSError as error:
            raise ConfigError(f"{path.parent} is not a base checkpoint: cannot read {path.name}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path} does not describe a LLaVA: {error}") from error


_CLIP_L_336 = VisionSize(
    num_layers=24, hidden_size=1024, ffn_hidden_size=4096, num_heads=16, image_size=336, patch_size=14
)

SIZES: dict[str, LlavaSize] = {
    "tiny": LlavaSize(
        vision=VisionSize(
            num_layers=3, hidden_size=32, ffn_hidden_size=64, num_heads=4, image_size=16, patch_size=8
        ),
        language=LanguageSize(
            num_layers=4, hidden_size=64, ffn_hidden_size=96, num_heads=4, num_kv_heads=2, vocab_size=128,
            max_length=128,
        ),
        image_token_id=4,
    ),
    "llava15_7b": LlavaSize(
        vision=_CLIP_L_336,
        language=LanguageSize(
            num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_heads=32, num_kv_heads=32, vocab_size=32064,
            max_length=4096,
        ),
        image_token_id=32000,
        pad_token_id=32001,
    ),
    "llava15_13b": LlavaSize(
        vision=_CLIP_L_336,
        language=LanguageSize(
            num_layers=40, hidden_size=5120, ffn_hidden_size=13824, num_heads=40, num_kv_heads=40, vocab_size=32064,
            max_length=4096,
        ),
        image_token_id=32000,
        pad_token_id=32001,
    ),
}  # fmt: skip


def find_size(base: Path, name: str | None = None) -> LlavaSize:
    """The size of a base folder, or the one known by `name`. Raises ConfigError when there is neither."""
    known = f"one of {', '.join(SIZES)}"
    if name is not None:
        if name not in SIZES:
            raise ConfigError(f"--size {name} is not known: it is {known}")
        return SIZES[name]
    if not (base / MODEL_JSON).is_file():
        raise ConfigError(f"{base} is not a base checkpoint: it has no {MODEL_JSON}. Without a base, --size is {known}")
    return LlavaSize.from_json(base / MODEL_JSON)
