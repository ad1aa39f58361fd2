"""The ways in which tensors are scaled for products in FP8, and what each asks of a GPU and of sizes. Without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mole_mega.config import RunConfig

# A sequence is padded to a multiple of this in any case.
_PAD_TO = 8


@dataclass(frozen=True)
class Recipe:
    """A way to scale tensors. `format`: hybrid has gradients in e5m2. `multiple`: of what rows (tokens) and widths of a
    product must be a multiple. `capability`: the least of a GPU, and `below`, which it must be below; `cuda`: the least
    of what torch was built for. `weight_bytes`: what is kept of each number of a frozen weight, scales included."""

    format: str
    multiple: int
    capability: tuple[int, int]
    gpus: str
    weight_bytes: float
    below: tuple[int, int] | None = None
    cuda: tuple[int, int] = (12, 1)

    def why_not(self, capability: tuple[int, int], cuda: tuple[int, int]) -> str:
        """What a GPU or its CUDA lacks for it, in words; empty if nothing."""
        if capability < self.capability:
            return f"needs a GPU of compute capability {dotted(self.capability)} or more ({self.gpus})"
        if self.below is not None and capability >= self.below:
            return f"has no products for compute capability {dotted(self.below)} and more"
        if cuda < self.cuda:
            return f"needs a torch built for CUDA {dotted(self.cuda)} or later, this one is for {dotted(cuda)}"
        return ""


# As Transformer Engine 2.20 checks them. It takes rows in eights and widths in sixteens; the gradient's product swaps
# the two. Of a weight it keeps two copies, for the forward product and, the other way round, for the backward one. (One
# by delayed and tensorwise on Blackwell, whose products read either way; counted are two.) Scales: an fp32 number a
# 128 x 128 block, a byte for each 32 numbers.
RECIPES = {
    "delayed": Recipe("hybrid", 16, (8, 9), "Ada, Hopper, Blackwell", 2),
    "tensorwise": Recipe("hybrid", 16, (8, 9), "Ada, Hopper, Blackwell", 2),
    "blockwise": Recipe("e4m3", 16, (9, 0), "Hopper, Blackwell", 2 * (1 + 4 / 128**2), cuda=(12, 9)),
    "mxfp8": Recipe("e4m3", 32, (10, 0), "Blackwell", 2 * (1 + 1 / 32), below=(12, 0)),
}


def recipe_of(run: RunConfig) -> Recipe | None:
    """That of a run which computes in FP8; None for others."""
    return RECIPES[run.fp8.recipe] if run.train.precision == "fp8" else None


def sequence_multiple(run: RunConfig) -> int:
    """What the places of a sequence must be a multiple of: context and sequence parallelism cut them into parts, the
    first into two a rank, and FP8 takes no odd number of rows of any part."""
    tensor, recipe = run.parallel.tensor, recipe_of(run)
    return run.parallel.context * (math.lcm(_PAD_TO, tensor) if recipe is None else recipe.multiple * tensor)


def dotted(version: tuple[int, int]) -> str:
    """(8, 9) as 8.9."""
    return f"{version[0]}.{version[1]}"
