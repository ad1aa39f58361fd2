"""The training stream: shares, epochs and replacements of `mixture.py`."""

import math
from itertools import pairwise

import pytest

from mole_mega.config import ConfigError
from mole_mega.data.mixture import Mixture

WEIGHTS = [(1.0,), (1, 1), (0.1, 0.2, 0.7), (3, 0, 1), (1e-3, 1, 1), (5, 1, 1, 1, 1, 1, 0.3)]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_every_prefix_holds_the_asked_shares(weights):
    mixture = Mixture([7] * len(weights), weights, seed=1)
    counts = [0] * len(weights)
    for position in range(3000):
        counts[mixture.locate(position)[0]] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - (position + 1) * weight / math.fsum(weights)) <= len(weights)
    assert all((count > 0) == (weight > 0) for count, weight in zip(counts, weights, strict=True))


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (1, 2, 3, 4), (0.5, 0.25, 0.125, 0.125)], ids=str)
def test_each_source_is_walked_whole_and_in_a_new_order_each_epoch(weights):
    sizes = [1, 2, 13, 64]
    mixture = Mixture(sizes, weights, seed=3)
    rows = [[] for _ in sizes]
    for position in range(1500):
        source, row = mixture.locate(position)
        rows[source].append(row)
    for size, walked in zip(sizes, rows, strict=True):
        epochs = [walked[i : i + size] for i in range(0, len(walked) - size + 1, size)]
        assert len(epochs) > 1
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        if size > 10:
            assert all(one != other for one, other in pairwise(epochs))
            assert epochs[0] != sorted(epochs[0])


def test_position_is_all_it_depends_on():
    sizes, weights = [10, 1000, 333], [1.0, 2.5, 0.5]
    forward = Mixture(sizes, weights, seed=5)
    stream = [forward.locate(position) for position in range(300)]
    fresh = Mixture(sizes, weights, seed=5)
    assert [fresh.locate(position) for position in reversed(range(300))] == stream[::-1]
    assert [Mixture(sizes, weights, seed=6).locate(position) for position in range(300)] != stream


def test_a_regular_assignment_to_ranks_sees_every_source():
    mixture = Mixture([50, 50], [1, 1], seed=0)
    for dp_size in (2, 4):
        first_rank = [mixture.locate(position)[0] for position in range(0, 400, dp_size)]
        assert 0.3 < sum(first_rank) / len(first_rank) < 0.7


def test_a_stream_far_out_in_a_huge_source_costs_nothing():
    mixture = Mixture([10**12, 3], [1.0, 1e-6], seed=0)
    source, row = mixture.locate(10**15)
    assert source == 0
    assert 0 <= row < 10**12


def test_replacements_are_pure_stay_in_the_source_first_and_reach_others_later():
    mixture = Mixture([40, 50, 60], [1, 1, 0], seed=2)
    seen_later = set()
    for position in range(40):
        source, _ = mixture.locate(position)
        tries = [mixture.locate(position, attempt) for attempt in range(1, 24)]
        assert tries == [Mixture([40, 50, 60], [1, 1, 0], seed=2).locate(position, a) for a in range(1, 24)]
        assert {other for other, _ in tries[:8]} == {source}
        assert len(set(tries[:8])) > 1
        assert all(0 <= row < (40, 50)[other] for other, row in tries)
        seen_later |= {other for other, _ in tries[8:]}
    assert seen_later == {0, 1}


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ([1], [1, 1], "1 sources but 2 weights"),
        ([1, 1], [0, 0], "not all 0"),
        ([1, 1], [1, -1], "at least 0"),
        ([1, 1], [1, math.nan], "finite"),
        ([1, 0], [1, 1], r"\[1, 0\]"),
    ],
)
def test_impossible_mixtures_are_refused(sizes, weights, message):
    with pytest.raises(ConfigError, match=message):
        Mixture(sizes, weights, seed=0)
