"""The linears that carry plain LoRA over Transformer Engine's. Imported where it is installed alone."""

from __future__ import annotations

from typing import Any

from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

from mole_mega.adapters.linear import LoRAColumn, LoRARow


class TELoRAColumnParallelLinear(LoRAColumn, TEColumnParallelLinear):
    """`LoRAColumn` over Transformer Engine's linear."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_without_communication(kwargs))


class TELoRARowParallelLinear(LoRARow, TERowParallelLinear):
    """`LoRARow` over Transformer Engine's linear."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_without_communication(kwargs))


def _without_communication(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Megatron-Core gives the linear of an expert no group: what surrounds it communicates. It differs in nothing else
    that a frozen weight feels."""
    return kwargs | {"is_expert": True}
