"""Build an example's base model: a real transformers LLaVA of a million or two parameters that reads images well.

The model is pretrained here in plain torch: first the vision tower, as a classifier, then projector and language model
on neutral conversations. All of it sees train crops of the example's pictures only, no held-out crop, and never an
answer in a domain's own convention. `RECIPES` holds what the examples' bases differ in.
"""

import argparse
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import make_conflict_data
import make_demo_data
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mole_mega.data.conversation import IGNORE_INDEX, VICUNA_CHAT_TEMPLATE, Encoder, Example
from mole_mega.data.image import ImageSpec, preprocess
from mole_mega.data.sources import ImageRef, Sample

VOCABULARY = 512
IMAGE_TOKEN = "<image>"
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", IMAGE_TOKEN)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MAX_PLACES = 256
NO_FILE = ImageRef(b"", max_pixels=0, source="demo", sample_id="0")  # the encoder counts images but never opens one
SEED = 11
KIND_WEIGHT = 0.5


# Vicuna's turns without its opening sentence: short prompts make short steps.
SHORT_CHAT_TEMPLATE = (
    "{% macro words(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endmacro %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + words(message['content']) | trim + ' ' }}"
    "{% else %}{{ 'ASSISTANT:' }}"
    "{% generation %}{{ ' ' + words(message['content']) | trim + eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """What a base is made of. `pictures` is a data maker's module: its scenes, questions and neutral answers.
    `template_words` are those that the chat template puts in."""

    pictures: ModuleType
    chat_template: str
    template_words: str
    patch_size: int
    vision_width: int
    width: int
    ffn_width: int
    num_heads: int

    @property
    def num_patches(self) -> int:
        return (self.pictures.CANVAS // self.patch_size) ** 2

    def words(self) -> list[str]:
        """Every word of the conversations, the chat template's included, with the space before it if it has one."""
        pictures = self.pictures
        asked = {word for question in pictures.QUESTIONS.values() for word in question.split()}
        words = asked | set(self.template_words.split())
        answers = [*pictures.KINDS.values(), *pictures.CONNECTIVES]
        answers += [value for values in self.vocabularies().values() for value in values]
        # A question begins after a line break, and `USER:` after a stop token: no space before either.
        return sorted(words) + sorted(f" {word}" for word in {*words, *" ".join(answers).split()})

    def vocabularies(self) -> dict[str, list[str]]:
        """The values of each attribute over all domains."""
        pictures = self.pictures
        return {
            attribute: sorted({v for domain in pictures.DOMAINS for v in pictures.attribute_values(domain, attribute)})
            for attribute in pictures.ATTRIBUTES
        }


RECIPES = {
    "tiny_cpu": Recipe(
        make_demo_data,
        VICUNA_CHAT_TEMPLATE,
        " ".join([*VICUNA_CHAT_TEMPLATE.split("'"), "assistant. user's USER:"]),
        patch_size=8,
        vision_width=160,
        width=128,
        ffn_width=352,
        num_heads=8,
    ),
    "data_conflict": Recipe(
        make_conflict_data,
        SHORT_CHAT_TEMPLATE,
        "USER: ASSISTANT:",
        patch_size=12,
        vision_width=96,
        width=96,
        ffn_width=256,
        num_heads=6,
    ),
}


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer in Llama's manner: a word carries the space before it, written as U+2581."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?[A-Za-z]+|▁?[0-9]|▁?[^▁A-Za-z0-9]|▁"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    printable = ["\n", *map(chr, range(33, 127)), "▁"]
    trainer = BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=printable, show_progress=False
    )
    tokenizer.train_from_iterator(recipe.words() * 2, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        model_max_length=512,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        chat_template=recipe.chat_template,
    )


