"""Bytes that one rank holds at the peak of a training step, by part.

Static: weights, fp32 gradients, Adam. Moving: what autograd keeps of the micro-batches in flight (formulas below, by
Megatron-Core's local attention, which keeps its score matrices; Transformer Engine's keeps none), and the largest
workspace beside it. Sequences are as long as `Shape.length`, so what is counted is the longest that the run may meet.

Not counted: what a process holds before a model is built (Python, torch, a CUDA context), the allocator's gaps, and
NCCL's buffers.

Shape suffixes in formulas: T tokens of a micro-batch, S sequence, H hidden, F ffn, V vocabulary, E experts, K experts
that a token uses.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from mole_mega.adapters.forms import computes_all
from mole_mega.config import RunConfig
from mole_mega.estimate.parameters import (
    adapted_layers,
    decoder_linears,
    fp8_bytes,
    mlp_lora,
    multiplied_in_fp8,
    padded_vocabulary,
    router_widths,
    stage_layers,
    stage_parameters,
    vision_linears,
)
from mole_mega.models.expert_parallel import expert_parallel
from mole_mega.models.sizes import LlavaSize
from mole_mega.platform.recipes import recipe_of, sequence_multiple

BYTES = {"fp32": 4, "bf16": 2}
FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A micro-batch: samples, their places (the longest sample's, padded), and images in all of them together.
    `context` ranks share the places."""

    samples: int
    length: int
    images: int
    context: int = 1

    @property
    def tokens(self) -> int:
        """Places that one of them holds."""
        return self.samples * self.length // self.context


