"""The maths of a mixture in which a token may use several LoRA experts, written as if on one device.

One formula, a gate in rank space: with the experts' factors stacked, A [sum of ranks, in] and B [out, sum of ranks],

    y = W x + s B (G * (A x))        G [tokens, sum of ranks]: an expert's weight w_te in the columns of its ranks

W x is computed once a token, however many experts it uses. Two forms compute the rest, equal by test: `MaskedGate`, two
plain products with the gate between them, every expert for every token; and `PairedGate`, a row for each pair of a
token and an expert that it uses, sorted by expert (bank.py). Not here: who chooses, where factors live, communication.

Shape suffixes: T tokens, N pairs (token, expert), K experts a token uses, H hidden, I in, O out, E experts, R rank,
P projections that read the same x.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mole_mega.adapters import bank, cpu_kernels, forms
from mole_mega.adapters.bank import InputGradient
from mole_mega.adapters.cpu_kernels import CompiledProducts


@dataclass(frozen=True)
class MaskedGate:
    """weight_TE: fp32, 0 for an expert that a token does not use. Or weight_TPE, one of its own for each projection.
    `few`: so many are 0 that products are faster without them (`forms.uses_few`)."""

    weight: Tensor
    rescaled: bool = False
    few: bool = False

    def add_lora(self, base_TO: Tensor, x_TI: Tensor, A_P: Sequence[Tensor], B_P: Sequence[Tensor], scale: float,
                 gradient: InputGradient | None = None) -> Tensor:  # fmt: skip
        """See `Gate`."""
        dtype = base_TO.dtype
        x_TI = x_TI.to(dtype).contiguous()
        factors = [factor.to(dtype) for factor in (*A_P, *B_P)]
        weight = self.weight if self.weight.dim() == 3 else self.weight[:, None]
        x_TI = x_TI if gradient is None else x_TI.detach()
        kernels = cpu_kernels.library_for(base_TO) if self.few and cpu_kernels.in_rows(base_TO) else None
        settings = (scale, self.rescaled, kernels, gradient)
        return _AddMasked.apply(*settings, bank.overwritable(base_TO), x_TI, weight, *factors)


@dataclass(frozen=True)
class PairedGate:
    """The pairs of a token and an expert that it uses, as many for each token, sorted by expert and then by token.
    token_N: whose each is; tokens_per_expert_E; weight_N fp32."""

    token_N: Tensor
    tokens_per_expert_E: Tensor
    weight_N: Tensor
    rescaled: bool = False

    @cached_property
    def inverse_N(self) -> Tensor:  # noqa: N802
        """Where the pairs of the first token stand, then those of the second, and so on."""
        return self.token_N.argsort(stable=True)

    def places(self, num_tokens: int) -> Tensor:
        """Where each token's pairs stand, [T, K]."""
        return self.inverse_N.view(num_tokens, -1)

    def products(self, like: Tensor, sizes: Sequence[int]) -> tuple[CompiledProducts, CompiledProducts] | None:
        """(over a tensor with a row for each token, which its pairs share; over one with a row for each pair); None
        where kernels do not take tensors like this one, or these sizes."""
        return self._products if cpu_kernels.library_for(like, sizes) is not None else None

    @cached_property
    def _products(self) -> tuple[CompiledProducts, CompiledProducts] | None:
        kernels = cpu_kernels.library_for(self.weight_N)
        if kernels is None:
            return None
        by_token = CompiledProducts(kernels, self.tokens_per_expert_E, self.token_N)
        return by_token, CompiledProducts(kernels, self.tokens_per_expert_E)

    def add_lora(self, base_TO: Tensor, x_TI: Tensor, A_P: Sequence[Tensor], B_P: Sequence[Tensor], scale: float,
                 gradient: InputGradient | None = None, *, x_by_pair: bool = False) -> Tensor:  # fmt: skip
        """See `Gate`. `x_by_pair`: x has a row for each pair, [N, I]."""
        A_P = self.of_experts(A_P)
        products = self.products(base_TO, [A_P[0].shape[1], x_TI.shape[1], *(B.shape[1] for B in B_P)])
        if products is not None:
            by_token, by_pair = products
            reads, weight_N, rescaled = by_pair if x_by_pair else by_token, self.weight_N, self.rescaled
            return bank.add_with(reads, by_token, base_TO, x_TI, A_P, B_P, scale, weight_N, gradient, rescaled=rescaled)
        x_NI = x_TI.to(base_TO.dtype)
        x_NI = x_NI if x_by_pair else self.to_pairs(x_NI)
        delta_NO = base_TO.new_zeros(len(x_NI), base_TO.shape[1])
        weight_N = self.weight_N
        if self.rescaled:
            weight_N = weight_N.sqrt().detach()
            fixed_A, fixed_B = [A.detach() for A in A_P], [B.detach() for B in B_P]
            delta_NO = bank.add_projections(
                delta_NO, x_NI.detach(), fixed_A, fixed_B, self.tokens_per_expert_E, scale, self.weight_N - weight_N
            )
        delta_NO = bank.add_projections(delta_NO, x_NI, A_P, B_P, self.tokens_per_expert_E, scale, weight_N)
        return base_TO + self.from_pairs(delta_NO, len(base_TO))

    def of_experts(self, A_P: Sequence[Tensor]) -> list[Tensor]:
        """Each A with an axis of experts, where they share it too."""
        num_experts = len(self.tokens_per_expert_E)
        return [A if A.dim() == 3 else A.expand(num_experts, *A.shape) for A in A_P]

    def to_pairs(self, x_TI: Tensor) -> Tensor:
        """Each token's row for each of its pairs, sorted by expert: [N, I]."""
        return _ToPairs.apply(x_TI, self.token_N, self.inverse_N)

    def from_pairs(self, rows_NO: Tensor, num_tokens: int) -> Tensor:
        """The sum of each token's pairs: [T, O]."""
        return _FromPairs.apply(rows_NO, self.token_N, self.inverse_N, num_tokens)


