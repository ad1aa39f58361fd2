"""The router of a MoLE block, and its balance and z losses.

Shape suffixes: T tokens, H hidden, E experts, G groups of tokens, L layers that have a router.

The losses on the router are functions of the *global batch*: how often each expert is chosen over all its tokens.
While micro-batches pass one by one, that number is not known yet. The balance loss is linear in it, so each
micro-batch leaves behind sums from which the router's exact gradient is put together once the batch is complete
(`router_loss_gradients`): the result does not depend on how the batch was cut into micro-batches, on padding, on
pipeline stages or on recompute, and it needs no communication in the forward or backward pass. In return these losses
train the router alone: they do not reach through its input into earlier layers.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import router_gating_linear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.autograd.function import once_differentiable

from mole_mega.adapters import cpu_kernels, sharding
from mole_mega.adapters.routing import RoutingSummary, group_domains, num_groups
from mole_mega.config import AdapterConfig

_NUM_SCALARS = 3  # z, entropy and margin, in a row of `RouterSums`
_LEAST_SCORE = 1e-9


def gate_weights(
    probs_TE: torch.Tensor, chosen_TE: torch.Tensor, gate: str, *, renormalize: bool = False
) -> torch.Tensor:
    """The weight w of each token's LoRA outputs, [T, E], zero where an expert was not chosen (DESIGN gate modes).

    `none`: 1, no gradient; `prob` and, of all experts, `dense`: p; `straight_through`: 1 with the gradient of p. With
    `renormalize` p is divided by its sum over the chosen experts, gradient included.
    """
    chosen = chosen_TE.to(probs_TE.dtype)
    if gate == "none":
        return chosen
    if gate == "dense":
        return probs_TE
    if renormalize:
        probs_TE = probs_TE / (chosen * probs_TE).sum(-1, keepdim=True)
    if gate == "prob":
        return chosen * probs_TE
    return chosen * (1 + (probs_TE - probs_TE.detach()))


def sigmoid_scores(logits_TE: torch.Tensor, bias_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores, their logarithms) of experts that are scored each for itself (SMoRA, arXiv 2501.15103): sigmoid(R x) +
    bias, which says who is chosen and, divided by the chosen ones' sum, the weight. The logarithms, without gradient,
    are what statistics take for logits: their softmax is each score's share of the sum over all experts.
    """
    scores_TE = torch.sigmoid(logits_TE) + bias_E
    return scores_TE, scores_TE.detach().clamp(min=_LEAST_SCORE).log()


def fp32_logits(x_TH: torch.Tensor, weight_EH: torch.Tensor, bias_E: torch.Tensor | None) -> torch.Tensor:
    """R x + b, [T, E] fp32: x [T, H] of any dtype, weight [E, H] and bias [E] fp32."""
    kernels = cpu_kernels.library_for(x_TH)
    if kernels is None or cpu_kernels.library(torch.float32) is None:  # the sums are fp32's
        return router_gating_linear(x_TH, weight_EH, bias_E, torch.float32)
    return _CompiledLogits.apply(kernels, x_TH, weight_EH, bias_E)


