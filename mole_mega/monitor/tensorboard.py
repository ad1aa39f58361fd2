"""Rows of scalars, pictures and alarms onto TensorBoard."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

# {category: {chart: [regular expressions of the tags in it]}}
Layout = dict[str, dict[str, list[str]]]


class Board:
    """The `tensorboard/` folder of a run. Steps after `resume_step` that a killed run wrote are marked as gone."""

    def __init__(self, folder: Path, resume_step: int, layout: Layout | None = None) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)
        if layout:
            charts = {
                category: {title: ["Multiline", tags] for title, tags in charts.items()}
                for category, charts in layout.items()
            }
            self._writer.add_custom_scalars(charts)

    def write(self, row: Mapping[str, float]) -> None:
        """The row's scalars, as one event: a row has hundreds, and `add_scalar` takes longer than a small model's step
        may be held up."""
        values = [
            Summary.Value(tag=scalar_tag(key), simple_value=value)
            for key, value in row.items()
            if key != "step" and math.isfinite(value)
        ]
        assert self._writer.file_writer is not None
        self._writer.file_writer.add_summary(Summary(value=values), int(row["step"]))
        self._writer.flush()

    def picture(self, tag: str, picture_HWC: np.ndarray, step: int) -> None:
        """uint8 [height, width, 3]."""
        self._writer.add_image(tag, picture_HWC, step, dataformats="HWC")

    def text(self, tag: str, text: str, step: int) -> None:
        """Markdown."""
        self._writer.add_text(tag, text, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def scalar_tag(key: str) -> str:
    """What a row's key is called on the board."""
    return key if "/" in key else f"train/{key}"


def board_layout(layers: Sequence[int], domains: Sequence[str]) -> Layout:
    """The charts of TensorBoard's Custom Scalars tab, so that the board opens ready to read. `layers` are those with a
    router; none leaves the routing out."""
    layout: Layout = {
        "training": {
            "loss": ["^train/loss$"],
            "loss by source": ["^loss/"],
            "validation": ["^validation_"],
            "gradient norm": ["^train/grad_norm$"],
        }
    }
    if not layers:
        return layout
    layout["routing"] = {
        title: [f"^{tag}/layer_"]
        for title, tag in {
            "max over mean (1: balanced)": "router/max_over_mean",
            "coefficient of variation": "router/cv",
            "experts without a token": "router/dead_experts",
            "entropy of the load, nats": "router/load_entropy",
            "entropy of the choice, nats": "router/choice_entropy",
            "gate margin, p1 - p2": "router/gate_margin",
            "balance loss": "balance_loss",
            "z loss": "z_loss",
        }.items()
    }
    loads = {"load": "load", "load of image tokens": "load_image", "load of text tokens": "load_text"}
    loads |= {f"load of {domain}": f"load_source/{re.escape(domain)}" for domain in domains}
    for title, tag in loads.items():
        layout[title] = {f"layer {layer}": [f"^{tag}/layer_{layer}/"] for layer in layers}
    layout["experts"] = {
        f"{title}, layer {layer}": [f"^expert/{tag}/layer_{layer}/"]
        for title, tag in {"relative norm": "delta_norm", "similarity": "similarity", "tokens seen": "tokens"}.items()
        for layer in layers
    }
    return layout
