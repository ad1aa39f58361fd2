"""Frozen tensor-parallel linears that carry plain LoRA. A fused base (q, k, v; gate, up) carries one pair a projection,
as Hugging Face PEFT does, so that export stays exact.

y = W x + s B A dropout(x), s = `adapter.scale` (LoRA, arXiv 2106.09685).

The communication around the base is done here once for base and LoRA together: a column linear gathers the sequence
before both, a row linear sums both over the ranks after.

`LoRAColumn` and `LoRARow` stand before the class of the base: Megatron-Core's own here, Transformer Engine's in
transformer_engine.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from mole_mega.adapters import bank, sharding
from mole_mega.adapters.dropout import drop_cut, drop_whole
from mole_mega.adapters.pairs import Pair, make_pair
from mole_mega.config import AdapterConfig
from mole_mega.platform.fp8 import frozen_weight


@dataclass(frozen=True)
class Projection:
    """One of the projections that a base linear fuses, `width` outputs of it in each block."""

    name: str
    width: int


@dataclass(frozen=True, kw_only=True)
class LoRASpec:
    """What a linear needs to know to carry LoRA. `name` is the linear's place in the whole model; it seeds the factors.
    `layer` counts decoder layers from 0. `num_blocks` is how often the base's whole output repeats its projections one
    after another: once a query group for q, k, v; once a tensor-parallel rank for gate and up; 1 for a base that fuses
    nothing."""

    adapter: AdapterConfig
    name: str
    layer: int
    seed: int
    groups: ProcessGroupCollection
    device: torch.device
    projections: tuple[Projection, ...]
    num_blocks: int = 1

    @property
    def gathers_sequence(self) -> bool:
        """Tensor-parallel ranks hold a part of the sequence each where they do not work on it together."""
        return self.groups.tp.size() > 1


def _add_factors(module: torch.nn.Module, spec: LoRASpec, kind: str, in_features: int, dtype: torch.dtype) -> None:
    for projection in spec.projections:
        shapes = {
            "A": (spec.adapter.rank, in_features),
            "B": (projection.width * spec.num_blocks, spec.adapter.rank),
        }
        inits = {"A": sharding.kaiming_uniform, "B": sharding.zeros}
        for factor in ("A", "B"):
            parameter = sharding.make_parameter(
                f"{spec.name}.{projection.name}.{factor}",
                sharding.PLACEMENTS[f"{kind}.{factor}"],
                shapes[factor],
                inits[factor],
                spec.groups,
                seed=spec.seed,
                dtype=dtype,
                device=spec.device,
            )
            module.register_parameter(f"lora_{projection.name}_{factor}", parameter)


class LoRAColumn(torch.nn.Module):
    """A frozen column-parallel linear (outputs cut over TP) with one LoRA pair a projection.

    forward: [S / TP, B, in] -> ([S, B, out / TP], None). The class that comes after it is a linear that computes its
    part and leaves communication alone: the gather's backward sums the input's gradient over ranks.
    """

    def __init__(self, input_size: int, *args: Any, config: TransformerConfig, lora: LoRASpec, **kwargs: Any) -> None:
        super().__init__(input_size, *args, config=config, **kwargs)
        self.lora = lora
        _add_factors(self, lora, "column", input_size, config.params_dtype)

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        lora, tp = self.lora, self.lora.groups.tp
        if lora.gathers_sequence:
            input_ = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=tp)
        tokens, gradient = bank.share_input(input_.flatten(0, -2))
        output, bias = super().forward(tokens, *args, **kwargs)
        x = tokens
        if lora.adapter.dropout and self.training:
            x, gradient = drop_whole(tokens, lora.adapter.dropout), None
        factors_A = [getattr(self, f"lora_{p.name}_A") for p in lora.projections]
        factors_B = [getattr(self, f"lora_{p.name}_B") for p in lora.projections]
        scale = lora.adapter.scale
        num_blocks = lora.num_blocks // tp.size()
        if num_blocks == 1:  # each projection's outputs lie side by side
            output = bank.add_lora(output, x, factors_A, factors_B, scale, gradient)
        else:
            z = (scale * F.linear(x, torch.cat(factors_A))).split(lora.adapter.rank, dim=-1)
            deltas = [
                F.linear(z_p, B).unflatten(-1, (num_blocks, p.width))
                for z_p, B, p in zip(z, factors_B, lora.projections, strict=True)
            ]
            output = output + torch.cat(deltas, dim=-1).flatten(-2)
        return output.unflatten(0, input_.shape[:-1]), bias

    def pairs(self) -> list[Pair]:
        """Handles on this rank's factors, one a projection."""
        lora = self.lora
        return [
            make_pair(self, f"{lora.name}.{p.name}", lora.layer, p.name, lora.adapter.scale, lora.groups,
                      partial(self._frozen_rows, p))
            for p in lora.projections
        ]  # fmt: skip

    def _frozen_rows(self, projection: Projection) -> list[torch.Tensor]:
        """The base's rows of one projection, block by block."""
        widths = [p.width for p in self.lora.projections]
        start = sum(widths[: self.lora.projections.index(projection)])
        blocks = frozen_weight(self).detach().split(sum(widths))
        return [block[start : start + projection.width] for block in blocks]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]  # the linear's
        return _with_adapters(self, entries, prefix)


