"""From a `config.json` to the size of a LLaVA or a part of one, and back; what our model cannot be is refused by key.

Four configs are read: that of `LlavaForConditionalGeneration`, with a section for each part; that of the first LLaVA
code, which is a Llama's with keys added; a Llama's; a CLIP's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mole_mega.config import ConfigError
from mole_mega.convert.hf_files import read_json
from mole_mega.convert.source import Kind
from mole_mega.models.sizes import LLAMA3_ROPE, LanguageSize, LlavaSize, VisionSize

ARCHITECTURE = "LlavaForConditionalGeneration"
# (architecture, its model types) of each kind of source
KINDS: dict[Kind, tuple[str, tuple[str, ...]]] = {
    "llava_hf": (ARCHITECTURE, ("llava",)),
    "llava_original": ("LlavaLlamaForCausalLM", ("llava", "llava_llama")),
    "parts": ("LlamaForCausalLM", ("llama",)),
}
TOP, ORIGINAL, TEXT, VISION = "", "mm", "text_config", "vision_config"

# What transformers, or LLaVA's code, takes for a key that a config leaves out; older configs leave out whatever was the
# default.
DEFAULTS: dict[str, dict[str, Any]] = {
    TOP: {
        "image_token_index": 32000,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
    },
    ORIGINAL: {
        "mm_projector_type": "linear",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "unfreeze_mm_vision_tower": False,
        "image_aspect_ratio": "pad",
        "s2": False,
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
    (ORIGINAL, "mm_projector_type", "mlp2x_gelu"),
    (ORIGINAL, "mm_vision_select_feature", "patch"),
    (ORIGINAL, "mm_patch_merge_type", "flat"),
    (ORIGINAL, "mm_use_im_start_end", False),
    (ORIGINAL, "s2", False),
    (TEXT, "hidden_act", "silu"),
    (TEXT, "attention_bias", False),
    (TEXT, "mlp_bias", False),
    (VISION, "hidden_act", "quick_gelu"),
    (VISION, "num_channels", 3),
)


@dataclass(frozen=True)
class _Section:
    """One mapping of the config, asked key by key; a key that is missing or null has its default. `prefix` leads to it
    in messages."""

    path: Path
    name: str
    tree: dict[str, Any]
    prefix: str = ""

    def label(self, key: str) -> str:
        return f"{self.path}: {self.prefix}{key}"

    def get(self, key: str, default: Any = None) -> Any:
        value = self.tree.get(key)
        return DEFAULTS[self.name].get(key, default) if value is None else value

    def check_only(self) -> None:
        """Raise ConfigError naming a key that has another value than the one that the model is built with."""
        for name, key, only in ONLY:
            if name == self.name:
                self.must_be(key, only)

    def must_be(self, key: str, only: Any) -> None:
        if self.get(key) != only:
            raise ConfigError(f"{self.label(key)} is {self.get(key)!r}; only {only!r} is supported")

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


def kind_of(path: Path) -> Kind:
    """Which kind of source a `config.json` describes. Raises ConfigError when it is none that we read."""
    tree = _read(path)
    model_type, architectures = tree.get("model_type"), tree.get("architectures")
    for kind, (architecture, model_types) in KINDS.items():
        if model_type in model_types and architectures == [architecture]:
            return kind
    for kind in ("llava_hf", "parts", "llava_original") if architectures is None else ():
        # both kinds of LLaVA call themselves `llava`; only transformers' has sections
        if model_type in KINDS[kind][1] and (kind != "llava_hf" or TEXT in tree):
            return kind
    raise ConfigError(
        f"{path} describes {model_type!r} with architectures {architectures!r}; "
        f"supported are {', '.join(architecture for architecture, _ in KINDS.values())}"
    )


def size_from_config(path: Path, vocab_size: int) -> LlavaSize:
    """The size that the `config.json` of a `LlavaForConditionalGeneration` describes; the vocabulary's is taken from
    the embedding itself.

    Raises ConfigError naming the key when the file is not a LLaVA's or asks for what the model does not have.
    """
    if kind_of(path) != "llava_hf":
        raise ConfigError(f"{path} is not the config of a {ARCHITECTURE}")
    tree = _read(path)
    for name in (TEXT, VISION):
        if not isinstance(tree.get(name), dict):
            raise ConfigError(f"{path}: {name} must be a mapping, got {tree.get(name)!r}")
    top, text, vision = (
        _Section(path, TOP, tree),
        _Section(path, TEXT, tree[TEXT], f"{TEXT}."),
        _Section(path, VISION, tree[VISION], f"{VISION}."),
    )
    top.check_only()
    text.must_be("model_type", "llama")
    vision.must_be("model_type", "clip_vision_model")
    tower = _vision_size(vision)
    return LlavaSize(
        vision=replace(tower, feature_layer=_feature_layer(top, "vision_feature_layer", tower.num_layers)),
        language=_language_size(text, vocab_size, tied=top.flag("tie_word_embeddings")),
        image_token_id=_image_token_id(top),
        pad_token_id=_pad_token_id(path, vocab_size, [tree, text.tree]),
    )


def language_from_config(path: Path, vocab_size: int) -> tuple[LanguageSize, int]:
    """The decoder that a Llama's or the first LLaVA code's `config.json` describes, and the id that pads."""
    text = _Section(path, TEXT, _read(path))
    return _language_size(text, vocab_size), _pad_token_id(path, vocab_size, [text.tree])


def vision_from_config(path: Path) -> VisionSize:
    """The tower that a CLIP's `config.json` describes: a `CLIPVisionModel`'s, or the section of a `CLIPModel`'s."""
    tree, prefix = _read(path), ""
    if tree.get("model_type") == "clip" and isinstance(tree.get(VISION), dict):
        tree, prefix = {"model_type": "clip_vision_model", **tree[VISION]}, f"{VISION}."
    vision = _Section(path, VISION, tree, prefix)
    if tree.get("model_type") != "clip_vision_model":
        raise ConfigError(f"{vision.label('model_type')} is {tree.get('model_type')!r}; supported are clip models")
    return _vision_size(vision)


