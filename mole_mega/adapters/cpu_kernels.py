"""What a MoLE layer does on the CPU, compiled (cpu_kernels.cpp): the thin products of a bank, in one pass over the wide
rows whatever the number of experts, a router's logits, products of which most is 0, and SwiGLU, alone and of several
experts a token.

Shape suffixes as in bank.py; N sorted rows, T rows of a wide tensor, W its columns.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mole_mega.platform import compiler

SOURCE = Path(__file__).with_suffix(".cpp")
_Value = Tensor | list[Tensor] | float | None
_SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels, which are compiled when they are first asked for; None where they cannot be had for this dtype."""
    if dtype not in _SUFFIXES or (found := _load()) is None:
        return None
    return found if getattr(found, f"available_{_SUFFIXES[dtype]}")() else None


def library_for(x: Tensor, sizes: Sequence[int] = ()) -> ctypes.CDLL | None:
    """The kernels for x and others like it; None for a device, dtype or sizes that they do not take (numbers in half
    precision are multiplied by pairs)."""
    return library(x.dtype) if x.device.type == "cpu" and all(size % 2 == 0 for size in sizes) else None


@functools.cache
def _load() -> ctypes.CDLL | None:
    try:
        return compiler.load(SOURCE)
    except compiler.CannotCompileError as problem:
        warnings.warn(f"experts go through torch's own products, which are slower: {problem}", stacklevel=2)
        return None


