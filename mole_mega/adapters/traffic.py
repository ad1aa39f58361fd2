"""What expert parallelism moves, as a count of numbers, and which of its two forms is the faster by it. Arithmetic
alone.

`tokens`: each token travels to the rank of its expert and back. `weights`: a layer's experts travel to every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mole_mega.config import AdapterConfig, ParallelConfig

# Weights may be so many times the tokens, and so many numbers more, and still be the faster: they are sent once a pass,
# while the block before computes, where tokens are waited for on both ways and put in order at each end, however few
# they are. (Measured with tools/bench_expert_parallel.py on 2 and 4 processes over gloo: up to 1.4 times faster in all
# settings but for ties; at 2.8 with 256 tokens by 14 % and 2 %, with 1,024 slower by 1 %; from 5.5 slower.)
_WEIGHTS_FOR_TOKENS = 2
_WEIGHTS_MORE = 200_000


@dataclass(frozen=True)
class Traffic:
    """What a rank sends for one layer in one pass (forward; backward sends as much again), in numbers of the model's
    dtype, in either form: with f = (EP - 1) / EP,

        tokens = 2 T H f / TP        weights = E r (3 H + 3 F / TP) f

    T tokens a micro-batch, of which a tensor-parallel rank has the TP-th part; of its experts' factors it holds those
    of width H whole and those of width F cut. An A that experts share does not travel: E r (H + 2 F / TP) f. Nor do B
    that they mix.
    """

    tokens: int
    weights: int

    @classmethod
    def of(
        cls, adapter: AdapterConfig, parallel: ParallelConfig, hidden_size: int, ffn_hidden_size: int, num_tokens: int
    ) -> Traffic:
        others, ranks, tensor = parallel.expert - 1, parallel.expert, parallel.tensor
        wide, cut = hidden_size, ffn_hidden_size // tensor
        # of gate and up A is as wide as the input and B as the MLP, of down the other way round
        columns = wide + 2 * cut if adapter.share_A else 3 * (wide + cut)
        # common factors lie on every rank
        factors = 0 if adapter.shared_B else adapter.num_experts * adapter.rank * columns
        return cls(2 * num_tokens * hidden_size // tensor * others // ranks, factors * others // ranks)


@dataclass(frozen=True)
class ExpertParallel:
    """The form that a run uses, and why, for people."""

    form: Literal["tokens", "weights"]
    reason: str


def choose_expert_parallel(
    adapter: AdapterConfig, parallel: ParallelConfig, hidden_size: int, ffn_hidden_size: int, num_tokens: int
) -> ExpertParallel:
    """`adapter.expert_parallel` with `auto` decided. `num_tokens`: places of a data-parallel rank's full micro-batch.

    A function of the config and the model's size alone, so that a resumed run decides the same.
    """
    if adapter.expert_parallel != "auto":
        return ExpertParallel(adapter.expert_parallel, "as adapter.expert_parallel says")
    if adapter.why_tokens_stay:
        return ExpertParallel("weights", f"{adapter.why_tokens_stay}; a token can travel to one whole expert alone")
    if parallel.expert == 1:
        return ExpertParallel("tokens", "nothing travels at parallel.expert 1; tokens are sorted by their one expert")
    traffic = Traffic.of(adapter, parallel, hidden_size, ffn_hidden_size, num_tokens)
    weights_win = traffic.weights <= _WEIGHTS_FOR_TOKENS * traffic.tokens + _WEIGHTS_MORE
    form: Literal["tokens", "weights"] = "weights" if weights_win else "tokens"
    return ExpertParallel(
        form,
        f"a rank sends {traffic.weights:,} numbers of weights a layer and pass, or {traffic.tokens:,} of "
        f"{num_tokens:,} tokens, and weights win up to {_WEIGHTS_FOR_TOKENS} times that and {_WEIGHTS_MORE:,}",
    )
