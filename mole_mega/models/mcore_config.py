"""The only place where a Megatron-Core `TransformerConfig` is built, and where a layout is checked against a size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from mole_mega.config import ConfigError, RunConfig
from mole_mega.models.sizes import LanguageSize, LlavaSize
from mole_mega.platform.fp8 import BLOCK
from mole_mega.platform.recipes import recipe_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """CLIP's activation. Megatron-Core's own is compiled at its first call, and so asks for a C++ compiler."""
    return x * torch.sigmoid(1.702 * x)


@dataclass(frozen=True)
class McoreConfigs:
    """One config a part of the model."""

    vision: TransformerConfig
    projector: TransformerConfig
    language: TransformerConfig


def build_configs(run: RunConfig, size: LlavaSize) -> McoreConfigs:
    """Megatron-Core's configs of the tower, the projector and the decoder. Raises ConfigError when the layout does not
    divide the size."""
    check_layout(run, size)
    parallel, train, language, vision = run.parallel, run.train, size.language, size.vision
    common: dict[str, Any] = {
        "params_dtype": DTYPES[train.dtype],
        "bf16": train.dtype == "bf16",
        "tensor_model_parallel_size": parallel.tensor,
        # weights come from the base checkpoint; adapters are initialised by adapters/sharding.py
        "perform_initialization": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # fused kernels need Apex or Transformer Engine
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        "bias_dropout_fusion": False,
        "gradient_accumulation_fusion": False,
    }
    return McoreConfigs(
        vision=_transformer_config(
            **common,
            num_layers=vision.num_built_layers,
            hidden_size=vision.hidden_size,
            ffn_hidden_size=vision.ffn_hidden_size,
            num_attention_heads=vision.num_heads,
            layernorm_epsilon=vision.norm_eps,
            activation_func=quick_gelu,
        ),
        projector=_transformer_config(
            **common,
            num_layers=1,
            hidden_size=language.hidden_size,
            ffn_hidden_size=language.hidden_size,
            num_attention_heads=language.num_heads,  # unused, but checked against TP
            activation_func=F.gelu,
        ),
        language=_transformer_config(
            **common,
            num_layers=language.num_layers,
            hidden_size=language.hidden_size,
            ffn_hidden_size=language.ffn_hidden_size,
            num_attention_heads=language.num_heads,
            num_query_groups=language.num_kv_heads,
            kv_channels=language.kv_channels,
            layernorm_epsilon=language.norm_eps,
            normalization="RMSNorm",
            activation_func=F.silu,
            gated_linear_unit=True,
            add_bias_linear=False,
            pipeline_model_parallel_size=parallel.pipeline,
            pipeline_dtype=DTYPES[train.dtype],
            sequence_parallel=parallel.tensor > 1,
            context_parallel_size=parallel.context,
            # micro-batches are padded to their own longest sample
            variable_seq_lengths=True,
            batch_p2p_sync=False,
            # the default refuses sequences of different lengths, with experts or without
            moe_token_dispatcher_type="alltoall",
            # the loss is a mean over the valid tokens of the global batch, however it is cut
            calculate_per_token_loss=True,
            **_moe(run, size),
            **_recompute(run),
            **_fp8(run),
        ),
    )


def check_layout(run: RunConfig, size: LlavaSize) -> None:
    """Raise ConfigError, with the numbers, where a size does not divide over the layout."""
    tensor, pipeline = run.parallel.tensor, run.parallel.pipeline
    language, vision = size.language, size.vision
    for what, number in (
        ("the decoder's heads", language.num_heads),
        ("the decoder's key-value heads", language.num_kv_heads),
        ("the decoder's feed-forward width", language.ffn_hidden_size),
        ("the decoder's hidden width", language.hidden_size),
        ("the tower's heads", vision.num_heads),
        ("the tower's feed-forward width", vision.ffn_hidden_size),
    ):
        if number % tensor:
            raise ConfigError(f"parallel.tensor {tensor} does not divide {what}, {number}")
    if language.num_layers % pipeline:
        raise ConfigError(f"parallel.pipeline {pipeline} does not divide the decoder's {language.num_layers} layers")
    if run.data.max_length > language.max_length:
        raise ConfigError(f"data.max_length {run.data.max_length} exceeds the base's context of {language.max_length}")
    _check_fp8(run, language)
    _check_blocks(run, size)
    layers = run.adapter.layers
    if layers != "all":
        for index in layers:
            if not 0 <= index < language.num_layers:
                raise ConfigError(
                    f"adapter.layers names layer {index}; the decoder has layers 0 to {language.num_layers - 1}"
                )
        if len(set(layers)) < len(layers):
            raise ConfigError(f"adapter.layers names a layer twice: {list(layers)}")


def _check_fp8(run: RunConfig, language: LanguageSize) -> None:
    """Raise ConfigError, naming the width, where FP8 products cannot have a size's parts."""
    recipe, tensor = recipe_of(run), run.parallel.tensor
    if recipe is None:
        return
    for what, width in (
        ("hidden width", language.hidden_size),
        ("part of the query heads' width", language.num_heads * language.kv_channels // tensor),
        ("part of the key-value heads' width", language.num_kv_heads * language.kv_channels // tensor),
        ("part of the feed-forward width", language.ffn_hidden_size // tensor),
    ):
        if width % recipe.multiple:
            raise ConfigError(
                f"fp8.recipe {run.fp8.recipe} takes widths that are a multiple of {recipe.multiple}; at "
                f"parallel.tensor {tensor} the decoder's {what} is {width}"
            )


def _check_blocks(run: RunConfig, size: LlavaSize) -> None:
    """Raise ConfigError, naming the width, where tensor parallelism would cut a block of a base that is kept in FP8."""
    tensor, language, vision = run.parallel.tensor, size.language, size.vision
    if tensor == 1 or not run.fp8.store_base or run.fp8.scale != "block" or recipe_of(run) is not None:
        return
    fused_heads = language.num_heads + 2 * language.num_kv_heads
    for what, width in (
        ("the decoder's query, key and value heads", fused_heads * language.kv_channels),
        ("the decoder's query heads", language.num_heads * language.kv_channels),
        ("the decoder's feed-forward width", language.ffn_hidden_size),
        ("the tower's query, key and value heads", 3 * vision.hidden_size),
        ("the tower's query heads", vision.hidden_size),
        ("the tower's feed-forward width", vision.ffn_hidden_size),
    ):
        if width // tensor % BLOCK:
            raise ConfigError(
                f"fp8.scale block needs parts of a multiple of {BLOCK}, but under parallel.tensor {tensor} {what} "
                f"has parts of {width // tensor}; use fp8.scale channel"
            )


def _fp8(run: RunConfig) -> dict[str, Any]:
    recipe = recipe_of(run)
    if recipe is None:
        return {}
    return {
        "fp8": recipe.format,
        "fp8_recipe": run.fp8.recipe,
        "fp8_param": run.fp8.store_base,
        "first_last_layers_bf16": run.fp8.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": 1,
        "num_layers_at_end_in_bf16": 1,
    }


def _moe(run: RunConfig, size: LlavaSize) -> dict[str, Any]:
    if run.adapter.method != "mole":
        return {}
    return {
        "num_moe_experts": run.adapter.num_experts,
        "moe_ffn_hidden_size": size.language.ffn_hidden_size,
        "expert_model_parallel_size": run.parallel.expert,
        "expert_tensor_parallel_size": run.parallel.tensor,
        # of the dispatcher, which carries one expert a token (adapters/mole.py) or nothing (adapters/mixture.py)
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
        # the balance loss is ours (adapters/routers.py)
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


def _recompute(run: RunConfig) -> dict[str, Any]:
    if run.train.recompute == "none":
        return {}
    if run.train.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _transformer_config(**fields: Any) -> TransformerConfig:
    return TransformerConfig(**fields)