class CompiledProducts:
    """Rows of each expert against that expert's matrix. `row_N` says which row of the wide tensors each sorted row is,
    where tokens have several experts; without it they are the same."""

    def __init__(self, found: ctypes.CDLL, tokens_per_expert_E: Tensor, row_N: Tensor | None = None) -> None:
        assert row_N is None or row_N.is_contiguous()
        self.library, self._row_N = found, row_N
        self._starts = torch.zeros(len(tokens_per_expert_E) + 1, dtype=torch.int64)
        torch.cumsum(tokens_per_expert_E, 0, out=self._starts[1:])
        self.num_rows = int(self._starts[-1])

    def to_rank(self, x_TI: Tensor, M_P: Sequence[Tensor]) -> Tensor:
        """[N, R]: each row by its expert's matrix, whose ranks lie in M_P, [E, I, R / P] each."""
        num_experts, width, rank = M_P[0].shape
        rank *= len(M_P)
        z_NR = x_TI.new_empty(self.num_rows, rank)
        sizes = (num_experts, width, rank)
        self._call("to_rank", x_TI, *self._wide(x_TI), *sizes, *_lying(M_P), z_NR, z_NR.stride(0))
        return z_NR

    def from_rank(self, z_NR: Tensor, M_P: Sequence[Tensor], num_tokens: int) -> Tensor:
        """[T, O]: the sum of what each row gives, by M_P [E, R / P, O]."""
        out_TO = z_NR.new_empty(num_tokens, M_P[0].shape[2])
        if self._row_N is None:
            self._from_rank(out_TO, z_NR, M_P, None)
        else:
            self._sum_from_rank(out_TO, z_NR, M_P, add=False)
        return out_TO

    def add_from_rank_(self, out_TO: Tensor, z_NR: Tensor, M_P: Sequence[Tensor]) -> None:
        """out += what each row gives; the sum of all is rounded once."""
        if self._row_N is None:
            self._from_rank(out_TO, z_NR, M_P, out_TO)
        else:
            self._sum_from_rank(out_TO, z_NR, M_P, add=True)

    def put_from_rank(
        self, out_NO: Tensor, z_NR: Tensor, M_P: Sequence[Tensor], base_TO: Tensor, token_N: Tensor
    ) -> None:
        """out = each row's base, base[token_n], + what it gives. base is no part of out."""
        assert self._row_N is None and token_N.dtype == torch.int64 and token_N.is_contiguous()
        assert len(out_NO) == len(token_N) == self.num_rows
        self._from_rank(out_NO, z_NR, M_P, base_TO, token_N)

    def outer(self, z_NR: Tensor, wide_TW: Tensor, parts: int) -> list[Tensor]:
        """The sum over each expert's rows of z_n^T wide_n, in so many parts, [E, R / P, W]."""
        shape = len(self._starts) - 1, z_NR.shape[1] // parts, wide_TW.shape[1]
        grad_P = [z_NR.new_empty(shape) for _ in range(parts)]
        sizes = (shape[0], z_NR.shape[1], shape[2])
        self._call("outer", z_NR, z_NR.stride(0), wide_TW, *self._wide(wide_TW), *sizes, *_lying(grad_P))
        return grad_P

    def to_rank_with_outer(self, wide_TW: Tensor, M_EWR: Tensor, z_NR: Tensor, u_NR: Tensor) -> Tensor:
        """The sum over each expert's rows of wide_n^T z_n, [E, W, R]; `to_rank` of wide and M goes to u. Reads wide
        once."""
        grad_EWR = torch.empty_like(M_EWR)
        wide, sizes = self._wide(wide_TW), M_EWR.shape
        ranks, results = (z_NR, z_NR.stride(0), u_NR, u_NR.stride(0)), (grad_EWR, *grad_EWR.stride())
        values = (wide_TW, *wide, *sizes, M_EWR, *M_EWR.stride(), *ranks, *results)
        self._call("to_rank_with_outer", *values)
        return grad_EWR

    def _from_rank(
        self, out_TO: Tensor, z_NR: Tensor, M_P: Sequence[Tensor], base: Tensor | None, base_row_N: Tensor | None = None
    ) -> None:
        assert base is None or in_rows(base)
        leading, _, starts = self._wide(out_TO)
        added = (base, 0 if base is None else base.stride(0), base_row_N)
        self._call("from_rank", out_TO, leading, starts, *_thin(z_NR, M_P), *added)

    def _sum_from_rank(self, out_TO: Tensor, z_NR: Tensor, M_P: Sequence[Tensor], *, add: bool) -> None:
        self._call("sum_from_rank", out_TO, *self._wide(out_TO), *_thin(z_NR, M_P), len(out_TO), add)

    def _wide(self, wide: Tensor) -> tuple[int, Tensor | None, Tensor]:
        assert in_rows(wide) and (self._row_N is not None or len(wide) == self.num_rows)
        return wide.stride(0), self._row_N, self._starts

    def _call(self, name: str, *values: _Value) -> None:
        first = values[0]
        assert isinstance(first, Tensor)
        tensors = [t for v in values for t in (v if isinstance(v, list) else [v]) if isinstance(t, Tensor)]
        assert all(tensor.dtype in (first.dtype, torch.int64) for tensor in tensors)
        _call(self.library, f"{name}_{_SUFFIXES[first.dtype]}", *values)


def _lying(M_P: Sequence[Tensor]) -> tuple[list[Tensor], int, int, int, int]:
    """The tensors, how many they are, and the strides that all of them have."""
    assert all(M.shape == M_P[0].shape and M.stride() == M_P[0].stride() for M in M_P)
    stride_e, stride_1, stride_2 = M_P[0].stride()
    return list(M_P), len(M_P), stride_e, stride_1, stride_2


def _thin(z_NR: Tensor, M_P: Sequence[Tensor]) -> tuple[_Value, ...]:
    """The sizes of a product of z and the experts' matrices, and its factors."""
    num_experts, rank, width = M_P[0].shape
    return num_experts, rank * len(M_P), width, z_NR, z_NR.stride(0), *_lying(M_P)


