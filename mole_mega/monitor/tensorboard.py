"""Rows of scalars onto TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class Board:
    """The `tensorboard/` folder of a run. Steps after `resume_step` that a killed run wrote are marked as gone."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def write(self, row: Mapping[str, float]) -> None:
        step = int(row["step"])
        for key, value in row.items():
            if key != "step" and math.isfinite(value):
                self._writer.add_scalar(key if "/" in key else f"train/{key}", value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
