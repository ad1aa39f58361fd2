"""How many parameters one rank holds, counted from the sizes alone.

All tensor-, expert- and data-parallel ranks of a pipeline stage hold the same number (the vocabulary is padded to what
the tensor-parallel ranks divide), so a count belongs to a stage. The model that is built has exactly these numbers,
which tests hold it to.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mole_mega.config import AdapterConfig, RunConfig
from mole_mega.models.sizes import LanguageSize, LlavaSize, VisionSize

# The sides of the blocks of platform/fp8.py, whose torch arithmetic needs not.
FP8_BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of parameters, by part. `dense_adapters` are those that every expert-parallel rank holds alike (LoRA of
    the attention, and of the MLP without experts; an A that experts share), `experts` the banks, `routers` what is
    always fp32."""

    vision: int = 0
    projector: int = 0
    embedding: int = 0
    decoder: int = 0
    output: int = 0
    dense_adapters: int = 0
    experts: int = 0
    routers: int = 0
    # of routers, moved by no gradient
    score_biases: int = 0

    @property
    def adapters(self) -> int:
        return self.dense_adapters + self.experts + self.routers

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def trainable(self, *, projector: bool) -> int:
        """Of these, how many train; `projector` says whether the projector does."""
        return self.adapters + projector * self.projector

    def frozen(self, *, projector: bool) -> int:
        return self.total - self.trainable(projector=projector)


