"""Every layout writes the answers that one process writes, token for token, and scores them alike; and what the
teacher-forced scores call exact is what greedy answers get right.

All cases of one world size run in one launch, whose worker is this file.
"""

import json
import logging
import math
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import commands
import pytest
import torch
from transformers import AutoTokenizer

from mole_mega import config as run_config
from mole_mega.checkpoint.base import save_base
from mole_mega.checkpoint.store import trainable_entries
from mole_mega.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, SourceConfig, TrainConfig
from mole_mega.data.collate import Batch
from mole_mega.data.conversation import IGNORE_INDEX, Encoder
from mole_mega.models.decode import greedy, pad_prompts
from mole_mega.models.llava import LLaVA
from mole_mega.platform import parallel as platform
from mole_mega.training import parity
from mole_mega.training.evaluation import answer_questions
from mole_mega.training.loss import SCORE_ROWS
from mole_mega.training.step import Evaluator
from mole_mega.training.trainer import build_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_cpu" / "base_hf"
RUN, SIZE = parity.scaled_down(
    RunConfig(
        run_dir="unused",
        model=ModelConfig(base=""),
        train=TrainConfig(steps=1),
        data=DataConfig(sources=(SourceConfig(name="made", path="made"),)),
    ),
    None,
)
RUN = replace(RUN, adapter=replace(RUN.adapter, num_experts=4))
SIZE = replace(SIZE, image_token_id=200)  # which no answer can hold: it is not in the vocabulary
LAYOUTS = [
    ({"tensor": 2}, 2),
    ({"pipeline": 2}, 2),
    ({"expert": 2}, 2),
    ({}, 2),
    ({"tensor": 2, "expert": 2}, 4),
    ({"pipeline": 2, "expert": 2}, 4),
    ({"tensor": 2, "pipeline": 2}, 4),
    ({"expert": 4}, 4),  # ranks with more questions than others, and with none
]
GATES = ("none", "prob", "straight_through")
TOP_2 = {"top_k": 2, "renormalize": True, "expert_parallel": "weights"}
DENSE = {"gate": "dense", "expert_parallel": "weights"}
CASES = [
    *((layout, world, {"gate": "prob"}) for layout, world in LAYOUTS),
    *((LAYOUTS[number][0], 2, {"gate": gate}) for number in (0, 2) for gate in ("none", "straight_through")),
    *((LAYOUTS[number][0], LAYOUTS[number][1], {"method": "lora"}) for number in (0, 6)),
    (*LAYOUTS[7], TOP_2),
    (*LAYOUTS[0], DENSE),
]
LONGEST = 10
STOPS = list(range(5, 40))
# of each sample: how many images, and which of its answers the model itself would give
SAMPLES = [(0, [True]), (1, [True, False]), (2, [False]), (0, [True, True, True]), (3, [True]), (1, [False, True]),
           (0, [False]), (0, [True, True])]  # fmt: skip
DOMAINS = tuple(f"sample {number}" for number in range(len(SAMPLES)))


def kind(adapter):
    return " ".join(map(str, adapter.values()))


def name(layout, world, adapter):
    words = [parity.layout_name(ParallelConfig(**layout), world), *(f"{k}={v}" for k, v in adapter.items())]
    return ", ".join(words)


def build(folder, layout, adapter):
    run = replace(
        RUN,
        parallel=ParallelConfig(**layout),
        adapter=replace(RUN.adapter, **adapter),
        model=ModelConfig(base=str(folder / "base")),
    )
    run_config.validate(run)
    parallel = platform.initialize(run.parallel, seed=0)
    model = build_model(run, SIZE, parallel)
    parity._fill_adapters(trainable_entries(model), run.adapter.alpha / run.adapter.rank)
    return run, model.module.eval()


def evaluate(folder, layout, adapter):
    """What a layout makes of the samples: {"answers": ..., "scores": [SCORE_ROWS, samples]}."""
    run, model = build(folder, layout, adapter)
    parallel = model.parallel
    chunks = torch.load(folder / f"{kind(adapter)}.pt", weights_only=False)
    batches = chunks[parallel.dp_rank :: parallel.dp_size]
    encoder = Encoder(
        AutoTokenizer.from_pretrained(EXAMPLE),
        image_token_id=SIZE.image_token_id,
        places_per_image=SIZE.vision.num_places,
        max_length=256,
    )
    answers = answer_questions(model, batches, DOMAINS, encoder, folder, 3, LONGEST)
    everyone = [None] * parallel.world_size
    torch.distributed.all_gather_object(everyone, answers)
    assert all(other == answers for other in everyone)
    scores = Evaluator(run, model, parallel, len(DOMAINS)).evaluate(batches)
    platform.leave_groups()
    return {"answers": [asdict(answer) for answer in answers], "scores": scores.tolist()}


