"""What the methods around the optimizer step take: each says of itself (adapters/methods), over a rank's LoRA pairs."""

from __future__ import annotations

from mole_mega.adapters.methods import check_methods
from mole_mega.adapters.methods.base import PairSize
from mole_mega.config import RunConfig
from mole_mega.estimate.parameters import adapted_layers, stage_layers
from mole_mega.models.sizes import LlavaSize


def method_bytes(run: RunConfig, size: LlavaSize, stage: int) -> tuple[int, int]:
    """(what one rank's methods remember, what they need beside it while a step is made, one after another)."""
    pairs, asked = lora_pairs(run, size, stage), check_methods(run)
    state = sum(kind.state_bytes(options, pairs) for kind, options in asked)
    return state, max((kind.workspace_bytes(options, pairs) for kind, options in asked), default=0)


def lora_pairs(run: RunConfig, size: LlavaSize, stage: int) -> list[PairSize]:
    """The pairs of one rank of a pipeline stage."""
    adapter, language, tensor = run.adapter, size.language, run.parallel.tensor
    hidden, ffn = language.hidden_size, language.ffn_hidden_size // tensor
    heads, groups = (n * language.kv_channels // tensor for n in (language.num_heads, language.num_kv_heads))
    experts = adapter.num_experts // run.parallel.expert if adapter.method == "mole" else None
    shares_A = adapter.share_A and experts is not None

    def pair(projection: str, wide_in: int, wide_out: int, experts: int | None, shares_A: bool) -> PairSize:
        return PairSize(projection, adapter.rank, adapter.rank * wide_in, adapter.rank * wide_out, experts, shares_A)

    attention = (("q", hidden, heads), ("k", hidden, groups), ("v", hidden, groups), ("o", heads, hidden))
    mlp = (("gate", hidden, ffn), ("up", hidden, ffn), ("down", ffn, hidden))
    found = [pair(*widths, None, False) for widths in attention] * len(stage_layers(run, size, stage))
    found = found if adapter.attention else []
    return found + [pair(*widths, experts, shares_A) for widths in mlp] * adapted_layers(run, size, stage)
