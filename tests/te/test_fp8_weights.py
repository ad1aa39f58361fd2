"""Weights that Transformer Engine keeps in FP8: its own tensors, put together on the CPU."""

import torch
from test_wiring import RUN, SIZE
from transformer_engine.pytorch.constants import DType
from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor

from mole_mega.models.llava import LLaVA
from mole_mega.platform import fp8


def in_fp8(weight: torch.Tensor, *, twice: bool) -> torch.nn.Parameter:
    q = weight.detach().to(torch.float8_e4m3fn)
    tensor = Float8Tensor(
        shape=weight.shape, dtype=weight.dtype, data=q.view(torch.uint8), fp8_scale_inv=torch.ones(1),
        fp8_dtype=DType.kFloat8E4M3, data_transpose=q.t().contiguous().view(torch.uint8) if twice else None,
        quantizer=None, device=weight.device,
    )  # fmt: skip
    return torch.nn.Parameter(tensor, requires_grad=False)


def test_what_is_kept_in_fp8_is_said_with_both_copies(alone):
    model = LLaVA(RUN, SIZE, alone)
    assert fp8.bytes_kept(model) == (0, 0)
    once, twice = (model.language_model.decoder.layers[layer].mlp.experts for layer in (0, 1))
    numbers = once.linear_fc1.weight.numel()
    wide = numbers * once.linear_fc1.weight.element_size()
    once.linear_fc1.weight = in_fp8(once.linear_fc1.weight, twice=False)
    assert fp8.bytes_kept(model) == (numbers + 4, wide)
    twice.linear_fc1.weight = in_fp8(twice.linear_fc1.weight, twice=True)
    assert fp8.bytes_kept(model) == (3 * numbers + 8, 2 * wide)