def build_processor(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """CLIP's image preparation at the tiny size, and a place a patch."""
    side = recipe.pictures.CANVAS
    size = {"height": side, "width": side}
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size=size, image_mean=list(CLIP_MEAN), image_std=list(CLIP_STD)
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=recipe.patch_size,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
        chat_template=recipe.chat_template,
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights: CLIP ViT, two-layer GELU projector, Llama with grouped-query attention."""
    vision = CLIPVisionConfig(
        hidden_size=recipe.vision_width,
        intermediate_size=4 * recipe.vision_width,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=recipe.pictures.CANVAS,
        patch_size=recipe.patch_size,
        hidden_act="quick_gelu",
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / 8) * 8,
        hidden_size=recipe.width,
        intermediate_size=recipe.ffn_width,
        num_hidden_layers=4,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads // 2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=recipe.num_patches,
        multimodal_projector_bias=True,
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config)


def pixels(image: Image.Image) -> torch.Tensor:
    """[3, size, size], as the project's own loader prepares it."""
    return preprocess(image, ImageSpec(image.width, CLIP_MEAN, CLIP_STD))


class SceneStream:
    """Endless neutral scenes, from the train crops only (or the held-out ones, to measure)."""

    def __init__(self, pictures: ModuleType, held_out: bool, seed: int):
        self.pictures, self.subjects, self.rng = pictures, pictures.Subjects(held_out), random.Random(seed)

    def draw(self, count: int, domain: str | None = None) -> list:
        """`count` scenes, of one domain or of all."""
        domains = self.pictures.DOMAINS if domain is None else (domain,)
        return [self.pictures.draw_scene(self.rng.choice(domains), self.subjects, self.rng) for _ in range(count)]


@dataclass(frozen=True)
class TextBatch:
    """Token ids and the labels of the next token, [batch, places], padded on the right."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor


class Writer:
    """Turns questions and answers into token ids and labels, by the project's own encoder."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast):
        self._pad = tokenizer.pad_token_id
        image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self._encoder = Encoder(
            tokenizer, image_token_id=image_token_id, places_per_image=recipe.num_patches, max_length=MAX_PLACES
        )

    def encode(self, turns: list[tuple[str, str]]) -> Example:
        """One conversation about one image."""
        messages = []
        for index, (question, answer) in enumerate(turns):
            image = f"{IMAGE_TOKEN}\n" if index == 0 else ""
            messages += [("user", image + question), ("assistant", answer)]
        return self._encoder.encode(Sample(tuple(messages), (NO_FILE,), "demo", "0"))

    def batch(self, conversations: list[list[tuple[str, str]]]) -> TextBatch:
        """Conversations of one image each, padded to the longest."""
        examples = [self.encode(turns) for turns in conversations]
        return TextBatch(
            pad_sequence([example.tokens for example in examples], batch_first=True, padding_value=self._pad),
            pad_sequence([example.labels for example in examples], batch_first=True, padding_value=IGNORE_INDEX),
            pad_sequence([torch.ones_like(example.tokens) for example in examples], batch_first=True),
        )


def pretraining_turns(pictures: ModuleType, scene, rng: random.Random) -> list[tuple[str, str]]:
    """All questions in a random order, with their neutral answers."""
    turns = [(question, pictures.plain_answer(scene, asked)) for asked, question in pictures.QUESTIONS.items()]
    rng.shuffle(turns)
    return turns


def learning_rates(peak: float, steps: int) -> Iterator[float]:
    """Linear warm-up over the first twentieth, then a cosine down to a fiftieth of the peak."""
    warmup = max(1, steps // 20)
    for step in range(steps):
        cosine = 0.51 + 0.49 * math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup))
        yield peak * min(1.0, (step + 1) / warmup) * cosine


def make_optimizer(parameters) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=0.02)


