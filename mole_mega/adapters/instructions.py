"""One gate a sample, the same in every layer, chosen by what the sample asks (Octavius, arXiv 2311.02684).

The router reads the mean of the embeddings of the instruction's text. Embeddings are frozen, so that the means of all
the samples of a step are known before its first pass: every pipeline stage gets them then, and holds the one router
with its gradient summed over stages. Departs from the released code in that padding is not in the mean, and in that
the mean comes before the router, which is linear, and not after.

Shape suffixes: N samples of a step, S sequence, B batch, T tokens, H hidden, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from mole_mega.adapters import sharding
from mole_mega.adapters.routers import MoLERouter
from mole_mega.config import AdapterConfig

# A place's number carries its sample's row and, below this, its group (routing.py).
_STRIDE = 2**32


def number_places(groups_BS: torch.Tensor, rows_B: torch.Tensor) -> torch.Tensor:
    """Places of `place_groups` with the row of their sample; -1 stays."""
    return torch.where(groups_BS >= 0, groups_BS + rows_B[:, None] * _STRIDE, -1)


class InstructionRouter(MegatronModule):
    """The router of the whole model: weight [E, H] and bias [E], fp32, a copy on each pipeline stage."""

    def __init__(
        self, config: TransformerConfig, groups: ProcessGroupCollection, adapter: AdapterConfig, seed: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        super().__init__(config)
        self._groups = groups
        shape = (adapter.num_experts, config.hidden_size)
        common: dict[str, Any] = {"seed": seed, "dtype": torch.float32, "device": device}
        self.weight = sharding.make_parameter(
            "router.weight", sharding.PLACEMENTS["router.weight"], shape, sharding.kaiming_uniform, groups, **common
        )
        self.bias = None
        if adapter.router_bias:
            self.bias = sharding.make_parameter(
                "router.bias", sharding.PLACEMENTS["router.bias"], shape[:1], sharding.zeros, groups, **common
            )
        for parameter in self.parameters():
            # the gradient's norm counts one of the copies
            parameter.shared = groups.pp.rank() > 0
        self._table_NH: torch.Tensor | None = None
        self._next_row = 0

    def hear(self, table_NH: torch.Tensor) -> None:
        """The mean embeddings of the samples that are about to pass, in their order, once or several times over."""
        self._table_NH, self._next_row = table_NH, 0

    def next_rows(self, number: int) -> torch.Tensor:
        """The rows [B] of the next `number` samples. Raises ValueError where nobody was heard."""
        if self._table_NH is None:
            raise ValueError("adapter.router_scope is sample, but the model was not told what samples ask")
        rows = torch.arange(self._next_row, self._next_row + number, device=self._table_NH.device)
        self._next_row = (self._next_row + number) % len(self._table_NH)
        return rows % len(self._table_NH)

    def logits(self) -> torch.Tensor:
        """[N, E] of all the samples heard."""
        assert self._table_NH is not None
        return F.linear(self._table_NH, self.weight, self.bias)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        entries = sharding.sharded_adapters(self, prefix, self._groups)
        for entry in entries.values():
            entry.replica_id = (self._groups.pp.rank(), *entry.replica_id[1:])
        return entries


class SampleRouter(MoLERouter):
    """Stands where a block's router does; what it says is the `InstructionRouter`'s, for each token of a sample."""

    def __init__(self, *args: Any, instructions: InstructionRouter, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._instructions = (instructions,)  # in a tuple, so that its parameters are not this module's

    def _make_parameters(self, config: TransformerConfig, name: str, **common: Any) -> None:
        pass

    def forward(
        self, hidden: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `MoLERouter.forward`."""
        if self._group_T is None:
            raise ValueError("adapter.router_scope is sample, but the model was not told which sample a place is of")
        place_T = self._group_T
        logits_TE = self._instructions[0].logits().index_select(0, place_T.clamp(min=0) // _STRIDE)
        group_T = torch.where(place_T >= 0, place_T % _STRIDE, -1)
        return self._weigh(hidden.reshape(-1, hidden.shape[-1]), logits_TE, group_T >= 0, group_T)
