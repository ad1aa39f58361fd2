"""Experts that mix common factors: the B of MTL-LoRA (arXiv 2410.09437).

    h = W x + s (sum_n softmax(w_e / T)_n B_n) Lambda_e A x

e the sample's task, A one for all, B_n a few for all, Lambda_e an r x r transform that begins as the identity. What
stands before A depends on the task alone, so it is put together once a pass, and the mixture then has experts like any
other: one A, and a B each.

Shape suffixes: E experts, N common factors, O out, R rank.
"""

from __future__ import annotations

import torch


def mix_factors(
    B_NOR: torch.Tensor, weight_EN: torch.Tensor, transform_ERR: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Each expert's own B, [E, O, R], in B's dtype; put together in fp32 or above. B may be a part of it along O."""
    dtype = torch.promote_types(B_NOR.dtype, torch.float32)
    share_EN = torch.softmax(weight_EN.to(dtype) / temperature, dim=-1)
    mixed_EOR = torch.einsum("en,nor->eor", share_EN, B_NOR.to(dtype))
    return (mixed_EOR @ transform_ERR.to(dtype)).to(B_NOR.dtype)
