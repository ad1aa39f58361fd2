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
    of what torch was built for. `copy_bytes`: what one copy of a frozen weight takes of each number, scales included;
    `per_tensor`: by one scale a tensor."""

    format: str
    multiple: int
    capability: tuple[int, int]
    gpus: str
    copy_bytes: float
    per_tensor: bool = False
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

    def copies(self, capability: tuple[int, int] | None) -> int:
        """How many copies of a frozen weight a GPU needs: one for the forward product and, the other way round, one for
        the backward product. A single one where a scale of the whole tensor is that of either, and the GPU's products
        read either way (Transformer Engine's `is_non_tn_fp8_gemm_supported`). None is a GPU that is not known: two."""
        if capability is None or not self.per_tensor:
            return 2
        return 1 if (10, 0) <= capability < (12, 0) or capability >= (13, 0) else 2

    def weight_bytes(self, capability: tuple[int, int] | None) -> float:
        """What is kept of each number of a frozen weight on such a GPU, scales included."""
        return self.copies(capability) * self.copy_bytes


# As Transformer Engine 2.20 checks them. It takes rows in eights and widths in sixteens; the gradient's product swaps
# the two. Scales: an fp32 number a 128 x 128 block, a byte for each 32 numbers.
RECIPES = {
    "delayed": Recipe("hybrid", 16, (8, 9), "Ada, Hopper, Blackwell", 1, per_tensor=True),
    "tensorwise": Recipe("hybrid", 16, (8, 9), "Ada, Hopper, Blackwell", 1, per_tensor=True),
    "blockwise": Recipe("e4m3", 16, (9, 0), "Hopper, Blackwell", 1 + 4 / 128**2, cuda=(12, 9)),
    "mxfp8": Recipe("e4m3", 32, (10, 0), "Blackwell", 1 + 1 / 32, below=(12, 0)),
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
