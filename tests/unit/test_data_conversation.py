"""What the model is trained to say, with tokenizers of four kinds: `conversation.py`."""

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from mole_mega.config import ConfigError
from mole_mega.data.conversation import IGNORE_INDEX, VICUNA_CHAT_TEMPLATE, Encoder, Example
from mole_mega.data.sources import BadSample, Sample

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
WORDS = ["a", "what", "colour", "is", "this", "and", "that", "two", "cats", "no", "2", "3", "red", "blue"]


def byte_tokenizer(trim_offsets=False, specials=("<unk>", "<s>", "</s>", "<pad>", "<image>"), **more):
    """Byte-level BPE with a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SYSTEM + " USER: " + " ".join(WORDS) + " ASSISTANT: "] * 3, trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(names | more))


def word_tokenizer(**_):
    """Whole words; spaces have no token."""
    split = pre_tokenizers.Whitespace().pre_tokenize_str(" ".join([SYSTEM, "USER: ASSISTANT:", *WORDS]))
    vocabulary = ["<unk>", "</s>", "<image>", *dict.fromkeys(word for word, _ in split)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def llama_tokenizer(**_):
    """Spaces are tokens or parts of tokens; a <s> of the tokenizer's own at the start; no <image>."""
    letters = dict.fromkeys(f"\u2581\n{SYSTEM}USER: ASSISTANT:{''.join(WORDS)}".replace(" ", ""))
    merges = [("\u2581", letter) for letter in "acnrbATU"]
    vocabulary = ["<unk>", "<s>", "</s>", *letters, *map("".join, merges)]
    return LlamaTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}, merges=merges, add_bos_token=True)


