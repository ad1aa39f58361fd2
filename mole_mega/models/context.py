"""Context parallelism: which places of a sequence a rank holds.

Of C ranks, rank c holds chunks c and 2C - 1 - c of 2C equal ones, so that under a causal mask all have as much to
attend to. (Megatron-Core cuts its rotations so, and Transformer Engine's attention expects it.) The sequence is whole
until images are spliced in; from the first layer on, and in the loss, each rank has its own places alone.
"""

from __future__ import annotations

import dataclasses

import torch

from mole_mega.platform.parallel import Parallel


@dataclasses.dataclass(frozen=True)
class ContextPart:
    """Rank `rank` of `size`."""

    rank: int
    size: int

    @staticmethod
    def of(parallel: Parallel) -> ContextPart:
        """This process's."""
        return ContextPart(parallel.cp_rank, parallel.cp_size)

    def take(self, whole: torch.Tensor, axis: int = 1) -> torch.Tensor:
        """This rank's places of a tensor that has all along `axis`; their number must divide by 2 `size`."""
        if self.size == 1:
            return whole
        assert whole.shape[axis] % (2 * self.size) == 0, (whole.shape, axis, self.size)
        chunks = whole.chunk(2 * self.size, dim=axis)
        return torch.cat([chunks[self.rank], chunks[2 * self.size - 1 - self.rank]], dim=axis)
