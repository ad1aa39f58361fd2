"""What FP8's `delayed` scaling remembers from one pass to the next: of each frozen linear the scales of what it
multiplies, and the largest entries seen since these were set. The other recipes measure anew in every product.

Transformer Engine's own form for checkpoints is a pickle, which would have to be trusted. Entries here are the same
tensors as they are. All ranks of a pipeline stage hold the same scales, which follow from maxima over all of them, so
that any layout can read what any other wrote.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.fp8_utils import get_fp8_context, get_fp8_recipe

from mole_mega.config import RunConfig

_PASSES = {"scaling_fwd": "forward", "scaling_bwd": "backward"}  # as Transformer Engine calls them, and as we do


def remembers_scales(run: RunConfig) -> bool:
    """Whether a run's products have scales that a checkpoint must hold."""
    return run.train.precision == "fp8" and run.fp8.recipe == "delayed"


def make_scales(decoder: Any) -> None:
    """Give each linear that multiplies in FP8 its scales before its first pass, which otherwise makes them: room to
    load into. (What Transformer Engine does when it reads its own form.)"""
    recipe = get_fp8_recipe(decoder.config)
    # a linear looks at its context's recipe too; one that ends with gradients would set scales
    with torch.no_grad(), get_fp8_context(decoder.config):
        for _, linear in _linears(decoder):
            linear.fp8_meta["num_gemms"] = 1
            linear.init_fp8_meta_tensors(recipe)


def scale_entries(decoder: Any, group: dist.ProcessGroup) -> ShardedStateDict:
    """The checkpoint entries of all scales that there are. `group`: the ranks of this pipeline stage, which call it
    together.

    A pass without gradients (validation) leaves maxima that no other rank has heard of yet. They are agreed on here;
    the next pass would do so before it used them.
    """
    states = {
        f"fp8_scaling.{name}.{ours}": linear.fp8_meta[theirs]
        for name, linear in _linears(decoder)
        for theirs, ours in _PASSES.items()
        if theirs in linear.fp8_meta
    }
    if not states:
        return {}
    seen = [state.amax_history for state in states.values()]
    largest = torch.cat([history.flatten() for history in seen])
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    for history, part in zip(seen, largest.split([history.numel() for history in seen]), strict=True):
        history.copy_(part.view_as(history))
    return {
        f"{key}.{kind}": ShardedTensor.from_rank_offsets(f"{key}.{kind}", tensor, replica_id=group.rank())
        for key, state in states.items()
        for kind, tensor in (("scale", state.scale), ("largest", state.amax_history))
    }


def _linears(decoder: Any) -> Iterator[tuple[str, Any]]:
    """Transformer Engine's linears, by their names in the whole decoder."""
    for layer in decoder.layers:
        for name, module in layer.named_modules():
            # its attention remembers nothing: only linears multiply in FP8
            if hasattr(module, "init_fp8_meta_tensors") and hasattr(module, "weight"):
                yield f"layers.{layer.layer_number - 1}.{name}", module
