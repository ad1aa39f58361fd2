"""The mixture block: Megatron-Core's MLP with a bank of LoRA experts, of which each token may use several.

For a token x with gate weights w_e, those of the experts that it does not use 0 (LLaVA-MoLE, arXiv 2401.16160, is the
case of one):

    D(z) = s sum_e w_e B_e A_e dropout(z);  h = silu(Wg x + Dg(x)) * (Wu x + Du(x));  out = Wd h + Dd(h)

Tokens stay where they are, and the frozen base runs once for each, as in a dense MLP. Expert-parallel ranks hold a part
of the experts each, with its gradient and optimizer state; for a layer's pass each gathers the whole bank, and the
gradients of all go back to the experts' owners, summed. The gathered bank is kept from forward to backward. While a
block computes, the next one's bank is on its way (`prefetch_along`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.autograd.function import once_differentiable

from mole_mega.adapters import bank, whole_mlps
from mole_mega.adapters.dropout import drop_cut, drop_whole
from mole_mega.adapters.forms import uses_few
from mole_mega.adapters.mixing import Gate, MaskedGate, PairedGate, make_gate, paired
from mole_mega.adapters.mole import MoLEExperts, MoLELayer, SwiGLU
from mole_mega.adapters.routers import LinearRouters, MoLERouter


class MixtureLayer(MoLELayer):
    """The block with its router. No token travels: Megatron-Core's dispatcher is built, but idle."""

    experts: MixtureExperts

    def __init__(self, config: TransformerConfig, *, pg_collection: ProcessGroupCollection, **kwargs: Any) -> None:
        super().__init__(config, pg_collection=pg_collection, **kwargs)
        self._gathers_sequence = config.sequence_parallel

    def forward(
        self, hidden_states: torch.Tensor, intermediate_tensors: Any = None, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, None]:
        """hidden_states [S / TP, B, H] -> ([S / TP, B, H], None). `padding_mask`: see `MoLELayer.forward`."""
        weight_TE, chosen_TE = _route(self.router, hidden_states, padding_mask)
        shape = hidden_states.shape
        if self._gathers_sequence:
            hidden_states, weight_TE = self._gather(hidden_states), self._gather_tokens(weight_TE, shape)
            with torch.no_grad():
                chosen_TE = self._gather_tokens(chosen_TE.to(weight_TE.dtype), shape).bool()
        adapter, rescaled = self.experts.adapter, self.experts.adapter.rescale_gate
        gate: Gate
        if adapter.gate == "dense":
            gate = MaskedGate(weight_TE, rescaled)
        elif adapter.expert_form == "mlp":
            gate = paired(weight_TE, chosen_TE, adapter.top_k)
        else:
            dtype = hidden_states.dtype
            gate = make_gate(weight_TE, chosen_TE, adapter.top_k, adapter.rank, dtype, rescaled=rescaled)
        return self._scatter(self.experts(hidden_states.flatten(0, 1), gate), shape), None

    def _gather(self, part: torch.Tensor) -> torch.Tensor:
        """[S / TP, ...] -> [S, ...]. Each rank computes a part of every token's gradient: backward sums them."""
        return gather_from_sequence_parallel_region(part, tensor_parallel_output_grad=True, group=self.attn_tp_group)

    def _gather_tokens(self, part_T: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """[T / TP, ...] -> [T, ...] for the tokens of hidden states [S / TP, B, H] of this `shape`."""
        return self._gather(part_T.view(*shape[:2], *part_T.shape[1:])).flatten(0, 1)

    def _scatter(self, output_TH: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        output = output_TH.view(-1, *shape[1:])
        if self._gathers_sequence:
            output = reduce_scatter_to_sequence_parallel_region(output, group=self.attn_tp_group)
        return output


class LinearMixtureLayer(MixtureLayer):
    """The block with a router for each linear (`LinearRouters`). All experts are computed for every token, whichever
    it uses."""

    router: LinearRouters

    def forward(
        self, hidden_states: torch.Tensor, intermediate_tensors: Any = None, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, None]:
        """See `MixtureLayer.forward`."""
        shape, adapter = hidden_states.shape, self.experts.adapter
        few = adapter.gate != "dense" and uses_few(adapter.num_experts, adapter.top_k, hidden_states.dtype.itemsize)
        routers = (self.router.gate, self.router.up)
        weight_TPE = torch.stack([_route(router, hidden_states, padding_mask)[0] for router in routers], dim=1)
        if self._gathers_sequence:
            hidden_states, weight_TPE = self._gather(hidden_states), self._gather_tokens(weight_TPE, shape)
            if padding_mask is not None:
                whole_SB = self._gather(padding_mask.T.contiguous().long())
                padding_mask = (whole_SB.bool() if padding_mask.dtype == torch.bool else whole_SB).T

        def masked(weight: torch.Tensor) -> Gate:
            return MaskedGate(weight, adapter.rescale_gate, few)

        def gate_of_down(h_TF: torch.Tensor) -> Gate:
            return masked(_route(self.router.down, h_TF, padding_mask)[0])

        output_TH = self.experts(hidden_states.flatten(0, 1), masked(weight_TPE), gate_of_down)
        return self._scatter(output_TH, shape), None


def _route(
    router: MoLERouter, hidden: torch.Tensor, padding_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a router says of hidden states; `padding_mask` as `MoLELayer.forward` takes it."""
    if padding_mask is None or padding_mask.dtype == torch.bool:
        return router(hidden, None if padding_mask is None else padding_mask.T)
    with router.counting_by(padding_mask.T):
        return router(hidden, padding_mask.T < 0)


class MixtureExperts(MoLEExperts):
    """The frozen MLP of a block with this rank's part of the expert bank; parameters as in `MoLEExperts`."""

    # in tuples: a module that is an attribute would be a part of this one
    _before: tuple[MixtureExperts, ...] = ()
    _after: tuple[MixtureExperts, ...] = ()
    _on_its_way: BankOnItsWay | None = None

    def forward(  # type: ignore[override]
        self, x_TH: torch.Tensor, gate: Gate, gate_of_down: Callable[[torch.Tensor], Gate] | None = None
    ) -> torch.Tensor:
        """[T, H] -> [T, H]: tokens in any order, whose experts `gate` says; those of the down projection
        `gate_of_down`, of its input h, where it is given. Under tensor parallelism x is whole, and the outputs of the
        ranks are still to be summed."""
        adapter = self.adapter
        scale, whole = adapter.scale, self._whole_factors()
        if adapter.expert_form == "mlp":
            assert isinstance(gate, PairedGate) and gate_of_down is None
            return self._whole_mlps(x_TH, gate, whole)
        drops = adapter.dropout > 0 and self.training
        x_TH, gradient = bank.share_input(x_TH)
        fc1_T2F = self._base(self.linear_fc1, x_TH)
        fc1_T2F = gate.add_lora(
            fc1_T2F,
            drop_whole(x_TH, adapter.dropout) if drops else x_TH,
            [whole["lora_gate_A"], whole["lora_up_A"]],
            [whole["lora_gate_B"], whole["lora_up_B"]],
            scale,
            None if drops else gradient,
        )
        h_TF, gradient = bank.share_input(SwiGLU.apply(fc1_T2F))
        output_TH = self._base(self.linear_fc2, h_TF)
        if gate_of_down is not None:
            gate = gate_of_down(h_TF)
        return gate.add_lora(
            output_TH,
            drop_cut(h_TF, adapter.dropout) if drops else h_TF,
            [whole["lora_down_A"]],
            [whole["lora_down_B"]],
            scale,
            None if drops else gradient,
        )

    def _whole_factors(self) -> dict[str, torch.Tensor]:
        """The factors of all experts, by the parameters' names."""
        whole: dict[str, Any] = dict(self.named_parameters(recurse=False))
        if self.adapter.shared_B:
            return whole | {f"lora_{name}_B": self.mixed_B(name) for name in ("gate", "up", "down")}
        if self._groups.ep.size() == 1:
            return whole
        cut = {name: factor for name, factor in whole.items() if factor.placement.expert_axis is not None}
        arriving, self._on_its_way = self._on_its_way or BankOnItsWay(list(cut.values()), self._groups.ep), None
        factors = arriving.arrive()
        # recomputed layers run from the last to the first
        recomputed = self.config.recompute_granularity == "full" and self.training and torch.is_grad_enabled()
        for neighbour in self._before if recomputed else self._after:
            neighbour.send_for_bank()
        return whole | dict(zip(cut, factors, strict=True))

    def send_for_bank(self) -> None:
        """Begin to gather the bank that this block's next pass needs, while another block computes."""
        factors = [f for f in self.parameters(recurse=False) if f.placement.expert_axis is not None]
        self._on_its_way = BankOnItsWay(factors, self._groups.ep)

    def _whole_mlps(self, x_TH: torch.Tensor, gate: PairedGate, whole: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """sum_e w_e MLP_e(x), each expert an MLP with an activation of its own (MixLoRA, arXiv 2404.15159):

            h_e = silu(Wg x + Dg_e(x)) * (Wu x + Du_e(x));  out = Wd sum_e w_e h_e + sum_e w_e Dd_e(h_e)

        The base's gate and up run once a token, and as down is linear, its base does too.
        """
        adapter, scale = self.adapter, self.adapter.scale
        drops = adapter.dropout > 0 and self.training
        x_TH, gradient = bank.share_input(x_TH)
        h_NF, mixed_TF = whole_mlps.activate(
            gate,
            self._base(self.linear_fc1, x_TH),
            drop_whole(x_TH, adapter.dropout) if drops else x_TH,
            [whole["lora_gate_A"], whole["lora_up_A"]],
            [whole["lora_gate_B"], whole["lora_up_B"]],
            scale,
            None if drops else gradient,
        )
        output_TH = self._base(self.linear_fc2, mixed_TF)
        A, B = [whole["lora_down_A"]], [whole["lora_down_B"]]
        h_NF = drop_cut(h_NF, adapter.dropout) if drops else h_NF
        return gate.add_lora(output_TH, h_NF, A, B, scale, x_by_pair=True)


def prefetch_along(blocks: Sequence[MixtureExperts]) -> None:
    """Let each of these blocks, in the order of their layers, send for its neighbour's bank once it has its own, so
    that it comes while the block computes. What is computed stays the same."""
    for block, following in pairwise(blocks):
        if not block.adapter.shared_B:  # which lie on every rank
            block._after, following._before = (following,), (block,)


class BankOnItsWay:
    """Factors [E / EP, ...] of one dtype, of whose banks [E, ...] an all-gather is under way."""

    def __init__(self, factors: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
        self._factors, self._group = list(factors), group
        self._versions = [factor._version for factor in factors]
        with torch.no_grad():
            mine = torch.cat([factor.reshape(-1) for factor in factors])
            self._everyone = mine.new_empty(group.size(), len(mine))
            self._work = dist.all_gather_single(self._everyone.view(-1), mine, group=group, async_op=True)

    def arrive(self) -> list[torch.Tensor]:
        """The banks; their backward sums the ranks' gradients and leaves each its own part. Waits for the gather."""
        self._work.wait()
        assert self._versions == [factor._version for factor in self._factors], "factors moved while they were gathered"
        return list(_Banks.apply(self._group, self._everyone, *self._factors))


class _Banks(torch.autograd.Function):
    """The gathered `everyone` as banks of the factors that it came from."""

    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, everyone: torch.Tensor, *factors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.group, ctx.shapes = group, [factor.shape for factor in factors]
        parts = everyone.split([factor.numel() for factor in factors], dim=1)
        return tuple(part.reshape(-1, *factor.shape[1:]) for part, factor in zip(parts, factors, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        everyone = torch.cat([grad.reshape(ctx.group.size(), -1) for grad in grads], dim=1)
        mine = everyone.new_empty(everyone.shape[1])
        dist.reduce_scatter_single(mine, everyone.view(-1), group=ctx.group)
        parts = mine.split([shape.numel() for shape in ctx.shapes])
        return None, None, *(part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True))