def weigh(found: ctypes.CDLL, z_NR: Tensor, weight_N: Tensor, scale: float) -> Tensor:
    """scale * weight * z, bf16, rounded once; the weight is fp32. (torch makes two fp32 tensors on the way.)"""
    z_NR, weight_N = z_NR.contiguous(), weight_N.contiguous()
    assert z_NR.dtype == torch.bfloat16 and weight_N.dtype == torch.float32 and len(weight_N) == len(z_NR)
    out_NR = torch.empty_like(z_NR)
    _call(found, "weigh_bf16", z_NR, weight_N, scale, *z_NR.shape, out_NR)
    return out_NR


def dot_rows(found: ctypes.CDLL, u_NR: Tensor, z_NR: Tensor, scale: float) -> Tensor:
    """scale * <u_n, z_n>, [N] fp32."""
    u_NR, z_NR = u_NR.contiguous(), z_NR.contiguous()
    assert u_NR.dtype == z_NR.dtype and u_NR.shape == z_NR.shape
    dots_N = z_NR.new_empty(len(z_NR), dtype=torch.float32)
    _call(found, f"dot_rows_{_SUFFIXES[z_NR.dtype]}", u_NR, z_NR, scale, *z_NR.shape, dots_N)
    return dots_N


def in_rows(tensor: Tensor) -> bool:
    """Whether the numbers of a row lie side by side."""
    return tensor.stride(1) == 1 or tensor.shape[1] == 1 or not len(tensor)


def add_few_(found: ctypes.CDLL, out_TO: Tensor, values_TR: Tensor, M_RO: Tensor) -> None:
    """out += values M, faster than a product of all where most of the values are 0 (`forms.uses_few`)."""
    (tokens, rank), width = values_TR.shape, out_TO.shape[1]
    assert out_TO.dtype == values_TR.dtype == M_RO.dtype and in_rows(out_TO)
    assert out_TO.shape == (tokens, width) and M_RO.shape == (rank, width)
    values_TR = values_TR if in_rows(values_TR) else values_TR.contiguous()
    tensors = (out_TO, out_TO.stride(0), values_TR, values_TR.stride(0), M_RO.contiguous())
    _call(found, f"add_few_{_SUFFIXES[out_TO.dtype]}", *tensors, tokens, rank, width)


def outer_few(found: ctypes.CDLL, values_TR: Tensor, wide_TW: Tensor) -> Tensor:
    """values^T wide, [R, W], where most of the values are 0."""
    (tokens, rank), width = values_TR.shape, wide_TW.shape[1]
    assert values_TR.dtype == wide_TW.dtype and in_rows(wide_TW) and len(wide_TW) == tokens
    values_TR = values_TR if in_rows(values_TR) else values_TR.contiguous()
    grad_RW = wide_TW.new_empty(rank, width)
    tensors = (values_TR, values_TR.stride(0), wide_TW, wide_TW.stride(0))
    _call(found, f"outer_few_{_SUFFIXES[wide_TW.dtype]}", *tensors, tokens, rank, width, grad_RW)
    return grad_RW


def largest(found: ctypes.CDLL, scores_TE: Tensor, number: int) -> Tensor:
    """The places of each row's `number` largest scores, the largest first, [T, number]; of equal ones the first is the
    larger. fp32."""
    assert scores_TE.dtype == torch.float32 and number <= scores_TE.shape[1]
    places_TK = torch.empty(len(scores_TE), number, dtype=torch.int64)
    _call(found, "largest", scores_TE.contiguous(), *scores_TE.shape, number, places_TK)
    return places_TK


def router_logits(found: ctypes.CDLL, x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor | None) -> Tensor:
    """x weight^T + bias, [T, E]: x [T, H] bf16, all else fp32, and so are the sums."""
    assert (
        x_TH.dtype == torch.bfloat16
        and weight_EH.dtype == torch.float32
        and (bias_E is None or bias_E.dtype == torch.float32)
    )
    x_TH, weight_EH = x_TH.contiguous(), weight_EH.contiguous()
    sizes = (*x_TH.shape, len(weight_EH))
    logits_TE = weight_EH.new_empty(len(x_TH), len(weight_EH))
    _call(found, "router_logits_bf16", x_TH, weight_EH, bias_E, *sizes, logits_TE)
    return logits_TE


