"""Which Hugging Face tensors make which tensor of ours, as data. Reading and writing them is not done here.

Names on the Hugging Face side are written as transformers 5 names them in a built `LlavaForConditionalGeneration`; what
files call them is brought to that form by `PREFIXES` and its like. `{layer}` stands for a layer's number, the same on
both sides. Shapes are those of Hugging Face, in the words of `dims`; ours follow by the rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mole_mega.convert import rules
from mole_mega.convert.rules import Rule
from mole_mega.models.sizes import LlavaSize

EMBEDDING = "model.language_model.embed_tokens.weight"
OUTPUT = "lm_head.weight"

# What a name in a file starts with -> what it starts with here; the first that fits counts.
Prefixes = tuple[tuple[str, str], ...]

# Of a `LlavaForConditionalGeneration`: a built model's own names; the hub's older files (`vision_tower.vision_model.`),
# and those that transformers 5 saves, which leave `vision_model.` out.
PREFIXES: Prefixes = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.", "model.vision_tower."),
    ("model.vision_tower.vision_model.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
# Of a projector saved by the first LLaVA code, which is a torch `Sequential`; transformers' own names pass as well.
PROJECTOR_PREFIXES: Prefixes = (
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
# Of a `LlamaForCausalLM`.
LLAMA_PREFIXES: Prefixes = (("model.", "model.language_model."),)
# Of a `LlavaLlamaForCausalLM`, the first LLaVA code's: a Llama that holds the projector, sometimes the tower too.
ORIGINAL_PREFIXES: Prefixes = (
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("model.vision_tower.vision_tower.", "model.vision_tower."),
    *PROJECTOR_PREFIXES[:2],
    *LLAMA_PREFIXES,
)
# Of a `CLIPModel` or `CLIPVisionModel`; the latter as transformers 5 saves it leaves `vision_model.` out.
CLIP_PREFIXES: Prefixes = (
    ("vision_model.", "model.vision_tower."),
    *((part, "model.vision_tower." + part) for part in ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")),
)
# The side of a `CLIPModel` that reads text.
CLIP_TEXT = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")


@dataclass(frozen=True)
class Row:
    """One tensor of ours, the Hugging Face tensors it is made of in the rule's order, the rule's name, and the shape of
    each of those tensors."""

    ours: str
    hf: tuple[str, ...]
    rule: str
    shapes: tuple[str, ...]

    def at(self, layer: int) -> Row:
        """This row with a layer's number filled in."""
        return Row(
            self.ours.replace("{layer}", str(layer)),
            tuple(name.replace("{layer}", str(layer)) for name in self.hf),
            self.rule,
            self.shapes,
        )


def _rows(ours: str, hf: str, rows: tuple[tuple[str, tuple[str, ...], str, str], ...]) -> tuple[Row, ...]:
    """Rows with the prefixes of both sides left out, completed. Shapes are parted by commas."""
    return tuple(
        Row(ours + name, tuple(hf + part for part in parts), rule, tuple(shapes.split(", ")))
        for name, parts, rule, shapes in rows
    )


VISION = _rows(
    "vision_model.",
    "model.vision_tower.",
    (
        ("class_token", ("embeddings.class_embedding",), "class_token", "vision"),
        ("conv1.weight", ("embeddings.patch_embedding.weight",), "identity", "vision colours patch patch"),
        ("position_embeddings.weight", ("embeddings.position_embedding.weight",), "identity", "positions vision"),
        # transformers' own spelling
        ("ln_pre.weight", ("pre_layrnorm.weight",), "identity", "vision"),
        ("ln_pre.bias", ("pre_layrnorm.bias",), "identity", "vision"),
    ),
)

VISION_LAYER = _rows(
    "vision_model.decoder.layers.{layer}.",
    "model.vision_tower.encoder.layers.{layer}.",
    (
        ("input_layernorm.weight", ("layer_norm1.weight",), "identity", "vision"),
        ("input_layernorm.bias", ("layer_norm1.bias",), "identity", "vision"),
        (
            "self_attention.linear_qkv.weight",
            ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
            "vision_qkv",
            "vision vision, vision vision, vision vision",
        ),
        (
            "self_attention.linear_qkv.bias",
            ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
            "vision_qkv",
            "vision, vision, vision",
        ),
        ("self_attention.linear_proj.weight", ("self_attn.out_proj.weight",), "identity", "vision vision"),
        ("self_attention.linear_proj.bias", ("self_attn.out_proj.bias",), "identity", "vision"),
        ("pre_mlp_layernorm.weight", ("layer_norm2.weight",), "identity", "vision"),
        ("pre_mlp_layernorm.bias", ("layer_norm2.bias",), "identity", "vision"),
        ("mlp.linear_fc1.weight", ("mlp.fc1.weight",), "identity", "vision_ffn vision"),
        ("mlp.linear_fc1.bias", ("mlp.fc1.bias",), "identity", "vision_ffn"),
        ("mlp.linear_fc2.weight", ("mlp.fc2.weight",), "identity", "vision vision_ffn"),
        ("mlp.linear_fc2.bias", ("mlp.fc2.bias",), "identity", "vision"),
    ),
)

