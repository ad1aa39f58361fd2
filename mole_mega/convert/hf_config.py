"""From Hugging Face's `config.json` of a LLaVA to a `LlavaSize`; what our model cannot be is refused by key."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mole_mega.config import ConfigError
from mole_mega.convert.hf_files import read_json
from mole_mega.models.sizes import LanguageSize, LlavaSize, VisionSize

ARCHITECTURE = "LlavaForConditionalGeneration"
TOP, TEXT, VISION = "", "text_config", "vision_config"

# What transformers takes for a key that a config leaves out; older configs leave out whatever was the default.
DEFAULTS: dict[str, dict[str, Any]] = {
    TOP: {
        "image_token_index": 32000,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
    },
    TEXT: {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    },
    VISION: {
        "model_type": "clip_vision_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 32,
        "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu",
    },
}
DEFAULT_ROPE_THETA = 10000.0

# Keys that may have one value only: the model is built with it.
ONLY: tuple[tuple[str, str, Any], ...] = (
    (TOP, "projector_hidden_act", "gelu"),
    (TOP, "multimodal_projector_bias", True),
    (TOP, "vision_feature_select_strategy", "default"),
    (TEXT, "model_type", "llama"),
    (TEXT, "hidden_act", "silu"),
    (TEXT, "attention_bias", False),
    (TEXT, "mlp_bias", False),
    (VISION, "model_type", "clip_vision_model"),
    (VISION, "hidden_act", "quick_gelu"),
    (VISION, "num_channels", 3),
)


@dataclass(frozen=True)
class _Section:
    """One mapping of the config, asked key by key; a key that is missing or null has its default."""

    path: Path
    name: str
    tree: dict[str, Any]

    def label(self, key: str) -> str:
        return f"{self.path}: {self.name}.{key}" if self.name else f"{self.path}: {key}"

    def get(self, key: str, default: Any = None) -> Any:
        value = self.tree.get(key)
        return DEFAULTS[self.name].get(key, default) if value is None else value

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{self.label(key)} must be a positive integer, got {value!r}")
        return value

    def number(self, key: str) -> float:
        value = self.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ConfigError(f"{self.label(key)} must be a number above 0, got {value!r}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.label(key)} must be true or false, got {value!r}")
        return value

    def divides(self, part: str, whole: str) -> int:
        """whole / part; raises ConfigError when it is no integer."""
        if self.positive(whole) % self.positive(part):
            raise ConfigError(
                f"{self.label(part)} {self.positive(part)} does not divide {whole} {self.positive(whole)}"
            )
        return self.positive(whole) // self.positive(part)


def size_from_config(path: Path, vocab_size: int) -> LlavaSize:
    """The size that `config.json` describes; the vocabulary's is taken from the embedding itself.

    Raises ConfigError naming the key when the file is not a LLaVA's or asks for what the model does not have.
    """
    top, text, vision = _sections(path)
    for section in (top, text, vision):
        for name, key, only in ONLY:
            if name == section.name and section.get(key) != only:
                raise ConfigError(f"{section.label(key)} is {section.get(key)!r}; only {only!r} is supported")
    return LlavaSize(
        vision=_vision_size(top, vision),
        language=_language_size(top, text, vocab_size),
        image_token_id=_image_token_id(top),
        pad_token_id=_pad_token_id(top, text),
    )


def _sections(path: Path) -> tuple[_Section, _Section, _Section]:
    tree = read_json(path)
    # the first LLaVA code calls itself `llava` too, with other architectures and other tensor names
    architectures, model_type = tree.get("architectures", [ARCHITECTURE]), tree.get("model_type")
    if model_type != "llava" or architectures != [ARCHITECTURE]:
        raise ConfigError(
            f"{path} describes {model_type!r} with architectures {architectures!r}; "
            f"only 'llava' with {ARCHITECTURE} is supported"
        )
    if tree.get("quantization_config") is not None:
        raise ConfigError(f"{path}: quantization_config: quantized weights are not supported")
    for name in (TEXT, VISION):
        if not isinstance(tree.get(name), dict):
            raise ConfigError(f"{path}: {name} must be a mapping, got {tree.get(name)!r}")
    return _Section(path, TOP, tree), _Section(path, TEXT, tree[TEXT]), _Section(path, VISION, tree[VISION])


def _vision_size(top: _Section, vision: _Section) -> VisionSize:
    vision.divides("num_attention_heads", "hidden_size")
    vision.divides("patch_size", "image_size")
    num_layers = vision.positive("num_hidden_layers")
    return VisionSize(
        num_layers=num_layers,
        hidden_size=vision.positive("hidden_size"),
        ffn_hidden_size=vision.positive("intermediate_size"),
        num_heads=vision.positive("num_attention_heads"),
        image_size=vision.positive("image_size"),
        patch_size=vision.positive("patch_size"),
        norm_eps=vision.number("layer_norm_eps"),
        feature_layer=_feature_layer(top, num_layers),
    )


def _feature_layer(top: _Section, num_layers: int) -> int:
    """Counted from the tower's end. Hugging Face counts from either end, the embeddings as layer 0."""
    layer = top.get("vision_feature_layer")
    if isinstance(layer, list) and len(layer) == 1:
        layer = layer[0]
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise ConfigError(f"{top.label('vision_feature_layer')} is {layer!r}; only one layer is supported")
    from_end = layer if layer < 0 else layer - num_layers - 1
    if not -num_layers <= from_end <= -1:
        raise ConfigError(f"{top.label('vision_feature_layer')} is {layer}; the tower has {num_layers} layers")
    return from_end