def main(arguments: list[str]) -> int:
    """The worker: the cases of this world size."""
    folder, world = Path(arguments[0]), int(arguments[1])
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    found = {name(*case): evaluate(folder, case[0], case[2]) for case in CASES if case[1] == world}
    if torch.distributed.get_rank() == 0:
        (folder / f"found_{world}.json").write_text(json.dumps(found))
    platform.shutdown()
    return 0


# ---- samples whose true answers the model would give, or not


def make_base(parallel, out):
    model = LLaVA(RUN, SIZE, parallel, adapters=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1]))
        # each token says much of the next one, so that answers do not stand still
        model.language_model.embedding.word_embeddings.weight.mul_(8)
    save_base(model, out)


def make_samples(model, parallel):
    """Batches of two samples each. A sample's true answers are the model's own, one token altered where SAMPLES says
    False; a question has 3 to 20 tokens, and the first one the images."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for images, own in SAMPLES:
        side, places = SIZE.vision.image_size, SIZE.vision.num_places
        pixels = torch.randn(images, 3, side, side, generator=generator)
        tokens, labels = [SIZE.image_token_id] * (images * places), [IGNORE_INDEX] * (images * places)
        for is_own in own:
            length = int(torch.randint(3, 20, (), generator=generator))
            question = torch.randint(40, SIZE.language.vocab_size, (length,), generator=generator).tolist()
            prompt = torch.tensor(tokens + question)
            prompts = pad_prompts([prompt], [prompt == SIZE.image_token_id], pixels, parallel)
            ((answer,),) = greedy(model, [prompts], LONGEST, frozenset(STOPS))
            if not is_own:
                place = len(answer) // 2
                answer[place] = 40 + (answer[place] + 1) % 80
            tokens, labels = tokens + question + answer, labels + [IGNORE_INDEX] * length + answer
        made.append((tokens, labels, pixels))
    return [stack(made[first : first + 2], first) for first in range(0, len(made), 2)]


def stack(samples, first):
    length = -(-max(len(tokens) for tokens, _, _ in samples) // 8) * 8
    tokens = torch.zeros(len(samples), length, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORE_INDEX)
    padding_mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, (sample, answers, _) in enumerate(samples):
        tokens[row, : len(sample)] = torch.tensor(sample)
        labels[row, : len(sample) - 1] = torch.tensor(answers[1:])  # of each place, the next token
        padding_mask[row, : len(sample)] = True
    return Batch(
        tokens=tokens,
        labels=labels,
        padding_mask=padding_mask,
        position_ids=torch.arange(length).expand_as(tokens).contiguous(),
        pixels=torch.cat([pixels for _, _, pixels in samples]),
        image_mask=tokens == SIZE.image_token_id,
        domains=torch.arange(first, first + len(samples)),
        sample_ids=tuple(str(first + row) for row in range(len(samples))),
    )


@pytest.fixture(scope="module")
def expected(alone, tmp_path_factory):
    """(folder of the cases, {adapter: what one process finds})."""
    folder = tmp_path_factory.mktemp("decode")
    make_base(alone, folder / "base")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": STOPS}))
    results = {}
    for adapter in (*({"gate": gate} for gate in GATES), {"method": "lora"}, TOP_2, DENSE):
        _, model = build(folder, {}, adapter)
        torch.save(make_samples(model, model.parallel), folder / f"{kind(adapter)}.pt")
        results[kind(adapter)] = evaluate(folder, {}, adapter)
    return folder, results


@pytest.fixture(scope="module")
def found(expected):
    """{case: what it finds}."""
    folder, _ = expected
    results = {}
    for world in (2, 4):
        assert commands.launch(__name__, [str(folder), str(world)], world) == 0
        results |= json.loads((folder / f"found_{world}.json").read_text())
    return results


@pytest.mark.parametrize("adapter", [*GATES, "lora", kind(TOP_2), kind(DENSE)])
def test_teacher_forced_exactness_is_that_of_greedy_answers(adapter, expected):
    of_one = expected[1][adapter]
    exact = [[a["exact"] for a in of_one["answers"] if a["source"] == domain] for domain in DOMAINS]
    assert exact == [own for _, own in SAMPLES]
    assert of_one["scores"][SCORE_ROWS.index("exact")] == [float(all(own)) for _, own in SAMPLES]
    assert len({answer["answer"] for answer in of_one["answers"]}) > 8


@pytest.mark.parametrize("case", CASES, ids=lambda case: name(*case))
def test_a_layout_answers_as_one_process_does(case, expected, found):
    of_one, of_layout = expected[1][kind(case[2])], found[name(*case)]
    assert of_layout["answers"] == of_one["answers"]
    torch.testing.assert_close(torch.tensor(of_layout["scores"]), torch.tensor(of_one["scores"]), rtol=1e-5, atol=0)