def router_gradients(
    found: ctypes.CDLL, grad_TE: Tensor, x_TH: Tensor, weight_EH: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of such logits' weight, [E, H] fp32, and, where the weight is given, of x, [T, H] bf16 or fp32;
    reads x once. Where most of grad is 0 it is passed over."""
    assert grad_TE.dtype == torch.float32
    grad_TE, x_TH = grad_TE.contiguous(), x_TH.contiguous()
    dweight_EH, dx_TH = grad_TE.new_empty(grad_TE.shape[1], x_TH.shape[1]), None
    if weight_EH is not None:
        assert weight_EH.dtype == torch.float32 and weight_EH.shape == dweight_EH.shape
        weight_EH, dx_TH = weight_EH.contiguous(), torch.empty_like(x_TH)
    sizes = (*x_TH.shape, len(dweight_EH))
    _call(found, f"router_gradients_{_SUFFIXES[x_TH.dtype]}", grad_TE, x_TH, weight_EH, *sizes, dweight_EH, dx_TH)
    return dweight_EH, dx_TH


def sum_pairs_(found: ctypes.CDLL, pairs_PX: Tensor, x_TH: Tensor, probs_TE: Tensor) -> None:
    """Add to `RouterSums.pairs_PX` what tokens are to it: x bf16, to which the products are rounded, all else fp32."""
    assert x_TH.dtype == torch.bfloat16 and probs_TE.dtype == pairs_PX.dtype == torch.float32
    (tokens, width), num_experts = x_TH.shape, probs_TE.shape[1]
    assert pairs_PX.shape == (num_experts * (num_experts - 1) // 2, width + 1) and pairs_PX.is_contiguous()
    _call(found, "sum_pairs_bf16", x_TH.contiguous(), probs_TE.contiguous(), tokens, width, num_experts, pairs_PX)


def sum_routing_(
    found: ctypes.CDLL,
    row: Tensor,
    logits_TE: Tensor,
    probs_TE: Tensor,
    choice_TK: Tensor,
    valid_T: Tensor,
    group_T: Tensor | None,
) -> None:
    """Add to `RouterSums.row` what tokens are to it; fp32."""
    assert row.dtype == logits_TE.dtype == probs_TE.dtype == torch.float32 and row.is_contiguous()
    assert choice_TK.dtype == torch.int64 and valid_T.dtype == torch.bool
    if group_T is not None:
        assert group_T.dtype == torch.int64
        num_groups = (len(row) - 3) // probs_TE.shape[1] - 1
        assert not len(group_T) or int(group_T.max()) < num_groups, "a count would land outside the row"
        group_T = group_T.contiguous()
    tensors = (logits_TE.contiguous(), probs_TE.contiguous(), choice_TK.contiguous(), valid_T.contiguous(), group_T)
    _call(found, "sum_routing", *tensors, *probs_TE.shape, choice_TK.shape[1], row)


@functools.cache
def _table(function: Callable[[Tensor], Tensor]) -> Tensor:
    """The function's fp32 value at every bf16 number, by its bits: [65536]."""
    return function(torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)).float()


def _sigmoid(numbers: Tensor) -> Tensor:
    return numbers.float().sigmoid()


def swiglu(found: ctypes.CDLL, fused_T2F: Tensor) -> Tensor:
    """silu(gate) * up of [gate | up] side by side, bf16: [T, F], the bits that torch's operators give (but that
    what is below 1.2e-38 may be 0)."""
    rows, columns = fused_T2F.shape
    width = columns // 2
    out_TF = fused_T2F.new_empty(rows, width)
    _call(found, "swiglu_bf16", fused_T2F, _table(F.silu), rows, width, out_TF)
    return out_TF