def _language_size(top: _Section, text: _Section, vocab_size: int) -> LanguageSize:
    hidden_size, num_heads = text.positive("hidden_size"), text.positive("num_attention_heads")
    head_dim = text.get("head_dim")
    if head_dim is None:
        text.divides("num_attention_heads", "hidden_size")
    num_kv_heads = text.positive("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"{text.label('num_key_value_heads')} {num_kv_heads} does not divide num_attention_heads {num_heads}"
        )
    head_dim = None if head_dim is None else text.positive("head_dim")
    return LanguageSize(
        num_layers=text.positive("num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=text.positive("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        vocab_size=vocab_size,
        max_length=text.positive("max_position_embeddings"),
        # one model, one description: newer configs spell out what follows from the width
        head_dim=None if head_dim is None or head_dim * num_heads == hidden_size else head_dim,
        norm_eps=text.number("rms_norm_eps"),
        rope_theta=_rope_theta(text),
        tied_embeddings=top.flag("tie_word_embeddings") or text.flag("tie_word_embeddings"),
    )


def _rope_theta(text: _Section) -> float:
    """Of `rope_parameters` (transformers 5) or `rope_theta`. Raises ConfigError for any scaling."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = text.get(key, default={})
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise ConfigError(f"{text.label(key)} must be one flat mapping, got {rope!r}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ConfigError(f"{text.label(key)} is of type {kind!r}; only 'default' is supported")
        if rope.get("partial_rotary_factor", 1) != 1:
            raise ConfigError(f"{text.label(key)} turns a part of each head only, which is not supported")
    if text.get("partial_rotary_factor", 1) != 1:
        raise ConfigError(f"{text.label('partial_rotary_factor')} must be 1, got {text.get('partial_rotary_factor')!r}")
    theta = text.get("rope_parameters", default={}).get("rope_theta", text.get("rope_theta", DEFAULT_ROPE_THETA))
    return _Section(text.path, TEXT, {"rope_theta": theta}).number("rope_theta")


def _image_token_id(top: _Section) -> int:
    token = top.tree.get("image_token_id")
    token = top.get("image_token_index") if token is None else token
    if not isinstance(token, int) or isinstance(token, bool) or token < 0:
        raise ConfigError(f"{top.label('image_token_index')} must be a token id, got {token!r}")
    return token


def _pad_token_id(top: _Section, text: _Section) -> int:
    """The first that says one: the model's, the decoder's, generation's; 0 when none does (-1 is an old 'none')."""
    generation = top.path.with_name("generation_config.json")
    trees = [top.tree, text.tree, read_json(generation) if generation.is_file() else {}]
    tokens = [tree.get("pad_token_id") for tree in trees]
    return next((token for token in tokens if isinstance(token, int) and token >= 0), 0)
