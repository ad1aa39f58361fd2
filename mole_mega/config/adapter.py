"""The section about what is trained beside the frozen base."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from mole_mega.config.values import LARGEST_SIZE, NonNegative, Positive, PositiveInt, ProperShare, Range, Size

# The keys of AdapterConfig that make a mixture; adapter.method lora hears none of them.
MIXTURE_KEYS = frozenset({
    "num_experts", "gate", "top_k", "router_scope", "renormalize", "rescale_gate", "share_A", "shared_B",
    "mix_temperature", "expert_form", "router_score", "score_bias_rate", "balance_weight", "balance_scope",
    "z_loss_weight", "expert_parallel", "router_bias",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What is trained beside the frozen base (LLaVA-MoLE, arXiv 2401.16160)."""

    method: Literal["mole", "lora"] = "mole"
    num_experts: Size = 3
    rank: Size = 32
    alpha: Positive = 64.0
    dropout: ProperShare = 0.0
    # The weight of a chosen expert's output: 1; its probability; 1 with the probability's gradient. dense: all experts,
    # each by its probability.
    gate: Literal["none", "prob", "straight_through", "dense"] = "prob"
    top_k: PositiveInt = 1
    # What routes: a router a block (LLaVA-MoLE); one for each of gate, up and down (LoRAMoE, arXiv 2312.09979); one of
    # the model, which reads a sample's instruction (Octavius, arXiv 2311.02684); or the sample's task: source number e
    # of data.sources is served by expert e, and nothing is learned (as in BoRA, arXiv 2407.15857).
    router_scope: Literal["block", "linear", "sample", "task"] = "block"
    # divide the probabilities of the chosen experts by their sum
    renormalize: bool = False
    # backward an expert gets the square root of its weight where the weight stood (arXiv 2502.15828); the value stays
    rescale_gate: bool = False
    # one A a linear for all its experts (MoSLD, arXiv 2412.08946; HydraLoRA, arXiv 2404.19245)
    share_A: bool = False
    # So many B a linear, of which each expert's is a mixture of its own, with the softmax of its weights over
    # mix_temperature, behind a transform of the ranks (MTL-LoRA, arXiv 2410.09437). 0: a B each.
    shared_B: Annotated[int, Range(0, LARGEST_SIZE)] = 0
    mix_temperature: Positive = 0.1
    # What the weights weigh: what LoRA adds to each linear, or whole MLPs, each with its own activation (MixLoRA, arXiv
    # 2404.15159).
    expert_form: Literal["linear", "mlp"] = "linear"
    # How a router scores experts: by a softmax; or each by a sigmoid and a bias that no gradient moves, but after each
    # step score_bias_rate towards the mean load (SMoRA, arXiv 2501.15103).
    router_score: Literal["softmax", "sigmoid"] = "softmax"
    score_bias_rate: NonNegative = 1e-5
    balance_weight: NonNegative = 0.01
    balance_scope: Literal["layer", "model"] = "layer"
    z_loss_weight: NonNegative = 0.0
    # What travels between expert-parallel ranks: tokens to their expert (top_k 1 alone), or the weights of a layer's
    # experts to where the tokens are; auto: by the numbers of each (adapters/traffic.py).
    expert_parallel: Literal["tokens", "weights", "auto"] = "tokens"
    router_bias: bool = True
    attention: bool = True
    # "all", or the indices (from 0) of the decoder layers that carry adapters in their MLP.
    layers: Literal["all"] | tuple[int, ...] = "all"
    # The scale of what a pair adds: alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732).
    scaling: Literal["lora", "rslora"] = "lora"
    # What works around the optimizer step, in order: a `name` of adapters/methods and that method's options each.
    methods: tuple[dict[str, Any], ...] = ()

    @property
    def scale(self) -> float:
        """s of y = W x + s B A x."""
        return self.alpha / (math.sqrt(self.rank) if self.scaling == "rslora" else self.rank)

    @property
    def why_tokens_stay(self) -> str:
        """What of this config wants `expert_parallel` weights, in words; empty if nothing does."""
        reasons = {
            f"adapter.top_k is {self.top_k}": self.top_k > 1,
            "adapter.gate is dense": self.gate == "dense",
            "adapter.share_A is true": self.share_A,
            "adapter.rescale_gate is true": self.rescale_gate,
            "adapter.router_scope is linear": self.router_scope == "linear",
            "adapter.expert_form is mlp": self.expert_form == "mlp",
        }
        return next((reason for reason, holds in reasons.items() if holds), "")

    @property
    def without_effect(self) -> frozenset[str]:
        """The keys of this section that nothing hears beside its others: they may hold anything."""
        if self.method == "lora":
            return MIXTURE_KEYS
        idle = {"mix_temperature": self.shared_B == 0, "score_bias_rate": self.router_score != "sigmoid"}
        return frozenset(key for key, holds in idle.items() if holds)

    @property
    def num_choices(self) -> int:
        """How many experts a token is counted for: top_k; where it uses all, its likeliest."""
        return 1 if self.gate == "dense" else self.top_k
