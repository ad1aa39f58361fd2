"""Image features land in the text in order of appearance, all of them or none."""

import re

import pytest
import torch

from mole_mega.models.splice import splice

PLACES, HIDDEN = 3, 4


def images_at(starts: list[list[int]], length: int) -> torch.Tensor:
    """The mask [B, S] of images of PLACES places each that begin at `starts` in each row."""
    mask = torch.zeros(len(starts), length, dtype=torch.bool)
    for row, row_starts in enumerate(starts):
        for start in row_starts:
            mask[row, start : start + PLACES] = True
    return mask


LAYOUTS = {
    "one image a row": [[1], [4], [0]],
    "none in the first row": [[], [2]],
    "none in the last row": [[2], []],
    "several in a row": [[0, 3, 7], [5], [], [1, 6]],  # 0 and 3 touch
    "at both ends": [[0, 9]],
}


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("starts", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_images_take_their_places_in_order_of_appearance(rng, starts):
    length, count = 12, sum(map(len, starts))
    text = torch.randn(len(starts), length, HIDDEN, generator=rng)
    features = torch.randn(count, PLACES, HIDDEN, generator=rng)
    expected, images = text.clone(), iter(features)
    for row, row_starts in enumerate(starts):
        for start in row_starts:
            for place, feature in enumerate(next(images)):
                expected[row, start + place] = feature
    assert torch.equal(splice(text, features, images_at(starts, length)), expected)


def test_without_images_the_text_stays(rng):
    text = torch.randn(2, 5, HIDDEN, generator=rng)
    assert torch.equal(splice(text, torch.zeros(0, PLACES, HIDDEN), torch.zeros(2, 5).bool()), text)


def test_the_inputs_stay_as_they_were(rng):
    text, features = torch.randn(1, 8, HIDDEN, generator=rng), torch.randn(1, PLACES, HIDDEN, generator=rng)
    copies = text.clone(), features.clone()
    splice(text, features, images_at([[2]], 8))
    assert torch.equal(text, copies[0]) and torch.equal(features, copies[1])


def test_each_place_sends_its_gradient_to_the_feature_that_fills_it_and_none_to_the_text_below(rng):
    text = torch.randn(2, 8, HIDDEN, generator=rng, requires_grad=True)
    features = torch.randn(3, PLACES, HIDDEN, generator=rng, requires_grad=True)
    probe = torch.randn(2, 8, HIDDEN, generator=rng)
    mask = images_at([[0, 4], [3]], 8)
    (splice(text, features, mask) * probe).sum().backward()
    assert torch.equal(features.grad.reshape(-1, HIDDEN), probe[mask])
    assert torch.equal(text.grad, probe.masked_fill(mask[..., None], 0))


def test_features_take_the_texts_dtype(rng):
    text, features = torch.randn(1, 4, HIDDEN, generator=rng).bfloat16(), torch.randn(1, PLACES, HIDDEN, generator=rng)
    spliced = splice(text, features, images_at([[1]], 4))
    assert spliced.dtype == torch.bfloat16 and torch.equal(spliced[0, 1:], features[0].bfloat16())


@pytest.mark.parametrize(
    ("starts", "images", "says"),
    [
        ([[0], [4]], 1, "6 image places in the text, but 1 images of 3 features give 3"),
        ([[0], []], 2, "3 image places in the text, but 2 images of 3 features give 6"),
        ([[], []], 1, "0 image places in the text, but 1 images of 3 features give 3"),
        ([[7], []], 1, "1 image places in the text, but 1 images of 3 features give 3"),  # cut off at the end
        ([[0], []], 0, "3 image places in the text, but 0 images of 3 features give 0"),
    ],
)
def test_a_wrong_number_of_images_is_refused_with_the_numbers(starts, images, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        splice(torch.zeros(2, 8, HIDDEN), torch.ones(images, PLACES, HIDDEN), images_at(starts, 8))
