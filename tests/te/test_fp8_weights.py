"""Weights that Transformer Engine keeps in FP8: its own tensors, put together on the CPU."""

import pytest
import torch
from test_wiring import RUN, SIZE
from transformer_engine.pytorch.constants import DType
from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer, Float8Tensor

from mole_mega.checkpoint import base
from mole_mega.models.backend import on_local_backend
from mole_mega.models.llava import LLaVA
from mole_mega.platform import fp8
from mole_mega.training import parity


class InTorch(Float8Quantizer):
    """Rounds as Transformer Engine's kernels do with a scale of 1."""

    def __init__(self) -> None:
        super().__init__(torch.ones(1), torch.zeros(1), DType.kFloat8E4M3)

    def copy(self):
        return InTorch()

    def update_quantized(self, src, dst, *, noop_flag=None):
        dst._data.copy_(src.to(torch.float8_e4m3fn).view(torch.uint8))
        return dst


def in_fp8(weight: torch.Tensor, *, twice: bool) -> torch.nn.Parameter:
    q = weight.detach().to(torch.float8_e4m3fn)
    tensor = Float8Tensor(
        shape=weight.shape, dtype=weight.dtype, data=q.view(torch.uint8), fp8_scale_inv=torch.ones(1),
        fp8_dtype=DType.kFloat8E4M3, data_transpose=q.t().contiguous().view(torch.uint8) if twice else None,
        quantizer=InTorch(), device=weight.device,
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


def test_a_base_loads_straight_into_fp8(alone, tmp_path, monkeypatch):
    """A weight at a time is wide, and what is kept is the base's, rounded once."""
    parity.make_base(on_local_backend(RUN), SIZE, alone, tmp_path / "base")
    plain = LLaVA(RUN, SIZE, alone)
    base.load_base(plain, tmp_path / "base")
    model = LLaVA(RUN, SIZE, alone)
    for layer in model.language_model.decoder.layers:
        for linear in (layer.mlp.experts.linear_fc1, layer.mlp.experts.linear_fc2, layer.self_attention.linear_qkv):
            linear.weight = in_fp8(torch.zeros_like(linear.weight), twice=False)
    kept, load, at_once = fp8.kept_in_fp8(model), base._load, []
    assert len(kept) == 3 * SIZE.language.num_layers

    def watched(entries, *args, **options):
        at_once.append(len(kept.keys() & entries.keys()))
        return load(entries, *args, **options)

    monkeypatch.setattr(base, "_load", watched)
    monkeypatch.setattr(base, "_PORTION_BYTES", 1)
    base.load_base(model, tmp_path / "base")
    assert at_once == [0] + [1] * len(kept)
    for name, parameter in plain.named_parameters():
        if name in kept:
            expected = parameter.detach().to(torch.float8_e4m3fn).view(torch.uint8)
            assert expected.any() and torch.equal(model.get_parameter(name)._data, expected), name
        elif not hasattr(parameter, "placement"):
            assert torch.equal(model.get_parameter(name), parameter), name
    with pytest.raises(AssertionError, match="no longer the base"):
        base.save_base(model, tmp_path / "again")
