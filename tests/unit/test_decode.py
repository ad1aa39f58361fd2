"""Greedy answers with a cache of keys and values are those of a pass over the whole text for every token."""

import inspect
from dataclasses import replace

import pytest
import torch
from megatron.core.transformer.attention import SelfAttention

from mole_mega.config import DataConfig, ModelConfig, RunConfig, SourceConfig, TrainConfig
from mole_mega.models.cache import CachedSelfAttention, KeyValueCache
from mole_mega.models.decode import greedy, pad_prompts
from mole_mega.models.llava import LLaVA
from mole_mega.training.parity import scaled_down

RUN, SIZE = scaled_down(
    RunConfig(
        run_dir="unused",
        model=ModelConfig(base=""),
        train=TrainConfig(steps=1),
        data=DataConfig(sources=(SourceConfig(name="made", path="made"),)),
    ),
    None,
)
PLACES, IMAGE = SIZE.vision.num_places, SIZE.image_token_id
NEVER = frozenset()
# [length, places of the images]: no image, one, three, and the shortest prompt there is
PROMPTS = [(7, []), (19, [2]), (40, [1, 9, 20]), (1, [])]


def make_model(alone, *, adapter=None, language=None):
    size = replace(SIZE, language=replace(SIZE.language, **(language or {})))
    adapters = replace(RUN.adapter, num_experts=4, **(adapter or {}))
    run = replace(RUN, adapter=adapters, data=replace(RUN.data, max_length=size.language.max_length))
    model = LLaVA(run, size, alone)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
        # each token says much of the next one, so that answers do not stand still
        model.language_model.embedding.word_embeddings.weight.mul_(8)
    return model.eval()


@pytest.fixture(scope="module")
def model(alone):
    return make_model(alone)


@pytest.fixture(scope="module")
def asked():
    """(tokens, image mask, pixels) of each of PROMPTS."""
    generator = torch.Generator().manual_seed(4)
    made = []
    for length, starts in PROMPTS:
        tokens = torch.randint(5, SIZE.language.vocab_size, (length,), generator=generator)
        mask = torch.zeros(length, dtype=torch.bool)
        for start in starts:
            mask[start : start + PLACES] = True
        pixels = torch.randn(len(starts), 3, SIZE.vision.image_size, SIZE.vision.image_size, generator=generator)
        made.append((tokens.masked_fill(mask, IMAGE), mask, pixels))
    return made


def batch(asked, parallel):
    tokens, masks, pixels = zip(*asked, strict=True)
    return pad_prompts(tokens, masks, torch.cat(pixels), parallel)


def whole_pass(model, tokens, mask, pixels):
    """Logits [S, V] without a cache. Behind the prompt's places stands text."""
    with torch.no_grad():
        return model(
            tokens=tokens[None],
            position_ids=torch.arange(len(tokens))[None],
            padding_mask=torch.ones(1, len(tokens), dtype=torch.bool),
            image_mask=torch.nn.functional.pad(mask, (0, len(tokens) - len(mask)))[None],
            pixels=pixels,
        )[0]


def watch(model, record):
    """Calls record(router's number, [S, B] choices) for every pass; returns the hooks."""

    def keep(module, inputs, output):
        record(module.layer_number, output[1].int().argmax(-1).view(inputs[0].shape[:2]))

    return [router.register_forward_hook(keep) for router in model.routers()]


ADAPTERS = [{"gate": gate} for gate in ("none", "prob", "straight_through")] + [{"method": "lora"}]
ROTATIONS = [{"rope_scaling": "linear", "rope_factor": 2.0}, {"rope_scaling": "llama3", "rope_factor": 8.0}]


