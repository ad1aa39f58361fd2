"""How fast a run goes, how long it still takes, and the line that says so."""

from __future__ import annotations

import resource
import time
from collections import deque

import torch

from mole_mega.monitor.metrics import Row


class Throughput:
    """Step times of the last steps. The first step of a process pays for warming up and is left out."""

    def __init__(self, window: int = 50) -> None:
        self._times: deque[float] = deque(maxlen=window)
        self._tokens: deque[int] = deque(maxlen=window)
        self._last: float | None = None

    def step(self, tokens: int) -> dict[str, float]:
        """Call after each step with its valid places; returns the timing columns of its row."""
        now = time.perf_counter()
        if self._last is not None:
            self._times.append(now - self._last)
            self._tokens.append(tokens)
        self._last = now
        seconds = sum(self._times)
        return {
            "tokens_per_second": sum(self._tokens) / seconds if seconds else 0.0,
            "seconds_per_step": seconds / len(self._times) if self._times else 0.0,
        }

    def restart(self) -> None:
        """Leave out what is not training (validation, saving)."""
        self._last = time.perf_counter()


def progress_line(row: Row, steps: int, note: str = "") -> str:
    """step, loss, tokens/s, the time left, and what else there is to say."""
    step = int(row["step"])
    speed, left = "-", "-"
    if row["seconds_per_step"]:  # 0 until there is a measurement
        speed, left = f"{row['tokens_per_second']:.0f}", _clock((steps - step) * row["seconds_per_step"])
    balance = f"  balance {row['balance_loss']:.4f}" if "balance_loss" in row else ""
    skipped = "  NOT FINITE, step skipped" if row["skipped"] else ""
    return (
        f"step {step}/{steps}  loss {row['loss']:.4f}  grad {row['grad_norm']:.3g}  lr {row['lr']:.3g}{balance}  "
        f"{speed} tok/s  left {left}{skipped}{note}"
    )


def peak_memory_bytes() -> int:
    """Peak memory of this process: on the device where there is one, resident otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