def take_step(loss: torch.Tensor, optimizer: torch.optim.AdamW, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def pretrain_vision(
    recipe: Recipe, model: LlavaForConditionalGeneration, steps: int, batch_size: int, peak_lr: float
) -> None:
    """Give the tower a head start as a classifier of every attribute; the heads are thrown away.

    Learning to see through the language loss alone takes several times as long.
    """
    tower = model.model.vision_tower
    vocabularies = recipe.vocabularies()
    width = tower.config.hidden_size
    heads = nn.ModuleDict({name: nn.Linear(width, len(words)) for name, words in vocabularies.items()})
    optimizer = make_optimizer([*tower.parameters(), *heads.parameters()])
    stream = SceneStream(recipe.pictures, held_out=False, seed=SEED)
    for step, lr in enumerate(learning_rates(peak_lr, steps)):
        scenes = stream.draw(batch_size)
        images = torch.stack([pixels(scene.image) for scene in scenes])
        features = tower(images, output_hidden_states=True).hidden_states[-2][:, 1:].mean(dim=1)
        features = F.layer_norm(features, (width,))
        losses = {}
        for name, words in vocabularies.items():
            targets = torch.tensor([words.index(scene.values[name]) for scene in scenes])
            losses[name] = F.cross_entropy(heads[name](features), targets)
        take_step(sum(losses.values()), optimizer, lr)
        if step % 50 == 0 or step == steps - 1:
            print(f"vision {step:5d}", {name: round(loss.item(), 3) for name, loss in losses.items()}, flush=True)


class KindProbe:
    """Asks every decoder layer to tell the kind of picture in the hidden state of each token from the image on.

    A grown LLaVA's hidden states tell documents from photographs; two million parameters do not by themselves, and
    then no router could send their tokens to different experts. Fixed orthogonal directions, one a kind, and the
    cross-entropy of the cosines to them. The state is taken where a MoLE router reads it, before the norm of the MLP.
    """

    SHARPNESS = 4.0

    def __init__(self, model: LlavaForConditionalGeneration, domains: tuple[str, ...]):
        language_model = model.model.language_model
        basis, _ = torch.linalg.qr(torch.randn(language_model.config.hidden_size, len(domains)))
        self._domains, self._directions = domains, basis.T
        self._image_token_id = model.config.image_token_index
        self._states: list[torch.Tensor] = []
        for layer in language_model.layers:
            layer.post_attention_layernorm.register_forward_hook(self._keep_input)

    def _keep_input(self, _module: nn.Module, inputs: tuple[torch.Tensor], _output: torch.Tensor) -> None:
        self._states.append(inputs[0])

    def loss(self, batch: TextBatch, scenes: list) -> torch.Tensor:
        """The mean over layers, of the forward pass just made; forgets its states."""
        from_image_on = (batch.input_ids == self._image_token_id).cumsum(dim=1).bool() & batch.attention_mask.bool()
        kinds = torch.tensor([self._domains.index(scene.domain) for scene in scenes])
        targets = kinds[:, None].expand_as(from_image_on)[from_image_on]
        losses = [
            F.cross_entropy(self.SHARPNESS * F.normalize(state[from_image_on], dim=-1) @ self._directions.T, targets)
            for state in self._states
        ]
        self._states.clear()
        return torch.stack(losses).mean()


def pretrain_language(
    recipe: Recipe,
    model: LlavaForConditionalGeneration,
    writer: Writer,
    steps: int,
    batch_size: int,
    peak_lr: float,
) -> None:
    """Train projector and language model on neutral conversations; the tower is frozen from here on, as in LLaVA."""
    model.model.vision_tower.requires_grad_(False)
    optimizer = make_optimizer([parameter for parameter in model.parameters() if parameter.requires_grad])
    probe = KindProbe(model, recipe.pictures.DOMAINS)
    stream = SceneStream(recipe.pictures, held_out=False, seed=SEED + 1)
    started = time.monotonic()
    for step, lr in enumerate(learning_rates(peak_lr, steps)):
        scenes = stream.draw(batch_size)
        batch = writer.batch([pretraining_turns(recipe.pictures, scene, stream.rng) for scene in scenes])
        images = torch.stack([pixels(scene.image) for scene in scenes])
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, pixel_values=images).logits
        reading = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE_INDEX)
        kind = probe.loss(batch, scenes)
        take_step(reading + KIND_WEIGHT * kind, optimizer, lr)
        if step % 50 == 0 or step == steps - 1:
            seconds = time.monotonic() - started
            print(
                f"language {step:5d} reading {reading.item():.4f} kind {kind.item():.4f}  {seconds:.0f} s", flush=True
            )


@torch.no_grad()
def held_out_accuracy(
    recipe: Recipe, model: LlavaForConditionalGeneration, writer: Writer, count: int = 200
) -> dict[str, float]:
    """Exact match of neutral single-question answers on held-out crops, teacher-forced (equal to greedy decoding)."""
    model.eval()
    pictures, accuracy = recipe.pictures, {}
    stream = SceneStream(pictures, held_out=True, seed=SEED + 2)
    for domain in pictures.DOMAINS:
        scenes = stream.draw(count, domain)
        batch = writer.batch([[stream.rng.choice(pretraining_turns(pictures, s, stream.rng))] for s in scenes])
        images = torch.stack([pixels(scene.image) for scene in scenes])
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, pixel_values=images).logits
        right = (logits.argmax(-1) == batch.labels) | (batch.labels == IGNORE_INDEX)
        accuracy[domain] = right.all(dim=1).float().mean().item()
    return accuracy


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build and pretrain an example's tiny LLaVA.")
    parser.add_argument("--recipe", choices=RECIPES, default="tiny_cpu", help="the example it is for")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its processor")
    parser.add_argument("--vision-steps", type=int, default=1500)
    parser.add_argument("--language-steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    """Build, pretrain, measure, save."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)
    recipe = RECIPES[arguments.recipe]
    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    print(f"{len(tokenizer)} tokens, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    writer = Writer(recipe, tokenizer)
    pretrain_vision(recipe, model, arguments.vision_steps, arguments.batch_size, peak_lr=1e-3)
    pretrain_language(recipe, model, writer, arguments.language_steps, arguments.batch_size, peak_lr=2e-3)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    build_processor(recipe, tokenizer).save_pretrained(arguments.out)
    stored = LlavaForConditionalGeneration.from_pretrained(arguments.out, dtype=torch.float32)
    for domain, accuracy in held_out_accuracy(recipe, stored, writer).items():
        print(f"held-out exact match, neutral wording, {domain}: {accuracy:.3f}")


if __name__ == "__main__":
    main()