@pytest.mark.parametrize(
    "options", [*({"adapter": a} for a in ADAPTERS), *({"language": r} for r in ROTATIONS)], ids=str
)
def test_cached_answers_are_those_of_whole_passes(options, alone, asked):
    """Logits, experts and tokens, in one batch of unlike lengths with 0, 1 and 3 images a prompt."""
    model = make_model(alone, **options)
    logits, choices = [], []
    hooks = watch(model, lambda layer, choice_SB: choices.append((layer, choice_SB)))
    hooks.append(model.register_forward_hook(lambda *args: logits.append(args[-1])))
    (answers,) = greedy(model, [batch(asked, alone)], 10, NEVER)
    for hook in hooks:
        hook.remove()
    routed = len(model.routers())
    assert routed == (4 if "method" not in options.get("adapter", {}) else 0)
    assert len({token for answer in answers for token in answer}) > 12, answers
    for row, (tokens, mask, pixels) in enumerate(asked):
        text = torch.cat([tokens, torch.tensor(answers[row][:-1])])
        seen = {}
        hooks = watch(model, seen.__setitem__)
        expected = whole_pass(model, text, mask, pixels)[len(tokens) - 1 :]
        for hook in hooks:
            hook.remove()
        cached = torch.stack([logits[0][row, len(tokens) - 1], *(step[row, 0] for step in logits[1:])])
        assert (cached - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert answers[row] == expected.argmax(-1).tolist()
        for number, layer in enumerate(seen):
            passes = [choice_SB for of_layer, choice_SB in choices if of_layer == layer]
            assert len(passes) == 10 and choices[number][0] == layer
            chosen = torch.cat([passes[0][: len(tokens), row], *(choice_SB[:1, row] for choice_SB in passes[1:])])
            assert torch.equal(chosen, seen[layer][:, 0])


def test_a_batch_answers_as_its_rows_do_alone(model, alone, asked):
    (together,) = greedy(model, [batch(asked, alone)], 10, NEVER)
    assert together == [greedy(model, [batch([one], alone)], 10, NEVER)[0][0] for one in asked]
    two = greedy(model, [batch(asked[:1], alone), batch(asked[1:], alone)], 10, NEVER)
    assert together == two[0] + two[1]


def test_an_answer_ends_with_a_stop_token_or_at_its_limit(model, alone, asked):
    (whole,) = greedy(model, [batch(asked, alone)], 10, NEVER)
    stops = frozenset({whole[0][3], whole[2][5]})
    (stopped,) = greedy(model, [batch(asked, alone)], 10, stops)

    def until_stop(answer):
        ends = [place for place, token in enumerate(answer) if token in stops]
        return answer[: ends[0] + 1] if ends else answer

    assert stopped == [until_stop(answer) for answer in whole]
    assert len({len(answer) for answer in stopped}) > 1
    assert greedy(model, [batch(asked, alone)], 4, NEVER) == [[answer[:4] for answer in whole]]


def test_an_answer_ends_where_the_context_does(alone, asked):
    model = make_model(alone, language={"max_length": 24})
    (answers,) = greedy(model, [batch(asked[:2], alone)], 10, NEVER)
    assert [len(answer) for answer in answers] == [10, 24 - 19]


def test_a_row_that_asks_nothing_gets_no_answer(model, alone, asked):
    nothing = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool), asked[0][2]
    (alone_,) = greedy(model, [batch(asked[:1], alone)], 6, NEVER)
    assert greedy(model, [batch([asked[0], nothing], alone)], 6, NEVER) == [[alone_[0], []]]
    assert greedy(model, [batch([nothing], alone)], 6, NEVER) == [[[]]]


def test_an_image_token_that_the_model_writes_is_text(model, alone, asked):
    def write_an_image(module, args, logits):
        logits[..., IMAGE] = 1e9
        return logits

    seen = []
    hooks = [
        model.register_forward_hook(write_an_image),
        model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((kwargs["image_mask"][0].tolist(), len(kwargs["pixels"]))),
            with_kwargs=True,
        ),
    ]
    answers = greedy(model, [batch(asked[1:2], alone)], 3, NEVER)
    for hook in hooks:
        hook.remove()
    assert answers == [[[IMAGE] * 3]]
    assert seen == [(asked[1][1].tolist(), 1), ([False], 0), ([False], 0)]


def test_the_cache_takes_its_room_once(model, alone, asked):
    """Slots hold what was read, and what lies behind a row's tokens is as good as empty."""
    cache = KeyValueCache(16)
    mask = cache.expect(torch.tensor([[0, 1, 2], [0, 1, 2]]))
    assert mask[0, 0].tolist() == [[False, True, True], [False, False, True], [False] * 3]
    new = torch.arange(12.0).view(3, 2, 1, 2)
    keys, values = cache.store(1, new, -new)
    assert torch.equal(keys, new) and torch.equal(values, -new)
    # the first row's text ends after 1 place, the second's after 3
    mask = cache.expect(torch.tensor([[1], [3]]))
    assert mask[:, 0, 0].tolist() == [[False, False, True, True], [False] * 4]
    keys, _ = cache.store(1, torch.full((1, 2, 1, 2), 50.0), torch.zeros(1, 2, 1, 2))
    assert keys[:, 0, 0, 0].tolist() == [0, 50, 8, 0] and keys[:, 1, 0, 0].tolist() == [2, 6, 10, 50]
    with pytest.raises(AssertionError):
        cache.expect(torch.tensor([[16], [4]]))


def test_megatron_core_still_has_the_hook():
    hook = "_adjust_key_value_for_inference"
    theirs = list(inspect.signature(getattr(SelfAttention, hook)).parameters)
    ours = list(inspect.signature(getattr(CachedSelfAttention, hook)).parameters)
    assert theirs[: len(ours) - 2] == ours[:-2]
    assert f"self.{hook}(" in inspect.getsource(SelfAttention.forward)
