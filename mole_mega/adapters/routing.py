"""What is known of the routing of one global batch, and what a run remembers of it. Numbers only: no process groups.

Tokens are counted by group: the source that their sample comes from, and whether they stand at an image place.

Shape suffixes: B batch, S sequence, L layers that have a router, G groups, D sources (domains), M text and image,
E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

TEXT, IMAGE = 0, 1


def num_groups(num_domains: int) -> int:
    """How many groups `place_groups` numbers."""
    return 2 * num_domains


def place_groups(domains_B: torch.Tensor, image_mask_BS: torch.Tensor, padding_mask_BS: torch.Tensor) -> torch.Tensor:
    """The group of every place, int64 [B, S]: 2 domain + (1 at an image place); -1 where `padding_mask` is False."""
    return torch.where(padding_mask_BS, 2 * domains_B[:, None] + image_mask_BS, -1)


def group_domains(groups: torch.Tensor) -> torch.Tensor:
    """The domain of each place's group, the inverse of `place_groups`; 0 for padding."""
    return groups.clamp(min=0) // 2


@dataclass(frozen=True)
class RoutingSummary:
    """What the routers did with one global batch, each valid token counted once. Every rank holds the same, on the CPU.

    Rows are the layers of the whole model that have a router; `layers` numbers them from 0. `counts_LGE`: choices by
    group and expert, `num_choices` a token. Means over tokens: `balance_L` and `z_L` (unweighted losses), `entropy_L`
    (of the router's probabilities, in nats), `margin_L` (largest probability minus the second largest; 1 with one
    expert).
    """

    layers: tuple[int, ...]
    counts_LGE: torch.Tensor
    balance_L: torch.Tensor
    z_L: torch.Tensor
    entropy_L: torch.Tensor
    margin_L: torch.Tensor
    balance_loss: float
    z_loss: float
    num_choices: int = 1

    @property
    def tokens(self) -> float:
        return float(self.counts_LGE[0].sum()) / self.num_choices

    @property
    def counts_LE(self) -> torch.Tensor:  # noqa: N802
        return self.counts_LGE.sum(1)

    @property
    def load_LE(self) -> torch.Tensor:  # noqa: N802
        """Each expert's share of the choices; sums to 1 by layer."""
        return shares(self.counts_LE)

    @property
    def max_over_mean_L(self) -> torch.Tensor:  # noqa: N802
        """The busiest expert's tokens over the mean's: 1 when balanced, E when collapsed."""
        return self.load_LE.amax(-1) * self.load_LE.shape[-1]

    @property
    def load_entropy_L(self) -> torch.Tensor:  # noqa: N802
        """Entropy of the load in nats: log E when balanced, 0 when collapsed."""
        return torch.special.entr(self.load_LE).sum(-1)

    def counts_by_domain(self) -> torch.Tensor:
        """[D, L, E]."""
        return self._counts_LDME().sum(2).transpose(0, 1)

    def counts_by_modality(self, modality: int) -> torch.Tensor:
        """[L, E], of the TEXT or the IMAGE places."""
        return self._counts_LDME()[:, :, modality].sum(1)

    def _counts_LDME(self) -> torch.Tensor:  # noqa: N802
        return self.counts_LGE.unflatten(1, (-1, 2))


def shares(counts_E: torch.Tensor) -> torch.Tensor:
    """Counts over the last axis as shares of their sum; 0 where there is nothing to share."""
    return counts_E / counts_E.sum(-1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class RouterMemory:
    """What a run remembers of its routers from step to step. Part of every checkpoint; the same on every rank and in
    every layout, as its rows are the layers of the whole model.

    `tokens_LE` and `unused_steps_LE` int64: tokens that each expert has seen in total, and for how many steps it has
    seen none. `balance_factor` multiplies `adapter.balance_weight`. `told`: the step at which each alarm that sounded
    did so last, by its key.
    """

    tokens_LE: torch.Tensor
    unused_steps_LE: torch.Tensor
    balance_factor: float = 1.0
    told: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def empty(cls, num_layers: int, num_experts: int) -> RouterMemory:
        zeros = torch.zeros(num_layers, num_experts, dtype=torch.int64)
        return cls(zeros, zeros.clone())

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> RouterMemory:
        """The inverse of `to_tree`."""
        tokens, unused = (_int_table(tree[name]) for name in ("tokens", "unused_steps"))
        return cls(tokens, unused, float(tree["balance_factor"]), dict(tree["told"]))

    def to_tree(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "tokens": self.tokens_LE.tolist(),
            "unused_steps": self.unused_steps_LE.tolist(),
            "balance_factor": self.balance_factor,
            "told": dict(self.told),
        }


def _int_table(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64)