Gate = MaskedGate | PairedGate
"""Who uses which expert, and how much, for T tokens. One gate serves every linear of a block.

`add_lora(base, x, A_P, B_P, scale)` gives y_t = base_t + scale * concat_p(sum_e w_te B_pe A_pe x_t), [T, O]; A_P are
[E, R, I], or [R, I] where the experts share it; B_P are [E, O_p, R] and fill O side by side. base is consumed.
`gradient`: as `bank.add_expert_lora` takes it; a form that leaves it alone gives x its gradient itself. The
products run in its dtype. Double backward is not supported.

`rescaled`: backward the experts get sqrt(w) where w stood, and the gate what it always gets (MoE-LoRA with Riemannian
preconditioning, arXiv 2502.15828): with e an expert's output and sg stopping gradients,

    sg(sqrt w) e + (w - sg(sqrt w)) sg(e)
"""


def make_gate(
    weight_TE: Tensor, chosen_TE: Tensor, top_k: int, rank: int, dtype: torch.dtype, *, rescaled: bool = False
) -> Gate:
    """The faster form, in this dtype, for tokens that use `top_k` of E experts each: those that `chosen` marks."""
    num_tokens, num_experts = weight_TE.shape
    in_place = weight_TE.device.type == "cpu" and cpu_kernels.library(dtype) is not None
    if forms.computes_all(num_experts, top_k, rank, dtype.itemsize, in_place=in_place) or num_tokens == 0:
        return MaskedGate(weight_TE, rescaled, few=forms.uses_few(num_experts, top_k, dtype.itemsize))
    return paired(weight_TE, chosen_TE, top_k, rescaled=rescaled)


