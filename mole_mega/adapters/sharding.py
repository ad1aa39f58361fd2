"""Where each adapter tensor lives, as one table, and its readers' common tools.

Construction cuts a tensor by it, Megatron-Core's gradient sync obeys the marks that `place` sets, the checkpoint writes
by it and export reads by it. The maths elsewhere knows none of this.

A *partial* tensor is one that tensor-parallel ranks hold in full while each computes its gradient from a part of the
sequence, the heads or the hidden units: the parts must be summed. Forgetting that leaves the loss right and the
gradient wrong.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True)
class Placement:
    """Which axis of a tensor is cut over expert- and tensor-parallel ranks (None: held in full by each)."""

    expert_axis: int | None = None
    tensor_axis: int | None = None

    @property
    def partial(self) -> bool:
        """Held in full by tensor-parallel ranks, each of which computes a part of the gradient."""
        return self.tensor_axis is None


# A LoRA pair under a base linear: `column` cuts the base's outputs over TP, `row` its inputs. A is [rank, in],
# B is [out, rank]; banks of experts carry one leading axis more.
PLACEMENTS = {
    "router.weight": Placement(),
    "router.bias": Placement(),
    # of a linear whose inputs are cut, such as down
    "router.row.weight": Placement(tensor_axis=1),
    # that no gradient moves
    "router.score_bias": Placement(),
    "column.A": Placement(),
    "column.B": Placement(tensor_axis=0),
    "row.A": Placement(tensor_axis=1),
    "row.B": Placement(),
    "experts.column.A": Placement(expert_axis=0),
    "experts.column.B": Placement(expert_axis=0, tensor_axis=1),
    "experts.row.A": Placement(expert_axis=0, tensor_axis=2),
    "experts.row.B": Placement(expert_axis=0),
    # several B that all experts share, [number, out, rank], and how each expert mixes them
    "shared.column.B": Placement(tensor_axis=1),
    "shared.row.B": Placement(),
    "shared.mix": Placement(),
    "shared.transform": Placement(),
}


def make_parameter(
    name: str,
    placement: Placement,
    full_shape: tuple[int, ...],
    init: Callable[[torch.Tensor, torch.Generator], None],
    groups: ProcessGroupCollection,
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.nn.Parameter:
    """This rank's part of the adapter tensor `name`, initialised as one process would: `draw_part` as a parameter."""
    part = draw_part(name, placement, full_shape, init, groups, seed=seed)
    parameter = torch.nn.Parameter(part.to(device=device, dtype=dtype).clone())
    place(parameter, placement)
    return parameter


def draw_part(
    name: str,
    placement: Placement,
    full_shape: tuple[int, ...],
    init: Callable[[torch.Tensor, torch.Generator], None],
    groups: ProcessGroupCollection,
    *,
    seed: int,
) -> torch.Tensor:
    """This rank's part of a tensor that `init` draws: fp32, on the CPU.

    The whole tensor is drawn from a generator seeded by (seed, name) and then cut, so that every layout gets the same
    numbers. `full_shape` must divide along the placement's axes; the caller has checked that.
    """
    whole = torch.empty(full_shape, dtype=torch.float32)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    init(whole, torch.Generator().manual_seed(int.from_bytes(digest[:7], "little")))
    part = whole
    for axis, rank, size in _cuts(placement, groups):
        part = part.chunk(size, dim=axis)[rank]
    return part


def place(parameter: torch.nn.Parameter, placement: Placement) -> None:
    """Mark a parameter in Megatron-Core's words.

    `sequence_parallel` makes `finalize_model_grads` sum the gradient over the tensor-parallel group (which is also the
    expert-tensor group here), `allreduce=False` makes data-parallel sync use the expert-data group, and
    `tensor_model_parallel` says that the norm must count every rank's part.
    """
    parameter.placement = placement  # type: ignore[attr-defined]
    parameter.sequence_parallel = placement.partial  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = placement.tensor_axis is not None  # type: ignore[attr-defined]
    parameter.partition_dim = -1 if placement.tensor_axis is None else placement.tensor_axis  # type: ignore[attr-defined]
    parameter.partition_stride = 1  # type: ignore[attr-defined]
    parameter.allreduce = placement.expert_axis is None  # type: ignore[attr-defined]


def sharded_adapters(module: torch.nn.Module, prefix: str, groups: ProcessGroupCollection) -> ShardedStateDict:
    """The checkpoint entries of the placed parameters that `module` itself holds, keyed `prefix + name`."""
    entries: ShardedStateDict = {}
    for name, parameter in module.named_parameters(recurse=False):
        placement = getattr(parameter, "placement", None)
        if placement is not None:
            entries[prefix + name] = sharded_entry(prefix + name, parameter, placement, groups)
    return entries


def sharded_entry(
    key: str, tensor: torch.Tensor, placement: Placement, groups: ProcessGroupCollection
) -> ShardedTensor:
    """The checkpoint entry of this rank's part of the tensor that is called `key` in the whole model."""
    # the copies of one part: over TP where TP holds it in full, over the data-parallel ranks that remain
    data_group = groups.dp_cp if placement.expert_axis is None else groups.expt_dp
    replica = (0, groups.tp.rank() if placement.partial else 0, data_group.rank())
    return ShardedTensor.from_rank_offsets(key, tensor, *_cuts(placement, groups), replica_id=replica)


def kaiming_uniform(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """A's initialisation, U(-1/sqrt(in), 1/sqrt(in)): Kaiming uniform with a = sqrt(5), as released with LLaVA-MoLE."""
    bound = 1 / math.sqrt(tensor.shape[-1])
    tensor.uniform_(-bound, bound, generator=generator)


def normal(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """N(0, 1)."""
    tensor.normal_(generator=generator)


def zeros(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """B's initialisation: the adapted model starts as the frozen one."""
    tensor.zero_()


def identity(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Each matrix of a stack the identity."""
    tensor.copy_(torch.eye(tensor.shape[-1]))


def _cuts(placement: Placement, groups: ProcessGroupCollection) -> list[tuple[int, int, int]]:
    """(axis, this rank's part, number of parts) for each axis that is cut."""
    cuts = []
    if placement.expert_axis is not None:
        cuts.append((placement.expert_axis, groups.ep.rank(), groups.ep.size()))
    if placement.tensor_axis is not None:
        cuts.append((placement.tensor_axis, groups.tp.rank(), groups.tp.size()))
    return cuts
