"""How large each expert's change of its frozen MLP is, and how alike the experts of a layer are.

Nothing of the size of a weight is built: with D = s B A,

    <D_i, D_j> = s^2 tr(A_i A_j^T B_j^T B_i)

Per tensor-parallel rank one of the two small products is whole and the other a partial sum (adapters/sharding.py), so
that the inner products of the ranks simply add.

Shape suffixes: L layers that have experts, E experts, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from mole_mega.adapters.mole import MoLEExperts, MoLELayer
from mole_mega.adapters.routing import RouterMemory
from mole_mega.monitor.metrics import Row
from mole_mega.platform.fp8 import frozen_weight

# Of more experts, only each one's most similar other is written: all pairs would be thousands of scalars a layer.
_MOST_PAIRED = 16


@dataclass(frozen=True)
class ExpertStatistics:
    """`delta_norm_LE`: ||s B A||_F over gate, up and down, relative to ||W||_F of the three frozen weights;
    `similarity_LEE`: cosine between the experts' deltas, 0 where one is zero. On the CPU; every rank holds the same."""

    layers: tuple[int, ...]
    delta_norm_LE: torch.Tensor
    similarity_LEE: torch.Tensor


@torch.no_grad()
def measure_experts(
    blocks: Sequence[MoLELayer], layers: Sequence[int], num_experts: int, groups: ProcessGroupCollection,
    device: torch.device,
) -> ExpertStatistics:  # fmt: skip
    """Measure this stage's blocks and gather the others'; all ranks call it. `layers` are those of the whole model."""
    # a layer's row: <D_i, D_j>, and at the end ||W||^2
    table = torch.zeros(len(layers), num_experts**2 + 1, dtype=torch.float64, device=device)
    for block in blocks:
        row = table[layers.index(block.router.layer)]
        row[:-1] = _inner_products(block.experts, groups.ep).flatten()
        row[-1] = _base_square(block.experts)
    dist.all_reduce(table, group=groups.expt_tp)
    dist.all_reduce(table, group=groups.pp)
    table = table.cpu()
    inner_LEE = table[:, :-1].unflatten(-1, (num_experts, num_experts))
    norm_LE = inner_LEE.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    scale_LEE = norm_LE[:, :, None] * norm_LE[:, None, :]
    similarity_LEE = torch.where(scale_LEE > 0, inner_LEE / scale_LEE, 0.0)
    return ExpertStatistics(tuple(layers), norm_LE / table[:, -1:].sqrt(), similarity_LEE)


def expert_row(statistics: ExpertStatistics, memory: RouterMemory) -> Row:
    """As scalars, with the tokens that each expert has seen in the whole run."""
    row: Row = {}
    tables = zip(
        statistics.layers, statistics.delta_norm_LE.tolist(), memory.tokens_LE.tolist(), statistics.similarity_LEE,
        strict=True,
    )  # fmt: skip
    for layer, norm_E, tokens_E, similarity_EE in tables:
        row |= {f"expert/delta_norm/layer_{layer}/expert_{e}": norm for e, norm in enumerate(norm_E)}
        row |= {f"expert/tokens/layer_{layer}/expert_{e}": tokens for e, tokens in enumerate(tokens_E)}
        for i, j in _pairs(similarity_EE):
            row[f"expert/similarity/layer_{layer}/expert_{i}_{j}"] = float(similarity_EE[i, j])
    return row


def _pairs(similarity_EE: torch.Tensor) -> list[tuple[int, int]]:
    """The pairs i < j that are shown."""
    number = len(similarity_EE)
    if number <= _MOST_PAIRED:
        return [(i, j) for i in range(number) for j in range(i + 1, number)]
    nearest = similarity_EE.clone().fill_diagonal_(-torch.inf).argmax(-1).tolist()
    return sorted({(min(i, j), max(i, j)) for i, j in enumerate(nearest)})


def _inner_products(experts: MoLEExperts, ep_group: dist.ProcessGroup) -> torch.Tensor:
    """This tensor-parallel rank's part of <D_i, D_j> over the layer's experts, [E, E] fp64."""
    number, rank = experts.adapter.num_experts, experts.adapter.rank
    total = torch.zeros(number, number, dtype=torch.float64, device=experts.lora_gate_B.device)
    for projection in ("gate", "up", "down"):
        A = getattr(experts, f"lora_{projection}_A")
        A_ERI = A.float().expand(number, *A.shape) if experts.adapter.share_A else _all_experts(A, ep_group)
        if experts.adapter.shared_B:
            B_EOR = experts.mixed_B(projection).float()
        else:
            B_EOR = _all_experts(getattr(experts, f"lora_{projection}_B"), ep_group)
        A_rows, B_rows = A_ERI.flatten(0, 1), B_EOR.transpose(1, 2).flatten(0, 1)
        products = (A_rows @ A_rows.T).double() * (B_rows @ B_rows.T).double()
        total += products.unflatten(0, (number, rank)).unflatten(-1, (number, rank)).sum((1, 3))
    return total * experts.adapter.scale**2


def _all_experts(mine: torch.Tensor, ep_group: dist.ProcessGroup) -> torch.Tensor:
    """The factors of all experts of a layer in fp32, of which expert-parallel ranks hold a part each."""
    parts = [torch.empty_like(mine) for _ in range(ep_group.size())]
    dist.all_gather(parts, mine.contiguous(), group=ep_group)
    return torch.cat(parts).float()


def _base_square(experts: MoLEExperts) -> torch.Tensor:
    """This tensor-parallel rank's part of the squared norm of the frozen gate, up and down."""
    norms = [
        torch.linalg.vector_norm(frozen_weight(linear), dim=-1, dtype=torch.float32)
        for linear in (experts.linear_fc1, experts.linear_fc2)
    ]
    return torch.cat(norms).double().square().sum()
