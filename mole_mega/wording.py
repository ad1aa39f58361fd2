"""Words that several rooms say alike."""

from collections.abc import Iterable


def number_of(count: int, noun: str) -> str:
    """ "1 step", "2,000 steps"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def ranges(numbers: Iterable[int]) -> str:
    """ "0-3,7" of 0, 1, 2, 3 and 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
