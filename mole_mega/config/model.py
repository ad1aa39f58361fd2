"""The sections about what computes, and where: the frozen base, its FP8 forms, the process grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mole_mega.config.values import PositiveInt


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which frozen LLaVA the adapters sit on. `base` is a folder written by `mole-mega convert hf-to-megatron`.
    `backend` is whose attention, norms and linears compute it: torch's through Megatron-Core, on any hardware, or
    Transformer Engine's, on CUDA."""

    base: str
    # Fails the run when the base is not the one the user meant; empty accepts any and records what was found.
    base_hash: str = ""
    backend: Literal["local", "transformer_engine"] = "local"


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the process grid. Data parallelism is what is left of the world. TP > 1 always means sequence
    parallelism: Megatron-Core's MoE layer does not train without it."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    expert: PositiveInt = 1
    context: PositiveInt = 1

    def data(self, world_size: int) -> int:
        """How many ranks of so many processes read other samples."""
        return world_size // (self.tensor * self.pipeline * self.context)


ScaleOf = Literal["channel", "block"]


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """FP8 in storage and in products.

    `store_base` keeps the frozen linears of tower and decoder as float8. Alone it is storage: e4m3 with a `scale` an
    output channel or a 128 x 128 block, products in the training precision, on any hardware. With train.precision fp8
    it is Transformer Engine's primary FP8 weights, scaled as the recipe says.

    `first_last_layers_bf16` leaves the decoder's first and last layer as they are, in either form. `recipe` is heard
    with train.precision fp8 alone: how tensors are scaled (Transformer Engine's DelayedScaling, Float8CurrentScaling,
    Float8BlockScaling, MXFP8BlockScaling). Products in FP8 are the decoder's: the tower, whose products are few, and
    the projector, which is trained, stay in bf16.
    """

    store_base: bool = False
    scale: ScaleOf = "channel"
    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    first_last_layers_bf16: bool = False
