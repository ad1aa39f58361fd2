"""Greedy answers, batched, with a cache of keys and values, by one code under every layout and on one process.

Each token is a forward pass of Megatron-Core's own schedule over one micro-batch or more: under pipeline parallelism as
many as there are stages keep all of them busy. The last stage chooses, and tells the others.

Shape suffixes: B batch, S sequence, V vocabulary of one tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from mole_mega.models.cache import KeyValueCache
from mole_mega.models.llava import LLaVA
from mole_mega.platform.parallel import Parallel


@dataclass(frozen=True)
class Prompts:
    """A micro-batch of B prompts, padded on the right.

    tokens int64 [B, S], S a multiple of the tensor-parallel size; lengths int64 [B], 0 for a row that asks nothing;
    image_mask bool [B, S]; pixels float32 [N, 3, h, w], in order of appearance; domains int64 [B], the source that each
    is like, for a model that routes by task; instruction_mask bool [B, S], for one that routes by what is asked.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    image_mask: torch.Tensor
    pixels: torch.Tensor
    domains: torch.Tensor
    instruction_mask: torch.Tensor


def pad_prompts(
    prompts: Sequence[torch.Tensor],
    image_masks: Sequence[torch.Tensor],
    pixels: torch.Tensor,
    parallel: Parallel,
    domains: Sequence[int] | None = None,
    instructions: Sequence[int] | None = None,
) -> Prompts:
    """Prompts int64 [S_b] with their image places bool [S_b] as one micro-batch on this rank's device. `domains`: the
    source that each is like (default: the first); `instructions`: how many places of each come before its first answer
    (default: all)."""
    tp = parallel.tp_size
    longest = max(tp, *(len(prompt) for prompt in prompts))
    shape = len(prompts), -(-longest // tp) * tp
    tokens, image_mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    for row, (prompt, mask) in enumerate(zip(prompts, image_masks, strict=True)):
        tokens[row, : len(prompt)], image_mask[row, : len(prompt)] = prompt, mask
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    sources = torch.tensor(domains if domains is not None else [0] * len(prompts), dtype=torch.int64)
    asked = lengths if instructions is None else torch.tensor(instructions)
    instruction_mask = (torch.arange(shape[1]) < asked[:, None]) & ~image_mask
    fields = (tokens, lengths, image_mask, pixels, sources, instruction_mask)
    return Prompts(*(tensor.to(parallel.device) for tensor in fields))


@torch.no_grad()
def greedy(
    model: LLaVA, micro_batches: Sequence[Prompts], max_new_tokens: int, stop_ids: frozenset[int]
) -> list[list[list[int]]]:
    """The answer to each row of each micro-batch: tokens, the last of them the stop token, if one came.

    An answer ends with a stop token, after `max_new_tokens`, or where the model's context does. Every rank calls it
    with as many micro-batches; ranks that share a data-parallel rank with the same ones. They all get their answers.
    """
    model.eval()
    parallel = model.parallel
    model.read_instructions([(prompts.tokens, prompts.instruction_mask) for prompts in micro_batches])
    writers = [_Writer(prompts, model, max_new_tokens, stop_ids) for prompts in micro_batches]
    passes = [writer.first_pass() for writer in writers]
    while True:
        for writer, tokens_B in zip(writers, _choose(model, passes), strict=True):
            writer.write(tokens_B)
        # experts are shared over data-parallel ranks: one that is done goes on until all are
        unfinished = torch.tensor(int(any(writer.unfinished for writer in writers)), device=parallel.device)
        dist.all_reduce(unfinished, op=dist.ReduceOp.MAX)
        if not unfinished:
            return [writer.answers for writer in writers]
        passes = [writer.next_pass() for writer in writers]


def largest(logits_V: torch.Tensor, tp_group: dist.ProcessGroup) -> torch.Tensor:
    """Index of the largest logit over the whole vocabulary, [..., V] -> int64 [...]; the same on every rank."""
    value, index = logits_V.max(dim=-1)
    if tp_group.size() == 1:
        return index
    mine = torch.stack([value.double(), (index + tp_group.rank() * logits_V.shape[-1]).double()])
    parts = [torch.empty_like(mine) for _ in range(tp_group.size())]
    dist.all_gather(parts, mine, group=tp_group)
    values, indices = torch.stack(parts).unbind(1)
    return indices.gather(0, values.argmax(dim=0, keepdim=True))[0].long()


@dataclass(frozen=True)
class _Pass:
    """What the model reads next, and the place of each row, [B], whose logits choose the row's next token."""

    inputs: dict[str, Any]
    places_B: torch.Tensor


class _Writer:
    """The answers of one micro-batch while they are written."""

    def __init__(self, prompts: Prompts, model: LLaVA, max_new_tokens: int, stop_ids: frozenset[int]) -> None:
        self._prompts, self._stop_ids = prompts, stop_ids
        # a pass reads as many places as sequence parallelism divides: the new token and what it is padded with
        self._places = model.parallel.tp_size
        lengths = prompts.lengths.tolist()
        longest = max(prompts.tokens.shape[1], max(lengths) + max_new_tokens + self._places)
        self._cache = KeyValueCache(-(-longest // 64) * 64)
        room = (model.size.language.max_length - length for length in lengths)
        self._limits = [min(max_new_tokens, left) if length else 0 for left, length in zip(room, lengths, strict=True)]
        self.answers: list[list[int]] = [[] for _ in lengths]

    @property
    def unfinished(self) -> bool:
        return any(self._goes_on(row) for row in range(len(self.answers)))

    def first_pass(self) -> _Pass:
        prompts = self._prompts
        positions_S = torch.arange(prompts.tokens.shape[1], device=prompts.tokens.device)
        inputs = {
            "tokens": prompts.tokens,
            "position_ids": positions_S.expand_as(prompts.tokens),
            "padding_mask": positions_S < prompts.lengths[:, None],
            "image_mask": prompts.image_mask,
            "pixels": prompts.pixels,
            "domains": prompts.domains,
            "cache": self._cache,
        }
        self._position_B = prompts.lengths  # of the token that comes next
        return _Pass(inputs, (prompts.lengths - 1).clamp(min=0))

    def write(self, tokens_B: torch.Tensor) -> None:
        """Add each row's next token, unless its answer has ended."""
        self._tokens_B = tokens_B
        for row, token in enumerate(tokens_B.tolist()):
            if self._goes_on(row):
                self.answers[row].append(token)

    def next_pass(self) -> _Pass:
        """Over the tokens just written. They are text, also one that stands for images in a prompt."""
        tokens_BS = torch.nn.functional.pad(self._tokens_B[:, None], (0, self._places - 1))
        positions_S = torch.arange(self._places, device=tokens_BS.device)
        inputs = {
            "tokens": tokens_BS,
            "position_ids": self._position_B[:, None] + positions_S,
            "padding_mask": (positions_S == 0).expand_as(tokens_BS),
            "image_mask": torch.zeros_like(tokens_BS, dtype=torch.bool),
            "pixels": self._prompts.pixels[:0],
            "domains": self._prompts.domains,
            "cache": self._cache,
        }
        self._position_B = self._position_B + 1
        return _Pass(inputs, torch.zeros_like(self._tokens_B))

    def _goes_on(self, row: int) -> bool:
        answer = self.answers[row]
        return len(answer) < self._limits[row] and not (answer and answer[-1] in self._stop_ids)


def _choose(model: LLaVA, passes: Sequence[_Pass]) -> tuple[torch.Tensor, ...]:
    """The next token of each row, [B] a micro-batch, on all ranks that share the micro-batches."""
    parallel = model.parallel
    chosen = get_forward_backward_func()(
        forward_step_func=_forward,
        data_iterator=iter(passes),
        model=model,
        num_microbatches=len(passes),
        # shapes travel with the tensors (variable_seq_lengths); these only have to be numbers
        seq_length=1,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    rows = [len(one.places_B) for one in passes]
    tokens = torch.cat(chosen) if parallel.is_last_stage else passes[0].places_B.new_empty(sum(rows))
    if parallel.pp_size > 1:
        group = parallel.groups.pp
        dist.broadcast(tokens, src=dist.get_process_group_ranks(group)[-1], group=group)
    return tokens.split(rows)


def _forward(passes: Any, model: Any) -> tuple[torch.Tensor, Any]:
    """Megatron-Core's forward step: a stage's output, and what the last one makes of it."""
    one: _Pass = next(passes)

    def choose(logits_BSV: torch.Tensor, *, non_loss_data: bool) -> torch.Tensor:
        rows_B = torch.arange(len(logits_BSV), device=logits_BSV.device)
        return largest(logits_BSV[rows_B, one.places_B], model.parallel.groups.tp)

    return model(**one.inputs), choose
