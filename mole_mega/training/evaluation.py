"""What a model is worth on held-out rows: scores with the true answer before it, and answers that it writes itself.

Each of the assistant's turns is asked, with the true conversation before it: the same question that the teacher-forced
scores put to the model. So a sample's teacher-forced accuracy is 1 if and only if each of its answers is exact, as long
as an answer may be as long as the true one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from mole_mega.data.collate import Batch
from mole_mega.data.conversation import IGNORE_INDEX, Encoder
from mole_mega.models.decode import Prompts, greedy, pad_prompts
from mole_mega.models.llava import LLaVA
from mole_mega.monitor import scores
from mole_mega.monitor.metrics import Row
from mole_mega.platform.parallel import Parallel
from mole_mega.training.step import Evaluator


@dataclass(frozen=True)
class Question:
    """One of the assistant's turns. `place` orders questions as their rows stand in the sources. `prompt` int64 [S],
    `image_mask` bool [S], `pixels` [N, 3, h, w] of the images in it; `true` are the tokens of the answer, with its stop
    token; `instruction` is how many places come before the sample's first answer."""

    place: tuple[int, ...]
    domain: int
    sample_id: str
    turn: int
    prompt: torch.Tensor
    image_mask: torch.Tensor
    pixels: torch.Tensor
    true: list[int]
    instruction: int


@dataclass(frozen=True)
class Answer:
    """A question with what was written. `exact`: token for token, up to the stop token. `contains` and `anls` compare
    the texts (monitor/scores.py). `turn` counts the sample's answers from 0. `cut`: no stop token came before the limit
    on new tokens, or the end of the context."""

    id: str
    source: str
    turn: int
    prompt: str
    true: str
    answer: str
    exact: bool
    contains: bool
    anls: float
    cut: bool


def labelled_places(batches: Sequence[Batch], num_domains: int, parallel: Parallel) -> torch.Tensor:
    """How many places of each domain have a label in all ranks' batches, int64 [D]. All ranks call it."""
    places = torch.zeros(num_domains, dtype=torch.int64, device=parallel.device)
    for batch in batches:
        counts = (batch.labels != IGNORE_INDEX).sum(dim=1)
        places.index_add_(0, batch.domains.to(places.device), counts.to(places.device))
    dist.all_reduce(places, group=parallel.groups.dp)
    return places.cpu()


def evaluation_row(evaluator: Evaluator, batches: Sequence[Batch], domains: Sequence[str]) -> Row:
    """{"loss/<domain>", "perplexity/<domain>", "token_accuracy/<domain>", "accuracy/<domain>"} over all ranks' batches;
    accuracy is the share of samples whose whole answer greedy decoding gets right. Domains without a usable sample are
    not in it."""
    if not batches:
        return {}
    row: Row = {}
    for domain, (loss, tokens, correct, samples, exact) in zip(domains, evaluator.evaluate(batches).T, strict=True):
        if tokens:
            row[f"loss/{domain}"] = float(loss / tokens)
            row[f"perplexity/{domain}"] = float((loss / tokens).exp())
            row[f"token_accuracy/{domain}"] = float(correct / tokens)
            row[f"accuracy/{domain}"] = float(exact / samples)
    return row


def answer_row(answers: Sequence[Answer]) -> Row:
    """{"exact_match/<domain>", "contains/<domain>", "anls/<domain>"}: means over a domain's answers."""
    row: Row = {}
    for source in dict.fromkeys(answer.source for answer in answers):
        own = [answer for answer in answers if answer.source == source]
        row[f"exact_match/{source}"] = sum(answer.exact for answer in own) / len(own)
        row[f"contains/{source}"] = sum(answer.contains for answer in own) / len(own)
        row[f"anls/{source}"] = sum(answer.anls for answer in own) / len(own)
    return row


