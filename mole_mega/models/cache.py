"""Keys and values of the places that were read: a new token then costs its own place, not a pass over the whole text.

Shape suffixes: B batch, S sequence (of one pass), K places read so far, G key-value heads of one tensor-parallel rank,
D a head's width.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType


class KeyValueCache(BaseInferenceContext):
    """What the attention of one pipeline stage remembers of one batch: each place in the slot of its position.

    Rows are padded on the right, as in training. What padding writes lies behind its row's tokens, where no query looks
    (one at position p sees the slots up to p), and is overwritten when the row's next tokens come. So rows of unlike
    lengths share a batch, a pass may be padded to what sequence parallelism divides, and each token is rotated by its
    true position. (Megatron-Core's `StaticInferenceContext` gives all rows one slot a pass: prompts would be padded on
    the left, and rotated by positions that are not theirs, which bf16 rounds otherwise.)
    """

    def __init__(self, num_slots: int) -> None:
        super().__init__(InferenceConfig())
        self.max_sequence_length = num_slots  # as long does Megatron-Core make the table of rotations
        self._num_read = 0
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def is_static_batching(self) -> bool:
        return True

    def is_decode_only(self) -> bool:
        return False

    def expect(self, position_ids_BS: torch.Tensor) -> torch.Tensor:
        """Call before a pass, with its positions. Returns its attention mask, [B, 1, S, K] bool, True: not seen."""
        self.positions_SB = position_ids_BS.T
        self._num_read = max(self._num_read, int(position_ids_BS.max()) + 1)
        assert self._num_read <= self.max_sequence_length, (self._num_read, self.max_sequence_length)
        slots_K = torch.arange(self._num_read, device=position_ids_BS.device)
        return slots_K > position_ids_BS[:, None, :, None]

    def store(self, layer: int, key_SBGD: torch.Tensor, value_SBGD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a pass's keys (rotated already) and values to a layer; returns all of it, [K, B, G, D] each."""
        if layer not in self._layers:
            shape = self.max_sequence_length, *key_SBGD.shape[1:]
            # zeros: what is masked still gets a weight of 0, and 0 times an arbitrary number need not be 0
            self._layers[layer] = key_SBGD.new_zeros(shape), value_SBGD.new_zeros(shape)
        rows_B = torch.arange(key_SBGD.shape[1], device=key_SBGD.device)
        for kept, new in zip(self._layers[layer], (key_SBGD, value_SBGD), strict=True):
            kept[self.positions_SB, rows_B] = new
        keys, values = self._layers[layer]
        return keys[: self._num_read], values[: self._num_read]


class CachedSelfAttention(SelfAttention):
    """Megatron-Core's attention, which keeps keys and values in a `KeyValueCache` when it is given one."""

    def _adjust_key_value_for_inference(
        self,
        inference_context: BaseInferenceContext | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rotary_pos_emb: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Megatron-Core's hook between the projections and the rotation. The keys that come out are rotated."""
        if inference_context is None:
            return super()._adjust_key_value_for_inference(
                inference_context, query, key, value, rotary_pos_emb, *args, **kwargs
            )
        assert isinstance(inference_context, KeyValueCache)
        table, _ = rotary_pos_emb  # [slots, 1, 1, D]
        rotation_SB1D = table[inference_context.positions_SB, 0]
        key = apply_rotary_pos_emb(key, rotation_SB1D, config=self.config, cp_group=self.pg_collection.cp)
        keys, values = inference_context.store(self.layer_number, key, value)
        return query, keys, values, (rotation_SB1D, None), AttnMaskType.arbitrary, None
