"""Pure tensor rules between Hugging Face's layout and ours, each with its inverse; no names and no files here.

A rule takes the parts that Hugging Face stores and gives the one tensor that Megatron-Core holds. It moves elements and
computes nothing, so that going there and back gives identical bytes. Every rule runs on the meta device too: shapes
are derived from it instead of being listed.

Shape suffixes: H hidden, G query groups (key-value heads), D head width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rule:
    """`to_ours` takes Hugging Face's parts in the table's order; `to_hf` gives them back in that order."""

    to_ours: Callable[..., torch.Tensor]
    to_hf: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


def identity() -> Rule:
    """The same tensor on both sides."""
    return Rule(to_ours=lambda tensor: tensor, to_hf=lambda tensor: (tensor,))


def class_token() -> Rule:
    """Class embedding [H] <-> class token [1, 1, H]."""
    return Rule(to_ours=lambda embedding: embedding[None, None], to_hf=lambda token: (token[0, 0],))


def qkv(num_heads: int, num_groups: int, head_dim: int) -> Rule:
    """q [heads * D, ...], k and v [G * D, ...] <-> [(heads + 2 G) * D, ...], weights and biases alike.

    Megatron-Core keeps query groups together, so that tensor parallelism cuts between them: a group is its query heads,
    then its key head, then its value head.
    """
    queries = num_heads // num_groups * head_dim

    def to_ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.cat([_groups(part, num_groups) for part in (q, k, v)], dim=1).flatten(0, 1)

    def to_hf(fused: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = _groups(fused, num_groups).split([queries, head_dim, head_dim], dim=1)
        return tuple(part.flatten(0, 1) for part in parts)

    return Rule(to_ours, to_hf)


def gate_up() -> Rule:
    """gate [F, H] and up [F, H] <-> [2 F, H]: Megatron-Core's gated unit activates the first half."""
    return Rule(
        to_ours=lambda gate, up: torch.cat([gate, up]),
        to_hf=lambda fused: tuple(fused.chunk(2)),
    )


def _groups(tensor: torch.Tensor, num_groups: int) -> torch.Tensor:
    """[G * n, ...] -> [G, n, ...]."""
    return tensor.unflatten(0, (num_groups, tensor.shape[0] // num_groups))
