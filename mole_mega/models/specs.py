"""Which modules each layer is built of: the only place where LoRA and MoLE enter the model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from mole_mega.adapters.instructions import InstructionRouter, SampleRouter
from mole_mega.adapters.linear import LoRAColumnParallelLinear, LoRARowParallelLinear, LoRASpec, Projection
from mole_mega.adapters.mixture import LinearMixtureLayer, MixtureExperts, MixtureLayer
from mole_mega.adapters.mole import MoLEExperts, MoLELayer
from mole_mega.adapters.routers import LinearRouters, MoLERouter, TaskRouter
from mole_mega.config import AdapterConfig
from mole_mega.models.cache import CachedSelfAttention
from mole_mega.platform.parallel import Parallel

_ROUTERS: dict[str, Any] = {
    "block": MoLERouter, "linear": LinearRouters, "sample": SampleRouter, "task": TaskRouter,
}  # fmt: skip


@dataclass(frozen=True)
class AdapterPlan:
    """What the adapters of one model are built from. `adapter` None builds the frozen base alone; its `expert_parallel`
    is decided, not auto."""

    adapter: AdapterConfig | None
    seed: int
    parallel: Parallel
    backend: BackendSpecProvider
    # of a model whose samples are routed as a whole
    instructions: InstructionRouter | None = None

    def lora(self, layer: int, part: str, projections: tuple[Projection, ...], num_blocks: int = 1) -> LoRASpec:
        assert self.adapter is not None
        return LoRASpec(
            adapter=self.adapter, name=f"layers.{layer}.{part}", layer=layer, seed=self.seed,
            groups=self.parallel.groups, device=self.parallel.device, projections=projections, num_blocks=num_blocks,
        )  # fmt: skip


class TorchNorm:
    """A torch norm with Megatron-Core's mark for sequence parallelism, which its own wrapper refuses. A class, because
    Megatron-Core takes a bare function for the finished module."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> torch.nn.Module:  # type: ignore[misc]
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


def vision_layer(backend: BackendSpecProvider) -> ModuleSpec:
    """A CLIP layer: pre-LN, full attention, no adapters."""
    return _layer(
        SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
        ),
        AttnMaskType.no_mask,
        partial(MLP.as_mlp_submodule, submodules=_mlp(backend)),
    )


def projector_mlp(backend: BackendSpecProvider) -> MLPSubmodules:
    return _mlp(backend)


def decoder_block(config: TransformerConfig, layer_indices: range, plan: AdapterPlan) -> TransformerBlockSubmodules:
    """The decoder layers of one pipeline stage; `layer_indices` are theirs in the whole decoder, from 0."""
    specs = [
        _layer(_attention(config, index, plan), AttnMaskType.causal, _decoder_mlp(config, index, plan))
        for index in layer_indices
    ]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=TorchNorm)


def _layer(attention: SelfAttentionSubmodules, mask: AttnMaskType, mlp: Any) -> ModuleSpec:
    params = {"attn_mask_type": mask}
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=TorchNorm,
            self_attention=ModuleSpec(module=CachedSelfAttention, params=params, submodules=attention),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=TorchNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _mlp(backend: BackendSpecProvider) -> MLPSubmodules:
    return MLPSubmodules(linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear())


def _attention(config: TransformerConfig, index: int, plan: AdapterPlan) -> SelfAttentionSubmodules:
    backend, adapter = plan.backend, plan.adapter
    if adapter is None or not adapter.attention:
        linear_qkv, linear_proj = backend.column_parallel_linear(), backend.row_parallel_linear()
    else:
        heads, groups, width = config.num_attention_heads, config.num_query_groups, config.kv_channels
        qkv = (Projection("q", heads // groups * width), Projection("k", width), Projection("v", width))
        linear_qkv = partial(LoRAColumnParallelLinear, lora=plan.lora(index, "attention", qkv, num_blocks=groups))
        output = plan.lora(index, "attention", (Projection("o", config.hidden_size),))
        linear_proj = partial(LoRARowParallelLinear, lora=output)
    return SelfAttentionSubmodules(
        linear_qkv=linear_qkv, core_attention=backend.core_attention(), linear_proj=linear_proj
    )


def _decoder_mlp(config: TransformerConfig, index: int, plan: AdapterPlan) -> Any:
    adapter, parallel = plan.adapter, plan.parallel
    if adapter is None or (adapter.layers != "all" and index not in adapter.layers):
        return partial(MLP.as_mlp_submodule, submodules=_mlp(plan.backend), ffn_hidden_size=config.ffn_hidden_size)
    name = f"layers.{index}.mlp"
    common: dict[str, Any] = {"adapter": adapter, "seed": plan.seed, "device": parallel.device}
    if adapter.method == "mole":
        assert adapter.expert_parallel != "auto"
        travels = adapter.expert_parallel == "tokens"
        layer, bank = (MoLELayer, MoLEExperts) if travels else (MixtureLayer, MixtureExperts)
        if adapter.router_scope == "linear":
            layer = LinearMixtureLayer
        experts = partial(bank, submodules=_mlp(plan.backend), prefix=name, layer=index, **common)
        router = partial(_ROUTERS[adapter.router_scope], name=f"{name}.router", **common)
        if plan.instructions is not None:
            router = partial(router, instructions=plan.instructions)
        return partial(layer, submodules=MoESubmodules(experts=experts, router=router))
    width = config.ffn_hidden_size // parallel.tp_size
    fused = plan.lora(index, "mlp", (Projection("gate", width), Projection("up", width)), num_blocks=parallel.tp_size)
    down = plan.lora(index, "mlp", (Projection("down", config.hidden_size),))
    submodules = MLPSubmodules(
        linear_fc1=partial(LoRAColumnParallelLinear, lora=fused),
        linear_fc2=partial(LoRARowParallelLinear, lora=down),
    )
    return partial(MLP.as_mlp_submodule, submodules=submodules, ffn_hidden_size=config.ffn_hidden_size)
