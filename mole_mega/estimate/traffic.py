"""Bytes that one rank sends in a training step, by kind.

A ring over n ranks: all-gather and reduce-scatter of a tensor of b bytes send (n - 1) / n b from each rank, an
all-reduce twice as much (Patarasuk and Yuan, 2009). An all-to-all sends (n - 1) / n of what a rank holds. Routing is
taken for balanced. Not counted: what routers say, where ranks tell it one another (a few numbers a token).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mole_mega.adapters.traffic import Traffic as ExpertTraffic
from mole_mega.config import RunConfig
from mole_mega.estimate.memory import BYTES, FP32, Shape, num_micro_batches
from mole_mega.estimate.parameters import Parameters, adapted_layers, stage_layers, stage_parameters
from mole_mega.models.expert_parallel import expert_parallel
from mole_mega.models.sizes import LanguageSize, LlavaSize


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes by kind: `tensor` (with sequence parallelism), `pipeline`, `expert` (tokens to their experts and back,
    or the experts' weights and their gradients), `context` (keys and values around the ranks that share a sequence, and
    their gradients) and `data` (gradients, and weights under the distributed optimizer)."""

    tensor: int = 0
    pipeline: int = 0
    expert: int = 0
    context: int = 0
    data: int = 0

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def stage_traffic(run: RunConfig, size: LlavaSize, world_size: int, stage: int, shape: Shape) -> Traffic:
    """What a rank of pipeline stage `stage` sends in a step."""
    parallel, language, width = run.parallel, size.language, BYTES[run.train.dtype]
    num_batches = num_micro_batches(run, world_size)
    data = world_size // (parallel.tensor * parallel.pipeline)
    hidden = shape.tokens * language.hidden_size * width  # a micro-batch between two layers, whole
    part = hidden // parallel.tensor
    numbers = stage_parameters(run, size, stage)
    num_layers, num_adapted = len(stage_layers(run, size, stage)), adapted_layers(run, size, stage)
    passes = 3 if run.train.recompute == "full" else 2  # forward, backward, and forward again

    # attention and MLP each gather the sequence and scatter sums back
    tensor = passes * num_layers * 4 * _ring(hidden, parallel.tensor) * num_batches
    if stage == 0:
        images = shape.images * (size.vision.num_places + 1) * size.vision.hidden_size * width
        tensor += num_batches * 2 * _ring(hidden, parallel.tensor)  # the embedding's sum
        tensor += num_batches * 2 * size.vision.num_built_layers * 2 * _ring(images, parallel.tensor)
    if stage == parallel.pipeline - 1:
        tensor += num_batches * 2 * _ring(hidden, parallel.tensor)  # the output layer's input, and its gradient
    tensor += 2 * _ring(FP32 * partial_gradients(run, language, numbers, num_layers, num_adapted), parallel.tensor)

    neighbours = (stage > 0) + (stage < parallel.pipeline - 1)  # activations go one way, gradients the other
    # the one router of all samples has a copy on each stage
    copies = 2 * _ring(FP32 * numbers.routers, parallel.pipeline) if run.adapter.router_scope == "sample" else 0
    dense = numbers.dense_adapters + numbers.routers + (numbers.projector if run.train.projector else 0)
    return Traffic(
        tensor=tensor,
        pipeline=neighbours * part * num_batches + copies,
        expert=passes * num_adapted * num_batches * width * expert_numbers(run, size, shape),
        context=_ring_attention(run, language, shape) * num_layers * num_batches,
        data=_sync(dense, data, run) + _sync(numbers.experts, data // parallel.expert, run),
    )


def expert_numbers(run: RunConfig, size: LlavaSize, shape: Shape) -> int:
    """Numbers that a rank sends for one layer in one pass, of what travels in this run: `auto` chose by the same."""
    language = size.language
    if run.adapter.method != "mole":
        return 0
    sent = ExpertTraffic.of(run.adapter, run.parallel, language.hidden_size, language.ffn_hidden_size, shape.tokens)
    return sent.tokens if expert_parallel(run, size).form == "tokens" else sent.weights


def _ring_attention(run: RunConfig, size: LanguageSize, shape: Shape) -> int:
    """Bytes that a rank sends for one layer and micro-batch: each rank's keys and values go past all others, forward
    and backward, and their gradients backward (ring attention, arXiv 2310.01889)."""
    groups = size.num_kv_heads * size.kv_channels // run.parallel.tensor
    keys_and_values = 2 * shape.tokens * groups * BYTES[run.train.dtype]
    rounds = 3 if run.train.recompute == "none" else 4
    return rounds * (run.parallel.context - 1) * keys_and_values


def partial_gradients(
    run: RunConfig, size: LanguageSize, numbers: Parameters, num_layers: int, num_adapted: int
) -> int:
    """Trained numbers that tensor-parallel ranks hold whole, and whose gradients they sum (adapters/sharding.py)."""
    adapter = run.adapter
    attention = num_layers * 4 * adapter.rank * size.hidden_size if adapter.attention else 0
    is_mole = adapter.method == "mole"
    banks = adapter.num_experts // run.parallel.expert if is_mole else 1
    # A of gate and up, B of down
    factors = (2 if is_mole and adapter.share_A else 2 * banks) + banks
    mixing = 0
    if is_mole and adapter.shared_B:
        factors = 2 + adapter.shared_B
        mixing = 3 * adapter.num_experts * (adapter.shared_B + adapter.rank**2)
    routers = numbers.routers
    if is_mole and adapter.router_scope == "linear":
        routers -= num_adapted * adapter.num_experts * size.ffn_hidden_size // run.parallel.tensor  # those of down
    return attention + routers + num_adapted * (factors * adapter.rank * size.hidden_size + mixing)


def _ring(num_bytes: int, ranks: int) -> int:
    """What each of `ranks` sends to gather, or to reduce and scatter, a tensor of so many bytes."""
    return num_bytes * (ranks - 1) // ranks


def _sync(numbers: int, ranks: int, run: RunConfig) -> int:
    """Gradients are summed in fp32; the distributed optimizer then gathers the weights it stepped."""
    if run.train.distributed_optimizer:
        return _ring(numbers * FP32, ranks) + _ring(numbers * BYTES[run.train.dtype], ranks)
    return 2 * _ring(numbers * FP32, ranks)