class LoRARow(torch.nn.Module):
    """A frozen row-parallel linear (inputs cut over TP) with a LoRA pair.

    forward: [S, B, in / TP] -> ([S / TP, B, out], None). B is applied to each rank's part of A x, and the one
    reduce-scatter that the base needs anyway sums the LoRA outputs too. The class that comes after it is a linear that
    computes its part and leaves communication alone.
    """

    def __init__(self, input_size: int, *args: Any, config: TransformerConfig, lora: LoRASpec, **kwargs: Any) -> None:
        super().__init__(input_size, *args, config=config, **kwargs)
        (self._projection,) = lora.projections
        self.lora = lora
        _add_factors(self, lora, "row", input_size, config.params_dtype)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        lora = self.lora
        tokens, gradient = bank.share_input(input_.flatten(0, -2))
        output, bias = super().forward(tokens)
        x = tokens
        if lora.adapter.dropout and self.training:
            x, gradient = drop_cut(tokens, lora.adapter.dropout), None
        factor_A = getattr(self, f"lora_{self._projection.name}_A")
        factor_B = getattr(self, f"lora_{self._projection.name}_B")
        output = bank.add_lora(output, x, [factor_A], [factor_B], lora.adapter.scale, gradient)
        output = output.unflatten(0, input_.shape[:-1])
        if lora.gathers_sequence:
            output = reduce_scatter_to_sequence_parallel_region(output, group=lora.groups.tp)
        return output, bias

    def pairs(self) -> list[Pair]:
        """The handle on this rank's factors."""
        lora, name = self.lora, self._projection.name
        whole_name = f"{lora.name}.{name}"
        return [
            make_pair(
                self,
                whole_name,
                lora.layer,
                name,
                lora.adapter.scale,
                lora.groups,
                lambda: [frozen_weight(self).detach()],
            )
        ]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]  # the linear's
        return _with_adapters(self, entries, prefix)


class LoRAColumnParallelLinear(LoRAColumn, ColumnParallelLinear):
    """`LoRAColumn` over Megatron-Core's linear."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.explicit_expert_comm = True  # no communication in here


class LoRARowParallelLinear(LoRARow, RowParallelLinear):
    """`LoRARow` over Megatron-Core's linear."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.explicit_expert_comm = True  # no communication in here


def _with_adapters(module: Any, entries: dict, prefix: str) -> dict:
    """Megatron-Core has entered every parameter as if it were replicated; the placed ones are entered as placed."""
    return entries | sharding.sharded_adapters(module, prefix, module.lora.groups)