TOKENIZERS = {
    "bytes": byte_tokenizer,
    "bytes, trimmed offsets": lambda: byte_tokenizer(trim_offsets=True),
    "words": word_tokenizer,
    "llama": llama_tokenizer,
    "bytes without <image>": lambda: byte_tokenizer(specials=("<unk>", "<s>", "</s>", "<pad>")),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def make_encoder(tokenizer, places=3, max_length=500, image_token_id=None):
    if image_token_id is None:
        known = tokenizer.convert_tokens_to_ids("<image>")
        image_token_id = len(tokenizer) if known in (None, tokenizer.unk_token_id) else known
    return Encoder(tokenizer, image_token_id=image_token_id, places_per_image=places, max_length=max_length)


def sample(*texts, images=()):
    roles = ("user", "assistant") * len(texts)
    return Sample(tuple(zip(roles, texts, strict=False)), tuple(images), "vqa", "s1")


def squash(text):
    return "".join(text.split())


def answer_of(tokenizer, example):
    return squash(tokenizer.decode(example.labels[example.labels != IGNORE_INDEX]))


def test_the_template_writes_the_conversation_of_llava_v1():
    tokenizer = byte_tokenizer()
    chat = [{"role": role, "content": text} for role, text in sample(" Q1 ", "A1", "Q2", "A2").messages]
    text = tokenizer.apply_chat_template(chat, chat_template=VICUNA_CHAT_TEMPLATE, tokenize=False)
    assert text == f"{SYSTEM} USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>"
    text = tokenizer.apply_chat_template(
        chat[:3], chat_template=VICUNA_CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    assert text == f"{SYSTEM} USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:"


@pytest.mark.parametrize("answers", [("two cats", "no"), ("2", "3 cats"), (" red\n", "a")], ids=str)
def test_only_answers_and_their_stop_tokens_are_learned(tokenizer, answers):
    example = make_encoder(tokenizer).encode(sample("what is this", answers[0], "and that", answers[1]))
    assert example.tokens.dtype == example.labels.dtype == torch.int64
    assert example.tokens.shape == example.labels.shape
    assert answer_of(tokenizer, example) == squash(f"{answers[0]}</s>{answers[1]}</s>")
    learned = example.labels != IGNORE_INDEX
    assert torch.equal(example.labels[:-1][learned[:-1]], example.tokens[1:][learned[:-1]])
    assert example.labels[-1] == IGNORE_INDEX
    assert example.tokens[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("answer", ["two cats", "2"])
def test_training_continues_exactly_where_the_prompt_ends(tokenizer, answer):
    encoder = make_encoder(tokenizer)
    whole = encoder.encode(sample("what is this", "no", "<image> and", answer, images=["img"]))
    prompt = encoder.prompt(sample("what is this", "no", "<image> and").messages)
    assert torch.equal(whole.tokens[: len(prompt)], prompt)
    assert (whole.labels[len(prompt) - 1 : -1] == whole.tokens[len(prompt) :]).all()
    assert whole.labels[len(prompt) - 2] == IGNORE_INDEX


def test_each_image_takes_its_places_and_nothing_else_moves(tokenizer):
    encoder = make_encoder(tokenizer, places=3)
    example = encoder.encode(sample("<image>\nwhat and <image> this", "no", images=["one", "two"]))
    single = make_encoder(tokenizer, places=1).encode(sample("<image>\nwhat and <image> this", "no", images=["1", "2"]))
    is_image = example.tokens == encoder.image_token_id
    assert is_image.sum() == 6
    assert example.images == ("one", "two")
    assert (example.labels[is_image][[0, 1, 3, 4]] == IGNORE_INDEX).all()
    text = single.tokens != encoder.image_token_id
    assert torch.equal(example.tokens[~is_image], single.tokens[text])
    assert torch.equal(example.labels[~is_image], single.labels[text])
    runs = torch.diff(is_image.int(), prepend=torch.zeros(1, dtype=torch.int)).clamp(min=0).sum()
    assert runs == 2


def test_the_tokenizers_own_start_is_kept_and_written_once():
    tokenizer = llama_tokenizer()
    for tokens in (
        make_encoder(tokenizer).encode(sample("a", "no")).tokens,
        make_encoder(tokenizer).prompt([("user", "a")]),
    ):
        assert (tokens == tokenizer.bos_token_id).nonzero().flatten().tolist() == [0]
        # just as the tokenizer alone would start the text
        assert tokens[:20].tolist() == tokenizer(SYSTEM)["input_ids"][:20]
    tokenizer.chat_template = "{{ bos_token }}" + VICUNA_CHAT_TEMPLATE
    tokens = make_encoder(tokenizer).encode(sample("a", "no")).tokens
    assert (tokens == tokenizer.bos_token_id).nonzero().flatten().tolist() == [0]
    assert tokenizer.bos_token_id not in make_encoder(byte_tokenizer()).encode(sample("a", "no")).tokens


OWN = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q ' + m['content'] }}{% else %}"
    "{{ 'A ' }}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
FOR_PARTS = (
    "{% for m in messages %}{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ part['text'] }}{% endgeneration %}{% endfor %}{% endfor %}"
)


UNMARKED = OWN.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.mark.parametrize(
    ("template", "misfit"),
    [
        (None, "the base has no template of its own"),
        (OWN, None),
        (UNMARKED, "the base's own template does not mark its answers"),
        ("{# generation #}" + UNMARKED, "the base's own template does not mark its answers"),
        (OWN.replace(" + eos_token", ""), "the base's own template marks no stop token as part of its answers"),
        (FOR_PARTS, "the base's own template does not take plain text"),
        (
            "{% generation %}{{ raise_exception('no') }}{% endgeneration %}",
            "the base's own template does not take plain text",
        ),
        ({"default": OWN, "rag": OWN}, "the base has more than one template"),
    ],
    ids=["none", "fits", "unmarked", "marks in name", "without stop", "for lists of parts", "refuses", "two"],
)
def test_the_tokenizers_own_template_is_used_only_if_it_fits_and_that_is_said(template, misfit):
    used = misfit is None
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    encoder = make_encoder(tokenizer)
    assert encoder.chat_template == (template if used else VICUNA_CHAT_TEMPLATE)
    assert encoder.prompts == ("the base's own template" if used else f"Vicuna v1; {misfit}")
    example = encoder.encode(sample("what", "two cats"))
    assert answer_of(tokenizer, example) == "twocats</s>"
    assert tokenizer.decode(example.tokens).startswith("Q what" if used else SYSTEM)


@pytest.mark.parametrize(
    ("bad", "kind", "reason"),
    [
        (sample("a " * 600, "no"), "too long", r"too long: \d+ > 500 places"),
        (sample("a"), "no assistant turn", "1 turns"),
        (sample("a </s> b", "no"), "control token", "'</s>'"),
        (sample("a", "no <pad>"), "control token", "'<pad>'"),
        (sample("<image>", "no"), "image count", "1 image marks but 0 images"),
        (sample("a", "no", images=["img"]), "image count", "0 image marks but 1 images"),
        (sample("a", "no <image>", images=["img"]), "image count", "1 image marks"),
    ],
)
def test_samples_that_cannot_be_encoded_are_bad(bad, kind, reason):
    with pytest.raises(BadSample, match=reason) as caught:
        make_encoder(byte_tokenizer()).encode(bad)
    assert caught.value.kind == kind
    assert str(caught.value).startswith("vqa, sample s1: ")


def test_too_long_counts_places_and_the_limit_itself_is_allowed():
    with_image = sample("<image>", "no", images=["img"])
    length = len(make_encoder(byte_tokenizer(), places=40).encode(with_image).tokens)
    make_encoder(byte_tokenizer(), places=40, max_length=length).encode(with_image)
    with pytest.raises(BadSample, match=f"too long: {length} > {length - 1} places"):
        make_encoder(byte_tokenizer(), places=40, max_length=length - 1).encode(with_image)


def test_an_answer_whose_mark_the_tokenizer_loses_is_bad_not_silently_unlearned():
    tokenizer = word_tokenizer()
    without_bangs = [pre_tokenizers.Split("!", "removed"), pre_tokenizers.Whitespace()]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(without_bangs)
    encoder = make_encoder(tokenizer)
    with pytest.raises(BadSample, match="1 of 2 answers have tokens to learn") as caught:
        encoder.encode(sample("what", "two", "and", "!no"))
    assert caught.value.kind == "no label"


def test_a_text_token_that_stands_for_images_is_bad():
    tokenizer = byte_tokenizer()
    encoder = make_encoder(tokenizer, image_token_id=tokenizer.convert_tokens_to_ids("~"))
    encoder.encode(sample("<image> a", "no", images=["img"]))
    with pytest.raises(BadSample, match="stands for images"):
        encoder.encode(sample("<image> ~", "no", images=["img"]))


def test_the_callers_tokenizer_stays_as_it_was():
    tokenizer = byte_tokenizer(specials=("<unk>", "<s>", "</s>", "<pad>"))
    size = len(tokenizer)
    encoder = make_encoder(tokenizer)
    assert len(tokenizer) == size
    assert encoder.image_token_id == size


def test_an_image_mark_that_tokens_would_split_is_still_one_place():
    tokenizer = byte_tokenizer(specials=("<unk>", "<s>", "</s>", "<pad>"))
    tokenizer.add_tokens([AddedToken("<image>", special=False, single_word=True)])
    example = make_encoder(tokenizer).encode(sample("a<image>b", "no", images=["img"]))
    assert (example.tokens == len(tokenizer) - 1).sum() == 3


def test_unusable_tokenizers_are_refused():
    with pytest.raises(ConfigError, match="end-of-sequence"):
        make_encoder(byte_tokenizer(eos_token=None))
    with pytest.raises(ConfigError, match="at least 1 place, got 0"):
        make_encoder(byte_tokenizer(), places=0)
    with pytest.raises(ConfigError, match="not a fast tokenizer"):
        make_encoder(object(), image_token_id=1)


def test_examples_are_frozen():
    example = make_encoder(byte_tokenizer()).encode(sample("a", "no"))
    assert isinstance(example, Example)
    with pytest.raises(AttributeError):
        example.tokens = None
