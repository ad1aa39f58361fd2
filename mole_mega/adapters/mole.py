"""The MoLE block: Megatron-Core's `MoELayer` around one frozen MLP and a bank of LoRA experts.

For a token x that its router sent to expert k with weight w (LLaVA-MoLE, arXiv 2401.16160):

    h = silu(Wg x + w Dg_k(x)) * (Wu x + w Du_k(x));  out = Wd h + w Dd_k(h);  D_k(z) = s B_k A_k dropout(z)

The frozen MLP is held once a rank and runs dense over all the tokens that the dispatcher brought, whichever expert
they chose; only the thin factors know about experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from mole_mega.adapters import bank, sharding
from mole_mega.config import AdapterConfig


class MoLEExperts(MLP):
    """The frozen MLP of one block with this rank's part of the expert bank.

    Factors, whole sizes: gate/up A [E, R, H], B [E, F, R]; down A [E, R, F], B [E, H, R].
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
        self._groups = pg_collection
        experts, rank, hidden, ffn = adapter.num_experts, adapter.rank, config.hidden_size, config.ffn_hidden_size
        assert num_local_experts * pg_collection.ep.size() == experts, (num_local_experts, experts)
        for projection, kind, in_features, out_features in (
            ("gate", "column", hidden, ffn),
            ("up", "column", hidden, ffn),
            ("down", "row", ffn, hidden),
        ):
            shapes = {"A": (experts, rank, in_features), "B": (experts, out_features, rank)}
            for factor, init in (("A", sharding.kaiming_uniform), ("B", sharding.zeros)):
                parameter = sharding.make_parameter(
                    f"{prefix}.{projection}.{factor}",
                    sharding.PLACEMENTS[f"experts.{kind}.{factor}"],
                    shapes[factor],
                    init,
                    pg_collection,
                    seed=seed,
                    dtype=config.params_dtype,
                    device=device,
                )
                self.register_parameter(f"lora_{projection}_{factor}", parameter)

    def forward(
        self, dispatched_TH: torch.Tensor, tokens_per_expert_E: torch.Tensor, weight_T: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """dispatched [T, H] sorted by local expert; counts [E]; weight [T], the gate's w. Returns ([T, H], None)."""
        adapter = self.adapter
        scale = adapter.alpha / adapter.rank
        # w = 1 throughout: leave the multiplication out, so that it stays bit for bit plain LoRA
        weight = None if adapter.gate == "none" else weight_T
        fc1_T2F, _ = self.linear_fc1(dispatched_TH)
        fc1_T2F = bank.add_gated_expert_lora(
            fc1_T2F,
            F.dropout(dispatched_TH, adapter.dropout, self.training),
            self.lora_gate_A,
            self.lora_gate_B,
            self.lora_up_A,
            self.lora_up_B,
            tokens_per_expert_E,
            scale,
            weight,
        )
        gate_TF, up_TF = fc1_T2F.chunk(2, dim=-1)
        h_TF = F.silu(gate_TF) * up_TF
        output_TH, _ = self.linear_fc2(h_TF)
        output_TH = bank.add_expert_lora(
            output_TH, self._dropout_split(h_TF), self.lora_down_A, self.lora_down_B, tokens_per_expert_E, scale, weight
        )
        return output_TH, None

    def _dropout_split(self, h_TF: torch.Tensor) -> torch.Tensor:
        """Dropout of features that expert-tensor ranks hold apart: each by a state of its own."""
        if not self.adapter.dropout or not self.training:
            return h_TF
        with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
            return F.dropout(h_TF, self.adapter.dropout)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        # In a base checkpoint the frozen MLP stands where it stands without experts.
        for entry in entries.values():
            entry.key = entry.key.replace(".mlp.experts.", ".mlp.")
        return entries | sharding.sharded_adapters(self, prefix, self._groups)
