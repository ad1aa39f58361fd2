"""Examples become one `Batch` of tensors on the CPU: the last place where Python lists exist."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mole_mega.data.conversation import IGNORE_INDEX, Example
from mole_mega.data.image import ImageSpec, preprocess


@dataclass(frozen=True)
class Batch:
    """B conversations padded on the right to S places, and their N images in order of appearance (N may be 0).

    tokens, labels (IGNORE_INDEX: no target), position_ids: int64 [B, S]. padding_mask: bool [B, S], True where a token
    is. image_mask: bool [B, S], the places of images. pixels: float32 [N, 3, size, size]. domains: int64 [B].
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    padding_mask: torch.Tensor
    position_ids: torch.Tensor
    pixels: torch.Tensor
    image_mask: torch.Tensor
    domains: torch.Tensor
    sample_ids: tuple[str, ...]

    @property
    def instruction_mask(self) -> torch.Tensor:
        """bool [B, S]: the text before a sample's first answer; all of it where there is none."""
        labelled = self.labels != IGNORE_INDEX
        # the place of the first label is the prompt's last
        before_answers = labelled.cumsum(1) - labelled.long() == 0
        return before_answers & self.padding_mask & ~self.image_mask

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        fields: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, value in fields.items():
            if isinstance(value, torch.Tensor):
                fields[name] = value.to(device)
        return Batch(**fields)


def collate(
    examples: Sequence[Example],
    image_spec: ImageSpec,
    image_token_id: int,
    pad_token_id: int,
    domain_index: Mapping[str, int],
    pad_to_multiple: int,
) -> Batch:
    """Read the images and pad to the longest example, rounded up to a multiple. Raises BadSample for an image."""
    pixels = [load_pixels(example, image_spec) for example in examples]
    return stack(examples, pixels, image_token_id, pad_token_id, domain_index, pad_to_multiple)


def load_pixels(example: Example, image_spec: ImageSpec) -> torch.Tensor:
    """float32 [number of images, 3, size, size], in order. Raises BadSample."""
    images = [preprocess(image.open(), image_spec) for image in example.images]
    return torch.stack(images) if images else torch.zeros(0, 3, image_spec.size, image_spec.size)


def stack(
    examples: Sequence[Example],
    pixels: Sequence[torch.Tensor],
    image_token_id: int,
    pad_token_id: int,
    domain_index: Mapping[str, int],
    pad_to_multiple: int,
) -> Batch:
    """`collate` for images that are already read: `pixels` holds one `load_pixels` result an example."""
    longest = max(1, *(len(example.tokens) for example in examples))
    length = -(-longest // pad_to_multiple) * pad_to_multiple
    tokens = torch.full((len(examples), length), pad_token_id, dtype=torch.int64)
    labels = torch.full((len(examples), length), IGNORE_INDEX, dtype=torch.int64)
    padding_mask = torch.zeros(len(examples), length, dtype=torch.bool)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = example.tokens
        labels[row, : len(example.labels)] = example.labels
        padding_mask[row, : len(example.tokens)] = True
    return Batch(
        tokens=tokens,
        labels=labels,
        padding_mask=padding_mask,
        position_ids=torch.arange(length).expand(len(examples), length).contiguous(),
        pixels=torch.cat(list(pixels)),
        image_mask=(tokens == image_token_id) & padding_mask,
        domains=torch.tensor([domain_index[example.domain] for example in examples], dtype=torch.int64),
        sample_ids=tuple(example.sample_id for example in examples),
    )
