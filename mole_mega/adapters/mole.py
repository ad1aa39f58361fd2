"""The MoLE block whose tokens travel: Megatron-Core's `MoELayer` around one frozen MLP and a bank of LoRA experts.

For a token x that its router sent to expert k with weight w (LLaVA-MoLE, arXiv 2401.16160):

    h = silu(Wg x + w Dg_k(x)) * (Wu x + w Du_k(x));  out = Wd h + w Dd_k(h);  D_k(z) = s B_k A_k dropout(z)

The frozen MLP is held once a rank and runs dense over all the tokens that the dispatcher brought, whichever expert
they chose; only the thin factors know about experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.autograd.function import once_differentiable

from mole_mega.adapters import bank, cpu_kernels, sharding
from mole_mega.adapters.dropout import drop_cut, drop_whole
from mole_mega.adapters.mixed_factors import mix_factors
from mole_mega.adapters.pairs import Pair, make_pair
from mole_mega.config import AdapterConfig
from mole_mega.platform.fp8 import frozen_weight
from mole_mega.platform.recipes import RECIPES


class MoLELayer(MoELayer):
    """Megatron-Core's MoE layer with a dispatcher that knows that each token has one expert."""

    def __init__(self, config: TransformerConfig, *, pg_collection: ProcessGroupCollection, **kwargs: Any) -> None:
        assert config.moe_token_dispatcher_type == "alltoall" and config.moe_router_topk == 1
        # a layer that Megatron-Core recomputes from its inside would be without its groups the second time
        assert "moe" not in (config.recompute_modules or ())
        super().__init__(config, pg_collection=pg_collection, **kwargs)
        self.token_dispatcher = TopOneDispatcher(
            self.num_local_experts, self.local_expert_indices, config=config, pg_collection=pg_collection
        )

    def forward(
        self, hidden_states: torch.Tensor, intermediate_tensors: Any = None, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`padding_mask` [B, S]: True where padded; or the groups that the router shall count by, -1 where padded
        (routing.py): what Megatron-Core hands on to a recomputed layer too."""
        if padding_mask is None or padding_mask.dtype == torch.bool:
            return super().forward(hidden_states, intermediate_tensors, padding_mask)
        with self.router.counting_by(padding_mask.T):
            return super().forward(hidden_states, intermediate_tensors, padding_mask < 0)


class TopOneDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron-Core's all-to-all dispatcher for one expert a token; tokens travel in the same order.

    Sorting is then a permutation, whose backward is a gather where Megatron-Core scatters into zeros, and one rank that
    holds all experts has nothing to sort a second time.
    """

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Detached: the weights' graph leads to the hooks of parameters, and these to the model, which would hold itself
        # where Python's collector cannot see it. Only their dtype is asked for.
        self.hidden_shape, self.probs, self.routing_map = hidden_states.shape, probs.detach(), routing_map
        hidden_TH = hidden_states.view(-1, self.hidden_shape[-1])
        self.hidden_shape_before_permute = hidden_TH.shape
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_1", self.preprocess(routing_map))
        if self.num_experts == 1:
            return hidden_TH, probs[:, 0]
        choice_T = routing_map.int().argmax(dim=1)
        self._order_T = choice_T.argsort(stable=True)
        self._inverse_T = torch.empty_like(self._order_T)
        self._inverse_T[self._order_T] = torch.arange(len(choice_T), device=choice_T.device)
        weight_T = probs.gather(1, choice_T[:, None])[:, 0]
        return (
            _Permute.apply(hidden_TH, self._order_T, self._inverse_T),
            _Permute.apply(weight_T, self._order_T, self._inverse_T),
        )

    def dispatch_postprocess(
        self, global_input_tokens: torch.Tensor, global_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.ep_size > 1 or self.tp_size > 1:
            return super().dispatch_postprocess(global_input_tokens, global_probs)
        for point in ("before_permutation_2", "before_finish"):
            self.tokens_per_expert = self._maybe_dtoh_and_synchronize(point, self.tokens_per_expert)
        return global_input_tokens, self.tokens_per_expert, global_probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.ep_size > 1 or self.tp_size > 1:
            return super().combine_preprocess(hidden_states)
        return hidden_states

    def combine_postprocess(self, permutated_local_input_tokens: torch.Tensor) -> torch.Tensor:
        output_TH = permutated_local_input_tokens
        if self.num_experts > 1:
            output_TH = _Permute.apply(output_TH, self._inverse_T, self._order_T)
        return output_TH.view(self.hidden_shape)


class _Permute(torch.autograd.Function):
    """rows[order], where `inverse` undoes `order`."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order_T: torch.Tensor, inverse_T: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse_T)
        return rows.index_select(0, order_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse_T,) = ctx.saved_tensors
        return grad.index_select(0, inverse_T), None, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up of [gate | up] side by side.

    **The input is consumed** by the backward pass, which writes its gradient there (but for a leaf of autograd and a
    view, whose memory is another's): so no second tensor as large as the widest activation is made. Whoever else kept
    it for a gradient is told by autograd.
    """

    @staticmethod
    def forward(ctx: Any, fused_T2F: torch.Tensor) -> torch.Tensor:
        ctx.keeps_input = fused_T2F.is_leaf or fused_T2F._is_view()
        ctx.save_for_backward(fused_T2F)
        kernels = cpu_kernels.library_for(fused_T2F) if fused_T2F.dtype == torch.bfloat16 else None
        if kernels is not None:
            return cpu_kernels.swiglu(kernels, fused_T2F.contiguous())
        gate_TF, up_TF = fused_T2F.chunk(2, dim=-1)
        return F.silu(gate_TF).mul_(up_TF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TF: torch.Tensor) -> torch.Tensor:
        # detached: else the gradient is the forward pass's own tensor, and who keeps it keeps the graph
        fused_T2F = ctx.saved_tensors[0].detach()
        if ctx.keeps_input:
            fused_T2F = fused_T2F.clone(memory_format=torch.contiguous_format)
        fused_T2F = fused_T2F.contiguous()
        torch.autograd.graph.increment_version(fused_T2F)
        kernels = cpu_kernels.library_for(fused_T2F) if fused_T2F.dtype == torch.bfloat16 else None
        if kernels is not None:
            cpu_kernels.swiglu_backward_(kernels, grad_TF.contiguous(), fused_T2F)
            return fused_T2F
        gate_TF, up_TF = fused_T2F.chunk(2, dim=-1)
        of_activation_TF = grad_TF * up_TF
        torch.mul(grad_TF, F.silu(gate_TF), out=up_TF)
        torch.ops.aten.silu_backward.grad_input(of_activation_TF, gate_TF, grad_input=gate_TF)
        return fused_T2F


class MoLEExperts(MLP):
    """The frozen MLP of one block with this rank's part of the expert bank.

    Factors, whole sizes: gate/up A [E, R, H], B [E, F, R]; down A [E, R, F], B [E, H, R]. An A that the experts share
    (`adapter.share_A`) has no axis E, and each expert-parallel rank holds it; so with B of which experts have mixtures
    (`adapter.shared_B`), [N, out, R], and with how each mixes and transforms them, [E, N] and [E, R, R].
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
        submodules: MLPSubmodules,
        adapter: AdapterConfig,
        prefix: str,
        layer: int,
        seed: int,
        device: torch.device,
        name: str | None = None,
    ) -> None:
        # is_expert: the dispatcher owns the communication around the base linears
        super().__init__(
            config,
            submodules,
            is_expert=True,
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=pg_collection.expt_tp,
            name=name,
        )
        self.adapter = adapter
        self._row_multiple = RECIPES[config.fp8_recipe].multiple if config.fp8 else 1
        self._groups, self._prefix, self._layer = pg_collection, prefix, layer
        experts, rank, hidden, ffn = adapter.num_experts, adapter.rank, config.hidden_size, config.ffn_hidden_size
        assert num_local_experts * pg_collection.ep.size() == experts, (num_local_experts, experts)
        for projection, kind, in_features, out_features in (
            ("gate", "column", hidden, ffn),
            ("up", "column", hidden, ffn),
            ("down", "row", ffn, hidden),
        ):
            A, B, common_B = (rank, in_features), (out_features, rank), adapter.shared_B
            tensors: dict[str, tuple[str, tuple[int, ...], Any]] = {
                "A": (f"{kind}.A", A, sharding.kaiming_uniform),
                "B": (f"shared.{kind}.B", (common_B, *B), sharding.zeros),
            }
            if not adapter.share_A:
                tensors["A"] = (f"experts.{kind}.A", (experts, *A), sharding.kaiming_uniform)
            if common_B:
                tensors["mix"] = ("shared.mix", (experts, common_B), sharding.kaiming_uniform)
                tensors["transform"] = ("shared.transform", (experts, rank, rank), sharding.identity)
            else:
                tensors["B"] = (f"experts.{kind}.B", (experts, *B), sharding.zeros)
            for factor, (placement, shape, init) in tensors.items():
                parameter = sharding.make_parameter(
                    f"{prefix}.{projection}.{factor}",
                    sharding.PLACEMENTS[placement],
                    shape,
                    init,
                    pg_collection,
                    seed=seed,
                    dtype=config.params_dtype,
                    device=device,
                )
                self.register_parameter(f"lora_{projection}_{factor}", parameter)

    def mixed_B(self, projection: str) -> torch.Tensor:  # noqa: N802
        """Where experts mix common B (`adapter.shared_B`): each one's own, [E, O, R] of this rank's outputs."""
        B, mix, transform = (getattr(self, f"lora_{projection}_{name}") for name in ("B", "mix", "transform"))
        return mix_factors(B, mix, transform, self.adapter.mix_temperature)

    def forward(
        self, dispatched_TH: torch.Tensor, tokens_per_expert_E: torch.Tensor, weight_T: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """dispatched [T, H] sorted by local expert; counts [E]; weight [T], the gate's w. Returns ([T, H], None)."""
        adapter = self.adapter
        scale = adapter.scale
        # w = 1 throughout: leave the multiplication out, so that it stays bit for bit plain LoRA
        weight = None if adapter.gate == "none" else weight_T
        drops = adapter.dropout > 0 and self.training
        dispatched_TH, gradient = bank.share_input(dispatched_TH)
        fc1_T2F = self._base(self.linear_fc1, dispatched_TH)
        fc1_T2F = bank.add_gated_expert_lora(
            fc1_T2F,
            drop_whole(dispatched_TH, adapter.dropout) if drops else dispatched_TH,
            self.lora_gate_A,
            self.lora_gate_B,
            self.lora_up_A,
            self.lora_up_B,
            tokens_per_expert_E,
            scale,
            weight,
            None if drops else gradient,
        )
        h_TF, gradient = bank.share_input(SwiGLU.apply(fc1_T2F))
        output_TH = self._base(self.linear_fc2, h_TF)
        output_TH = bank.add_expert_lora(
            output_TH,
            drop_cut(h_TF, adapter.dropout) if drops else h_TF,
            self.lora_down_A,
            self.lora_down_B,
            tokens_per_expert_E,
            scale,
            weight,
            None if drops else gradient,
        )
        return output_TH, None

    def _base(self, linear: torch.nn.Module, x_TI: torch.Tensor) -> torch.Tensor:
        """The frozen product. FP8 takes rows in multiples, and tokens that were sent to experts come in any number: the
        rest is zeros, which change no scale, and is cut off."""
        rows = self._row_multiple
        missing = -len(x_TI) % rows
        if rows > 1 and len(x_TI) == 0:
            missing = rows  # no kernel is asked for a product without rows
        if not missing:
            return linear(x_TI)[0]
        return linear(F.pad(x_TI, (0, 0, 0, missing)))[0][: len(x_TI)]

    def pairs(self) -> list[Pair]:
        """Handles on this rank's part of the bank, one a projection with all experts that it has."""
        frozen = {
            "gate": lambda: [frozen_weight(self.linear_fc1).detach().chunk(2)[0]],
            "up": lambda: [frozen_weight(self.linear_fc1).detach().chunk(2)[1]],
            "down": lambda: [frozen_weight(self.linear_fc2).detach()],
        }
        return [
            make_pair(self, f"{self._prefix}.{name}", self._layer, name, self.adapter.scale, self._groups, rows)
            for name, rows in frozen.items()
        ]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        # In a base checkpoint the frozen MLP stands where it stands without experts.
        for entry in entries.values():
            entry.key = entry.key.replace(".mlp.experts.", ".mlp.")
        return entries | sharding.sharded_adapters(self, prefix, self._groups)
