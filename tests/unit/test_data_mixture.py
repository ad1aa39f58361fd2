"""The training stream: shares, epochs and replacements of `mixture.py`."""

import hashlib
import math
import random
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


@pytest.mark.parametrize(
    ("sizes", "weights", "seed", "first", "digest"),
    [
        ([10, 1000, 333], [1.0, 2.5, 0.5], 5, [(1, 426), (0, 1), (1, 688), (2, 2), (1, 507)], "880a929291ecf83c"),
        ([7, 7, 7], [0.1, 0.2, 0.7], 0, [(2, 1), (2, 3), (2, 2), (2, 6), (2, 4)], "eab6804ae01ea14d"),
        ([800, 800, 800], [1.0, 1.0, 1.0], 0, [(1, 118), (0, 471), (2, 152), (2, 773), (1, 76)], "b074e5da823f892e"),
        ([5, 6, 9], [3, 0, 1], 9, [(0, 1), (0, 0), (2, 5), (0, 2), (0, 3)], "ea7ce4c84c88bf17"),
    ],
)
def test_the_stream_is_the_one_that_earlier_runs_had(sizes, weights, seed, first, digest):
    """A run that goes on under a newer version must meet the rows that it has not seen: positions and replacements."""
    mixture = Mixture(sizes, weights, seed)
    stream = [mixture.locate(position) for position in range(2000)]
    others = [mixture.locate(position, attempt) for position in range(50) for attempt in range(1, 24)]
    assert stream[:5] == first
    assert hashlib.sha256(repr(stream + others).encode()).hexdigest()[:16] == digest


def changing(seed, sources=4, phases=150):
    """Weights that change at odd places, some to 0; [(position, weights), ...] from 0 on."""
    rng = random.Random(seed)
    starts = [0, *sorted(rng.sample(range(1, 1500), phases))]
    return [(start, [rng.choice([0, 0.01, 0.3, 1, 5]) for _ in range(sources - 1)] + [0.7]) for start in starts]


@pytest.mark.parametrize("seed", range(3))
def test_shares_that_change_are_kept_in_sum_over_all_changes(seed):
    (_, first), *changes = changing(seed)
    mixture = Mixture([97] * 4, first, seed=1, changes=changes)
    asked, counts, drawn = [0.0] * 4, [0] * 4, [0] * 4
    for position in range(1700):
        weights = next(w for start, w in reversed([(0, first), *changes]) if start <= position)
        asked = [a + weight / math.fsum(weights) for a, weight in zip(asked, weights, strict=True)]
        source, row = mixture.locate(position)
        assert row == mixture.row(source, drawn[source])  # its draws go on in order over all changes
        drawn[source] += 1
        counts[source] += 1
        assert max(abs(n - a) for n, a in zip(counts, asked, strict=True)) < 8
        if position % 97 == 0:
            assert mixture.counts(position + 1) == counts
            assert mixture.asked(position + 1) == pytest.approx(asked)


def test_a_slope_of_many_small_steps_gives_a_rare_source_its_share():
    """A source that is due less than one draw a phase is not rounded away."""
    changes = [(16 * step, (0.01 + step * 1e-6, 1.0)) for step in range(1, 500)]
    mixture = Mixture([50, 50], (0.01, 1.0), seed=0, changes=changes)
    assert mixture.counts(8000)[0] == pytest.approx(mixture.asked(8000)[0], abs=2)
    assert mixture.asked(8000)[0] > 80


def test_a_source_gives_each_row_as_often_as_it_may_and_the_others_share_the_rest():
    sizes, weights = [13, 50, 40], [5.0, 1.0, 2.0]
    mixture = Mixture(sizes, weights, seed=7, limits=[26, None, None])
    stream = [mixture.locate(position) for position in range(600)]
    rows = [row for source, row in stream if source == 0]
    assert sorted(rows) == sorted([*range(13), *range(13)]) and sorted(rows[:13]) == list(range(13))
    [(source, end)] = mixture.ends().items()
    assert source == 0 and 40 <= end <= 44 and mixture.length is None
    assert 0 not in {source for source, _ in stream[end:]} and stream.index((0, rows[-1])) < end
    after = [source for source, _ in stream[end:]]
    assert abs(after.count(1) - len(after) / 3) < 2
    # what stands before is what stands there without a limit
    free = Mixture(sizes, weights, seed=7)
    whole_blocks = end - end % 4
    assert stream[:whole_blocks] == [free.locate(position) for position in range(whole_blocks)]


@pytest.mark.parametrize("seed", range(3))
def test_a_stream_of_limited_sources_holds_every_row_that_often_and_ends(seed):
    (_, first), *changes = changing(seed, phases=40)
    sizes, passes = [5, 64, 31, 2], [2, 1, 3, 4]
    # the last stretch asks for all of them, so that none is left over
    mixture = Mixture(
        sizes,
        first,
        seed=seed,
        changes=[*changes, (1600, [1, 1, 1, 1])],
        limits=[size * n for size, n in zip(sizes, passes, strict=True)],
    )
    if mixture.length != 175:  # at some stretch only sources were asked for that had run out: the stream ends there
        assert mixture.length < 175
        weights = next(w for start, w in reversed([(0, first), *changes]) if start <= mixture.length)
        counts = mixture.counts(mixture.length)
        assert all(w == 0 or c == s * n for w, c, s, n in zip(weights, counts, sizes, passes, strict=True))
    mixture = Mixture(sizes, [1, 4, 2, 1], seed=seed, limits=[s * n for s, n in zip(sizes, passes, strict=True)])
    assert mixture.length == sum(size * n for size, n in zip(sizes, passes, strict=True)) == 175
    stream = [mixture.locate(position) for position in range(175)]
    expected = [(s, row) for s, n in enumerate(passes) for row in range(sizes[s]) for _ in range(n)]
    assert sorted(stream) == sorted(expected)
    assert mixture.counts(175) == mixture.counts(10**6) == [10, 64, 93, 8]
    assert max(mixture.ends().values()) == 175
    with pytest.raises(ConfigError, match=r"run out: the stream ends after 175 samples"):
        mixture.locate(175)


def test_a_replacement_comes_from_sources_that_are_in_force():
    mixture = Mixture([9, 9, 9], [1, 1, 0], seed=2, changes=[(100, [0, 1, 1])], limits=[None, 150, None])
    for positions, allowed in ((range(40), {0, 1}), (range(120, 160), {1, 2}), (range(400, 440), {2})):
        found = {mixture.locate(p, attempt)[0] for p in positions for attempt in range(1, 24)}
        assert found == allowed


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([(5, [1, 1]), (5, [2, 1])], r"in order, got \[0, 5, 5\]"),
        ([(5, [0, 0])], r"not all 0, got \[0, 0\] from sample 5 on"),
        ([(5, [1, math.inf])], "finite"),
    ],
)
def test_impossible_changes_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Mixture([3, 3], [1, 1], seed=0, changes=changes)
