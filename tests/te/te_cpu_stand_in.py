"""What Transformer Engine's modules compute, in torch, on the CPU: its modules are real, their `forward` is not.

Each stand-in reads the module's own parameters and settings (what it holds, whether it returns its bias, over which
group it gathers), so that what our wiring asked of the constructor decides what comes out. That the kernels compute
the same is Transformer Engine's to prove, on a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import transformer_engine.pytorch as te
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from mole_mega.platform import cpu

# What was multiplied inside Transformer Engine's FP8 context since a test emptied it: (module, rows).
in_fp8: list[tuple[torch.nn.Module, int]] = []
_recipes: list[str] = []  # of the contexts that are entered


def install() -> None:
    """For this process; a second call is a no-op."""
    base: Any = importlib.import_module("transformer_engine.pytorch.module.base")
    if te.Linear.forward is linear:
        return
    # a constructor refuses without CUDA, and then makes nothing on it that it was not told to
    base.torch = cpu._View(torch, cuda=cpu._View(torch.cuda, is_available=lambda: True, synchronize=lambda: None))
    te.Linear.forward = linear
    te.LayerNormLinear.forward = norm_and_linear
    te.LayerNorm.forward = lambda self, x: layer_norm(x, self.weight, self.bias, self)
    te.RMSNorm.forward = lambda self, x: F.rms_norm(x, self.weight.shape, self.weight, self.eps)
    te.DotProductAttention.forward = attention
    for user in ("transformer.transformer_block", "fp8_utils", "recompute", "models.vision.multimodal_projector"):
        module: Any = importlib.import_module(f"megatron.core.{user}")
        assert hasattr(module, "get_fp8_context"), user
        module.get_fp8_context = fp8_context


@contextlib.contextmanager
def fp8_context(config: Any, layer_no: int = -1, is_init: bool = False) -> Iterator[None]:
    """Megatron-Core's `get_fp8_context`, in which nothing is rounded."""
    if is_init or not config.fp8 or is_first_last_bf16_layer(config, layer_no):
        yield
        return
    _recipes.append(config.fp8_recipe)
    yield
    _recipes.pop()


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, module: Any) -> torch.Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, module.eps)


def norm_and_linear(self: Any, x: torch.Tensor, is_first_microbatch: bool | None = None, **_: Any) -> Any:
    assert not self.return_layernorm_output and not self.zero_centered_gamma
    weight = self.layer_norm_weight
    if self.normalization == "RMSNorm":
        x = F.rms_norm(x, weight.shape, weight, self.eps)
    else:
        x = layer_norm(x, weight, self.layer_norm_bias, self)
    return linear(self, x, is_first_microbatch)


def multiply(self: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, self.weight, self.bias if self.apply_bias else None)


def linear(self: Any, x: torch.Tensor, is_first_microbatch: bool | None = None, **_: Any) -> Any:
    is_parallel = self.parallel_mode is not None and self.tp_size > 1
    if is_parallel and self.parallel_mode == "column":
        if self.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            x = copy_to_tensor_model_parallel_region(x, group=self.tp_group)
    if _recipes:
        rows, multiple = math.prod(x.shape[:-1]), 32 if _recipes[-1] == "mxfp8" else 16
        assert rows and rows % multiple == x.shape[-1] % multiple == self.out_features % multiple == 0, (x.shape, self)
        in_fp8.append((self, rows))
    y = multiply(self, x)
    if is_parallel and self.parallel_mode == "row":
        assert not self.apply_bias, "every rank would add it"
        if self.sequence_parallel:
            y = reduce_scatter_to_sequence_parallel_region(y, group=self.tp_group)
        else:
            y = reduce_from_tensor_model_parallel_region(y, group=self.tp_group)
    y = _ViewOfAFunction.apply(y)
    return (y, self.bias) if self.return_bias else y


class _ViewOfAFunction(torch.autograd.Function):
    """What the real linears return, on which torch allows no work in place."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        return y.flatten(0, -2).clone().view(y.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def attention(self: Any, query_SBHD: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
              attn_mask_type: str | None = None, **_: Any) -> torch.Tensor:  # fmt: skip
    assert attention_mask is None and self.qkv_format == "sbhd" and attn_mask_type in ("causal", "no_mask")
    group, length = self.cp_group, query_SBHD.shape[0]
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    # the places of all ranks, in the order in which they are gathered: rank r has chunks r and 2 size - 1 - r
    chunk = length * size // (2 * size)
    chunks = [(r, 2 * size - 1 - r) for r in range(size)]
    places = torch.cat([torch.arange(chunk) + c * chunk for pair in chunks for c in pair]) if size > 1 else None
    if size > 1:
        key, value = (
            gather_from_sequence_parallel_region(part, tensor_parallel_output_grad=True, group=group)
            for part in (key, value)
        )
    q, k, v = (part.permute(1, 2, 0, 3) for part in (query_SBHD, key, value))
    if places is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=attn_mask_type == "causal", enable_gqa=True)
    else:
        assert attn_mask_type == "causal"
        own = places[rank * length : (rank + 1) * length]
        out = F.scaled_dot_product_attention(q, k, v, places <= own[:, None], enable_gqa=True)
    return out.permute(2, 0, 1, 3).flatten(2)
