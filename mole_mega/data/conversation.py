"""A `Sample` becomes an `Example`: chat template, tokens, labels, places for images. Rank-free, opens no image."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from tokenizers import AddedToken

from mole_mega.config import ConfigError
from mole_mega.data.sources import IMAGE_MARK, BadSample, ImageRef, Sample

IGNORE_INDEX = -100

# The v1 conversation that LLaVA-1.5 was trained with. What the model has to say, its stop token included, stands
# between the generation marks. The space before the answer stays outside of them: many tokenizers give a leading space
# no place in the text, and a mark that begins on it would be lost (see `_with_leading_space`).
VICUNA_CHAT_TEMPLATE = (
    # a text, or the list of parts that chat interfaces send
    "{% macro words(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endmacro %}"
    '{{ "A chat between a curious user and an artificial intelligence assistant. '
    "The assistant gives helpful, detailed, and polite answers to the user's questions. \" }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + words(message['content']) | trim + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' }}{% generation %}{{ words(message['content']) | trim + eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True)
class Example:
    """`tokens`, `labels`: int64 [S]. labels[t] is the token to predict at place t, that is tokens[t + 1] where that one
    is the assistant's and IGNORE_INDEX elsewhere. `images` fill the image places in order."""

    tokens: torch.Tensor
    labels: torch.Tensor
    images: tuple[ImageRef, ...]
    domain: str
    sample_id: str


