"""Which modules each layer is built of: the only place where LoRA and MoLE enter the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from mole_mega.adapters import cpu_kernels
from mole_mega.adapters.instructions import InstructionRouter, SampleRouter
from mole_mega.adapters.linear import LoRASpec, Projection
from mole_mega.adapters.mixture import LinearMixtureLayer, MixtureExperts, MixtureLayer
from mole_mega.adapters.mole import MoLEExperts, MoLELayer
from mole_mega.adapters.routers import LinearRouters, MoLERouter, TaskRouter
from mole_mega.config import AdapterConfig
from mole_mega.models.backend import Backend
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
    backend: Backend
    # of a model whose samples are routed as a whole
    instructions: InstructionRouter | None = None

    def lora(self, layer: int, part: str, projections: tuple[Projection, ...], num_blocks: int = 1) -> LoRASpec:
        assert self.adapter is not None
        return LoRASpec(
            adapter=self.adapter, name=f"layers.{layer}.{part}", layer=layer, seed=self.seed,
            groups=self.parallel.groups, device=self.parallel.device, projections=projections, num_blocks=num_blocks,
        )  # fmt: skip


def vision_layer(backend: Backend) -> ModuleSpec:
    """A CLIP layer: pre-LN, full attention, no adapters."""
    return _layer(backend, _plain_attention(backend), AttnMaskType.no_mask, _plain_mlp(backend))


def projector_mlp(backend: Backend) -> MLPSubmodules:
    return _mlp(backend)


def decoder_block(config: TransformerConfig, layer_indices: range, plan: AdapterPlan) -> TransformerBlockSubmodules:
    """The decoder layers of one pipeline stage; `layer_indices` are theirs in the whole decoder, from 0."""
    specs = [
        _layer(plan.backend, _attention(config, index, plan), AttnMaskType.causal, _decoder_mlp(config, index, plan))
        for index in layer_indices
    ]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=plan.backend.norm)


@dataclass(frozen=True)
class _Part:
    """An attention or an MLP. `holds_norm`: the norm before it is inside its first linear."""

    built_of: Any
    holds_norm: bool


# What a base checkpoint calls a norm that a linear holds.
_NAMES_OF_HELD_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def _layer(backend: Backend, attention: _Part, mask: AttnMaskType, mlp: _Part) -> ModuleSpec:
    params = {"attn_mask_type": mask}
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if attention.holds_norm else backend.norm,
            self_attention=ModuleSpec(module=CachedSelfAttention, params=params, submodules=attention.built_of),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp if mlp.holds_norm else backend.norm,
            mlp=mlp.built_of,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_NAMES_OF_HELD_NORMS,
        ),
    )


def _mlp(backend: Backend) -> MLPSubmodules:
    modules = backend.modules
    return MLPSubmodules(linear_fc1=modules.column_parallel_linear(), linear_fc2=modules.row_parallel_linear())


def _plain_mlp(backend: Backend, **options: Any) -> _Part:
    """An MLP without adapters: nothing else reads the norm before it, so that its linear may hold it."""
    fused = backend.fused_column
    linears = _mlp(backend) if fused is None else replace(_mlp(backend), linear_fc1=fused)
    return _Part(partial(MLP.as_mlp_submodule, submodules=linears, **options), fused is not None)


def _plain_attention(backend: Backend) -> _Part:
    """An attention without adapters; its norm as in `_plain_mlp`."""
    modules, fused = backend.modules, backend.fused_column
    linears = SelfAttentionSubmodules(
        linear_qkv=modules.column_parallel_linear() if fused is None else fused,
        core_attention=modules.core_attention(),
        linear_proj=modules.row_parallel_linear(),
    )
    return _Part(linears, fused is not None)


def _attention(config: TransformerConfig, index: int, plan: AdapterPlan) -> _Part:
    backend, adapter = plan.backend, plan.adapter
    if adapter is None or not adapter.attention:
        return _plain_attention(backend)
    heads, groups, width = config.num_attention_heads, config.num_query_groups, config.kv_channels
    qkv = (Projection("q", heads // groups * width), Projection("k", width), Projection("v", width))
    output = (Projection("o", config.hidden_size),)
    linears = SelfAttentionSubmodules(
        linear_qkv=partial(backend.lora_column, lora=plan.lora(index, "attention", qkv, num_blocks=groups)),
        core_attention=backend.modules.core_attention(),
        linear_proj=partial(backend.lora_row, lora=plan.lora(index, "attention", output)),
    )
    return _Part(linears, holds_norm=False)


def _leaves_rows_in_place(config: TransformerConfig, adapter: AdapterConfig, parallel: Parallel) -> bool:
    """Whether tokens need not even be put in order by their expert: a rank alone has all experts, and the CPU's kernels
    take rows from where they lie (measured in bf16 with 16 experts: 5% of an MLP's step)."""
    alone = parallel.ep_size == parallel.tp_size == 1
    on_cpu = parallel.device.type == "cpu"
    return alone and adapter.num_experts > 1 and on_cpu and cpu_kernels.library(config.params_dtype) is not None


def _decoder_mlp(config: TransformerConfig, index: int, plan: AdapterPlan) -> _Part:
    adapter, parallel = plan.adapter, plan.parallel
    if adapter is None or (adapter.layers != "all" and index not in adapter.layers):
        return _plain_mlp(plan.backend, ffn_hidden_size=config.ffn_hidden_size)
    name = f"layers.{index}.mlp"
    common: dict[str, Any] = {"adapter": adapter, "seed": plan.seed, "device": parallel.device}
    if adapter.method == "mole":
        assert adapter.expert_parallel != "auto"
        travels = adapter.expert_parallel == "tokens" and not _leaves_rows_in_place(config, adapter, parallel)
        layer, bank = (MoLELayer, MoLEExperts) if travels else (MixtureLayer, MixtureExperts)
        if adapter.router_scope == "linear":
            layer = LinearMixtureLayer
        experts = partial(bank, submodules=_mlp(plan.backend), prefix=name, layer=index, **common)
        router = partial(_ROUTERS[adapter.router_scope], name=f"{name}.router", **common)
        if plan.instructions is not None:
            router = partial(router, instructions=plan.instructions)
        # the router reads what the norm puts out
        return _Part(partial(layer, submodules=MoESubmodules(experts=experts, router=router)), holds_norm=False)
    width = config.ffn_hidden_size // parallel.tp_size
    fused = plan.lora(index, "mlp", (Projection("gate", width), Projection("up", width)), num_blocks=parallel.tp_size)
    down = plan.lora(index, "mlp", (Projection("down", config.hidden_size),))
    submodules = MLPSubmodules(
        linear_fc1=partial(plan.backend.lora_column, lora=fused),
        linear_fc2=partial(plan.backend.lora_row, lora=down),
    )
    mlp = partial(MLP.as_mlp_submodule, submodules=submodules, ffn_hidden_size=config.ffn_hidden_size)
    return _Part(mlp, holds_norm=False)