def check_original(path: Path, vision: VisionSize, *, holds_tower: bool) -> VisionSize:
    """The tower as the first LLaVA code's `config.json` uses it. Raises ConfigError naming a key that asks for what
    the model does not have, or that does not fit the tower."""
    top = _Section(path, ORIGINAL, _read(path))
    top.check_only()
    if top.get("image_aspect_ratio") == "anyres":
        raise ConfigError(f"{top.label('image_aspect_ratio')} is 'anyres'; pictures in tiles are not supported")
    if top.flag("unfreeze_mm_vision_tower") and not holds_tower:
        raise ConfigError(f"{top.label('unfreeze_mm_vision_tower')} is true, but {path.parent} does not hold the tower")
    if top.tree.get("mm_hidden_size") not in (None, vision.hidden_size):
        raise ConfigError(
            f"{top.label('mm_hidden_size')} is {top.tree['mm_hidden_size']}, but the tower's width is "
            f"{vision.hidden_size}"
        )
    return replace(vision, feature_layer=_feature_layer(top, "mm_vision_select_layer", vision.num_layers))


def llava_config(size: LlavaSize, **tokens: int) -> dict[str, Any]:
    """The `config.json` of a `LlavaForConditionalGeneration` of a size: `size_from_config` gives the size back.

    `tokens` are added to the decoder's section (bos_token_id and the like).
    """
    vision, language = size.vision, size.language
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llava",
        "image_token_index": size.image_token_id,
        "pad_token_id": size.pad_token_id,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": vision.feature_layer,
        "vision_feature_select_strategy": "default",
        "image_seq_length": vision.num_places,
        "tie_word_embeddings": language.tied_embeddings,
        TEXT: {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": language.hidden_size,
            "intermediate_size": language.ffn_hidden_size,
            "num_hidden_layers": language.num_layers,
            "num_attention_heads": language.num_heads,
            "num_key_value_heads": language.num_kv_heads,
            "head_dim": language.kv_channels,
            "vocab_size": language.vocab_size,
            "max_position_embeddings": language.max_length,
            "rms_norm_eps": language.norm_eps,
            "rope_parameters": _rope_config(language),
            "tie_word_embeddings": language.tied_embeddings,
            "pad_token_id": size.pad_token_id,
            **tokens,
        },
        VISION: {
            "model_type": "clip_vision_model",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.ffn_hidden_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "layer_norm_eps": vision.norm_eps,
            "hidden_act": "quick_gelu",
        },
    }


def _read(path: Path) -> dict[str, Any]:
    tree = read_json(path)
    if tree.get("quantization_config") is not None:
        raise ConfigError(f"{path}: quantization_config: quantized weights are not supported")
    return tree