class Encoder:
    """Turns conversations into tokens with a tokenizer's chat template.

    The tokenizer's own template is used if it takes plain text and marks the answers with their stop token as
    generated; many LLaVA bases carry one that does not, then VICUNA_CHAT_TEMPLATE is used. `chat_template` is the
    one in use, `prompts` says for people which it is and why.
    Raises ConfigError for a tokenizer without a fast implementation or without an end-of-sequence token.
    """

    # A fast tokenizer refuses two threads at a time, and transformers keeps one compiled template for all tokenizers,
    # whose answer marks two threads would mix up: so one lock for all encoders of the process.
    _lock = threading.Lock()

    def __init__(
        self,
        tokenizer: Any,
        image_token: str = IMAGE_MARK,
        *,
        image_token_id: int,
        places_per_image: int,
        max_length: int,
    ):
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(f"{type(tokenizer).__name__} is not a fast tokenizer; label masks need one")
        if tokenizer.eos_token is None:
            raise ConfigError("the tokenizer has no end-of-sequence token, so no answer could end")
        if places_per_image < 1:
            raise ConfigError(f"an image must take at least 1 place, got {places_per_image}")
        # On a copy, so that the caller's tokenizer does not grow. If <image> is in the vocabulary this changes nothing
        # but that it is never split; if not, its new id stands for the place until `_expand` replaces it.
        self._tokenizer = copy.deepcopy(tokenizer)
        self._tokenizer.add_tokens([AddedToken(image_token, special=True, normalized=False)])
        self._placeholder = self._tokenizer.convert_tokens_to_ids(image_token)
        added = {id_: token.content for id_, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids = {*added, *self._tokenizer.all_special_ids}
        bos = self._tokenizer.bos_token_id
        adds_bos = bos is not None and self._tokenizer("")["input_ids"][:1] == [bos]
        self._own_start = [bos] if adds_bos else []
        self._controls = sorted({*added.values(), *self._tokenizer.all_special_tokens} - {image_token})
        self.image_token_id, self.places_per_image, self.max_length = image_token_id, places_per_image, max_length
        own = self._tokenizer.chat_template
        misfit = self._misfit(own)
        self.chat_template = VICUNA_CHAT_TEMPLATE if misfit else own
        self.prompts = f"Vicuna v1; {misfit}" if misfit else "the base's own template"

    def encode(self, sample: Sample) -> Example:
        """Tokens and labels of one conversation. Raises BadSample: too long, nothing to learn, control tokens in the
        text, or image places that do not fit the images."""

        def bad(kind: str, reason: str) -> BadSample:
            return BadSample(sample.domain, sample.sample_id, kind, reason)

        control = next((token for token in self._controls for _, text in sample.messages if token in text), None)
        if control is not None:
            raise bad("control token", f"the text holds the control token {control!r}")
        answers = sum(role == "assistant" for role, _ in sample.messages)
        if not answers:
            raise bad("no assistant turn", f"{len(sample.messages)} turns and none of the assistant's")
        ids, mask = self._tokens_and_mask(sample.messages, self.chat_template)
        tokens, is_answer = self._expand(ids, mask)
        if len(tokens) > self.max_length:
            raise bad("too long", f"too long: {len(tokens)} > {self.max_length} places")
        marked = _count_runs(mask)
        if marked != answers:
            raise bad("no label", f"{marked} of {answers} answers have tokens to learn")
        image_places = tokens == self.image_token_id
        if ids.count(self._placeholder) != len(sample.images) or (image_places & is_answer).any():
            raise bad("image count", f"{ids.count(self._placeholder)} image marks but {len(sample.images)} images")
        if image_places.sum() != len(sample.images) * self.places_per_image:
            raise bad("image count", f"the text holds token {self.image_token_id}, which stands for images")
        labels = torch.full_like(tokens, IGNORE_INDEX)
        labels[:-1] = torch.where(is_answer[1:], tokens[1:], IGNORE_INDEX)
        return Example(tokens, labels, sample.images, sample.domain, sample.sample_id)

    def prompt(self, messages: Sequence[tuple[str, str]]) -> torch.Tensor:
        """int64 [S]: the conversation so far, ready for the assistant's next answer, image places filled in."""
        with self._lock:
            ids = self._tokenizer.apply_chat_template(
                _as_chat(messages),
                chat_template=self.chat_template,
                add_generation_prompt=True,
                return_dict=False,
                tokenize=True,
            )
            ids = self._start(ids) + ids
        return self._expand(ids, [0] * len(ids))[0]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens as it stands, special ones by name; for people to read."""
        with self._lock:
            text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens say, for people: without control tokens, each image as one mark."""
        parts: list[list[int]] = [[]]
        images = 0
        for token in tokens:
            if token != self.image_token_id:
                parts[-1].append(token)
            else:
                if images % self.places_per_image == 0:
                    parts.append([])
                images += 1
        with self._lock:
            return IMAGE_MARK.join(self._tokenizer.decode(part, skip_special_tokens=True) for part in parts).strip()

    def stop_ids(self, folder: Path) -> frozenset[int]:
        """What ends an answer of a model that came with the files in `folder`."""
        return stop_ids(self._tokenizer, folder)

    def _tokens_and_mask(self, messages: Sequence[tuple[str, str]], template: str) -> tuple[list[int], list[int]]:
        with self._lock:
            encoded = self._tokenizer.apply_chat_template(
                _as_chat(messages),
                chat_template=template,
                return_assistant_tokens_mask=True,
                return_dict=True,
                tokenize=True,
            )
            ids, mask = list(encoded["input_ids"]), list(encoded["assistant_masks"])
            if template == VICUNA_CHAT_TEMPLATE:
                mask = self._with_leading_space(ids, mask)
            start = self._start(ids)
        return start + ids, [0] * len(start) + mask

    def _with_leading_space(self, ids: list[int], mask: list[int]) -> list[int]:
        """Count the space before an answer as part of it where it is a token of its own ("_" "2" in Llama): the prompt
        ends at "ASSISTANT:", so the model has to produce it."""
        mask = list(mask)
        for place in range(len(ids) - 1, 0, -1):
            if mask[place] and not mask[place - 1] and not self._tokenizer.decode([ids[place - 1]]).strip():
                mask[place - 1] = 1
        return mask

    def _start(self, ids: list[int]) -> list[int]:
        """What the tokenizer itself puts before a text, unless the template wrote it. (Not written by our template: the
        token before the first word would then change how some tokenizers split that word.)"""
        return self._own_start if ids[:1] != self._own_start else []

    def _expand(self, ids: list[int], mask: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Repeat each image placeholder once a place. -> tokens int64 [S], is_answer bool [S]."""
        ids_t = torch.tensor(ids, dtype=torch.int64)
        is_image = ids_t == self._placeholder
        repeats = torch.where(is_image, self.places_per_image, 1)
        tokens = torch.where(is_image, self.image_token_id, ids_t).repeat_interleave(repeats)
        return tokens, torch.tensor(mask, dtype=torch.bool).repeat_interleave(repeats)

    def _misfit(self, template: Any) -> str:
        """Why a template cannot be used: it has to show plain-text messages and to mark each answer, with a stop token,
        as generated. Empty when it does."""
        probe = tuple((role, f"probe{turn}") for turn, role in enumerate(("user", "assistant") * 2))
        if not isinstance(template, str):  # none, or several by name
            return "the base has no template of its own" if not template else "the base has more than one template"
        if "generation" not in template:
            return "the base's own template does not mark its answers"
        try:
            text = self._tokenizer.apply_chat_template(_as_chat(probe), chat_template=template, tokenize=False)
            ids, mask = self._tokens_and_mask(probe, template)
        except (TemplateError, TypeError):  # made for content of another form, such as lists of parts
            return "the base's own template does not take plain text"
        if not all(word in text for _, word in probe):
            return "the base's own template does not take plain text"
        if _count_runs(mask) != 2:
            return "the base's own template does not mark its answers"
        stops = sum(bool(m) and token in self._special_ids for token, m in zip(ids, mask, strict=True))
        return "" if stops >= 2 else "the base's own template marks no stop token as part of its answers"


def stop_ids(tokenizer: Any, folder: Path) -> frozenset[int]:
    """What ends an answer: the tokenizer's end of sequence, and what a folder's generation_config.json names."""
    path = folder / "generation_config.json"
    named = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    ids = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    return frozenset(ids - {None})


def _as_chat(messages: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in messages]


def _count_runs(mask: Sequence[int]) -> int:
    return sum(bool(here) and not before for before, here in zip([0, *mask], mask, strict=False))