def micro_batch(run: RunConfig, length: int | None = None, images_per_sample: float = 1.0) -> Shape:
    """The micro-batch of a run whose samples are `length` places long (None: `data.max_length`)."""
    multiple = sequence_multiple(run)
    length = -(-(length or run.data.max_length) // multiple) * multiple
    samples = run.train.micro_batch_size
    images = math.ceil(samples * images_per_sample)
    return Shape(samples=samples, length=length, images=images, context=run.parallel.context)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes by part. `methods`: what those around the optimizer step remember. `vision` is the tower's workspace where
    that, and not the decoder's, is at the peak."""

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    methods: int
    activations: int
    workspace: int
    dispatch: int
    vision: int

    @property
    def static(self) -> int:
        return self.frozen + self.trained + self.gradients + self.optimizer + self.methods

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def stage_memory(
    run: RunConfig,
    size: LlavaSize,
    world_size: int,
    stage: int,
    shape: Shape,
    capability: tuple[int, int] | None = None,
) -> Memory:
    """What a rank of pipeline stage `stage` holds at the peak of a step, on GPUs of a compute capability (None: those
    that hold most)."""
    frozen, trained, gradients, optimizer = _static(run, size, world_size, stage, capability)
    num_flying = in_flight(run, world_size, stage)
    saved = saved_activations(run, size, stage, shape)
    workspace, dispatch = _decoder_workspace(run, size, stage, shape), _dispatch(run, size, stage, shape)
    kept = _kept_for_good(run, size, stage, shape)
    vision = _vision_workspace(run, size, shape) if stage == 0 else 0
    # the tower runs before its micro-batch has kept anything
    vision_is_peak = vision > saved + workspace + dispatch
    if vision_is_peak:
        num_flying, workspace, dispatch = num_flying - 1, 0, 0
    else:
        vision = 0
    methods, of_their_step = _methods(run, size, stage)
    # methods work when the passes are over
    more = max(0, of_their_step - (num_flying * saved + workspace + dispatch + vision))
    return Memory(
        frozen=frozen,
        trained=trained,
        gradients=gradients,
        optimizer=optimizer,
        methods=methods,
        activations=num_flying * saved,
        workspace=kept + workspace + more,
        dispatch=dispatch,
        vision=vision,
    )


def _methods(run: RunConfig, size: LlavaSize, stage: int) -> tuple[int, int]:
    """(what methods remember, what their step takes beside it)."""
    if not run.adapter.methods:
        return 0, 0
    from mole_mega.estimate.methods import method_bytes  # with the methods come torch and Megatron-Core

    return method_bytes(run, size, stage)


def in_flight(run: RunConfig, world_size: int, stage: int) -> int:
    """Micro-batches whose activations a stage holds at once: one forward, one backward (1F1B, arXiv 2104.04473)."""
    return min(run.parallel.pipeline - stage, num_micro_batches(run, world_size))


def num_micro_batches(run: RunConfig, world_size: int) -> int:
    """Micro-batches of a step, on each data-parallel rank."""
    samples = run.train.micro_batch_size * run.parallel.data(world_size)
    return max(1, run.train.global_batch_size // samples)


def _static(
    run: RunConfig, size: LlavaSize, world_size: int, stage: int, capability: tuple[int, int] | None
) -> tuple[int, int, int, int]:
    """(frozen weights, trained weights, gradients, optimizer state)."""
    numbers, train = stage_parameters(run, size, stage), run.train
    width = BYTES[train.dtype]
    dense = numbers.dense_adapters + (numbers.projector if train.projector else 0)
    trained = (dense + numbers.experts) * width + numbers.routers * FP32
    gradients = FP32 * (dense + numbers.experts + numbers.routers)
    # Adam's two moments, and a master copy of what is not fp32 itself; the distributed optimizer cuts them over the
    # ranks that hold the same part
    moments = 2 * FP32 if train.optimizer == "adam" else 0
    master = FP32 if train.dtype == "bf16" else 0
    data = world_size // (run.parallel.tensor * run.parallel.pipeline)
    share, expert_share = (data, data // run.parallel.expert) if train.distributed_optimizer else (1, 1)
    optimizer = ((moments + master) * dense + moments * numbers.routers) // share
    optimizer += (moments + master) * numbers.experts // expert_share
    frozen = width * numbers.frozen(projector=train.projector) + (FP32 - width) * numbers.score_biases
    if recipe := recipe_of(run):  # beside the base in bf16, or instead of it
        instead_of = width if run.fp8.store_base else 0
        frozen += int((recipe.weight_bytes(capability) - instead_of) * multiplied_in_fp8(run, size, stage))
    elif run.fp8.store_base:
        num_weights, scales = fp8_bytes(run, size, stage)
        frozen += scales - (width - 1) * num_weights
    return frozen, trained, gradients, optimizer


def mixture_form(run: RunConfig, size: LlavaSize) -> Literal["tokens", "masked", "paired"]:
    """How experts meet tokens: tokens travel to their one expert; or they stay, and all experts are computed for each
    token, or a row for each pair of a token and an expert that it uses (adapters/mixing.py)."""
    adapter = run.adapter
    if expert_parallel(run, size).form == "tokens":
        return "tokens"
    if adapter.gate == "dense" or adapter.router_scope == "linear":
        return "masked"
    if adapter.expert_form == "mlp":
        return "paired"
    width = BYTES[run.train.dtype]
    return "masked" if computes_all(adapter.num_experts, adapter.top_k, adapter.rank, width) else "paired"


def gathered_bank(run: RunConfig, size: LlavaSize) -> int:
    """Bytes of the experts of one layer as each rank gathers them, where weights travel (adapters/mixture.py)."""
    if run.adapter.method != "mole" or run.parallel.expert == 1 or mixture_form(run, size) == "tokens":
        return 0
    one_expert, _ = mlp_lora(size.language, run.adapter, run.parallel.tensor)
    return run.adapter.num_experts * one_expert * BYTES[run.train.dtype]


def saved_activations(run: RunConfig, size: LlavaSize, stage: int, shape: Shape) -> int:
    """What autograd keeps of one micro-batch between its forward and its backward pass."""
    language, tensor, width = size.language, run.parallel.tensor, BYTES[run.train.dtype]
    tokens = shape.tokens
    num_layers, num_adapted = len(stage_layers(run, size, stage)), adapted_layers(run, size, stage)
    if run.train.recompute == "full":
        # the input of each layer, and the table of rotations
        saved = num_layers * tokens // tensor * language.hidden_size * width
        saved += shape.length * language.kv_channels * FP32 + tokens * 8
    else:
        saved = num_layers * _attention(run, size, shape, recomputed=run.train.recompute == "selective")
        saved += num_adapted * _mlp(run, size, shape, adapted=True)
        saved += (num_layers - num_adapted) * _mlp(run, size, shape, adapted=False)
    if stage == run.parallel.pipeline - 1:
        saved += _norm(run, size, shape) + tokens * (padded_vocabulary(language, tensor) // tensor * FP32 + 9)
    if stage == 0 and run.train.projector:
        places, hidden = shape.images * size.vision.num_places, language.hidden_size
        # its input, and its middle before and after GELU
        saved += places * (size.vision.hidden_size + 2 * hidden // tensor) * width + tokens
    return saved


def _norm(run: RunConfig, size: LlavaSize, shape: Shape) -> int:
    """An RMS norm keeps its input in fp32, and 1 / RMS; each tensor-parallel rank those of its part of the sequence."""
    return shape.tokens // run.parallel.tensor * (size.language.hidden_size + 1) * FP32


def _scores(run: RunConfig, size: LlavaSize, shape: Shape) -> int:
    """Attention scores of one layer on one rank."""
    if run.model.backend == "transformer_engine":
        return 0
    return shape.tokens * shape.length * size.language.num_heads // run.parallel.tensor


def _core_attention(run: RunConfig, size: LlavaSize, shape: Shape) -> int:
    """What one layer's attention itself keeps beside q, k and v: keys and values repeated for their queries, the mask,
    and probabilities; in bf16 the softmax's own fp32 ones too."""
    language, width = size.language, BYTES[run.train.dtype]
    repeated = 0
    if language.num_kv_heads < language.num_heads:
        repeated = 2 * shape.tokens * language.num_heads * language.kv_channels // run.parallel.tensor * width
    probabilities = _scores(run, size, shape) * (FP32 if width == FP32 else FP32 + width)
    return repeated + shape.length**2 + probabilities


def _attention(run: RunConfig, size: LlavaSize, shape: Shape, *, recomputed: bool) -> int:
    language, adapter, tensor, width = size.language, run.adapter, run.parallel.tensor, BYTES[run.train.dtype]
    tokens, hidden = shape.tokens, language.hidden_size
    heads, groups = language.num_heads * language.kv_channels, language.num_kv_heads * language.kv_channels
    saved = _norm(run, size, shape)
    saved += 4 * shape.length * language.kv_channels * width  # cosines and sines, for queries and for keys
    if adapter.attention:
        # x of q, k, v (whole: gathered from the ranks), A x, and the stacked A
        saved += width * (tokens * (hidden + 3 * adapter.rank) + 3 * adapter.rank * hidden)
        saved += width * tokens * (heads // tensor + adapter.rank)  # the same of o
        saved += _dropped(run, tokens * (hidden + heads // tensor))
    rotated = tokens * heads // tensor  # queries
    is_grouped = language.num_kv_heads < language.num_heads
    if recomputed or not is_grouped:
        # keys, and values, which are a view of what the fused linear gave
        rotated += tokens * (groups + heads + 2 * groups) // tensor
    saved += rotated * width
    return saved if recomputed else saved + _core_attention(run, size, shape)


def _mlp(run: RunConfig, size: LlavaSize, shape: Shape, *, adapted: bool) -> int:
    """The MLP of one layer, with its norm."""
    language, adapter, tensor, width = size.language, run.adapter, run.parallel.tensor, BYTES[run.train.dtype]
    tokens, hidden, ffn = shape.tokens, language.hidden_size, language.ffn_hidden_size // tensor
    saved = _norm(run, size, shape)
    if not adapted:
        return saved + width * tokens * 4 * ffn
    if adapter.method == "lora":
        return saved + width * tokens * (hidden + 3 * adapter.rank + 5 * ffn) + _dropped(run, tokens * (hidden + ffn))
    saved += _routing(run, size, shape) + _experts(run, size, shape) + gathered_bank(run, size)
    return saved + _mixed_factors(run, size)


def _mixed_factors(run: RunConfig, size: LlavaSize) -> int:
    """Of the experts' B that are mixtures of common ones: before their transform, and behind it in the model's dtype;
    and the common ones and the transforms in fp32, where that is another."""
    language, adapter, width = size.language, run.adapter, BYTES[run.train.dtype]
    if not adapter.shared_B:
        return 0
    outputs = 2 * language.ffn_hidden_size // run.parallel.tensor + language.hidden_size
    saved = adapter.num_experts * outputs * adapter.rank * (FP32 + width)
    if width != FP32:
        saved += FP32 * adapter.rank * (adapter.shared_B * outputs + 3 * adapter.num_experts * adapter.rank)
    return saved


def _dropped(run: RunConfig, numbers: int) -> int:
    """What dropout of so many numbers keeps: which of them it left, a byte each (on CUDA; the CPU multiplies by a
    tensor of their own type). What enters an adapter is kept in any case."""
    return numbers if run.adapter.dropout else 0


def _routing(run: RunConfig, size: LlavaSize, shape: Shape) -> int:
    """Of the routers of one block: their input, where the experts do not keep that very tensor, probabilities, weights
    and choices."""
    adapter, tensor, width = run.adapter, run.parallel.tensor, BYTES[run.train.dtype]
    own, form = shape.tokens // tensor, mixture_form(run, size)
    # the router of a down projection has all tokens
    routed = 2 * own + shape.tokens if adapter.router_scope == "linear" else own
    # sigmoids, beside what a softmax keeps
    tables = 1 if adapter.gate == "dense" else 3 if adapter.router_score == "softmax" else 4
    if form == "paired":  # which keep their own weights alone
        tables -= 1
    saved = routed * (FP32 * adapter.num_experts * tables + 8 * adapter.num_choices)
    if form == "masked":
        saved += (shape.tokens - own) * FP32 * adapter.num_experts  # weights of all ranks' tokens
    reads = adapter.router_scope in ("block", "linear")
    # experts whose input is dropped keep another tensor
    if reads and not (form == "masked" and tensor == 1 and not adapter.dropout):
        saved += own * size.language.hidden_size * width
    if adapter.router_scope == "linear" and adapter.dropout:
        saved += shape.tokens * size.language.ffn_hidden_size // tensor * width
    return saved


def _experts(run: RunConfig, size: LlavaSize, shape: Shape) -> int:
    """x, A x of gate, up and down, what enters SwiGLU and what leaves it. Routing is taken for balanced: where tokens
    travel, a rank's experts get as many as it has itself."""
    adapter, tensor, width = run.adapter, run.parallel.tensor, BYTES[run.train.dtype]
    hidden, ffn, ranks = size.language.hidden_size, size.language.ffn_hidden_size // tensor, 3 * adapter.rank
    form, used = mixture_form(run, size), adapter.top_k
    dropped = _dropped(run, shape.tokens * (hidden + (used if adapter.expert_form == "mlp" else 1) * ffn))
    if form == "masked":
        ranks *= 1 if adapter.share_A else adapter.num_experts
        return dropped + shape.tokens * width * (hidden + ranks + 3 * ffn)
    # weights, and the order of the rows there and back; of pairs also where their weights came from
    numbering = used * (FP32 + 8 * (2 if form == "tokens" else 3))
    if adapter.expert_form == "mlp":
        # each pair has an MLP's middle of its own, in and out; and what the adapter sees of that, if another
        middle = (4 if adapter.dropout else 3) * ffn
        return dropped + shape.tokens * (width * used * (hidden + ranks + middle) + numbering)
    return dropped + shape.tokens * (width * (used * (hidden + ranks + ffn) + 2 * ffn) + numbering)


def _decoder_workspace(run: RunConfig, size: LlavaSize, stage: int, shape: Shape) -> int:
    """The most that lies beside saved activations for a moment: at the loss, or in the backward pass of one layer."""
    language, tensor, width = size.language, run.parallel.tensor, BYTES[run.train.dtype]
    tokens, hidden, ffn = shape.tokens, language.hidden_size, language.ffn_hidden_size // tensor
    scores = _scores(run, size, shape)
    attention = scores * (2 * FP32 if width == FP32 else 2 * FP32 + 2 * width)
    # the gradients of the gathered bank, and the same side by side on their way to the owners
    middles = run.adapter.top_k if run.adapter.expert_form == "mlp" else 1
    mlp = width * tokens * (4 * ffn * middles + 2 * hidden) + 2 * gathered_bank(run, size)
    mlp += _decoded(run, decoder_linears(language, tensor))
    layer = max(attention, mlp)
    if run.train.recompute == "full":
        layer += max(
            _attention(run, size, shape, recomputed=False) + _mlp(run, size, shape, adapted=adapted)
            for adapted in {True} | ({False} if run.adapter.layers != "all" else set())
        )
        if adapted_layers(run, size, stage) > 1:  # the next one's, on its way
            layer += gathered_bank(run, size)
    elif run.train.recompute == "selective":
        layer = max(attention + _core_attention(run, size, shape), mlp)
    if stage < run.parallel.pipeline - 1:
        return layer
    logits = tokens * padded_vocabulary(language, tensor) // tensor
    loss = logits * (0 if width == FP32 else 2 * width) + logits * width
    return max(layer, loss)


def _decoded(run: RunConfig, linears: list[tuple[int, int]]) -> int:
    """The weight of the largest of these linears, taken back from FP8 for a product."""
    largest = max(rows * columns for rows, columns in linears)
    return largest * BYTES[run.train.dtype] if run.fp8.store_base and recipe_of(run) is None else 0


def _kept_for_good(run: RunConfig, size: LlavaSize, stage: int, shape: Shape) -> int:
    """What is made in the first step and stays: the buffer that scores are written to, and the routers' sums."""
    kept = _scores(run, size, shape) * BYTES[run.train.dtype]
    adapter = run.adapter
    if adapter.method == "mole":
        pairs = math.comb(adapter.num_experts, 2) if adapter.balance_weight else 0
        rows = pairs + (adapter.num_experts if adapter.z_loss_weight else 0)
        columns = sum(width + 1 for width in router_widths(run, size.language))
        kept += adapted_layers(run, size, stage) * rows * columns * FP32
    return kept


def _dispatch(run: RunConfig, size: LlavaSize, stage: int, shape: Shape) -> int:
    """Tokens on their way: sorted for sending and as received, and sorted again by local expert."""
    if run.adapter.method != "mole" or mixture_form(run, size) != "tokens" or not adapted_layers(run, size, stage):
        return 0
    travels = run.parallel.expert > 1 or run.parallel.tensor > 1
    copies = (2 + 1 / run.parallel.tensor) if travels else 1
    return int(copies * shape.tokens * size.language.hidden_size * BYTES[run.train.dtype])


def _vision_workspace(run: RunConfig, size: LlavaSize, shape: Shape) -> int:
    """One layer of the tower, forward alone: scores and their softmax, or the MLP's middle; and its input."""
    vision, tensor, width = size.vision, run.parallel.tensor, BYTES[run.train.dtype]
    places = shape.images * (vision.num_places + 1)
    scores = places * (vision.num_places + 1) * vision.num_heads // tensor
    attention = scores * (width if width == FP32 else FP32 + width) + 4 * places * vision.hidden_size * width
    mlp = 3 * places * vision.ffn_hidden_size // tensor * width + _decoded(run, vision_linears(vision, tensor))
    return max(attention, mlp) + 2 * places * vision.hidden_size * width