def paired(weight_TE: Tensor, chosen_TE: Tensor, top_k: int, *, rescaled: bool = False) -> PairedGate:
    """The pairs of exactly `top_k` chosen experts a token. Nothing here waits for the device."""
    num_tokens, num_experts = weight_TE.shape
    expert_N, token_N = chosen_TE.T.nonzero_static(size=num_tokens * top_k).unbind(1)
    weight_N = weight_TE.flatten().index_select(0, token_N * num_experts + expert_N)
    return PairedGate(token_N.contiguous(), chosen_TE.sum(0), weight_N, rescaled)


class _AddMasked(torch.autograd.Function):
    """out = base + concat_p(zw_p B_p^T) with z_p = x A_p^T over all experts' ranks, zw_p = scale * w * z_p.

    With g = d loss / d out and u_p = g_p B_p (rank space):
        d base = g      d w_te = scale * sum_p <u_pte, z_pte>      dz_p = scale * w * u_p
        d B_p = g_p^T zw_p      d A_p = dz_p^T x, summed over experts if they share it      d x = sum_p dz_p A_p

    `rescaled`: sqrt(w) in place of w in the last two rows. `kernels`: where they are given, what is 0 of zw and dz is
    passed over, but in a dx that is not added to another.
    """

    @staticmethod
    def forward(
        ctx: Any,
        scale: float,
        rescaled: bool,
        kernels: ctypes.CDLL | None,
        gradient: InputGradient | None,
        base_TO: Tensor,
        x_TI: Tensor,
        weight_TPE: Tensor,
        *factors: Tensor,
    ) -> Tensor:
        A_P, B_P = factors[: len(factors) // 2], factors[len(factors) // 2 :]
        z = x_TI @ _read_rows(A_P).t()
        *experts, rank, _ = A_P[0].shape
        z_TPER = z.view(len(x_TI), len(A_P), *(experts or [1]), rank)  # E is 1 where the experts share A
        zw_TPER = _weigh(z_TPER, scale, weight_TPE)
        for p, (out_TO, B_EOR) in enumerate(zip(_columns(base_TO, B_P), B_P, strict=True)):
            _add_product_(kernels, out_TO, zw_TPER[:, p].flatten(1), _write_rows(B_EOR))
        ctx.mark_dirty(base_TO)
        ctx.scale, ctx.rescaled, ctx.kernels, ctx.gradient = scale, rescaled, kernels, gradient
        ctx.save_for_backward(x_TI, z_TPER, weight_TPE, *factors)
        return base_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, z_TPER, weight_TPE, *factors = ctx.saved_tensors
        A_P, B_P = factors[: len(factors) // 2], factors[len(factors) // 2 :]
        needs_x, needs_weight, *needs_factors = ctx.needs_input_grad[5:]
        grad_TO = grad_TO.contiguous()  # sum().backward() sends an expanded one

        weight_TPE = weight_TPE.sqrt() if ctx.rescaled else weight_TPE
        zw_TPER = _weigh(z_TPER, ctx.scale, weight_TPE)
        u_P, dB_P = [], []
        for p, (g_TO, B_EOR) in enumerate(zip(_columns(grad_TO, B_P), B_P, strict=True)):
            u_P.append((g_TO @ _write_rows(B_EOR).t()).unflatten(1, (len(B_EOR), B_EOR.shape[2])))
            dB_RO = _outer(ctx.kernels, zw_TPER[:, p].flatten(1), g_TO) if any(needs_factors) else None
            dB_P.append(None if dB_RO is None else dB_RO.unflatten(0, (len(B_EOR), -1)).transpose(1, 2))
        u_TPER = torch.stack(u_P, dim=1)
        dweight_TPE = None
        if needs_weight:
            dweight_TPE = ctx.scale * (u_TPER.to(weight_TPE.dtype) * z_TPER).sum(-1)
            if weight_TPE.shape[1] == 1:  # one gate for all projections
                dweight_TPE = dweight_TPE.sum(1, keepdim=True)
        dz_TPER, kernels = _weigh(u_TPER, ctx.scale, weight_TPE), ctx.kernels
        if z_TPER.shape[2] < dz_TPER.shape[2]:  # one A for all experts, whose ranks all are used
            dz_TPER, kernels = dz_TPER.sum(2, keepdim=True), None
        dz = dz_TPER.flatten(1)
        dx_TI, A_RI = None, _read_rows(A_P)
        if ctx.gradient is not None:
            ctx.gradient.add_later(lambda grad_TI: _add_product_(kernels, grad_TI, dz, A_RI))
        elif needs_x:
            dx_TI = dz @ A_RI
        dA_P: Sequence[Tensor | None] = [None] * len(A_P)
        if any(needs_factors):
            dA_RI = _outer(kernels, dz, x_TI)
            dA_P = [dA.unflatten(0, A.shape[:-1]) for dA, A in zip(dA_RI.chunk(len(A_P)), A_P, strict=True)]
        return None, None, None, None, grad_TO, dx_TI, dweight_TPE, *dA_P, *dB_P


class _ToPairs(torch.autograd.Function):
    """Each token's row for each of its pairs, in sorted order: [T, I] -> [N, I]. Its gradient sums a token's pairs in a
    fixed order: an atomic scatter would not give the same bits twice."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, token_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N)
        ctx.num_tokens = len(x_TI)
        return x_TI.index_select(0, token_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NI: Tensor) -> tuple[Tensor, None, None]:
        (inverse_N,) = ctx.saved_tensors
        return _from_pairs(grad_NI, inverse_N, ctx.num_tokens), None, None


class _FromPairs(torch.autograd.Function):
    """The sum of each token's pairs: [N, O] -> [T, O]."""

    @staticmethod
    def forward(ctx: Any, rows_NO: Tensor, token_N: Tensor, inverse_N: Tensor, num_tokens: int) -> Tensor:
        ctx.save_for_backward(token_N)
        return _from_pairs(rows_NO, inverse_N, num_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor, None, None, None]:
        (token_N,) = ctx.saved_tensors
        return grad_TO.index_select(0, token_N), None, None, None


def _from_pairs(rows_N: Tensor, inverse_N: Tensor, num_tokens: int) -> Tensor:
    return rows_N.index_select(0, inverse_N).unflatten(0, (num_tokens, -1)).sum(1)


def _weigh(z_TPER: Tensor, scale: float, weight_TPE: Tensor) -> Tensor:
    """scale * w * z; the product is rounded to z's dtype once, whatever the weight's."""
    return (z_TPER * (scale * weight_TPE)[..., None]).to(z_TPER.dtype)


def _add_product_(kernels: ctypes.CDLL | None, out_TO: Tensor, z_TR: Tensor, M_RO: Tensor) -> None:
    """out += z M."""
    if kernels is None:
        out_TO.addmm_(z_TR, M_RO)
    else:
        cpu_kernels.add_few_(kernels, out_TO, z_TR, M_RO)


def _outer(kernels: ctypes.CDLL | None, z_TR: Tensor, wide_TW: Tensor) -> Tensor:
    """z^T wide, [R, W]."""
    if kernels is None:
        # as columns: torch multiplies few rows by a wide tensor more slowly in fp32 on the CPU
        return (wide_TW.t() @ z_TR).t()
    return cpu_kernels.outer_few(kernels, z_TR, wide_TW)


def _read_rows(A_P: Sequence[Tensor]) -> Tensor:
    """The ranks of all projections and experts: [P E R, I], or [P R, I] where experts share A."""
    rows = [A.reshape(-1, A.shape[-1]) for A in A_P]
    return torch.cat(rows) if len(rows) > 1 else rows[0]


def _write_rows(B_EOR: Tensor) -> Tensor:
    """[E R, O]."""
    return B_EOR.transpose(1, 2).reshape(-1, B_EOR.shape[1])


def _columns(wide_TO: Tensor, B_P: Sequence[Tensor]) -> Sequence[Tensor]:
    """The columns of each projection."""
    return wide_TO.split([B.shape[1] for B in B_P], dim=1)