class _CompiledLogits(torch.autograd.Function):
    """`fp32_logits` on the CPU: bf16 without copies of x and of its gradient in fp32; both gradients in one pass over
    x."""

    @staticmethod
    def forward(
        ctx: Any, kernels: ctypes.CDLL, x_TH: torch.Tensor, weight_EH: torch.Tensor, bias_E: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(x_TH, weight_EH)
        if x_TH.dtype == torch.float32:
            return router_gating_linear(x_TH, weight_EH, bias_E, torch.float32)
        return cpu_kernels.router_logits(kernels, x_TH, weight_EH, bias_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TH, weight_EH = ctx.saved_tensors
        _, needs_x, _, needs_bias = ctx.needs_input_grad
        dweight_EH, dx_TH = cpu_kernels.router_gradients(ctx.kernels, grad_TE, x_TH, weight_EH if needs_x else None)
        return None, dx_TH, dweight_EH, grad_TE.sum(0) if needs_bias else None


class RouterSums:
    """What a router remembers of the tokens of one global batch, summed over valid tokens. All tensors fp32.

    counts_GE (how often chosen, by group of tokens; a token counts once for each of its choices), probs_E, z_sum []
    (squared log-partition), entropy_sum [] (of p, nats), margin_sum [] (largest p minus the second), `pairs_PX`: the
    sum of p_j p_k x over tokens for each pair j < k, x extended by a 1 for the bias, and `z_grads_EX`: the sum of
    2 lse p_k x.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        device: torch.device,
        *,
        balance: bool,
        z: bool,
        product_dtype: torch.dtype = torch.float32,
        num_choices: int = 1,
    ) -> None:
        """`num_choices`: how often each token is counted.

        `product_dtype`: p_j p_k and x are rounded to it for the one big GEMM, [P, T] x [T, H] a micro-batch, and so
        is that GEMM's result, before it is added up over micro-batches in fp32. With bf16 (where x is bf16 anyway) the
        balance gradient is off by about 1e-3 of its norm; with 64 experts fp32 would cost half a bf16 MLP.

        With many experts that GEMM costs, and its sums are as large as the tokens themselves. So tokens are only kept
        (no copy: their x is an activation of the layer) until they would take more memory than the sums."""
        self.num_choices = num_choices
        self.balance, self.z, self.product_dtype = balance and num_experts > 1, z, product_dtype
        self.first_P, self.second_P = torch.triu_indices(num_experts, num_experts, offset=1, device=device)
        self._make_row(1, num_experts, device)
        num_pairs = len(self.first_P) if self.balance else 0
        self.pairs_PX = torch.zeros(num_pairs, hidden_size + 1, device=device)
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []  # x [T, H] and probabilities [T, E], 0 at padding
        self._has_pairs = False
        self._most_kept = (num_pairs + num_experts) * torch.float32.itemsize // product_dtype.itemsize
        self.z_grads_EX = torch.zeros(num_experts if z else 0, hidden_size + 1, device=device)

    def _make_row(self, num_groups: int, num_experts: int, device: torch.device) -> None:
        """The statistics lie in one vector, which `_split_rows` takes apart."""
        self.row = torch.zeros(_NUM_SCALARS + num_experts * (1 + num_groups), device=device)
        scalars, self.probs_E, self.counts_GE = _split_rows(self.row, num_experts)
        self.z_sum, self.entropy_sum, self.margin_sum = scalars.unbind()

    @property
    def tokens(self) -> torch.Tensor:
        return self.counts_GE.sum() / self.num_choices

    @property
    def counts_E(self) -> torch.Tensor:  # noqa: N802
        return self.counts_GE.sum(0)

    def count_groups(self, number: int) -> None:
        """From now on count tokens by `number` groups; what was counted is forgotten."""
        self.clear()
        self._make_row(number, self.counts_GE.shape[1], self.row.device)

    def tensors(self) -> list[torch.Tensor]:
        return [*_split_rows(self.row, self.counts_GE.shape[1]), self.pairs_PX, self.z_grads_EX]

    def clear(self) -> None:
        self._kept.clear()
        for tensor in self.tensors():
            if tensor is not self.pairs_PX or self._has_pairs:  # what was never written needs no memory
                tensor.zero_()
        self._has_pairs = False

    @torch.no_grad()
    def add(self, x_TH: torch.Tensor, logits_TE: torch.Tensor, probs_TE: torch.Tensor, choice_TK: torch.Tensor,
            valid_T: torch.Tensor, group_T: torch.Tensor | None = None) -> None:  # fmt: skip
        """Add the tokens that `valid_T` marks, each to the count of its group (all to group 0 where none is given).
        choice_TK are the experts that each chose, the likeliest first; [T] where it is one."""
        choice_TK = choice_TK if choice_TK.dim() == 2 else choice_TK[:, None]
        kernels = cpu_kernels.library_for(self.row)
        if kernels is None:
            self._sum_routing(logits_TE, probs_TE, choice_TK, valid_T, group_T)
        else:
            cpu_kernels.sum_routing_(kernels, self.row, logits_TE, probs_TE, choice_TK, valid_T, group_T)
        if self.balance or self.z:
            probs_TE = probs_TE * valid_T[:, None]
        if self.balance:
            self._kept.append((x_TH, probs_TE))
            if sum(len(x) for x, _ in self._kept) > self._most_kept:
                self._sum_pairs()
        if self.z:
            slope_TE = 2 * torch.logsumexp(logits_TE, dim=-1, keepdim=True) * probs_TE
            _add_slopes(self.z_grads_EX, slope_TE, x_TH)

    def _sum_routing(
        self,
        logits_TE: torch.Tensor,
        probs_TE: torch.Tensor,
        choice_TK: torch.Tensor,
        valid_T: torch.Tensor,
        group_T: torch.Tensor | None,
    ) -> None:
        """Add to the statistics."""
        valid = valid_T.to(torch.float32)
        probs = probs_TE * valid[:, None]
        lse = torch.logsumexp(logits_TE, dim=-1) * valid
        # one cell a choice: its group's row, its expert's column (whole numbers, exact in any order)
        row_T = 0 if group_T is None else group_T.clamp(min=0)[:, None] * self.counts_GE.shape[1]
        self.counts_GE.view(-1).scatter_add_(
            0, (row_T + choice_TK).view(-1), valid[:, None].expand_as(choice_TK).reshape(-1)
        )
        self.probs_E += probs.sum(0)
        self.z_sum += lse.square().sum()
        # entropy = lse - sum_k p_k logit_k
        self.entropy_sum += (lse - (probs * logits_TE).sum(-1)).sum()
        # by rows of [E, T]: the largest of a few columns is slow to find
        first_T1 = choice_TK[:, :1]
        others_ET = probs.T.clone(memory_format=torch.contiguous_format).scatter_(0, first_T1.T, 0.0)
        self.margin_sum += (probs.gather(1, first_T1)[:, 0] - others_ET.amax(0)).sum()

    def balance_gradient(self, share_E: torch.Tensor) -> torch.Tensor:
        """d/d(router) of sum_j share_j sum_tokens p_j, [E, H+1] (the last column is the bias).

        dp_j/dlogit_k = p_j (delta_jk - p_k), so with p_k = sum_j p_j p_k the gradient of logit k is
        sum_j (share_k - share_j) p_j p_k: each pair enters twice, with opposite signs, and j = k not at all.
        """
        gradient_EX = self.pairs_PX.new_zeros(len(share_E), self.pairs_PX.shape[1])
        if self._has_pairs:
            gap_P = share_E[self.first_P] - share_E[self.second_P]
            pair_P = torch.arange(len(gap_P), device=gap_P.device)
            signs_EP = gap_P.new_zeros(len(share_E), len(gap_P))
            signs_EP[self.first_P, pair_P] = gap_P
            signs_EP[self.second_P, pair_P] = -gap_P
            gradient_EX.addmm_(signs_EP, self.pairs_PX)
        for x_TH, probs_TE in self._kept:
            slope_TE = probs_TE * (share_E - (probs_TE @ share_E)[:, None])
            _add_slopes(gradient_EX, slope_TE, x_TH)
        return gradient_EX

    def _sum_pairs(self) -> None:
        """Let go of the tokens kept, for their sums."""
        for x_TH, probs_TE in self._kept:
            x_TH = x_TH.to(self.product_dtype)
            kernels = cpu_kernels.library_for(x_TH) if x_TH.dtype == torch.bfloat16 else None
            if kernels is not None:
                cpu_kernels.sum_pairs_(kernels, self.pairs_PX, x_TH, probs_TE)
                continue
            pairs_TP = probs_TE.index_select(1, self.first_P).mul_(probs_TE.index_select(1, self.second_P))
            pairs_PT = pairs_TP.to(self.product_dtype).T
            if self.product_dtype == torch.float32:
                self.pairs_PX[:, :-1].addmm_(pairs_PT, x_TH)
            else:
                self.pairs_PX[:, :-1] += pairs_PT @ x_TH
            self.pairs_PX[:, -1] += pairs_TP.sum(0)
        self._kept.clear()
        self._has_pairs = True


def _likeliest(probs_TE: torch.Tensor, number: int) -> torch.Tensor:
    """The `number` likeliest experts of each token, the likeliest first, [T, number]."""
    kernels = cpu_kernels.library_for(probs_TE) if probs_TE.dtype == torch.float32 else None
    if kernels is not None:
        return cpu_kernels.largest(kernels, probs_TE, number)
    return probs_TE.argmax(-1, keepdim=True) if number == 1 else probs_TE.topk(number, dim=-1).indices


def _add_slopes(gradient_EX: torch.Tensor, slope_TE: torch.Tensor, x_TH: torch.Tensor) -> None:
    """To a router's gradient, [E, H + 1], add that of logits whose own is `slope`."""
    kernels = cpu_kernels.library_for(x_TH) if x_TH.dtype == torch.bfloat16 else None
    if kernels is None or cpu_kernels.library(torch.float32) is None:
        gradient_EX[:, :-1].addmm_(slope_TE.T, x_TH.to(torch.float32))
    else:
        gradient_EX[:, :-1] += cpu_kernels.router_gradients(kernels, slope_TE, x_TH, None)[0]
    gradient_EX[:, -1] += slope_TE.sum(0)


class MoLERouter(MegatronModule):
    """Routes each token to the `top_k` likeliest experts, p = softmax(R x + b), or in gate mode `dense` to all of them.
    Weights and maths in fp32. `site` tells the routers of one layer apart.

    Stands where Megatron-Core's `MoESubmodules.router` wants a router: `forward` returns the dispatcher's
    (weights [T, E], routing map [T, E] bool).
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        is_mtp_layer: bool = False,
        *,
        adapter: AdapterConfig,
        name: str,
        seed: int,
        device: torch.device,
        site: int = 0,
    ) -> None:
        super().__init__(config)
        self.adapter, self.site = adapter, site
        self.layer_number: int | None = None
        self._group_T: torch.Tensor | None = None
        self._groups = pg_collection
        # of `adapter.router_score` sigmoid, [E]: moved by `move_score_biases` alone
        self.score_bias: torch.nn.Parameter | None = None
        self._make_parameters(config, name, seed=seed, dtype=torch.float32, device=device)
        self.sums = RouterSums(
            adapter.num_experts,
            self._in_features(config),
            device,
            balance=adapter.balance_weight > 0,
            z=adapter.z_loss_weight > 0,
            product_dtype=config.params_dtype,
            num_choices=adapter.num_choices,
        )

    def _in_features(self, config: TransformerConfig) -> int:
        return config.hidden_size

    def _make_parameters(self, config: TransformerConfig, name: str, **common: Any) -> None:
        self._make_weights(name, (self.adapter.num_experts, config.hidden_size), "router.weight", **common)

    def _make_weights(self, name: str, shape: tuple[int, int], placement: str, **common: Any) -> None:
        self.weight = sharding.make_parameter(
            f"{name}.weight", sharding.PLACEMENTS[placement], shape, sharding.kaiming_uniform, self._groups, **common
        )
        self.bias = None
        if self.adapter.router_bias:
            self.bias = sharding.make_parameter(
                f"{name}.bias", sharding.PLACEMENTS["router.bias"], shape[:1], sharding.zeros, self._groups, **common
            )
        if self.adapter.router_score == "sigmoid":
            self.score_bias = sharding.make_parameter(
                f"{name}.score_bias",
                sharding.PLACEMENTS["router.score_bias"],
                shape[:1],
                sharding.zeros,
                self._groups,
                **common,
            )
            self.score_bias.moved_by_load = True  # type: ignore[attr-defined]

    @property
    def counts(self) -> bool:
        """Whether this rank's sums are not another one's too."""
        return True

    def set_layer_number(self, layer_number: int) -> None:
        self.layer_number = layer_number

    @property
    def layer(self) -> int:
        """The decoder layer that this router belongs to, from 0 over the whole model."""
        assert self.layer_number is not None
        return self.layer_number - 1

    @contextlib.contextmanager
    def counting_by(self, group_SB: torch.Tensor) -> Iterator[None]:
        """Count the tokens routed inside the block by these groups. Megatron-Core's MoELayer hands a router hidden
        states and padding alone."""
        self._group_T = group_SB.reshape(-1)
        try:
            yield
        finally:
            self._group_T = None

    def forward(
        self, hidden: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [S, B, H]; padding_mask [S, B], True where padded. Returns (weights [T, E], map [T, E] bool)."""
        x_TH = hidden.reshape(-1, hidden.shape[-1])
        valid_T = None if padding_mask is None else ~padding_mask.reshape(-1)
        return self._weigh(x_TH, self._logits(x_TH), valid_T, self._group_T)

    def _weigh(
        self, x_TH: torch.Tensor, logits_TE: torch.Tensor, valid_T: torch.Tensor | None, group_T: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `forward` returns, of tokens with these logits; counts them."""
        adapter = self.adapter
        if self.score_bias is None:
            probs_TE = torch.softmax(logits_TE, dim=-1)
        else:
            probs_TE, logits_TE = sigmoid_scores(logits_TE, self.score_bias.detach())
        choice_TK, chosen_TE = self._choose(probs_TE)
        # Under recompute the first pass runs without gradients and the second with: each token is counted once.
        if self.training and torch.is_grad_enabled():
            valid_T = x_TH.new_ones(len(x_TH), dtype=torch.bool) if valid_T is None else valid_T
            shares_TE = probs_TE if self.score_bias is None else torch.softmax(logits_TE, dim=-1)
            self.sums.add(x_TH.detach(), logits_TE.detach(), shares_TE.detach(), choice_TK, valid_T, group_T)
        renormalize = adapter.renormalize
        if renormalize and self.score_bias is None:
            # The same, by the chosen ones' logits alone: through all of them rounding would leave the others a
            # gradient, and Adam makes whole steps of the smallest.
            probs_TE, renormalize = logits_TE.masked_fill(~chosen_TE, -torch.inf).softmax(-1), False
        return gate_weights(probs_TE, chosen_TE, adapter.gate, renormalize=renormalize), chosen_TE

    def _logits(self, x_TH: torch.Tensor) -> torch.Tensor:
        return fp32_logits(x_TH, self.weight, self.bias)

    def _choose(self, probs_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(the experts that statistics count a token for, the likeliest first, those that it uses [T, E] bool)."""
        choice_TK = _likeliest(probs_TE, self.adapter.num_choices)
        if self.adapter.gate == "dense":
            return choice_TK, torch.ones_like(probs_TE, dtype=torch.bool)
        return choice_TK, torch.zeros_like(probs_TE, dtype=torch.bool).scatter_(1, choice_TK, True)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        return sharding.sharded_adapters(self, prefix, self._groups)


class RowRouter(MoLERouter):
    """The router of a linear whose inputs are cut over tensor-parallel ranks: each has its columns of all tokens, and
    their parts of the logits are summed. All ranks route alike; the first counts."""

    def _in_features(self, config: TransformerConfig) -> int:
        return config.ffn_hidden_size // self._groups.tp.size()

    def _make_parameters(self, config: TransformerConfig, name: str, **common: Any) -> None:
        self._make_weights(name, (self.adapter.num_experts, config.ffn_hidden_size), "router.row.weight", **common)

    @property
    def counts(self) -> bool:
        return self._groups.tp.rank() == 0

    def _logits(self, x_TH: torch.Tensor) -> torch.Tensor:
        part_TE = fp32_logits(x_TH, self.weight, None)
        # summed forward, and backward too: what a rank makes of the logits is a part of the loss
        logits_TE = reduce_from_tensor_model_parallel_region(part_TE, group=self._groups.tp)
        logits_TE = copy_to_tensor_model_parallel_region(logits_TE, group=self._groups.tp)
        return logits_TE if self.bias is None else logits_TE + self.bias


class LinearRouters(MegatronModule):
    """A router for each of gate, up and down of a block (LoRAMoE, arXiv 2312.09979), each of its linear's input."""

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        is_mtp_layer: bool = False,
        *,
        name: str,
        **common: Any,
    ) -> None:
        super().__init__(config)
        self.gate = MoLERouter(config, pg_collection, name=f"{name}.gate", site=0, **common)
        self.up = MoLERouter(config, pg_collection, name=f"{name}.up", site=1, **common)
        self.down = RowRouter(config, pg_collection, name=f"{name}.down", site=2, **common)

    def set_layer_number(self, layer_number: int) -> None:
        for router in (self.gate, self.up, self.down):
            router.set_layer_number(layer_number)

    @property
    def layer(self) -> int:
        """See `MoLERouter.layer`."""
        return self.gate.layer


class TaskRouter(MoLERouter):
    """Stands where a router does, and has no parameters: each sample's tokens go to the expert of its task, with weight
    1. The task is the source that the sample comes from, which `counting_by` tells."""

    def _make_parameters(self, config: TransformerConfig, name: str, **common: Any) -> None:
        pass

    def forward(
        self, hidden: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `MoLERouter.forward`. Raises ValueError where nobody says which task a sample is of."""
        if self._group_T is None:
            raise ValueError("adapter.router_scope is task, but the model was not told which source samples come from")
        task_T = group_domains(self._group_T)
        chosen_TE = F.one_hot(task_T, self.adapter.num_experts).bool()
        weight_TE = chosen_TE.to(torch.float32)
        if self.training and torch.is_grad_enabled():
            # of a router that is certain
            logits_TE = torch.where(chosen_TE, 0.0, -1e9)
            x_TH = hidden.reshape(-1, hidden.shape[-1]).detach()
            self.sums.add(x_TH, logits_TE, weight_TE, task_T, self._group_T >= 0, self._group_T)
        return weight_TE, chosen_TE


@dataclass(frozen=True)
class RouterPlan:
    """What every rank knows of the whole model's routers: the layers that have some, from 0 and in order, by how many
    groups they count tokens, and how many a layer has."""

    layers: tuple[int, ...]
    num_groups: int
    num_sites: int = 1

    @property
    def num_routers(self) -> int:
        return len(self.layers) * self.num_sites

    def row(self, router: MoLERouter) -> int:
        """A router's place among those of the whole model."""
        return self.layers.index(router.layer) * self.num_sites + router.site


def plan_routers(routers: Sequence[MoLERouter], num_domains: int) -> RouterPlan:
    """Make this rank's routers count by source and modality, and ask all ranks for theirs. All ranks call it."""
    plan_groups = num_groups(num_domains)
    for router in routers:
        router.sums.count_groups(plan_groups)
    everyone: list[list[tuple[int, int]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, [(router.layer, router.site) for router in routers])
    found = set().union(*everyone)
    layers = tuple(sorted({layer for layer, _ in found}))
    return RouterPlan(layers, plan_groups, num_sites=1 + max((site for _, site in found), default=0))


def router_loss_gradients(
    routers: Sequence[MoLERouter],
    plan: RouterPlan,
    adapter: AdapterConfig,
    grad_scale: torch.Tensor,
    *,
    balance_factor: float = 1.0,
) -> torch.Tensor:
    """Add the gradient of the balance and z losses to this rank's routers, and clear their sums.

    With C the shares of choices and P the mean probabilities over the valid tokens of the global batch, C held fixed:

        layer:  w mean_l sum_j C_lj P_lj        model:  w sum_j C_j P_j,  C and P pooled over layers (as published)

    (LLaVA-MoLE, arXiv 2401.16160, without a factor E: uniform gives 1/E, collapse 1). z: w_z mean (logsumexp)^2. l runs
    over all routers, where a layer has several. With top_k choices a token each counts 1/top_k; where all experts are
    mixed, C counts the likeliest. w is `adapter.balance_weight` times `balance_factor`.

    Call once a step on all ranks, after the last backward pass and before the gradient sync, which sums what each rank
    adds here. `grad_scale` multiplies the gradient: the number of loss tokens, by which Megatron-Core divides
    afterwards.

    Returns the sums of all routers over all ranks, on the device, a row a router, for `summarize` to read: one
    all-reduce, and nothing here waits for the device.
    """
    # Each token is in one rank's sums: tensor-parallel ranks route parts of a sequence, data- and expert-parallel ones
    # (tokens are counted before they travel) other samples; and the other pipeline stages leave a layer's row at zero.
    num_experts = adapter.num_experts
    width = _NUM_SCALARS + num_experts * (1 + plan.num_groups)
    table = torch.zeros(plan.num_routers, width, device=grad_scale.device)
    for router in routers:
        if router.counts:
            table[plan.row(router)] = router.sums.row
    dist.all_reduce(table)
    _, _, counts_LGE = _split_rows(table, num_experts)
    counts_LE = counts_LGE.sum(1)
    choices_L = counts_LE.sum(-1).clamp(min=1)
    tokens_L, share_LE = choices_L / adapter.num_choices, counts_LE / choices_L[:, None]
    pull_LE = share_LE.mean(0, keepdim=True).expand_as(share_LE) if adapter.balance_scope == "model" else share_LE
    for router in routers:
        index = plan.row(router)
        scale = grad_scale / (plan.num_routers * tokens_L[index])
        if router.sums.balance:
            weight = adapter.balance_weight * balance_factor
            _accumulate(router, router.sums.balance_gradient(pull_LE[index]), weight * scale)
        if router.sums.z:
            _accumulate(router, router.sums.z_grads_EX, adapter.z_loss_weight * scale)
        router.sums.clear()
    return table


@torch.no_grad()
def move_score_biases(
    routers: Sequence[MoLERouter], plan: RouterPlan, adapter: AdapterConfig, table: torch.Tensor
) -> None:
    """Each router's score bias += `adapter.score_bias_rate` * sign(mean load - load), loads those of one global batch
    that `router_loss_gradients` returned: once a step that was applied, on every rank alike."""
    if adapter.router_score != "sigmoid":
        return
    counts_LE = _split_rows(table, adapter.num_experts)[2].sum(1)
    for router in routers:
        load_E = counts_LE[plan.row(router)]
        assert router.score_bias is not None
        router.score_bias.add_((load_E.mean() - load_E).sign(), alpha=adapter.score_bias_rate)


def summarize(table: torch.Tensor, plan: RouterPlan, adapter: AdapterConfig) -> RoutingSummary:
    """What `router_loss_gradients` returned, for people, a layer's routers together. Waits for the device, once."""
    scalars, probs_LE, counts_LGE = _split_rows(table.cpu().double(), adapter.num_experts)
    counts_LE = counts_LGE.sum(1)
    choices_L = counts_LE.sum(-1).clamp(min=1)
    tokens_L = choices_L / adapter.num_choices
    share_LE, mean_LE = counts_LE / choices_L[:, None], probs_LE / tokens_L[:, None]
    z_L, entropy_L, margin_L = (scalars / tokens_L[:, None]).unbind(-1)
    balance_L = (share_LE * mean_LE).sum(-1)
    pooled = adapter.balance_scope == "model"
    balance = (share_LE.mean(0) * mean_LE.mean(0)).sum() if pooled else balance_L.mean()

    def by_layer(of_routers: torch.Tensor) -> torch.Tensor:
        return of_routers.unflatten(0, (len(plan.layers), plan.num_sites))

    return RoutingSummary(
        layers=plan.layers,
        counts_LGE=by_layer(counts_LGE).sum(1),
        num_choices=adapter.num_choices * plan.num_sites,
        balance_L=by_layer(balance_L).mean(1),
        z_L=by_layer(z_L).mean(1),
        entropy_L=by_layer(entropy_L).mean(1),
        margin_L=by_layer(margin_L).mean(1),
        balance_loss=float(balance),
        z_loss=float(z_L.mean()),
    )


def _split_rows(table: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of `RouterSums.row`: (z, entropy and margin [L, 3], probs [L, E], counts [L, G, E])."""
    scalars, probs, counts = table.tensor_split([_NUM_SCALARS, _NUM_SCALARS + num_experts], dim=-1)
    return scalars, probs, counts.unflatten(-1, (-1, num_experts))


def _accumulate(router: MoLERouter, gradient_EX: torch.Tensor, scale: torch.Tensor) -> None:
    router.weight.main_grad.add_(gradient_EX[:, :-1] * scale)  # type: ignore[attr-defined]
    # its gradient is summed over tensor-parallel ranks
    if router.bias is not None and router.counts:
        router.bias.main_grad.add_(gradient_EX[:, -1] * scale)  # type: ignore[attr-defined]
