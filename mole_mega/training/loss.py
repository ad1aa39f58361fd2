"""What is summed over places: the language loss and the scores of an evaluation, told apart by domain.

Sums, not means: normalisation waits for the end of the global batch, since dividing here would make the figures depend
on how the batch was cut. Tables are [rows, D] float64, a column a domain, so that tables of micro-batches and ranks
simply add.

Shape suffixes: B batch, S sequence, D domains, V vocabulary of one tensor-parallel rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from mole_mega.data.collate import Batch
from mole_mega.data.conversation import IGNORE_INDEX
from mole_mega.models.decode import largest

LOSS_ROWS = ("loss", "tokens", "places")
SCORE_ROWS = ("loss", "tokens", "correct", "samples", "exact")


def sum_loss(loss_BS: torch.Tensor, batch: Batch, num_domains: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum of the loss over labelled places, their number as int, table of LOSS_ROWS by domain).

    loss_BS is each place's cross entropy. `tokens` counts labelled places, `places` all but padding.
    """
    labelled_BS = (batch.labels != IGNORE_INDEX).to(torch.float32)
    loss_B, tokens_B = (loss_BS.to(torch.float32) * labelled_BS).sum(1), labelled_BS.sum(1)
    table = _by_domain([loss_B.detach(), tokens_B, batch.padding_mask.sum(1)], batch, num_domains)
    return loss_B.sum(), tokens_B.sum().to(torch.int), table


def sum_scores(
    logits_BSV: torch.Tensor, batch: Batch, num_domains: int, groups: ProcessGroupCollection
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`sum_loss` for an evaluation: the table has SCORE_ROWS.

    A labelled place is correct when its largest logit is its label's. A sample is exact when all its labelled places
    are: with the true answer before each place, that is so if and only if greedy decoding writes the true answer. Of
    the ranks that hold a sample's places (context parallelism) the first returns the table of all.
    """
    tp_group = groups.tp
    labelled_BS = batch.labels != IGNORE_INDEX
    correct_BS = (largest(logits_BSV, tp_group) == batch.labels) & labelled_BS
    labels_SB = batch.labels.clamp(min=0).T.contiguous()
    loss_BS = vocab_parallel_cross_entropy(logits_BSV.transpose(0, 1).contiguous(), labels_SB, tp_group=tp_group).T
    loss_B = (loss_BS.to(torch.float32) * labelled_BS).sum(1)
    tokens_B, correct_B = labelled_BS.sum(1), correct_BS.sum(1)
    mine = loss_B.sum(), tokens_B.sum().to(torch.int)
    if groups.cp.size() > 1:
        whole = torch.stack([loss_B.double(), tokens_B.double(), correct_B.double()])
        dist.all_reduce(whole, group=groups.cp)
        loss_B, tokens_B, correct_B = whole * (groups.cp.rank() == 0)
    has_answer_B = tokens_B > 0
    rows = [loss_B, tokens_B, correct_B, has_answer_B, (correct_B == tokens_B) & has_answer_B]
    return *mine, _by_domain(rows, batch, num_domains)


def _by_domain(rows_B: list[torch.Tensor], batch: Batch, num_domains: int) -> torch.Tensor:
    rows = torch.stack([row.double() for row in rows_B])
    table = torch.zeros(len(rows_B), num_domains, dtype=torch.float64, device=rows.device)
    return table.index_add(1, batch.domains, rows)
