"""Whose modules compute the frozen base: the one place that knows both backends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.transformer.transformer_config import TransformerConfig

from mole_mega.adapters.linear import LoRAColumnParallelLinear, LoRARowParallelLinear
from mole_mega.config import Fp8Config, RunConfig


@dataclass(frozen=True)
class Backend:
    """Megatron-Core's provider, and what ours adds to it: the builder of norms (called with config, width, eps), and
    the linears that carry LoRA."""

    modules: BackendSpecProvider
    norm: Any
    lora_column: type
    lora_row: type

    @property
    def fused_column(self) -> type | None:
        """A norm and a column linear in one module, whose norm nobody else can read; None where there is none."""
        return self.modules.column_parallel_layer_norm_linear()


class TorchNorm:
    """A torch norm with Megatron-Core's mark for sequence parallelism, which its own wrapper refuses. A class, because
    Megatron-Core takes a bare function for the finished module."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> torch.nn.Module:  # type: ignore[misc]
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


def on_local_backend(run: RunConfig) -> RunConfig:
    """The run as any hardware can build it: its model has the same tensors. FP8 and context parallelism, which change
    no tensor, are left out."""
    if run.model.backend == "local":
        return run
    return replace(
        run,
        model=replace(run.model, backend="local"),
        train=replace(run.train, precision=run.train.dtype),
        parallel=replace(run.parallel, context=1),
        fp8=Fp8Config(),
    )


def backend_called(name: Literal["local", "transformer_engine"]) -> Backend:
    """The backend that `model.backend` names. ImportError where Transformer Engine cannot be imported."""
    if name == "local":
        return Backend(LocalSpecProvider(), TorchNorm, LoRAColumnParallelLinear, LoRARowParallelLinear)
    # Megatron-Core lets its wrappers be imported without what they wrap
    import transformer_engine.pytorch  # noqa: F401
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    from mole_mega.adapters.transformer_engine import TELoRAColumnParallelLinear, TELoRARowParallelLinear

    modules = TESpecProvider()
    return Backend(modules, modules.layer_norm(), TELoRAColumnParallelLinear, TELoRARowParallelLinear)
