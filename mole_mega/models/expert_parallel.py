"""What travels between the expert-parallel ranks of a run: arithmetic alone, which training and the estimate ask."""

from __future__ import annotations

from mole_mega.adapters.traffic import ExpertParallel, choose_expert_parallel
from mole_mega.config import RunConfig
from mole_mega.models.sizes import LlavaSize


def expert_parallel(run: RunConfig, size: LlavaSize) -> ExpertParallel:
    """What travels between expert-parallel ranks in this run, decided for full micro-batches."""
    return choose_expert_parallel(
        run.adapter,
        run.parallel,
        size.language.hidden_size,
        size.language.ffn_hidden_size,
        run.train.micro_batch_size * run.data.max_length // run.parallel.context,
    )
