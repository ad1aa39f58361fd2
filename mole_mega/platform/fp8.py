"""The frozen base stored in FP8: each weight as float8 e4m3 with a scale, taken back to the compute dtype inside
forward and again inside backward, so that nothing dequantised outlives a product.

W is kept as (q, s) with s = amax(|W|) / 448 over an output channel or a 128 x 128 block, q = round(W / s) in e4m3.
Three bits of mantissa round a weight by 2^-4 of it at most, by about 2.5 % in relative norm. Only storage is FP8:
products run in the dtype of the activations, on any hardware. (Weights that Transformer Engine keeps and multiplies in
FP8 are its own matter: te.py.)

Shape suffixes: T tokens, I in, O out; of this rank's part.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_tensor_model_parallel_attributes,
    gather_from_sequence_parallel_region,
)
from torch.autograd.function import once_differentiable

from mole_mega.config import ScaleOf
from mole_mega.errors import ConfigError

FP8 = torch.float8_e4m3fn
BLOCK = 128
_LARGEST = torch.finfo(FP8).max
# Entries decoded at a time, by kind of device: what is in between takes no more memory than these. A CPU's caches want
# few; on a GPU it is starting a kernel that costs.
_PIECE = {"cpu": 2**17, "cuda": 2**24}

# a column or row linear; Megatron-Core tells mypy no types
Fp8Linear = Any


def make_room(module: torch.nn.Module, scale_of: ScaleOf) -> None:
    """Make every frozen column and row linear in `module` hold its weight in FP8; `keep` fills it.

    Raises ConfigError where blocks would lie otherwise under this tensor parallelism than on one process.
    """
    for name, linear in _linears(module):
        if not linear.weight.requires_grad:
            _make_room(name, linear, scale_of)


def kept_in_fp8(module: torch.nn.Module) -> dict[str, Fp8Linear]:
    """The linears in `module` that hold their weight in FP8, as here or as Transformer Engine does, by the weight's
    name."""
    return {
        f"{name}.weight": linear
        for name, linear in module.named_modules()
        if is_float8tensor(getattr(linear, "weight", None)) or (_is_megatrons(linear) and _is_kept(linear))
    }


def keep(linear: Fp8Linear, weight_OI: torch.Tensor) -> None:
    """Keep this rank's part of a weight, of any dtype, in FP8. Tensor-parallel ranks call it together."""
    if is_float8tensor(linear.weight):
        with torch.no_grad():
            linear.weight.copy_(weight_OI)
        return
    by_channel = linear.weight_scale.shape == (weight_OI.shape[0], 1)
    group = linear.tp_group if by_channel and isinstance(linear, RowParallelLinear) else None
    q_OI, scale = quantise(weight_OI, "channel" if by_channel else "block", group)
    with torch.no_grad():
        linear.weight.copy_(q_OI)
        linear.weight_scale.copy_(scale)


def frozen_weight(linear: Fp8Linear) -> torch.Tensor:
    """The frozen weight [O, I] that a linear multiplies by: fp32 where it is kept in FP8, else as it is."""
    if _is_kept(linear):
        return dequantise(linear.weight, linear.weight_scale, torch.float32)
    if is_float8tensor(linear.weight):  # Transformer Engine's
        return dequantize_fp8_tensor(linear.weight).float()
    return linear.weight


def forget_initial_weights(module: torch.nn.Module) -> None:
    """Free what Transformer Engine keeps beside its FP8 weights, on the CPU, for an optimizer's master weights: the
    values that they were initialised with. A frozen base has none."""
    for parameter in module.parameters():
        if hasattr(parameter, "clear_high_precision_init_val"):
            parameter.clear_high_precision_init_val()


def _is_kept(linear: Fp8Linear) -> bool:
    # an output layer that shares the embedding's weight has none of its own
    return linear.weight is not None and linear.weight.dtype == FP8


def bytes_kept(module: torch.nn.Module) -> tuple[int, int]:
    """(bytes of the weights and scales that `module` keeps in FP8, what they would take in the model's dtype). Of
    Transformer Engine's weights, both copies of those that it keeps twice."""
    kept = instead_of = 0
    for linear in kept_in_fp8(module).values():
        if is_float8tensor(linear.weight):
            parts = [part for part in linear.weight.get_metadata().values() if isinstance(part, torch.Tensor)]
        else:
            parts = [linear.weight, linear.weight_scale]
        kept += sum(part.nbytes for part in parts)
        instead_of += linear.weight.numel() * linear.config.params_dtype.itemsize
    return kept, instead_of


def _linears(module: torch.nn.Module) -> Iterator[tuple[str, Fp8Linear]]:
    for name, child in module.named_modules():
        if _is_megatrons(child):
            yield name, child


def _is_megatrons(module: torch.nn.Module) -> bool:
    return isinstance(module, ColumnParallelLinear | RowParallelLinear)