def answer_questions(
    model: LLaVA,
    batches: Sequence[Batch],
    domains: Sequence[str],
    encoder: Encoder,
    base: Path,
    batch_size: int,
    max_new_tokens: int,
    each_batch: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """The answers of all ranks to the questions in their batches, in the order of the sources; every rank gets all.

    `base` names the stop tokens; `each_batch` is called before each batch of questions. All ranks call it, with the
    validation batches of their data-parallel rank.
    """
    parallel = model.parallel
    stop_ids = encoder.stop_ids(base)
    asked = sorted(questions(batches, parallel.dp_rank, encoder.places_per_image), key=lambda q: len(q.prompt))
    written = _write(model, asked, batch_size, max_new_tokens, stop_ids, each_batch)
    mine = []
    # each question is counted by one rank
    if parallel.pp_rank == 0 and parallel.tp_rank == 0:
        for question, tokens in zip(asked, written, strict=True):
            true, text = encoder.text(question.true), encoder.text(tokens)
            answer = Answer(
                id=question.sample_id,
                source=domains[question.domain],
                turn=question.turn,
                prompt=encoder.text(question.prompt.tolist()),
                true=true,
                answer=text,
                exact=tokens == question.true,
                contains=scores.contains(text, true),
                anls=scores.anls(text, true),
                cut=not tokens or tokens[-1] not in stop_ids,
            )
            mine.append((question.place, answer))
    everyone: list[list[tuple[tuple[int, ...], Answer]]] = [[] for _ in range(parallel.world_size)]
    dist.all_gather_object(everyone, mine)
    return [answer for _, answer in sorted((pair for part in everyone for pair in part), key=lambda pair: pair[0])]


def questions(batches: Sequence[Batch], dp_rank: int, places_per_image: int) -> Iterator[Question]:
    """Every answer that the labels of validation batches hold, as a question."""
    for number, batch in enumerate(batches):
        images_read = 0
        for row, sample_id in enumerate(batch.sample_ids):
            images = batch.pixels[images_read : images_read + int(batch.image_mask[row].sum()) // places_per_image]
            images_read += len(images)
            answers = _answers(batch.labels[row])
            for turn, (start, stop) in enumerate(answers):
                image_mask = batch.image_mask[row, : start + 1]
                yield Question(
                    place=(number, dp_rank, row, turn),
                    domain=int(batch.domains[row]),
                    sample_id=sample_id,
                    turn=turn,
                    prompt=batch.tokens[row, : start + 1],
                    image_mask=image_mask,
                    pixels=images[: int(image_mask.sum()) // places_per_image],
                    true=batch.labels[row, start:stop].tolist(),
                    instruction=answers[0][0] + 1,
                )


def answers_name(step: int) -> str:
    """Of the file with the answers of a run's own validation after a step."""
    return f"step_{step}.jsonl"


def forget_answers(folder: Path, step: int) -> None:
    """Remove the answers to validations after `step`, which a run that goes on from there has not reached yet."""
    for path in folder.glob("step_*.jsonl"):
        number = path.stem.removeprefix("step_")
        if number.isdecimal() and int(number) > step:
            path.unlink()


def write_answers(answers: Sequence[Answer], path: Path) -> None:
    """One JSON object a line; `path`, whose folder need not exist, is replaced when all are written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_text("".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers))
    beside.replace(path)


def _answers(labels_S: torch.Tensor) -> list[tuple[int, int]]:
    """(first place, place behind the last) of each unbroken stretch of labels."""
    is_answer = torch.nn.functional.pad((labels_S != IGNORE_INDEX).int(), (1, 1))
    edges = is_answer.diff().nonzero()[:, 0].tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _write(
    model: LLaVA,
    asked: Sequence[Question],
    batch_size: int,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    each_batch: Callable[[], None],
) -> list[list[int]]:
    """The tokens of each answer. Ranks may have unlike numbers of questions, also none."""
    parallel = model.parallel
    chunks = [asked[first : first + batch_size] for first in range(0, len(asked), batch_size)]
    # as many micro-batches at a time as there are pipeline stages, and on every rank as often
    rounds = torch.tensor(-(-len(chunks) // parallel.pp_size), device=parallel.device)
    dist.all_reduce(rounds, op=dist.ReduceOp.MAX)
    written: list[list[int]] = []
    for number in range(int(rounds)):
        each_batch()
        part = chunks[number * parallel.pp_size : (number + 1) * parallel.pp_size]
        prompts = [_prompts(chunk, model) for chunk in (*part, *[()] * (parallel.pp_size - len(part)))]
        for chunk, rows in zip(part, greedy(model, prompts, max_new_tokens, stop_ids), strict=False):
            written += rows[: len(chunk)]
    return written


def _prompts(chunk: Sequence[Question], model: LLaVA) -> Prompts:
    if not chunk:  # a row that asks nothing
        side = model.size.vision.image_size
        nothing = torch.zeros(0, dtype=torch.int64)
        return pad_prompts([nothing], [nothing.bool()], torch.zeros(0, 3, side, side), model.parallel)
    pixels = torch.cat([question.pixels for question in chunk])
    return pad_prompts(
        [q.prompt for q in chunk],
        [q.image_mask for q in chunk],
        pixels,
        model.parallel,
        [q.domain for q in chunk],
        [q.instruction for q in chunk],
    )
