"""The maths of a bank of LoRA experts (LLaVA-MoLE, arXiv 2401.16160), written as if on one device.

Here: y_t = base_t + w_t s B_e A_e x_t for tokens already sorted by their expert e, and its gradients. Not here: who
chooses e (routers), where the factors live (sharding), how tokens travel and return, dropout.

Shape suffixes: T tokens, H hidden, F ffn, E experts of this bank, R rank, I in, O out, P projections that share x (PR:
their ranks side by side). A [E, R, I] reads the input, B [E, O, R] writes the output, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm, pad

from mole_mega.adapters import cpu_kernels
from mole_mega.adapters.cpu_kernels import CompiledProducts

# torch.nn.functional.grouped_mm refuses rows that do not start on a multiple of this many bytes, and other dtypes.
_ALIGN_BYTES = 16
_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def add_expert_lora(
    base_TO: Tensor,
    x_TI: Tensor,
    A_ERI: Tensor,
    B_EOR: Tensor,
    tokens_per_expert_E: Tensor,
    scale: float,
    weight_T: Tensor | None = None,
    gradient: InputGradient | None = None,
) -> Tensor:
    """y_t = base_t + weight_t * scale * B_e A_e x_t, where e is the expert of token t; returns [T, O].

    Tokens are sorted by expert: the first tokens_per_expert_E[0] rows belong to expert 0, and so on; the counts sum to
    T and may be 0. An expert without tokens gets a gradient of exact zeros.

    **base_TO is consumed**: its memory becomes the result where autograd allows; the caller must not read it again.
    The products run in the dtype of base_TO, the factors may be of another. Double backward is not supported.
    `gradient`: where x is what `share_input` gave, what it gave with it; the gradient of x goes there.
    Raises ValueError when the counts are on the CPU (checking costs no synchronisation there) and do not sum to T.
    """
    return add_projections(base_TO, x_TI, [A_ERI], [B_EOR], tokens_per_expert_E, scale, weight_T, gradient)


def add_gated_expert_lora(
    base_T2F: Tensor,
    x_TH: Tensor,
    gate_A_ERH: Tensor,
    gate_B_EFR: Tensor,
    up_A_ERH: Tensor,
    up_B_EFR: Tensor,
    tokens_per_expert_E: Tensor,
    scale: float,
    weight_T: Tensor | None = None,
    gradient: InputGradient | None = None,
) -> Tensor:
    """`add_expert_lora` for gate (first F columns) and up (last F columns) of one fused base, reading x once; [T, 2F].

    y_t = base_t + weight_t * scale * concat(Bg_e Ag_e x_t, Bu_e Au_e x_t)
    """
    return add_projections(
        base_T2F, x_TH, [gate_A_ERH, up_A_ERH], [gate_B_EFR, up_B_EFR], tokens_per_expert_E, scale, weight_T, gradient
    )


def add_lora(
    base_TO: Tensor,
    x_TI: Tensor,
    A_P: Sequence[Tensor],
    B_P: Sequence[Tensor],
    scale: float,
    gradient: InputGradient | None = None,
) -> Tensor:
    """Plain LoRA: y = base + scale * concat_p(B_p A_p x), with A_p [R, I] and B_p [O_p, R]. base_TO is consumed."""
    everyone = torch.tensor([x_TI.shape[0]])
    A_P, B_P = [A[None] for A in A_P], [B[None] for B in B_P]
    return add_projections(base_TO, x_TI, A_P, B_P, everyone, scale, None, gradient)


class InputGradient:
    """What the adapter beside a frozen product adds to the gradient of the x that both read, once the product's own is
    there: so no second [T, I] is made and summed (measured in bf16: 10 ms of 140 in an MLP's step)."""

    def __init__(self) -> None:
        self._add_: Callable[[Tensor], object] | None = None

    def add_later(self, add_: Callable[[Tensor], object]) -> None:
        """`add_` adds the adapter's part to a gradient, in place. It replaces what is still here from a backward pass
        that wanted gradients of the factors alone and never came to x."""
        self._add_ = add_

    def add_to_(self, grad_TI: Tensor) -> None:
        """The part that was announced last, once."""
        add_, self._add_ = self._add_, None
        if add_ is not None:
            add_(grad_TI)


def share_input(x_TI: Tensor) -> tuple[Tensor, InputGradient | None]:
    """x for a frozen product and the adapter beside it, which is given what comes second. None: x has no gradient.

    The product's backward must come after the adapter's, which it does where that takes its output; and the gradient of
    x that it makes must be its own.
    """
    if not (torch.is_grad_enabled() and x_TI.requires_grad):
        return x_TI, None
    gradient = InputGradient()
    return _ShareInput.apply(x_TI, gradient), gradient


class _ShareInput(torch.autograd.Function):
    """x itself."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, gradient: InputGradient) -> Tensor:
        ctx.gradient = gradient
        return x_TI.view_as(x_TI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TI: Tensor) -> tuple[Tensor, None]:
        grad_TI = grad_TI.contiguous()
        ctx.gradient.add_to_(grad_TI)
        return grad_TI, None


class _PlainProducts:
    """One expert: ordinary GEMMs."""

    def to_rank(self, x_TI: Tensor, M_EIR: Tensor) -> Tensor:
        return x_TI @ M_EIR[0]

    def from_rank(self, z_TR: Tensor, M_ERO: Tensor, num_tokens: int) -> Tensor:
        return z_TR @ M_ERO[0]

    def add_from_rank_(self, out_TO: Tensor, z_TR: Tensor, M_ERO: Tensor) -> None:
        out_TO.addmm_(z_TR, M_ERO[0])

    def outer(self, z_TR: Tensor, wide_TW: Tensor, *, rank_last: bool) -> Tensor:
        return (wide_TW.t() @ z_TR if rank_last else z_TR.t() @ wide_TW)[None]


class _GroupedProducts:
    """Rows of each expert against that expert's matrix: the arithmetic does not grow with the number of experts."""

    def __init__(self, tokens_per_expert_E: Tensor) -> None:
        self.ends_E = tokens_per_expert_E.cumsum(0, dtype=torch.int32)
        self.empty_E11 = (tokens_per_expert_E == 0)[:, None, None]
        # where reading the counts costs no synchronisation
        self.counts = tokens_per_expert_E.tolist() if tokens_per_expert_E.device.type == "cpu" else None

    def to_rank(self, x_TI: Tensor, M_EIR: Tensor) -> Tensor:
        return grouped_mm(x_TI, M_EIR, offs=self.ends_E)

    def from_rank(self, z_TR: Tensor, M_ERO: Tensor, num_tokens: int) -> Tensor:
        return grouped_mm(z_TR, M_ERO, offs=self.ends_E)

    def add_from_rank_(self, out_TO: Tensor, z_TR: Tensor, M_ERO: Tensor) -> None:
        if self.counts is None:
            out_TO.add_(self.from_rank(z_TR, M_ERO, len(out_TO)))
            return
        # On the CPU grouped_mm is this loop too, but cannot add in the GEMM itself: that spares a pass over [T, O].
        start = 0
        for expert, count in enumerate(self.counts):
            rows = slice(start, start + count)
            out_TO[rows].addmm_(z_TR[rows], M_ERO[expert])
            start += count

    def outer(self, z_TR: Tensor, wide_TW: Tensor, *, rank_last: bool) -> Tensor:
        a_TM, b_TN = (wide_TW, z_TR) if rank_last else (z_TR, wide_TW)
        grad_EMN = grouped_mm(a_TM.t(), b_TN, offs=self.ends_E)
        # Blackwell kernels leave the slab of an empty group unwritten (pytorch issue 172439); the CPU writes zeros.
        return grad_EMN.masked_fill_(self.empty_E11, 0) if grad_EMN.is_cuda else grad_EMN


class _Fp32Products:
    """Half precision on a CPU without our kernels: each wide tensor is taken for fp32 once, and what comes out is
    rounded once. torch's bf16 products are loops where the processor has none, and where it has some, oneDNN compiles
    and keeps one for each number of rows (measured with 16 experts: 4.0 of plain LoRA's time, where this is 2.1)."""

    def __init__(self, tokens_per_expert_E: Tensor) -> None:
        self._grouped = _GroupedProducts(tokens_per_expert_E)

    def to_rank(self, x_TI: Tensor, M_EIR: Tensor) -> Tensor:
        return self._grouped.to_rank(x_TI.float(), M_EIR.float()).to(x_TI.dtype)

    def from_rank(self, z_TR: Tensor, M_ERO: Tensor, num_tokens: int) -> Tensor:
        return self._grouped.from_rank(z_TR.float(), M_ERO.float(), num_tokens).to(z_TR.dtype)

    def add_from_rank_(self, out_TO: Tensor, z_TR: Tensor, M_ERO: Tensor) -> None:
        out_TO.add_(self._grouped.from_rank(z_TR.float(), M_ERO.float(), len(out_TO)))

    def outer(self, z_TR: Tensor, wide_TW: Tensor, *, rank_last: bool) -> Tensor:
        return self._grouped.outer(z_TR.float(), wide_TW.float(), rank_last=rank_last).to(z_TR.dtype)


class _MaskedProducts:
    """Every expert on every token in rank space, then all but the token's own set to 0: plain GEMMs of width E * R.

    Only for what grouped_mm refuses (float64, rows that are not 16-byte aligned, no token at all): it is slower from 2
    experts on (measured: 1.37 of the frozen MLP against 1.18 in bf16), and more so with each expert.
    """

    def __init__(self, tokens_per_expert_E: Tensor, num_tokens: int) -> None:
        experts_E = torch.arange(tokens_per_expert_E.numel(), device=tokens_per_expert_E.device)
        expert_T = experts_E.repeat_interleave(tokens_per_expert_E, output_size=num_tokens)
        self.own_TE1 = (expert_T[:, None] == experts_E)[:, :, None]

    def to_rank(self, x_TI: Tensor, M_EIR: Tensor) -> Tensor:
        z_TER = torch.einsum("ti,eir->ter", x_TI, M_EIR)
        return torch.where(self.own_TE1, z_TER, 0).sum(1)

    def from_rank(self, z_TR: Tensor, M_ERO: Tensor, num_tokens: int) -> Tensor:
        return torch.einsum("ter,ero->to", self._spread(z_TR), M_ERO)

    def add_from_rank_(self, out_TO: Tensor, z_TR: Tensor, M_ERO: Tensor) -> None:
        out_TO.add_(self.from_rank(z_TR, M_ERO, len(out_TO)))

    def outer(self, z_TR: Tensor, wide_TW: Tensor, *, rank_last: bool) -> Tensor:
        z_TER = self._spread(z_TR)
        return torch.einsum("tw,ter->ewr" if rank_last else "tw,ter->erw", wide_TW, z_TER)

    def _spread(self, z_TR: Tensor) -> Tensor:
        return torch.where(self.own_TE1, z_TR[:, None, :], 0)


_OneMatrixProducts = _PlainProducts | _GroupedProducts | _Fp32Products | _MaskedProducts


class _StackedProducts:
    """What `CompiledProducts` does, by products of one matrix an expert: those of several projections are put side by
    side."""

    def __init__(self, products: _OneMatrixProducts) -> None:
        self._products = products

    def to_rank(self, x_TI: Tensor, M_P: Sequence[Tensor]) -> Tensor:
        return self._products.to_rank(x_TI, _side_by_side(M_P, 2))

    def from_rank(self, z_TR: Tensor, M_P: Sequence[Tensor], num_tokens: int) -> Tensor:
        return self._products.from_rank(z_TR, _side_by_side(M_P, 1), num_tokens)

    def add_from_rank_(self, out_TO: Tensor, z_TR: Tensor, M_P: Sequence[Tensor]) -> None:
        self._products.add_from_rank_(out_TO, z_TR, _side_by_side(M_P, 1))

    def outer(self, z_TR: Tensor, wide_TW: Tensor, parts: int) -> Sequence[Tensor]:
        return self._products.outer(z_TR, wide_TW, rank_last=False).chunk(parts, dim=1)

    def to_rank_with_outer(self, wide_TW: Tensor, M_EWR: Tensor, z_TR: Tensor, u_TR: Tensor) -> Tensor:
        u_TR.copy_(self._products.to_rank(wide_TW, M_EWR))
        return self._products.outer(z_TR, wide_TW, rank_last=True)


def _side_by_side(M_P: Sequence[Tensor], dim: int) -> Tensor:
    return torch.cat(list(M_P), dim) if len(M_P) > 1 else M_P[0]


_Products = CompiledProducts | _StackedProducts


def add_projections(
    base_TO: Tensor,
    x_TI: Tensor,
    A_P: Sequence[Tensor],
    B_P: Sequence[Tensor],
    tokens_per_expert_E: Tensor,
    scale: float,
    weight_T: Tensor | None,
    gradient: InputGradient | None = None,
) -> Tensor:
    """`add_expert_lora` for projections that read the same x; their outputs lie side by side in base_TO."""
    num_tokens, num_experts = x_TI.shape[0], A_P[0].shape[0]
    if tokens_per_expert_E.device.type == "cpu" and int(tokens_per_expert_E.sum()) != num_tokens:
        raise ValueError(
            f"tokens_per_expert sums to {int(tokens_per_expert_E.sum())} but there are {num_tokens} tokens: "
            "some tokens would get no expert, or another token's"
        )
    dtype = base_TO.dtype
    x_TI = x_TI.to(dtype).contiguous()
    A_P, B_P = [A.to(dtype) for A in A_P], [B.to(dtype) for B in B_P]
    products: _Products
    if num_experts == 1:
        products = _StackedProducts(_PlainProducts())
    else:
        tokens_per_expert_E = tokens_per_expert_E.to(x_TI.device, non_blocking=True)
        row = _ALIGN_BYTES // dtype.itemsize
        wide_dims = [x_TI.shape[1], *(B.shape[1] for B in B_P)]
        kernels = cpu_kernels.library_for(x_TI, [*wide_dims, A_P[0].shape[1]])
        if kernels is not None:
            products = CompiledProducts(kernels, tokens_per_expert_E)
        elif dtype in _GROUPED_DTYPES and num_tokens > 0 and all(dim % row == 0 for dim in wide_dims):
            half_on_cpu = x_TI.device.type == "cpu" and dtype.itemsize == 2
            grouped = (_Fp32Products if half_on_cpu else _GroupedProducts)(tokens_per_expert_E)
            products = _StackedProducts(grouped)
            missing = -A_P[0].shape[1] % row
            if missing:  # a rank of zeros more adds 0 to every product
                A_P, B_P = [pad(A, (0, 0, 0, missing)) for A in A_P], [pad(B, (0, missing)) for B in B_P]
        else:
            products = _StackedProducts(_MaskedProducts(tokens_per_expert_E, num_tokens))
    x_TI = x_TI if gradient is None else x_TI.detach()
    base_TO = overwritable(base_TO)
    return _AddLoRA.apply(products, products, scale, False, gradient, base_TO, x_TI, weight_T, *A_P, *B_P)


def add_with(
    reads: CompiledProducts,
    writes: CompiledProducts,
    base_TO: Tensor,
    x_TI: Tensor,
    A_P: Sequence[Tensor],
    B_P: Sequence[Tensor],
    scale: float,
    weight_N: Tensor,
    gradient: InputGradient | None = None,
    *,
    rescaled: bool = False,
) -> Tensor:
    """`add_projections` by products that know which rows are which expert's, and may take a token's several times:
    those of x, and those of what is added to.

    `rescaled`: backward, the experts get sqrt(weight) in the place of weight.
    """
    dtype = base_TO.dtype
    x_TI = x_TI.to(dtype).contiguous()
    factors = [factor.to(dtype) for factor in (*A_P, *B_P)]
    x_TI = x_TI if gradient is None else x_TI.detach()
    base_TO = overwritable(base_TO)
    return _AddLoRA.apply(reads, writes, scale, rescaled, gradient, base_TO, x_TI, weight_N, *factors)


def overwritable(base_TO: Tensor) -> Tensor:
    """base, or a copy that autograd may overwrite: no leaf that wants a gradient, and no view (its base would be
    rewritten too, and its backward would copy the whole gradient once more)."""
    return base_TO.clone() if base_TO._is_view() or (base_TO.is_leaf and base_TO.requires_grad) else base_TO


class _AddLoRA(torch.autograd.Function):
    """out = base + concat_p(zw_p B_p^T) with z_p = x A_p^T, zw_p = scale * weight * z_p; per expert. (T in the names of
    what lies in rank space: sorted rows, which the products may take from other rows of x and add to those of out.)

    With g = d loss / d out and u_p = g_p B_p (rank space, so that no second [T, O] tensor is made):
        d base = g      d weight = scale * sum_p <u_p, z_p>      dz_p = scale * weight * u_p
        d B_p = g_p^T zw_p      d A_p = dz_p^T x      d x = sum_p dz_p A_p
    """

    @staticmethod
    def forward(
        ctx: Any,
        reads: _Products,
        writes: _Products,
        scale: float,
        rescaled: bool,
        gradient: InputGradient | None,
        base_TO: Tensor,
        x_TI: Tensor,
        weight_T: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        A_P, B_P = factors[: len(factors) // 2], factors[len(factors) // 2 :]
        z_TPR = reads.to_rank(x_TI, [A.transpose(1, 2) for A in A_P])
        zw_TPR = weigh(z_TPR, scale, weight_T)
        for out_TO, B_EOR, zw_TR in by_projection(base_TO, B_P, zw_TPR):
            writes.add_from_rank_(out_TO, zw_TR, [B_EOR.transpose(1, 2)])
        ctx.mark_dirty(base_TO)
        ctx.reads, ctx.writes, ctx.scale, ctx.rescaled, ctx.gradient = reads, writes, scale, rescaled, gradient
        ctx.save_for_backward(x_TI, z_TPR, weight_T, *factors)
        return base_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        reads: _Products = ctx.reads
        x_TI, z_TPR, weight_T, *factors = ctx.saved_tensors
        A_P, B_P = factors[: len(factors) // 2], factors[len(factors) // 2 :]
        _, _, _, _, _, _, needs_x, needs_weight, *needs_factors = ctx.needs_input_grad
        grad_TO = grad_TO.contiguous()  # sum().backward() sends an expanded one

        if ctx.rescaled:
            weight_T = weight_T.sqrt()
        zw_TPR = weigh(z_TPR, ctx.scale, weight_T)
        u_TPR, dB_P = write_gradients(ctx.writes, grad_TO, B_P, zw_TPR, wanted=any(needs_factors))
        dz_TPR = weigh(u_TPR, ctx.scale, weight_T)
        dweight_T = None
        if needs_weight:
            dweight_T = _dot_rows(u_TPR, z_TPR, ctx.scale, weight_T.dtype)
        dx_TI = None
        if ctx.gradient is not None:
            ctx.gradient.add_later(lambda grad_TI: reads.add_from_rank_(grad_TI, dz_TPR, A_P))
        elif needs_x:
            dx_TI = reads.from_rank(dz_TPR, A_P, len(x_TI))
        dA_P: Sequence[Tensor | None] = [None] * len(A_P)
        if any(needs_factors):
            dA_P = reads.outer(dz_TPR, x_TI, len(A_P))
        return None, None, None, None, None, grad_TO, dx_TI, dweight_T, *dA_P, *dB_P


def write_gradients(
    writes: _Products, grad_TO: Tensor, B_P: Sequence[Tensor], zw_TPR: Tensor, *, wanted: bool = True
) -> tuple[Tensor, list[Tensor | None]]:
    """Of grad [T, sum of O], B_P [E, O, R] and zw [N, P R]: u [N, P R], u_p = g_p B_p side by side; and where it is
    wanted d B_p = g_p^T zw_p, [E, O, R] each."""
    u_TPR = torch.empty_like(zw_TPR)
    dB_P: list[Tensor | None] = []
    for g_TO, B_EOR, zw_TR, u_TR in by_projection(grad_TO, B_P, zw_TPR, u_TPR):
        if wanted:
            dB_P.append(writes.to_rank_with_outer(g_TO, B_EOR, zw_TR, u_TR))
        else:
            u_TR.copy_(writes.to_rank(g_TO, [B_EOR]))
            dB_P.append(None)
    return u_TPR, dB_P


def weigh(z_TR: Tensor, scale: float, weight_T: Tensor | None) -> Tensor:
    """scale * weight * z; the product is rounded to z's dtype once, whatever the weight's."""
    if weight_T is None:
        return z_TR * scale
    if z_TR.dtype == torch.bfloat16 and weight_T.dtype == torch.float32:
        kernels = cpu_kernels.library_for(z_TR)
        if kernels is not None:
            return cpu_kernels.weigh(kernels, z_TR, weight_T, scale)
    return (z_TR * (scale * weight_T)[:, None]).to(z_TR.dtype)


def _dot_rows(u_TR: Tensor, z_TR: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale * <u_t, z_t>, [T] of this dtype."""
    kernels = cpu_kernels.library_for(z_TR) if dtype == torch.float32 else None
    if kernels is not None:
        return cpu_kernels.dot_rows(kernels, u_TR, z_TR, scale)
    return scale * (u_TR.to(dtype) * z_TR).sum(1)


def by_projection(wide_TO: Tensor, B_P: Sequence[Tensor], *ranks_TPR: Tensor) -> zip[tuple[Tensor, ...]]:
    """(columns of the projection, its B, its part of each that lies in rank space) for each projection."""
    columns = wide_TO.split([B.shape[1] for B in B_P], dim=1)
    return zip(columns, B_P, *(z_TPR.chunk(len(B_P), dim=1) for z_TPR in ranks_TPR), strict=True)
