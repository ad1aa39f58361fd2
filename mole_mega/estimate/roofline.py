"""How long a step takes, by a simple roofline. Good for ranking layouts, not for promising a date.

Assumptions, all of them: GEMMs reach `EFFICIENCY` of the peak (in FP8 of FP8's, and rounding costs nothing); what
autograd keeps is written once and read once, and half as much again passes through memory; links reach
`LINK_EFFICIENCY` of their bandwidth; nothing overlaps; a group that does not fit on one host goes at the network's
speed; routing is balanced; samples are as long as the shape says; every stage waits for the slowest (bubble of 1F1B,
arXiv 2104.04473: (P - 1) micro-batches).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mole_mega.config import RunConfig
from mole_mega.estimate.gpus import Gpu
from mole_mega.estimate.memory import (
    BYTES,
    Shape,
    mixture_form,
    num_micro_batches,
    saved_activations,
    stage_memory,
)
from mole_mega.estimate.parameters import (
    fp8_bytes,
    multiplied_in_fp8,
    padded_vocabulary,
    stage_layers,
    stage_parameters,
)
from mole_mega.estimate.traffic import stage_traffic
from mole_mega.models.sizes import LlavaSize
from mole_mega.platform.recipes import Recipe, recipe_of

EFFICIENCY = 0.5
LINK_EFFICIENCY = 0.7
ASSUMPTIONS = (
    f"GEMMs at {EFFICIENCY:.0%} of the peak, links at {LINK_EFFICIENCY:.0%}, nothing overlaps, balanced routing, "
    "every sample of the longest length, attention between all its places"
)


def fp8_assumptions(recipe: Recipe, gpu: Gpu) -> str:
    """What is assumed of products by a recipe on a GPU, and of the weights that they keep."""
    kept = {1: "once: its products read it either way", 2: "twice, as it is and turned"}[recipe.copies(gpu.capability)]
    return f"its products at the same share of FP8's peak, rounding costs nothing; each weight is kept {kept}"


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step on its slowest stage, by what they go to."""

    compute: float
    memory: float
    tensor: float
    pipeline: float
    expert: float
    context: float
    bubble: float
    data: float
    optimizer: float

    @property
    def total(self) -> float:
        return (
            self.compute + self.memory + self.tensor + self.pipeline + self.expert + self.context + self.bubble
            + self.data + self.optimizer
        )  # fmt: skip


def step_time(run: RunConfig, size: LlavaSize, world_size: int, shape: Shape, gpu: Gpu) -> StepTime:
    """The time of a step of the whole world."""
    stages = [_stage_time(run, size, world_size, stage, shape, gpu) for stage in range(run.parallel.pipeline)]
    return max(stages, key=lambda time: time.total)


def micro_batch_flops(run: RunConfig, size: LlavaSize, stage: int, shape: Shape) -> float:
    """Floating-point operations of one rank for one micro-batch, forward and backward.

    A frozen GEMM costs 2 a weight and token forward and 2 backward (no gradient of the weight), a trained one 2 and 4;
    an expert's factors meet the tokens of that expert alone, or all where all are computed. The tower runs forward
    only.
    """
    numbers, language, vision, tensor = (
        stage_parameters(run, size, stage),
        size.language,
        size.vision,
        run.parallel.tensor,
    )
    tokens, adapter = shape.tokens, run.adapter
    one_expert = numbers.experts * run.parallel.expert // adapter.num_experts
    met = adapter.num_experts if mixture_form(run, size) == "masked" else adapter.top_k  # experts, by each token
    trained = numbers.dense_adapters + met * one_expert + numbers.routers // tensor
    if adapter.method == "mole" and adapter.shared_B:
        # a token meets its experts' mixtures, which are put together once, and not the common factors
        plain = stage_parameters(replace(run, adapter=replace(adapter, shared_B=0)), size, stage)
        one_expert = plain.experts * run.parallel.expert // adapter.num_experts
        trained = plain.dense_adapters + met * one_expert
    heads = language.num_heads * language.kv_channels // tensor
    attention = 4 * shape.length * heads * tokens * len(stage_layers(run, size, stage))
    forward = 2 * tokens * (numbers.decoder + trained) + attention
    backward = 2 * tokens * (numbers.decoder + 2 * trained) + 2 * attention
    again = {"none": 0.0, "selective": attention, "full": forward}[run.train.recompute]
    flops = float(forward + backward + again)
    if stage == run.parallel.pipeline - 1:
        flops += 4 * tokens * padded_vocabulary(language, tensor) // tensor * language.hidden_size
    if stage == 0:
        places = shape.images * (vision.num_places + 1)
        scores = 4 * (vision.num_places + 1) * vision.hidden_size // tensor * vision.num_built_layers
        flops += places * (2 * numbers.vision + scores)
        flops += 2 * places * numbers.projector * (3 if run.train.projector else 1)
    return flops


def fp8_flops(run: RunConfig, size: LlavaSize, stage: int, shape: Shape) -> float:
    """Those of `micro_batch_flops` that are in FP8: the decoder's frozen products."""
    passes = 3 if run.train.recompute == "full" else 2
    return 2.0 * passes * shape.tokens * multiplied_in_fp8(run, size, stage)


def _stage_time(run: RunConfig, size: LlavaSize, world_size: int, stage: int, shape: Shape, gpu: Gpu) -> StepTime:
    parallel, num_batches = run.parallel, num_micro_batches(run, world_size)
    memory = stage_memory(run, size, world_size, stage, shape, gpu.capability)
    traffic = stage_traffic(run, size, world_size, stage, shape)
    in_fp8 = fp8_flops(run, size, stage, shape)
    others = micro_batch_flops(run, size, stage, shape) - in_fp8
    compute = (others / gpu.peak(run.train.dtype) + in_fp8 / gpu.peak("fp8")) / EFFICIENCY
    weights = float(memory.frozen)
    if recipe := recipe_of(run):  # each pass reads one byte a weight of all that is kept
        kept = recipe.weight_bytes(gpu.capability) + (0 if run.fp8.store_base else BYTES[run.train.dtype])
        weights -= (kept - 1) * multiplied_in_fp8(run, size, stage)
    elif run.fp8.store_base:  # what is decoded is written and read
        weights += 2 * BYTES[run.train.dtype] * fp8_bytes(run, size, stage)[0]
    moved = 3 * saved_activations(run, size, stage, shape) + 2 * weights
    passing = moved / gpu.bandwidth
    ranks_a_stage = world_size // parallel.pipeline
    seconds = {
        "tensor": traffic.tensor / _speed(gpu, parallel.tensor),
        "expert": traffic.expert / _speed(gpu, parallel.tensor * parallel.expert),
        "context": traffic.context / _speed(gpu, parallel.tensor * parallel.context),
        "pipeline": traffic.pipeline / _speed(gpu, world_size),
        "data": traffic.data / _speed(gpu, ranks_a_stage),
    }
    travelling = sum(seconds[kind] for kind in ("tensor", "expert", "context", "pipeline"))
    in_a_batch = compute + passing + travelling / num_batches
    return StepTime(
        compute=compute * num_batches,
        memory=passing * num_batches,
        bubble=(parallel.pipeline - 1) * in_a_batch,
        optimizer=2 * (memory.optimizer + memory.gradients) / gpu.bandwidth,
        **seconds,
    )


def _speed(gpu: Gpu, span: int) -> float:
    """Bytes a second between ranks of a group whose members lie within `span` neighbouring ranks."""
    return LINK_EFFICIENCY * (gpu.link if span <= gpu.per_host else gpu.network)
