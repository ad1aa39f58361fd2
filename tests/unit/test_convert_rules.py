"""Conversion rules move elements and compute nothing: there and back gives identical bytes, at every shape."""

import pytest
import torch

from mole_mega.convert import rules

HEADS = [(4, 4, 8), (8, 2, 4), (6, 3, 5), (4, 1, 16), (1, 1, 3)]  # heads, groups, width


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def check_there_and_back(rule: rules.Rule, parts: list[torch.Tensor]) -> None:
    fused = rule.to_ours(*parts)
    assert fused.numel() == sum(part.numel() for part in parts)
    back = rule.to_hf(fused)
    assert len(back) == len(parts)
    assert all(same_bytes(part, other) for part, other in zip(parts, back, strict=True))
    assert same_bytes(rule.to_ours(*back), fused)
    shapes = [part.shape for part in rule.to_hf(torch.empty_like(fused, device="meta"))]
    assert shapes == [part.shape for part in parts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [(12,), ()], ids=["weight", "bias"])
@pytest.mark.parametrize(("heads", "groups", "width"), HEADS)
def test_qkv_there_and_back_is_identical(heads, groups, width, hidden, dtype):
    parts = [random(n * width, *hidden, dtype=dtype) for n in (heads, groups, groups)]
    check_there_and_back(rules.qkv(heads, groups, width), parts)


@pytest.mark.parametrize(("heads", "groups", "width"), HEADS)
def test_qkv_keeps_each_group_together(heads, groups, width):
    """Row by row, written without the rule's own reshaping."""
    q, k, v = (random(n * width, 7) for n in (heads, groups, groups))
    expected = []
    for group in range(groups):
        for head in range(group * heads // groups, (group + 1) * heads // groups):
            expected += [q[head * width + i] for i in range(width)]
        expected += [k[group * width + i] for i in range(width)]
        expected += [v[group * width + i] for i in range(width)]
    assert same_bytes(rules.qkv(heads, groups, width).to_ours(q, k, v), torch.stack(expected))


def test_gate_comes_before_up_and_back():
    gate, up = random(10, 6), random(10, 6) + 1
    check_there_and_back(rules.gate_up(), [gate, up])
    assert same_bytes(rules.gate_up().to_ours(gate, up)[:10], gate)


def test_class_token_and_identity_there_and_back():
    check_there_and_back(rules.class_token(), [random(9)])
    assert rules.class_token().to_ours(random(9)).shape == (1, 1, 9)
    check_there_and_back(rules.identity(), [random(5, 3, 2, 2)])
