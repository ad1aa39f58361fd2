"""Scores of an answer as text, against values worked out by hand and against a slower definition."""

import functools
import random

import pytest

from mole_mega.monitor.scores import anls, contains, edit_distance


@pytest.mark.parametrize(
    ("answer", "true", "score"),
    [
        ("nine top right", "nine top right", 1),
        ("  Nine\ttop  RIGHT ", "nine top right", 1),
        ("top right", "nine top right", 1 - 5 / 14),
        ("cat", "cut", 1 - 1 / 3),
        ("abcd", "abxy", 0),  # NL is 1/2, which is not below the threshold
        ("abcde", "abcxy", 1 - 2 / 5),
        ("", "nine", 0),
        ("nine and a great deal more", "nine", 0),
        ("", "", 1),
    ],
)
def test_anls(answer, true, score):
    assert anls(answer, true) == pytest.approx(score)
    assert anls(true, answer) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "true", "expected"),
    [
        ("it is Nine, top right", "nine", True),
        ("there are 13", "3", False),
        ("there are 3.", "3", True),
        ("top  right", "top right", True),
        ("right top", "top right", False),
        ("a (b)", "(b)", True),
        ("a+c", "a.c", False),
        ("", "nine", False),
    ],
)
def test_contains(answer, true, expected):
    assert contains(answer, true) is expected


def test_the_edit_distance_is_that_of_its_definition():
    @functools.cache
    def distance(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))

    rng = random.Random(3)
    words = ["".join(rng.choices("abc", k=rng.randint(0, 7))) for _ in range(60)]
    pairs = list(zip(words[::2], words[1::2], strict=True))
    assert [edit_distance(a, b) for a, b in pairs] == [distance(a, b) for a, b in pairs]
