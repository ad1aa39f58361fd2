"""The middle of experts that are whole MLPs (MixLoRA, arXiv 2404.15159), written as if on one device.

A token's experts e, with weights w_e that sum to 1, have an activation each, over one frozen product:

    h_e = silu(Wg x + Dg_e(x)) * (Wu x + Du_e(x));    m = sum_e w_e h_e = h_1 + sum_e w_e (h_e - h_1)

with h_1 the token's first. The second form of m is exactly h where all h_e are h, so that B = 0 is the frozen model.
What it leaves out of the weights' gradient is one number for all of a token's, which dividing by their sum takes out
again.

Shape suffixes as in mixing.py; F ffn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mole_mega.adapters import bank, cpu_kernels
from mole_mega.adapters.bank import InputGradient
from mole_mega.adapters.cpu_kernels import CompiledProducts
from mole_mega.adapters.mixing import PairedGate
from mole_mega.adapters.mole import SwiGLU


def activate(
    gate: PairedGate,
    fc1_T2F: Tensor,
    x_TH: Tensor,
    A_P: Sequence[Tensor],
    B_P: Sequence[Tensor],
    scale: float,
    gradient: InputGradient | None,
) -> tuple[Tensor, Tensor]:
    """(h [N, F] of each pair, m [T, F]). fc1: the frozen gate and up side by side. A [E, R, H], or [R, H] where the
    experts share it, and B [E, F, R], of gate and of up. `gradient`: as `bank.add_expert_lora` takes it."""
    dtype, A_P = fc1_T2F.dtype, gate.of_experts(A_P)
    x_TH = x_TH.to(dtype).contiguous()
    products = gate.products(fc1_T2F, [*A_P[0].shape[1:], B_P[0].shape[1]])
    if products is not None:
        x_TH = x_TH if gradient is None else x_TH.detach()
        factors = [factor.to(dtype) for factor in (*A_P, *B_P)]
        return _Activate.apply(products, gate, scale, gradient, fc1_T2F, x_TH, gate.weight_N, *factors)
    fc1_N2F, x_NH = gate.to_pairs(fc1_T2F), gate.to_pairs(x_TH)
    h_NF = SwiGLU.apply(bank.add_projections(fc1_N2F, x_NH, A_P, B_P, gate.tokens_per_expert_E, scale, None))
    return h_NF, _Mix.apply(h_NF, gate.weight_N, gate.places(len(fc1_T2F)))


class _Mix(torch.autograd.Function):
    """m of h [N, F]: [T, F]. Rows are read and written where place [T, K] says, none twice: no scatter adds, and
    nothing but h is kept."""

    @staticmethod
    def forward(ctx: Any, h_NF: Tensor, weight_N: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(h_NF, weight_N, place_TK)
        first_T, *others = place_TK.unbind(1)
        first_TF = h_NF.index_select(0, first_T)
        mixed_TF = first_TF.clone()
        for place_T in others:
            weight_T1 = weight_N[place_T, None].to(h_NF.dtype)
            mixed_TF += (h_NF.index_select(0, place_T) - first_TF) * weight_T1
        return mixed_TF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmixed_TF: Tensor) -> tuple[Tensor, Tensor, None]:
        h_NF, weight_N, place_TK = ctx.saved_tensors
        first_T, *others = place_TK.unbind(1)
        first_TF = h_NF.index_select(0, first_T)
        dh_NF, dweight_N = torch.empty_like(h_NF), torch.zeros_like(weight_N)
        weight_of_first_T = torch.ones_like(weight_N[first_T])
        for place_T in others:
            weight_T = weight_N[place_T]
            weight_of_first_T -= weight_T
            dh_NF.index_copy_(0, place_T, dmixed_TF * weight_T[:, None].to(h_NF.dtype))
            more_TF = h_NF.index_select(0, place_T) - first_TF
            dweight_N.index_copy_(0, place_T, (dmixed_TF * more_TF).sum(1, dtype=weight_N.dtype))
        dh_NF.index_copy_(0, first_T, dmixed_TF * weight_of_first_T[:, None].to(h_NF.dtype))
        return dh_NF, dweight_N, None


class _Activate(torch.autograd.Function):
    """`activate` by kernels, which take tokens' rows from where they lie, and go once over a pair's for its activation,
    the sum, and what comes back to both."""

    @staticmethod
    def forward(
        ctx: Any,
        products: tuple[CompiledProducts, CompiledProducts],
        gate: PairedGate,
        scale: float,
        gradient: InputGradient | None,
        fc1_T2F: Tensor,
        x_TH: Tensor,
        weight_N: Tensor,
        *factors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        by_token, by_pair = products
        A_P, B_P = factors[:2], factors[2:]
        z_NPR = by_token.to_rank(x_TH, [A.transpose(1, 2) for A in A_P])
        fc1_N2F = fc1_T2F.new_empty(len(weight_N), fc1_T2F.shape[1])
        of_projections = bank.by_projection(fc1_N2F, B_P, bank.weigh(z_NPR, scale, None))
        for base_TF, (out_NF, B_EFR, zs_NR) in zip(fc1_T2F.chunk(2, dim=1), of_projections, strict=True):
            by_pair.put_from_rank(out_NF, zs_NR, [B_EFR.transpose(1, 2)], base_TF, gate.token_N)
        h_NF, mixed_TF = cpu_kernels.swiglu_mixed(by_pair.library, fc1_N2F, weight_N, gate.places(len(x_TH)))
        ctx.products, ctx.gate, ctx.scale, ctx.gradient = products, gate, scale, gradient
        ctx.save_for_backward(x_TH, z_NPR, fc1_N2F, weight_N, *factors)
        return h_NF, mixed_TF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_NF: Tensor, dmixed_TF: Tensor) -> tuple[Tensor | None, ...]:
        by_token, by_pair = ctx.products
        x_TH, z_NPR, fc1_N2F, weight_N, *factors = ctx.saved_tensors
        A_P, B_P = factors[:2], factors[2:]
        needs_x, _, *needs_factors = ctx.needs_input_grad[5:]

        torch.autograd.graph.increment_version(fc1_N2F)  # it becomes its gradient: a second pass is told
        place_TK = ctx.gate.places(len(x_TH))
        dfc1_T2F, dweight_N = cpu_kernels.swiglu_mixed_backward_(
            by_pair.library, dh_NF, dmixed_TF, fc1_N2F, weight_N, place_TK
        )
        wanted, zs_NPR = any(needs_factors), bank.weigh(z_NPR, ctx.scale, None)
        u_NPR, dB_P = bank.write_gradients(by_pair, fc1_N2F, B_P, zs_NPR, wanted=wanted)
        dz_NPR = bank.weigh(u_NPR, ctx.scale, None)
        dx_TH = None
        if ctx.gradient is not None:
            ctx.gradient.add_later(lambda grad_TH: by_token.add_from_rank_(grad_TH, dz_NPR, A_P))
        elif needs_x:
            dx_TH = by_token.from_rank(dz_NPR, A_P, len(x_TH))
        dA_P: Sequence[Tensor | None] = by_token.outer(dz_NPR, x_TH, 2) if wanted else [None, None]
        return None, None, None, None, dfc1_T2F, dx_TH, dweight_N, *dA_P, *dB_P