PROJECTOR = _rows(
    "vision_projection.encoder.",
    "model.multi_modal_projector.",
    (
        ("linear_fc1.weight", ("linear_1.weight",), "identity", "hidden vision"),
        ("linear_fc1.bias", ("linear_1.bias",), "identity", "hidden"),
        ("linear_fc2.weight", ("linear_2.weight",), "identity", "hidden hidden"),
        ("linear_fc2.bias", ("linear_2.bias",), "identity", "hidden"),
    ),
)

LANGUAGE = (
    Row("language_model.embedding.word_embeddings.weight", (EMBEDDING,), "identity", ("vocabulary hidden",)),
    Row(
        "language_model.decoder.final_layernorm.weight", ("model.language_model.norm.weight",), "identity", ("hidden",)
    ),
)

LANGUAGE_LAYER = _rows(
    "language_model.decoder.layers.{layer}.",
    "model.language_model.layers.{layer}.",
    (
        ("input_layernorm.weight", ("input_layernorm.weight",), "identity", "hidden"),
        (
            "self_attention.linear_qkv.weight",
            ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
            "language_qkv",
            "queries hidden, keys hidden, keys hidden",
        ),
        ("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), "identity", "hidden queries"),
        ("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), "identity", "hidden"),
        ("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "gate_up", "ffn hidden, ffn hidden"),
        ("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), "identity", "hidden ffn"),
    ),
)

# Not there when the embeddings are tied.
LANGUAGE_OUTPUT = (Row("language_model.output_layer.weight", (OUTPUT,), "identity", ("vocabulary hidden",)),)

# Weights behind the feature layer, that no image's features pass through; the tower's last layers are VISION_LAYER's.
UNUSED = ("model.vision_tower.post_layernorm.weight", "model.vision_tower.post_layernorm.bias")
UNUSED_SHAPE = "vision"

# Buffers that older versions of transformers wrote and every version computes.
COMPUTED = ("model.vision_tower.embeddings.position_ids",)
COMPUTED_LAYER = ("model.language_model.layers.{layer}.self_attn.rotary_emb.inv_freq",)


def rules_by_name(size: LlavaSize) -> dict[str, Rule]:
    """The rules that the rows name, for a model of this size."""
    vision, language = size.vision, size.language
    return {
        "identity": rules.identity(),
        "class_token": rules.class_token(),
        "vision_qkv": rules.qkv(vision.num_heads, vision.num_heads, vision.hidden_size // vision.num_heads),
        "language_qkv": rules.qkv(language.num_heads, language.num_kv_heads, language.kv_channels),
        "gate_up": rules.gate_up(),
    }


def rows(size: LlavaSize) -> Iterator[Row]:
    """Every tensor of a model of this size, once, layer numbers filled in."""
    yield from VISION
    yield from (row.at(layer) for layer in range(size.vision.num_built_layers) for row in VISION_LAYER)
    yield from PROJECTOR
    yield from LANGUAGE
    yield from (row.at(layer) for layer in range(size.language.num_layers) for row in LANGUAGE_LAYER)
    if not size.language.tied_embeddings:
        yield from LANGUAGE_OUTPUT


def dims(size: LlavaSize) -> dict[str, int]:
    """The words that shapes are written in."""
    vision, language = size.vision, size.language
    return {
        "vision": vision.hidden_size,
        "vision_ffn": vision.ffn_hidden_size,
        "positions": vision.num_places + 1,
        "patch": vision.patch_size,
        "colours": 3,
        "hidden": language.hidden_size,
        "ffn": language.ffn_hidden_size,
        "queries": language.num_heads * language.kv_channels,
        "keys": language.num_kv_heads * language.kv_channels,
        "vocabulary": language.vocab_size,
    }


def hf_shapes(size: LlavaSize) -> dict[str, tuple[int, ...]]:
    """{Hugging Face name: shape} of every weight, the unused ones too."""
    words = dims(size)
    behind = range(size.vision.num_built_layers, size.vision.num_layers)
    every_row = (*rows(size), *(row.at(layer) for layer in behind for row in VISION_LAYER))
    shapes = {name: shape for row in every_row for name, shape in zip(row.hf, row.shapes, strict=True)}
    shapes |= dict.fromkeys(UNUSED, UNUSED_SHAPE)
    return {name: tuple(words[word] for word in shape.split()) for name, shape in shapes.items()}


def unused_names(size: LlavaSize) -> Iterator[str]:
    """Hugging Face weights that a checkpoint holds and a model of this size has no place for."""
    for layer in range(size.vision.num_built_layers, size.vision.num_layers):
        yield from (name for row in VISION_LAYER for name in row.at(layer).hf)
    yield from UNUSED


def computed_names(size: LlavaSize) -> Iterator[str]:
    """Hugging Face tensors that are no weights: leaving them out loses nothing."""
    yield from COMPUTED
    for layer in range(size.language.num_layers):
        yield from (name.replace("{layer}", str(layer)) for name in COMPUTED_LAYER)


def canonical_name(name: str, prefixes: Prefixes = PREFIXES) -> str:
    """A tensor's name in a file -> its name in this table; a name of no known form stays as it is."""
    for prefix, ours in prefixes:
        if name.startswith(prefix):
            return ours + name[len(prefix) :]
    return name