def swiglu_backward_(found: ctypes.CDLL, grad_TF: Tensor, fused_T2F: Tensor) -> None:
    """Put the gradient of `fused`, rounded once, in its place."""
    assert fused_T2F.is_contiguous() and grad_TF.is_contiguous()
    _call(found, "swiglu_backward_bf16", grad_TF, fused_T2F, _table(_sigmoid), *grad_TF.shape)


def swiglu_mixed(found: ctypes.CDLL, fused_N2F: Tensor, weight_N: Tensor, place_TK: Tensor) -> tuple[Tensor, Tensor]:
    """h [N, F], silu(gate) * up of sorted rows that have [gate | up] side by side, with the bits that torch's operators
    give; and [T, F], each token's h_1 + sum_k w_k (h_k - h_1), rounded once. place [T, K]: where a token's rows are;
    its weights, fp32, sum to 1."""
    _check_pairs(fused_N2F, weight_N, place_TK)
    (rows, columns), (tokens, choices) = fused_N2F.shape, place_TK.shape
    width, suffix = columns // 2, _SUFFIXES[fused_N2F.dtype]
    table = None
    if fused_N2F.dtype == torch.bfloat16:
        table, h_NF = _table(F.silu), fused_N2F.new_empty(rows, width)
    else:
        h_NF = F.silu(fused_N2F[:, :width])
    mixed_TF = h_NF.new_empty(tokens, width)
    sizes = (tokens, choices, width)
    tensors = (fused_N2F, table, weight_N.contiguous(), place_TK.contiguous())
    _call(found, f"swiglu_mixed_{suffix}", *tensors, *sizes, h_NF, mixed_TF)
    return h_NF, mixed_TF


def _check_pairs(fused_N2F: Tensor, weight_N: Tensor, place_TK: Tensor) -> None:
    assert fused_N2F.is_contiguous() and weight_N.dtype == torch.float32 and place_TK.dtype == torch.int64
    assert len(fused_N2F) == len(weight_N) == place_TK.numel()


def swiglu_mixed_backward_(
    found: ctypes.CDLL, dh_NF: Tensor, dmixed_TF: Tensor, fused_N2F: Tensor, weight_N: Tensor, place_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Put the gradient of `fused`, rounded once, in its place; give back the sum of each token's, [T, 2F], and the
    gradient of the weights, [N] fp32."""
    _check_pairs(fused_N2F, weight_N, place_TK)
    (tokens, choices), width = place_TK.shape, fused_N2F.shape[1] // 2
    assert dh_NF.dtype == dmixed_TF.dtype == fused_N2F.dtype
    assert dh_NF.shape == (len(weight_N), width) and dmixed_TF.shape == (tokens, width)
    table = _table(_sigmoid) if fused_N2F.dtype == torch.bfloat16 else None
    dfused_T2F, dweight_N = fused_N2F.new_empty(tokens, 2 * width), torch.empty_like(weight_N)
    tensors = (dh_NF.contiguous(), dmixed_TF.contiguous(), fused_N2F, table, weight_N.contiguous())
    values = (*tensors, place_TK.contiguous(), tokens, choices, width, dfused_T2F, dweight_N)
    _call(found, f"swiglu_mixed_backward_{_SUFFIXES[fused_N2F.dtype]}", *values)
    return dfused_T2F, dweight_N


def _call(found: ctypes.CDLL, name: str, *values: _Value) -> None:
    """With pointers for tensors, an array of them for a list, and how many threads torch uses after all else."""
    getattr(found, name)(*map(_argument, values), ctypes.c_int64(torch.get_num_threads()))


def _argument(value: _Value) -> Any:
    if isinstance(value, Tensor):
        assert value.device.type == "cpu"
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, list):
        return (ctypes.c_void_p * len(value))(*(tensor.data_ptr() for tensor in value))
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_void_p(None) if value is None else ctypes.c_int64(value)
