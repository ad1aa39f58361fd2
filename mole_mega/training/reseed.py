"""A dead expert becomes a copy of a busy one: what the alarm's reaction `reseed` does to the weights and to Adam.

The copy is each number of the busy expert times 1 + noise N(0, 1), noise drawn by name, seed and step and then cut, so
that every layout ends with the same weights; so does the router's row, while the bias is copied as it is (noise there
would turn all tokens at once to one of the two). From then on the two share the busy one's tokens. Adam's moments of
the new expert start at zero: those that it had are of weights that are gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from mole_mega.adapters import sharding
from mole_mega.training.optimizer import held_parts


@dataclass(frozen=True)
class Reseed:
    """Expert `dead` of decoder layer `layer` (from 0) becomes a copy of `busy` after step `step`."""

    step: int
    layer: int
    dead: int
    busy: int
    noise: float


@torch.no_grad()
def reseed_expert(
    reseed: Reseed,
    model: DistributedDataParallel,
    optimizer: MegatronOptimizer,
    groups: ProcessGroupCollection,
    seed: int,
) -> None:
    """Do it, on all ranks, after an optimizer step that was applied."""
    for block in model.module.mole_layers():
        if block.router.layer == reseed.layer:
            for name, parameter in block.experts.named_parameters(recurse=False):
                if parameter.placement.expert_axis is not None:  # not an A that all experts share
                    _reseed_factor(name, parameter, reseed, optimizer, groups, seed)
            _reseed_router(block.router, reseed, optimizer, groups, seed)


def _reseed_factor(
    name: str,
    parameter: torch.nn.Parameter,
    reseed: Reseed,
    optimizer: MegatronOptimizer,
    groups: ProcessGroupCollection,
    seed: int,
) -> None:
    """One bank of factors [E, ...], whose experts lie on several expert-parallel ranks."""
    here, (owner, index) = groups.ep.rank(), divmod(reseed.busy, len(parameter))
    copy = parameter[index].clone() if owner == here else torch.empty_like(parameter[0])
    dist.broadcast(copy, src=dist.get_global_rank(groups.ep, owner), group=groups.ep)
    owner, index = divmod(reseed.dead, len(parameter))
    if owner == here:
        axis = parameter.placement.tensor_axis  # type: ignore[attr-defined]
        one_expert = sharding.Placement(tensor_axis=None if axis is None else axis - 1)
        _write(parameter, index, _noisy(name, copy, one_expert, reseed, groups, seed), optimizer)


def _reseed_router(
    router: Any, reseed: Reseed, optimizer: MegatronOptimizer, groups: ProcessGroupCollection, seed: int
) -> None:
    row = _noisy("router.weight", router.weight[reseed.busy].clone(), sharding.Placement(), reseed, groups, seed)
    _write(router.weight, reseed.dead, row, optimizer)
    if router.bias is not None:
        _write(router.bias, reseed.dead, router.bias[reseed.busy].clone(), optimizer)


def _noisy(
    name: str,
    part: torch.Tensor,
    placement: sharding.Placement,
    reseed: Reseed,
    groups: ProcessGroupCollection,
    seed: int,
) -> torch.Tensor:
    """This rank's part of one expert's tensor, each number times 1 + noise N(0, 1), in fp32."""
    shape = list(part.shape)
    if placement.tensor_axis is not None:
        shape[placement.tensor_axis] *= groups.tp.size()
    noise = sharding.draw_part(
        f"layers.{reseed.layer}.mlp.{name}.expert_{reseed.dead}.step_{reseed.step}",
        placement,
        tuple(shape),
        sharding.normal,
        groups,
        seed=seed,
    )
    return part.float() * (1 + reseed.noise * noise.to(part.device))


def _write(parameter: torch.nn.Parameter, index: int, value: torch.Tensor, optimizer: MegatronOptimizer) -> None:
    """parameter[index] = value, in the model and in the optimizer's fp32 master; Adam's moments there become zero."""
    parameter[index].copy_(value)
    size = value.numel()
    start, stop = index * size, (index + 1) * size
    for master, moments, offset in held_parts(parameter, optimizer):
        # which of the numbers written lie in the part that this rank's optimizer holds
        first, last = max(start, offset), min(stop, offset + master.numel())
        if first < last:
            place = slice(first - offset, last - offset)
            master.view(-1)[place].copy_(value.reshape(-1)[first - start : last - start])
            for moment in moments:
                moment.view(-1)[place].zero_()
