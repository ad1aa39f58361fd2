"""Dropout of LoRA inputs under tensor parallelism, by Megatron-Core's generators.

With sequence parallelism Megatron-Core runs the decoder inside a fork of `model-parallel-rng`, which differs from rank
to rank: numbers that come from there are no good for an input that all ranks hold alike. And what a recomputed layer
draws must not come from a nested fork of that same generator, for the state that is brought back for the second pass is
the one that was put aside last, before the first. So each kind of input has a generator of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.random import (
    get_data_parallel_rng_tracker_name,
    get_expert_parallel_rng_tracker_name,
)


def drop_whole(x: torch.Tensor, probability: float) -> torch.Tensor:
    """Dropout of an input of any shape that is the same on all tensor-parallel ranks: they drop the same of it. What
    stays is divided by 1 - probability."""
    return _drop(x, probability, get_data_parallel_rng_tracker_name())


def drop_cut(x: torch.Tensor, probability: float) -> torch.Tensor:
    """As `drop_whole`, of an input whose features tensor-parallel ranks hold apart: each drops its own."""
    return _drop(x, probability, get_expert_parallel_rng_tracker_name())


def _drop(x: torch.Tensor, probability: float, generator: str) -> torch.Tensor:
    with get_cuda_rng_tracker().fork(generator):
        return F.dropout(x, probability)