def _make_room(name: str, linear: Fp8Linear, scale_of: ScaleOf) -> None:
    weight = linear.weight
    out_features, in_features = weight.shape
    if scale_of == "channel":
        shape = (out_features, 1)
    else:
        shape = (-(-out_features // BLOCK), -(-in_features // BLOCK))
        cut = in_features if isinstance(linear, RowParallelLinear) else out_features
        pieces = 2 if linear.config.gated_linear_unit and name.endswith("linear_fc1") else 1
        if linear.tp_group.size() > 1 and cut % (BLOCK * pieces):
            raise ConfigError(
                f"fp8.scale block needs parts of a multiple of {BLOCK}, but under tensor parallelism "
                f"{linear.tp_group.size()} {name} has parts of {cut // pieces}; use fp8.scale channel"
            )
    kept = torch.nn.Parameter(torch.empty(weight.shape, dtype=FP8, device=weight.device), requires_grad=False)
    copy_tensor_model_parallel_attributes(kept, weight)
    linear.weight = kept
    # not in checkpoints: the base names what it was made from
    linear.register_buffer(
        "weight_scale", torch.empty(shape, dtype=torch.float32, device=weight.device), persistent=False
    )
    linear._forward_impl = _Fp8Forward(linear)


def quantise(
    weight_OI: torch.Tensor, scale_of: ScaleOf, group: dist.ProcessGroup | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(q [O, I] e4m3, scale fp32: [O, 1] by channel, [O / 128, I / 128] by block, rounded up).

    `group`: ranks that hold other columns of the same output channels, whose largest entries count too. Weights must be
    finite."""
    weight_OI = weight_OI.float()
    if scale_of == "channel":
        largest = weight_OI.abs().amax(1, keepdim=True)
        if group is not None:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    else:
        out_features, in_features = weight_OI.shape
        padded = F.pad(weight_OI, (0, -in_features % BLOCK, 0, -out_features % BLOCK))
        largest = padded.abs().unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).amax((1, 3))
    # a channel of zeros keeps them
    scale = torch.where(largest > 0, largest / _LARGEST, 1.0)
    q_OI = torch.empty(weight_OI.shape, dtype=FP8, device=weight_OI.device)
    for part, rows in _pieces(weight_OI, scale):
        q_OI[part] = (weight_OI[part] / rows).clamp_(-_LARGEST, _LARGEST).to(FP8)
    return q_OI, scale


def dequantise(q_OI: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight [O, I] that (q, scale) stand for, rounded once to `dtype`."""
    weight_OI = torch.empty(q_OI.shape, dtype=dtype, device=q_OI.device)
    for part, rows in _pieces(q_OI, scale):
        weight_OI[part] = _decode(q_OI[part]).mul_(rows)
    return weight_OI


def _decode(q_OI: torch.Tensor) -> torch.Tensor:
    """q in fp32, exactly. The bits s eeee mmm, put where fp16 has them, are 2^-8 of it: torch's own cast of e4m3 runs
    entry by entry on a CPU (measured: 24 ms for 5.6 M, this 6)."""
    bits = q_OI.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
    return bits.view(torch.float16).float().mul_(2.0**8)


def _pieces(matrix_OI: torch.Tensor, scale: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """(some of the rows, the scale of their entries as it broadcasts), over all rows."""
    number, width = matrix_OI.shape
    piece = _PIECE.get(matrix_OI.device.type, _PIECE["cpu"])
    if scale.shape[1] == 1 and scale.shape[0] == number:
        step = max(1, piece // width)
        for start in range(0, number, step):
            part = slice(start, start + step)
            yield part, scale[part]
    else:
        step = max(1, piece // (width * BLOCK))
        for block in range(0, len(scale), step):
            part = slice(block * BLOCK, min((block + step) * BLOCK, number))
            rows = scale[block : block + step].repeat_interleave(BLOCK, 1)[:, :width]
            yield part, rows if step == 1 else rows.repeat_interleave(BLOCK, 0)[: part.stop - part.start]


class _FrozenProduct(torch.autograd.Function):
    """x W^T and its gradient for x, W dequantised in each and kept by neither."""

    @staticmethod
    def forward(ctx: Any, x_TI: torch.Tensor, q_OI: torch.Tensor, scale: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.save_for_backward(q_OI, scale)
        ctx.group = group
        return x_TI @ dequantise(q_OI, scale, x_TI.dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        q_OI, scale = ctx.saved_tensors
        grad_TI = grad_TO @ dequantise(q_OI, scale, grad_TO.dtype)
        if ctx.group is not None:
            dist.all_reduce(grad_TI, group=ctx.group)
        return grad_TI, None, None, None


class _Fp8Forward:
    """Stands where Megatron-Core's linears keep the function that multiplies (`_forward_impl`)."""

    def __init__(self, linear: Fp8Linear) -> None:
        self.scale = linear.weight_scale

    def __call__(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: dist.ProcessGroup | None,
        **_: Any,
    ) -> torch.Tensor:
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        output = _FrozenProduct.apply(input, weight, self.scale, tp_group if allreduce_dgrad else None)
        return output if bias is None else output + bias
