"""The language loss: what is summed, over which places, and how it is told apart by domain."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mole_mega.data.collate import Batch
from mole_mega.data.conversation import IGNORE_INDEX


@dataclass(frozen=True)
class LossSums:
    """Sums over one or more micro-batches on the last pipeline stage. loss and tokens [D], one entry a domain."""

    loss: torch.Tensor
    tokens: torch.Tensor


def sum_loss(loss_BS: torch.Tensor, batch: Batch, num_domains: int) -> tuple[torch.Tensor, torch.Tensor, LossSums]:
    """(sum of the loss over labelled places, their number as int, both by domain).

    loss_BS [B, S] is each place's cross entropy. Normalisation is left to the end of the global batch: dividing here
    would make the loss depend on how the batch was cut.
    """
    mask_BS = (batch.labels != IGNORE_INDEX).to(torch.float32)
    loss_B = (loss_BS.to(torch.float32) * mask_BS).sum(1)
    tokens_B = mask_BS.sum(1)
    zeros = torch.zeros(num_domains, dtype=torch.float64, device=loss_B.device)
    sums = LossSums(
        loss=zeros.index_add(0, batch.domains, loss_B.detach().double()),
        tokens=zeros.index_add(0, batch.domains, tokens_B.double()),
    )
    return loss_B.sum(), tokens_B.sum().to(torch.int), sums
