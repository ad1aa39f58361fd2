"""Which places of a sequence a context-parallel rank holds."""

import pytest
import torch

from mole_mega.models.context import ContextPart


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_hold_every_place_once_and_as_much_of_a_causal_mask(size):
    length = 2 * size * 5
    places = [ContextPart(rank, size).take(torch.arange(length), axis=0) for rank in range(size)]
    assert torch.equal(torch.cat(places).sort().values, torch.arange(length))
    assert len({int((held + 1).sum()) for held in places}) == 1  # place p sees p + 1 places


def test_a_rank_holds_a_chunk_and_its_mirror_image():
    assert ContextPart(1, 2).take(torch.arange(8), axis=0).tolist() == [2, 3, 4, 5]
    assert ContextPart(0, 2).take(torch.arange(8), axis=0).tolist() == [0, 1, 6, 7]


def test_places_are_taken_along_the_axis_that_holds_them():
    whole_BSH = torch.randn(3, 8, 2)
    assert torch.equal(ContextPart(0, 2).take(whole_BSH), whole_BSH[:, [0, 1, 6, 7]])


def test_one_rank_holds_the_sequence_as_it_is():
    whole = torch.randn(2, 7)
    assert ContextPart(0, 1).take(whole) is whole


def test_a_sequence_that_does_not_divide_is_a_mistake_of_ours():
    with pytest.raises(AssertionError):
        ContextPart(0, 2).take(torch.zeros(1, 6))
