"""What a MoLE layer does on the CPU, compiled (cpu_kernels.cpp): the thin products of a bank, in one
pass over the wide rows whatever the number of experts, and SwiGLU in bf16.

Shape suffixes as in bank.py; N sorted rows, T rows of a wide tensor.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mole_mega.platform import compiler

SOURCE = Path(__file__).with_suffix(".cpp")
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
        self._library, self._row_N = found, row_N
        self._starts = torch.zeros(len(tokens_per_expert_E) + 1, dtype=torch.int64)
        torch.cumsum(tokens_per_expert_E, 0, out=self._starts[1:])
        self.num_rows = int(self._starts[-1])

    def to_rank(self, x_TI: Tensor, M_EIR: Tensor) -> Tensor:
        """[N, R]: each row by its expert's matrix."""
        num_experts, width, rank = M_EIR.shape
        z_NR = x_TI.new_empty(self.num_rows, rank)
        sizes = (num_experts, width, rank)
        self._call("to_rank", x_TI, *self._wide(x_TI), *sizes, M_EIR, *M_EIR.stride(), z_NR, z_NR.stride(0))
        return z_NR

    def from_rank(self, z_NR: Tensor, M_ERO: Tensor, num_tokens: int) -> Tensor:
        """[T, O]: the sum of what each row gives."""
        shape = num_tokens, M_ERO.shape[2]
        out_TO = z_NR.new_empty(shape) if self._row_N is None else z_NR.new_zeros(shape)
        self._from_rank(out_TO, z_NR, M_ERO, add=self._row_N is not None)
        return out_TO

    def add_from_rank_(self, out_TO: Tensor, z_NR: Tensor, M_ERO: Tensor) -> None:
        """out += what each row gives."""
        self._from_rank(out_TO, z_NR, M_ERO, add=True)

    def outer(self, z_NR: Tensor, wide_TW: Tensor, *, rank_last: bool) -> Tensor:
        """[E, R, W], or [E, W, R]: the sum over each expert's rows of z_n^T wide_n."""
        num_experts, rank, width = len(self._starts) - 1, z_NR.shape[1], wide_TW.shape[1]
        grad = z_NR.new_empty(num_experts, *((width, rank) if rank_last else (rank, width)))
        grad_ERW = grad.transpose(1, 2) if rank_last else grad
        wide = self._wide(wide_TW)
        self._call("outer", z_NR, z_NR.stride(0), wide_TW, *wide, *grad_ERW.shape, grad_ERW, *grad_ERW.stride())
        return grad

    def _from_rank(self, out_TO: Tensor, z_NR: Tensor, M_ERO: Tensor, *, add: bool) -> None:
        wide, sizes = self._wide(out_TO), M_ERO.shape
        self._call("from_rank", out_TO, *wide, *sizes, z_NR, z_NR.stride(0), M_ERO, *M_ERO.stride(), add)

    def _wide(self, wide: Tensor) -> tuple[int, Tensor | None, Tensor]:
        assert wide.stride(1) == 1 and (self._row_N is not None or len(wide) == self.num_rows)
        return wide.stride(0), self._row_N, self._starts

    def _call(self, name: str, *values: Tensor | int | None) -> None:
        first = values[0]
        assert isinstance(first, Tensor)
        assert all(v.dtype in (first.dtype, torch.int64) for v in values if isinstance(v, Tensor))
        _call(self._library, f"{name}_{_SUFFIXES[first.dtype]}", *values)


def weigh(found: ctypes.CDLL, z_NR: Tensor, weight_N: Tensor) -> Tensor:
    """weight * z, bf16, rounded once; the weight is fp32. (torch makes two fp32 tensors on the way.)"""
    z_NR, weight_N = z_NR.contiguous(), weight_N.contiguous()
    assert z_NR.dtype == torch.bfloat16 and weight_N.dtype == torch.float32 and len(weight_N) == len(z_NR)
    out_NR = torch.empty_like(z_NR)
    _call(found, "weigh_bf16", z_NR, weight_N, *z_NR.shape, out_NR)
    return out_NR


@functools.cache
def _silu_tables() -> tuple[Tensor, Tensor]:
    """(silu rounded to bf16, its derivative) at every bf16 number, by its bits: fp32 [65536]."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    slope = torch.ops.aten.silu_backward(torch.ones(2**16), numbers.float())
    return F.silu(numbers).float(), slope


def swiglu(found: ctypes.CDLL, fused_T2F: Tensor) -> Tensor:
    """silu(gate) * up of [gate | up] side by side, bf16: [T, F], the bits that torch's operators give (but that
    what is below 1.2e-38 may be 0)."""
    rows, columns = fused_T2F.shape
    width = columns // 2
    out_TF = fused_T2F.new_empty(rows, width)
    _call(found, "swiglu_bf16", fused_T2F, _silu_tables()[0], rows, width, out_TF)
    return out_TF


def swiglu_backward(found: ctypes.CDLL, grad_TF: Tensor, fused_T2F: Tensor) -> Tensor:
    """The gradient of `fused`, rounded once."""
    grad_T2F = torch.empty_like(fused_T2F)
    rows, width = grad_TF.shape
    _call(found, "swiglu_backward_bf16", grad_TF, fused_T2F, *_silu_tables(), rows, width, grad_T2F)
    return grad_T2F


def _call(found: ctypes.CDLL, name: str, *values: Tensor | int | None) -> None:
    """With pointers for tensors, and how many threads torch uses after all else."""
    arguments: list[ctypes.c_void_p | ctypes.c_int64] = []
    for value in (*values, torch.get_num_threads()):
        if isinstance(value, Tensor):
            assert value.device.type == "cpu"
            arguments.append(ctypes.c_void_p(value.data_ptr()))
        else:
            arguments.append(ctypes.c_void_p(None) if value is None else ctypes.c_int64(value))
    getattr(found, name)(*arguments)
