"""Scores of an answer against the true one, as text: pure, and the same for every model."""

from __future__ import annotations

import re


def normalise(text: str) -> str:
    """What letter case and spacing cannot tell apart."""
    return " ".join(text.lower().split())


def contains(answer: str, true: str) -> bool:
    """Whether the true answer's words stand in the answer, whole and in a row: "3" is not in "13"."""
    return re.search(rf"(?<!\w){re.escape(normalise(true))}(?!\w)", normalise(answer)) is not None


def anls(answer: str, true: str, threshold: float = 0.5) -> float:
    """Similarity of an answer to the true one, in [0, 1]: 1 - NL where NL < threshold, otherwise 0.

    NL is the edit distance over the length of the longer text; case and spacing do not count. Its mean over questions
    is the ANLS of ST-VQA (arXiv 1905.13648, equation 1) and of DocVQA (arXiv 2007.00398), for one true answer each.
    """
    a, b = normalise(answer), normalise(true)
    longest = max(len(a), len(b))
    if not longest:
        return 1.0
    if abs(len(a) - len(b)) >= threshold * longest:  # the distance is at least the difference in length
        return 0.0
    distance = edit_distance(a, b) / longest
    return 1 - distance if distance < threshold else 0.0


def edit_distance(a: str, b: str) -> int:
    """Least number of characters inserted, left out or replaced that make b of a (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        corner, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (left != right))
    return row[-1]
