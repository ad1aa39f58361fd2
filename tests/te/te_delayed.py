"""`delayed` scaling on the CPU: Transformer Engine's own states, contexts and updates (its form in torch), and products
whose factors are rounded by the scales as its kernels round them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import te_cpu_stand_in
import torch
import torch.nn.functional as F
import transformer_engine.pytorch as te
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.transformer import transformer_block
from transformer_engine.pytorch import quantization
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from mole_mega.platform import cpu, scaling

INPUT, WEIGHT, GRADIENT = 0, 1, 0  # their places in a state


@contextlib.contextmanager
def rounding() -> Iterator[None]:
    """Inside, the decoder's products are those of `delayed` scaling."""
    with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):
        patch.setenv("NVTE_UNFUSED_FP8_UPDATE", "1")
        patch.setattr(quantization, "torch", cpu._View(torch, device=lambda *_: torch.device("cpu")))
        patch.setattr(FP8GlobalStateManager, "is_fp8_available", lambda: (True, ""))
        patch.setattr(quantization, "check_recipe_support", lambda recipe: None)
        patch.setattr(te_cpu_stand_in, "multiply", multiply)
        for user in (transformer_block, scaling):
            patch.setattr(user, "get_fp8_context", fp8_context)
        yield
    forget()


def forget() -> None:
    """What a process that ends forgets."""
    FP8GlobalStateManager.reset()


@contextlib.contextmanager
def fp8_context(config: Any, layer_no: int = -1, is_init: bool = False) -> Iterator[None]:
    with te_cpu_stand_in.fp8_context(config, layer_no, is_init):
        if is_init or not config.fp8:
            yield
            return
        with te.autocast(enabled=True, recipe=get_fp8_recipe(config)):
            yield


def multiply(self: Any, x: torch.Tensor) -> torch.Tensor:
    if not FP8GlobalStateManager.is_fp8_enabled():
        return F.linear(x, self.weight, self.bias if self.apply_bias else None)
    assert not self.apply_bias
    self.init_fp8_metadata(num_gemms=1)
    FP8GlobalStateManager.add_fp8_tensors_to_global_buffer(self.fp8_meta)
    is_first = x.requires_grad and FP8GlobalStateManager.is_first_fp8_module()
    return _Product.apply(x, self.weight, self.fp8_meta["scaling_fwd"], self.fp8_meta["scaling_bwd"], is_first)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, fwd: Any, bwd: Any, is_first: bool) -> torch.Tensor:
        ctx.weight = _rounded(weight, fwd, WEIGHT, torch.float8_e4m3fn)
        ctx.bwd, ctx.is_first = bwd, is_first
        return F.linear(_rounded(x, fwd, INPUT, torch.float8_e4m3fn), ctx.weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        result = _rounded(grad, ctx.bwd, GRADIENT, torch.float8_e5m2) @ ctx.weight
        if ctx.is_first:  # the last one in the backward pass
            FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=False)
        return result, None, None, None, None


def _rounded(tensor: torch.Tensor, state: Any, place: int, dtype: torch.dtype) -> torch.Tensor:
    """By the scale that earlier passes set; what is largest now is written down for later ones."""
    seen, largest = state.amax_history[0], torch.finfo(dtype).max
    seen[place] = torch.maximum(seen[place], tensor.detach().abs().amax().float())
    scale = state.scale[place].clone()
    return ((tensor.float() * scale).clamp(-largest, largest).to(dtype).float() / scale).to(tensor.dtype)
