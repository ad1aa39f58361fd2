"""Handles on a model's LoRA pairs, for what works around the optimizer step (adapters/methods).

A module that owns factors gives a handle a projection (`pairs()`); nobody finds factors by their names. A handle holds
this rank's part and knows what to do for a number of the *whole* tensor: a norm, a Gram matrix, the largest entries.
A bank of experts is one handle with a leading axis, so that its maths is batched and one collective serves all experts.

Shape suffixes: E this rank's experts, R rank, I in, O out. A is [E, R, I] or [R, I], B [E, O, R] or [O, R].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from mole_mega.adapters.sharding import Placement


@dataclass(frozen=True)
class Factor:
    """One factor of a pair. `name` is its own in the whole model; `parameter` is this rank's part of it."""

    name: str
    parameter: torch.nn.Parameter
    groups: ProcessGroupCollection

    @property
    def placement(self) -> Placement:
        return self.parameter.placement  # type: ignore[attr-defined]

    @property
    def is_cut(self) -> bool:
        """Whether tensor-parallel ranks hold parts of it, and not the whole each."""
        return self.placement.tensor_axis is not None

    @property
    def gradient(self) -> torch.Tensor:
        """This rank's part of the reduced gradient, fp32, which the optimizer reads next."""
        return self.parameter.main_grad  # type: ignore[attr-defined]

    @property
    def values(self) -> torch.Tensor:
        """This rank's part, fp32, outside autograd."""
        return self.parameter.detach().float()

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """The whole, over tensor-parallel ranks, of something cut as this factor is; of this rank's experts."""
        axis = self.placement.tensor_axis
        if axis is None:
            return part
        parts = [torch.empty_like(part) for _ in range(self.groups.tp.size())]
        dist.all_gather(parts, part.contiguous(), group=self.groups.tp)
        return torch.cat(parts, dim=axis)

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole: the inverse of `gather`."""
        axis, tp = self.placement.tensor_axis, self.groups.tp
        if axis is None:
            return whole
        return whole.chunk(tp.size(), dim=axis)[tp.rank()].contiguous()

    def whole_shape(self) -> tuple[int, ...]:
        """Of the whole tensor, all experts included."""
        shape = list(self.parameter.shape)
        for axis, group in ((self.placement.expert_axis, self.groups.ep), (self.placement.tensor_axis, self.groups.tp)):
            if axis is not None:
                shape[axis] *= group.size()
        return tuple(shape)

    @property
    def num_experts(self) -> int:
        """How many experts' factors the whole tensor holds; 1 where it has no axis of experts."""
        axis = self.placement.expert_axis
        return 1 if axis is None else self.whole_shape()[axis]

    def numel(self) -> int:
        """How many numbers one expert's whole factor has."""
        rows, columns = self.whole_shape()[-2:]
        return rows * columns

    def largest(self, number: int, among: torch.Tensor) -> torch.Tensor:
        """A bool mask, this rank's part, of the `number` largest magnitudes of each expert's whole factor.

        Entries where the mask `among` is False come after all others; of equal ones the first in the whole tensor's
        order is taken, so that exactly `number` are, in any layout.
        """
        size = self.parameter.abs().detach().masked_fill(~among, -1)
        whole = self.gather(size)
        order = whole.flatten(-2).argsort(dim=-1, descending=True, stable=True)
        mask = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., :number], True)
        return self.part(mask.view(whole.shape))


@dataclass(frozen=True)
class Pair:
    """The LoRA pair of one projection of one linear: y = W x + scale B A x.

    `layer` counts decoder layers from 0; `projection` is q, k, v, o, gate, up or down. `experts` are the numbers of the
    experts whose factors this rank holds; None for plain LoRA. `frozen()` gives this rank's part of W as blocks of rows
    [rows, I] that lie one after the other as B's rows do (a fused base holds several projections).
    """

    name: str
    layer: int
    projection: str
    A: Factor
    B: Factor
    scale: float
    experts: range | None
    frozen: Callable[[], Sequence[torch.Tensor]]

    @property
    def groups(self) -> ProcessGroupCollection:
        return self.A.groups

    @property
    def factors(self) -> tuple[Factor, Factor]:
        return self.A, self.B

    @property
    def num_experts(self) -> int:
        """Of the whole model's pair; 1 for plain LoRA."""
        return self.B.num_experts

    @property
    def shares_A(self) -> bool:  # noqa: N802
        """Whether one A serves all experts: it then has no axis E."""
        return self.experts is not None and self.A.placement.expert_axis is None


@runtime_checkable
class HasPairs(Protocol):
    """A module that owns LoRA factors."""

    def pairs(self) -> list[Pair]: ...


def make_pair(
    module: torch.nn.Module,
    name: str,
    layer: int,
    projection: str,
    scale: float,
    groups: ProcessGroupCollection,
    frozen: Callable[[], Sequence[torch.Tensor]],
) -> Pair:
    """The handle on `module.lora_<projection>_A` and `_B`, which a module that registers its factors so gives away."""
    A, B = (Factor(f"{name}.{f}", getattr(module, f"lora_{projection}_{f}"), groups) for f in ("A", "B"))
    experts = None
    if B.placement.expert_axis is not None:
        number = len(B.parameter)
        experts = range(groups.ep.rank() * number, (groups.ep.rank() + 1) * number)
    return Pair(name, layer, projection, A, B, scale, experts, frozen)


def reduce_together(
    tensors: Sequence[torch.Tensor], group: dist.ProcessGroup, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> list[torch.Tensor]:
    """All-reduce tensors of one dtype in one collective."""
    if not tensors or group.size() == 1:
        return list(tensors)
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, op=op, group=group)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def whole_sums(factors: Sequence[Factor], sums: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Sums over this rank's part of each factor, made sums over the whole factor: one collective at most."""
    cut = [index for index, factor in enumerate(factors) if factor.is_cut]
    totals = list(sums)
    if cut:
        reduced = reduce_together([sums[index] for index in cut], factors[cut[0]].groups.tp)
        for index, total in zip(cut, reduced, strict=True):
            totals[index] = total
    return totals


def squared_norms(factors: Sequence[Factor]) -> list[torch.Tensor]:
    """||factor||_F^2 of the whole tensor by expert, [E] or []."""
    return whole_sums(factors, [factor.values.square().sum((-2, -1)) for factor in factors])


def gram_matrices(pairs: Sequence[Pair]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(A A^T, B^T B) of the whole factors by pair and expert, each [E, R, R] or [R, R] in fp64."""
    products = []
    for pair in pairs:
        A, B = pair.A.values.double(), pair.B.values.double()
        products += [A @ A.mT, B.mT @ B]
    grams = whole_sums([factor for pair in pairs for factor in pair.factors], products)
    return list(zip(grams[0::2], grams[1::2], strict=True))