def _vision_size(vision: _Section) -> VisionSize:
    """The tower alone, its feature layer not yet said."""
    vision.check_only()
    vision.divides("num_attention_heads", "hidden_size")
    vision.divides("patch_size", "image_size")
    return VisionSize(
        num_layers=vision.positive("num_hidden_layers"),
        hidden_size=vision.positive("hidden_size"),
        ffn_hidden_size=vision.positive("intermediate_size"),
        num_heads=vision.positive("num_attention_heads"),
        image_size=vision.positive("image_size"),
        patch_size=vision.positive("patch_size"),
        norm_eps=vision.number("layer_norm_eps"),
    )


def _feature_layer(top: _Section, key: str, num_layers: int) -> int:
    """Counted from the tower's end. Hugging Face counts from either end, the embeddings as layer 0."""
    layer = top.get(key)
    if isinstance(layer, list) and len(layer) == 1:
        layer = layer[0]
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise ConfigError(f"{top.label(key)} is {layer!r}; only one layer is supported")
    from_end = layer if layer < 0 else layer - num_layers - 1
    if not -num_layers <= from_end <= -1:
        raise ConfigError(f"{top.label(key)} is {layer}; the tower has {num_layers} layers")
    return from_end


def _language_size(text: _Section, vocab_size: int, *, tied: bool = False) -> LanguageSize:
    text.check_only()
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
    scaling, factor = _rope_scaling(text)
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
        rope_scaling=scaling,
        rope_factor=factor,
        tied_embeddings=tied or text.flag("tie_word_embeddings"),
    )


def _rope_theta(text: _Section) -> float:
    """Of `rope_parameters` (transformers 5) or `rope_theta`."""
    theta = text.get("rope_parameters", default={}).get("rope_theta", text.get("rope_theta", DEFAULT_ROPE_THETA))
    return _Section(text.path, TEXT, {"rope_theta": theta}, text.prefix).number("rope_theta")


def _rope_scaling(text: _Section) -> tuple[Literal["linear", "llama3"] | None, float]:
    """Kind and factor, of `rope_parameters` (transformers 5) or `rope_scaling`. Raises ConfigError for any that
    Megatron-Core does not compute as transformers does."""
    if text.get("partial_rotary_factor", 1) != 1:
        raise ConfigError(f"{text.label('partial_rotary_factor')} must be 1, got {text.get('partial_rotary_factor')!r}")
    scaled = {key: scaling for key in ("rope_parameters", "rope_scaling") if (scaling := _one_scaling(text, key))[0]}
    if len(set(scaled.values())) > 1:
        raise ConfigError(f"{text.label('rope_parameters')} and rope_scaling differ: {scaled}")
    return next(iter(scaled.values()), (None, 1.0))


def _one_scaling(text: _Section, key: str) -> tuple[Literal["linear", "llama3"] | None, float]:
    rope = text.get(key, default={})
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ConfigError(f"{text.label(key)} must be one flat mapping, got {rope!r}")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ConfigError(f"{text.label(key)} turns a part of each head only, which is not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None, 1.0
    if kind not in ("linear", "llama3"):
        raise ConfigError(f"{text.label(key)} is of type {kind!r}; only 'default', 'linear' and 'llama3' are supported")
    if kind == "llama3":
        for name, only in LLAMA3_ROPE.items():
            if rope.get(name) != only:
                raise ConfigError(f"{text.label(key)}.{name} is {rope.get(name)!r}; only {only!r} is supported")
    factor = rope.get("factor")
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not factor >= 1:
        raise ConfigError(f"{text.label(key)}.factor must be a number of at least 1, got {factor!r}")
    return kind, float(factor)


def _rope_config(language: LanguageSize) -> dict[str, Any]:
    rope = {"rope_type": language.rope_scaling or "default", "rope_theta": language.rope_theta}
    if language.rope_scaling is not None:
        rope["factor"] = language.rope_factor
    return {**rope, **(LLAMA3_ROPE if language.rope_scaling == "llama3" else {})}


def _image_token_id(top: _Section) -> int:
    token = top.tree.get("image_token_id")
    token = top.get("image_token_index") if token is None else token
    if not isinstance(token, int) or isinstance(token, bool) or token < 0:
        raise ConfigError(f"{top.label('image_token_index')} must be a token id, got {token!r}")
    return token


def _pad_token_id(path: Path, vocab_size: int, trees: list[dict[str, Any]]) -> int:
    """The first that says one: the model's, the decoder's, generation's; 0 when none does. -1 is an old 'none', and one
    outside the vocabulary could not be embedded."""
    generation = path.with_name("generation_config.json")
    tokens = [tree.get("pad_token_id") for tree in (*trees, read_json(generation) if generation.is_file() else {})]
    return next((token for token in tokens if isinstance(token, int) and 0 <= token < vocab_size), 0)
