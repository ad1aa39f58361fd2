"""Which adapter tensor of ours belongs to which module of a built `LlavaForConditionalGeneration`, as data.

The tensors themselves are the same on both sides, element for element: gate and up, and q, k and v, have factors of
their own though Megatron-Core fuses the base weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mole_mega.config import AdapterConfig, ConfigError
from mole_mega.models.sizes import LlavaSize

_OURS = "language_model.decoder.layers.{layer}."
_THEIRS = "model.language_model.layers.{layer}."

# (our module, projection, their module)
_ATTENTION = (
    ("self_attention.linear_qkv", "q", "self_attn.q_proj"),
    ("self_attention.linear_qkv", "k", "self_attn.k_proj"),
    ("self_attention.linear_qkv", "v", "self_attn.v_proj"),
    ("self_attention.linear_proj", "o", "self_attn.o_proj"),
)
_MLP = (
    ("mlp.linear_fc1", "gate", "mlp.gate_proj"),
    ("mlp.linear_fc1", "up", "mlp.up_proj"),
    ("mlp.linear_fc2", "down", "mlp.down_proj"),
)
ROUTER = "mlp.router"
# those of a layer, the same modules on both sides, by `adapter.router_scope`
_ROUTERS = {"block": (ROUTER,), "linear": tuple(f"{ROUTER}.{name}" for name in ("gate", "up", "down"))}


@dataclass(frozen=True)
class AdapterRow:
    """One adapter tensor: our name; their module; what it is there. `has_experts`: its first axis is the experts'."""

    ours: str
    module: str
    kind: Literal["lora_A", "lora_B", "router_weight", "router_bias", "router_score_bias"]
    has_experts: bool = False


def adapter_rows(adapter: AdapterConfig, size: LlavaSize, *, mixed: bool = False) -> Iterator[AdapterRow]:
    """Every adapter tensor of a model, once. LoRA A is [R, in] and B [out, R], with a leading [E] for
    experts, but for an A that they share. Where experts mix common B (`adapter.shared_B`), B is what each makes of them
    if the caller puts it together (`mixed`), and else there is no such form: ConfigError."""
    if adapter.method == "mole" and adapter.shared_B and not mixed:
        raise ConfigError(
            f"adapter.shared_B is {adapter.shared_B}: each expert's B is a mixture of common ones behind a transform, "
            "for which this format has no place; --format peft puts each together"
        )
    is_mole = adapter.method == "mole"
    for layer in range(size.language.num_layers):
        ours, theirs = _OURS.format(layer=layer), _THEIRS.format(layer=layer)
        has_mlp = adapter.layers == "all" or layer in adapter.layers
        for module, projection, target in (*(_ATTENTION if adapter.attention else ()), *(_MLP if has_mlp else ())):
            has_experts = is_mole and module.startswith("mlp.")
            holder = "mlp.experts" if has_experts else module
            own_A = has_experts and not adapter.share_A
            yield AdapterRow(f"{ours}{holder}.lora_{projection}_A", theirs + target, "lora_A", own_A)
            yield AdapterRow(f"{ours}{holder}.lora_{projection}_B", theirs + target, "lora_B", has_experts)
        for router in _ROUTERS.get(adapter.router_scope, ()) if has_mlp and is_mole else ():
            yield AdapterRow(f"{ours}{router}.weight", theirs + router, "router_weight")
            if adapter.router_bias:
                yield AdapterRow(f"{ours}{router}.bias", theirs + router, "router_bias")
            if adapter.router_score == "sigmoid":
                yield AdapterRow(f"{ours}{router}.score_bias", theirs + router, "router_score_bias")