def padded_vocabulary(size: LanguageSize, tensor: int) -> int:
    """Rows of the embedding over all tensor-parallel ranks."""
    return -(-size.vocab_size // tensor) * tensor


def stage_layers(run: RunConfig, size: LlavaSize, stage: int) -> range:
    """The decoder layers of a pipeline stage, from 0."""
    per_stage = size.language.num_layers // run.parallel.pipeline
    return range(stage * per_stage, (stage + 1) * per_stage)


def adapted_layers(run: RunConfig, size: LlavaSize, stage: int) -> int:
    """How many layers of a stage carry adapters in their MLP."""
    layers = stage_layers(run, size, stage)
    return len(layers) if run.adapter.layers == "all" else sum(layer in layers for layer in run.adapter.layers)


def stage_parameters(run: RunConfig, size: LlavaSize, stage: int) -> Parameters:
    """What one rank of a pipeline stage holds. The layout must divide the size (`models/mcore_config.check_layout`)."""
    language, adapter, tensor = size.language, run.adapter, run.parallel.tensor
    is_first, is_last = stage == 0, stage == run.parallel.pipeline - 1
    num_layers, num_adapted = len(stage_layers(run, size, stage)), adapted_layers(run, size, stage)
    vocabulary = padded_vocabulary(language, tensor) // tensor * language.hidden_size
    has_output = is_last and not (is_first and language.tied_embeddings)  # a tied last stage has a copy of its own
    one_expert, shared = mlp_lora(language, adapter, tensor)
    banks = adapter.num_experts // run.parallel.expert if adapter.method == "mole" else 0
    mlp_dense = shared if banks else one_expert
    return Parameters(
        vision=_vision(size.vision, tensor) if is_first else 0,
        projector=_projector(size, tensor) if is_first else 0,
        embedding=vocabulary if is_first else 0,
        decoder=num_layers * _decoder_layer(language, tensor) + (language.hidden_size if is_last else 0),
        output=vocabulary if has_output else 0,
        dense_adapters=(num_layers * _attention_lora(language, adapter, tensor) if adapter.attention else 0)
        + num_adapted * mlp_dense,
        experts=num_adapted * banks * one_expert,
        routers=_routers(run, language, num_adapted),
        score_biases=num_adapted * adapter.num_experts * len(router_widths(run, language))
        if adapter.router_score == "sigmoid"
        else 0,
    )


def router_widths(run: RunConfig, size: LanguageSize) -> tuple[int, ...]:
    """What the routers of one block read, as wide as one rank holds it."""
    hidden, ffn = size.hidden_size, size.ffn_hidden_size // run.parallel.tensor
    by_scope = {"block": (hidden,), "linear": (hidden, hidden, ffn)}
    return by_scope.get(run.adapter.router_scope, ()) if run.adapter.method == "mole" else ()


def multiplied_in_fp8(run: RunConfig, size: LlavaSize, stage: int) -> int:
    """How many of one rank's frozen weights are multiplied in FP8: the decoder's linears with train.precision fp8."""
    if run.train.precision != "fp8":
        return 0
    one_layer = sum(rows * columns for rows, columns in decoder_linears(size.language, run.parallel.tensor))
    return _layers_in_fp8(run, size, stage) * one_layer


def _layers_in_fp8(run: RunConfig, size: LlavaSize, stage: int) -> int:
    as_they_are = (0, size.language.num_layers - 1) if run.fp8.first_last_layers_bf16 else ()
    return sum(layer not in as_they_are for layer in stage_layers(run, size, stage))


def fp8_bytes(run: RunConfig, size: LlavaSize, stage: int) -> tuple[int, int]:
    """(weights, bytes of their scales) of one rank's linears of tower and decoder, which `fp8.store_base` keeps at one
    byte a weight where products are not in FP8."""
    first = stage == 0
    linears = _layers_in_fp8(run, size, stage) * decoder_linears(size.language, run.parallel.tensor)
    linears += first * size.vision.num_built_layers * vision_linears(size.vision, run.parallel.tensor)
    if run.fp8.scale == "channel":
        num_scales = sum(rows for rows, _ in linears)
    else:
        num_scales = sum(-(-rows // FP8_BLOCK) * -(-columns // FP8_BLOCK) for rows, columns in linears)
    return sum(rows * columns for rows, columns in linears), 4 * num_scales


def decoder_linears(size: LanguageSize, tensor: int) -> list[tuple[int, int]]:
    """[out, in] of one rank's part of a layer's linears: q, k, v; o; gate, up; down."""
    hidden, ffn = size.hidden_size, size.ffn_hidden_size // tensor
    heads, groups = size.num_heads * size.kv_channels // tensor, size.num_kv_heads * size.kv_channels // tensor
    return [(heads + 2 * groups, hidden), (hidden, heads), (2 * ffn, hidden), (hidden, ffn)]


def vision_linears(size: VisionSize, tensor: int) -> list[tuple[int, int]]:
    """The same of a layer of the tower, whose MLP has no gate."""
    hidden, ffn = size.hidden_size, size.ffn_hidden_size // tensor
    return [(3 * hidden // tensor, hidden), (hidden, hidden // tensor), (ffn, hidden), (hidden, ffn)]


def _vision(size: VisionSize, tensor: int) -> int:
    hidden, ffn = size.hidden_size, size.ffn_hidden_size
    patches = hidden * 3 * size.patch_size**2
    positions = (size.num_places + 1) * hidden  # the class token stands at the first
    weights = sum(rows * columns for rows, columns in vision_linears(size, tensor))
    biases = (3 * hidden + ffn) // tensor + 2 * hidden  # row-parallel linears hold theirs whole
    norms = 4 * hidden
    return patches + hidden + positions + 2 * hidden + size.num_built_layers * (weights + biases + norms)


def _projector(size: LlavaSize, tensor: int) -> int:
    hidden = size.language.hidden_size
    return (hidden * size.vision.hidden_size + hidden + hidden * hidden) // tensor + hidden


def _decoder_layer(size: LanguageSize, tensor: int) -> int:
    return sum(rows * columns for rows, columns in decoder_linears(size, tensor)) + 2 * size.hidden_size


def _attention_lora(size: LanguageSize, adapter: AdapterConfig, tensor: int) -> int:
    heads, groups = size.num_heads * size.kv_channels, size.num_kv_heads * size.kv_channels
    whole = 3 * size.hidden_size + size.hidden_size  # A of q, k, v; B of o
    cut = heads + 2 * groups + heads  # B of q, k, v; A of o
    return adapter.rank * (whole + cut // tensor)


def mlp_lora(size: LanguageSize, adapter: AdapterConfig, tensor: int) -> tuple[int, int]:
    """(one expert's own factors, those that experts share): A of gate and up and B of down whole, the others cut."""
    hidden, ffn = size.hidden_size, size.ffn_hidden_size // tensor
    A, B = adapter.rank * (2 * hidden + ffn), adapter.rank * (2 * ffn + hidden)
    if adapter.shared_B and adapter.method == "mole":
        return 0, A + adapter.shared_B * B + 3 * adapter.num_experts * (adapter.shared_B + adapter.rank**2)
    return (B, A) if adapter.share_A and adapter.method == "mole" else (A + B, 0)


def _routers(run: RunConfig, size: LanguageSize, num_adapted: int) -> int:
    adapter = run.adapter
    if adapter.method == "mole" and adapter.router_scope == "sample":
        return adapter.num_experts * (size.hidden_size + adapter.router_bias)  # one, of which each stage has a copy
    widths = router_widths(run, size)
    return num_adapted * adapter.num_experts * (sum(widths) + len(widths) * adapter.router_bias)
