"""What a run shows is what it did: every step once, in files that any reader takes."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mole_mega.adapters.routers import RoutingSummary
from mole_mega.monitor import throughput
from mole_mega.monitor.metrics import MetricsFile, StepResult, read_rows, step_row
from mole_mega.monitor.tensorboard import Board
from mole_mega.monitor.throughput import Throughput, peak_memory_bytes, progress_line


def strict_rows(path: Path) -> list[dict[str, Any]]:
    """The rows as a reader sees them that knows JSON and nothing else: no NaN, no Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def write_rows(path: Path, resume_step: int, rows: list[dict[str, Any]]) -> None:
    file = MetricsFile(path, resume_step)
    for row in rows:
        file.write(row)
    file.close()


def rows(*steps: int) -> list[dict[str, Any]]:
    return [{"step": step, "loss": 1 / step} for step in steps]


# metrics.jsonl


def test_rows_come_back_as_they_were_written(tmp_path):
    write_rows(tmp_path / "m", 0, rows(1, 2, 3))
    assert strict_rows(tmp_path / "m") == read_rows(tmp_path / "m") == rows(1, 2, 3)


def test_a_row_can_be_read_as_soon_as_it_is_written(tmp_path):
    file = MetricsFile(tmp_path / "m", 0)
    file.write({"step": 1})
    assert strict_rows(tmp_path / "m") == [{"step": 1}]
    file.close()


@pytest.mark.parametrize("resume_step", [0, 1, 2, 3, 9])
def test_a_resumed_run_drops_the_rows_that_it_computes_again(tmp_path, resume_step):
    write_rows(tmp_path / "m", 0, rows(1, 2, 3))
    again = list(range(resume_step + 1, 6))
    write_rows(tmp_path / "m", resume_step, rows(*again))
    kept = [step for step in (1, 2, 3) if step <= resume_step]
    assert [row["step"] for row in strict_rows(tmp_path / "m")] == kept + again


@pytest.mark.parametrize("half", ['{"step": 3, "lo', "{", '{"step": 3, "loss": 0.5', "\x00\x00\x00", "\n"])
def test_half_a_last_line_is_dropped(tmp_path, half):
    write_rows(tmp_path / "m", 0, rows(1, 2))
    with open(tmp_path / "m", "a") as file:
        file.write(half)
    assert read_rows(tmp_path / "m") == rows(1, 2)
    write_rows(tmp_path / "m", 2, rows(3))
    assert strict_rows(tmp_path / "m") == rows(1, 2, 3)


def test_a_validation_row_of_the_resumed_step_is_kept(tmp_path):
    validation = {"step": 2, "validation/a": 0.5}
    write_rows(tmp_path / "m", 0, [*rows(1, 2), validation, *rows(3)])
    write_rows(tmp_path / "m", 2, rows(3))
    assert strict_rows(tmp_path / "m") == [*rows(1, 2), validation, *rows(3)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_does_not_have_is_written_as_text(tmp_path, value):
    write_rows(tmp_path / "m", 0, [{"step": 1, "loss": value, "grad_norm": 0.5}])
    write_rows(tmp_path / "m", 1, rows(2))  # and survives a resume
    assert strict_rows(tmp_path / "m") == [{"step": 1, "loss": str(value), "grad_norm": 0.5}, *rows(2)]
    assert float(read_rows(tmp_path / "m")[0]["loss"]) == pytest.approx(value, nan_ok=True)


def test_resuming_leaves_nothing_else_behind(tmp_path):
    write_rows(tmp_path / "m", 0, rows(1))
    write_rows(tmp_path / "m", 1, rows(2))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


# TensorBoard


def board_rows(folder: Path, resume_step: int, table: list[dict[str, float]]) -> None:
    board = Board(folder, resume_step)
    for row in table:
        board.write(row)
    board.close()


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """{tag: [(step, value), ...]} as TensorBoard's own reader gives them."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=True)
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_tensorboard_shows_the_rows(tmp_path):
    table = [
        {"step": 1, "loss": 0.5, "loss/docs": 0.25, "tokens": 7, "load/layer_0/expert_1": 0.125},
        {"step": 2, "loss": 0.375, "loss/docs": 0.5, "tokens": 9},
        {"step": 4, "loss": 1.0, "validation/docs": 2.0},
    ]
    board_rows(tmp_path, 0, table)
    assert events(tmp_path) == {
        "train/loss": [(1, 0.5), (2, 0.375), (4, 1.0)],
        "loss/docs": [(1, 0.25), (2, 0.5)],
        "train/tokens": [(1, 7.0), (2, 9.0)],
        "load/layer_0/expert_1": [(1, 0.125)],
        "validation/docs": [(4, 2.0)],
    }


def test_tensorboard_leaves_out_what_is_not_finite(tmp_path):
    board_rows(
        tmp_path, 0, [{"step": 1, "loss": math.nan, "grad_norm": 1.0}, {"step": 2, "loss": 0.5, "grad_norm": math.inf}]
    )
    assert events(tmp_path) == {"train/loss": [(2, 0.5)], "train/grad_norm": [(1, 1.0)]}


@pytest.mark.parametrize("resume_step", [0, 1, 3, 5])
def test_tensorboard_shows_each_step_of_a_resumed_run_once(tmp_path, resume_step):
    """From the second attempt, also where the first one was killed before it had saved anything."""
    board_rows(tmp_path, 0, [{"step": step, "loss": 1.0} for step in range(1, 6)])
    board_rows(tmp_path, resume_step, [{"step": step, "loss": 2.0} for step in range(resume_step + 1, 8)])
    expected = [(step, 1.0 if step <= resume_step else 2.0) for step in range(1, 8)]
    assert events(tmp_path) == {"train/loss": expected}


def test_tensorboard_shows_a_row_as_soon_as_it_is_written(tmp_path):
    board = Board(tmp_path, 0)
    board.write({"step": 1, "loss": 0.5})
    assert events(tmp_path) == {"train/loss": [(1, 0.5)]}
    board.close()


# one row a step


def make_result(**change: Any) -> StepResult:
    fields = {
        "loss": 0.5, "domain_loss": torch.tensor([0.25, 0.0, 0.75]), "domain_tokens": torch.tensor([4.0, 0.0, 4.0]),
        "places": 20, "grad_norm": 2.0, "applied": True, "routing": None,
    }  # fmt: skip
    return StepResult(**fields | change)


LRS = {"adapters": 0.1, "projector": 0.2, "router": 0.3}
DOMAINS = ("docs", "bio", "general")


def test_a_row_holds_the_steps_scalars_and_each_domain_that_had_labels():
    assert step_row(7, make_result(), LRS, DOMAINS) == {
        "step": 7, "loss": 0.5, "grad_norm": 2.0, "lr": 0.1, "lr/projector": 0.2, "lr/router": 0.3, "tokens": 20,
        "loss_tokens": 8, "skipped": 0, "loss/docs": 0.25, "loss/general": 0.75,
    }  # fmt: skip


def test_a_row_holds_what_each_layers_router_did():
    routing = RoutingSummary(
        layers=(0, 5), tokens=20.0, load_LE=torch.tensor([[0.75, 0.25], [0.5, 0.5]]),
        balance_L=torch.tensor([0.625, 0.5]), z_L=torch.tensor([1.0, 3.0]), balance_loss=0.5625, z_loss=2.0,
    )  # fmt: skip
    row = step_row(1, make_result(routing=routing), LRS, DOMAINS)
    assert {key: row[key] for key in row if key not in step_row(1, make_result(), LRS, DOMAINS)} == {
        "balance_loss": 0.5625, "balance_loss/layer_0": 0.625, "balance_loss/layer_5": 0.5,
        "z_loss": 2.0, "z_loss/layer_0": 1.0, "z_loss/layer_5": 3.0,
        "load/layer_0/expert_0": 0.75, "load/layer_0/expert_1": 0.25,
        "load/layer_5/expert_0": 0.5, "load/layer_5/expert_1": 0.5,
    }  # fmt: skip


def test_a_row_is_plain_numbers_that_both_writers_take(tmp_path):
    row = step_row(1, make_result(loss=math.nan, applied=False), LRS, DOMAINS)
    assert all(type(value) in (int, float) for value in row.values()) and row["skipped"] == 1
    write_rows(tmp_path / "m", 0, [row])
    board_rows(tmp_path / "board", 0, [row])
    assert strict_rows(tmp_path / "m")[0]["loss"] == "nan" and "train/lr" in events(tmp_path / "board")


# throughput


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_the_first_step_is_left_out_and_the_others_are_averaged(clock):
    meter = Throughput()
    clock[0] += 50
    assert meter.step(1000) == {"tokens_per_second": 0.0, "seconds_per_step": 0.0}
    clock[0] += 2
    assert meter.step(30) == {"tokens_per_second": 15.0, "seconds_per_step": 2.0}
    clock[0] += 4
    assert meter.step(30) == {"tokens_per_second": 10.0, "seconds_per_step": 3.0}


def test_only_the_last_steps_count(clock):
    meter = Throughput(window=2)
    meter.step(1)
    for seconds in (100, 1, 3):
        clock[0] += seconds
        shown = meter.step(8)
    assert shown == {"tokens_per_second": 4.0, "seconds_per_step": 2.0}


def test_what_is_not_training_does_not_count(clock):
    meter = Throughput()
    meter.step(1)
    clock[0] += 1000  # validation
    meter.restart()
    clock[0] += 2
    assert meter.step(10) == {"tokens_per_second": 5.0, "seconds_per_step": 2.0}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3599.4, "0:59:59"), (90061, "25:01:01")]
)
def test_time_left_reads_as_a_clock(seconds, text):
    assert throughput._clock(seconds) == text


def test_the_progress_line_says_how_far_and_how_long():
    row = step_row(5, make_result(), LRS, DOMAINS) | {"tokens_per_second": 1234.4, "seconds_per_step": 12.0}
    line = progress_line(row, 20)
    assert line == "step 5/20  loss 0.5000  grad 2  lr 0.1  1234 tok/s  left 0:03:00"
    bad = progress_line(row | {"skipped": 1, "loss": math.nan, "grad_norm": math.nan, "balance_loss": 0.25}, 20)
    assert "loss nan" in bad and "balance 0.2500" in bad and bad.endswith("NOT FINITE, step skipped")


def test_peak_memory_is_in_bytes_and_at_least_what_is_held():
    held = torch.ones(2**22)
    assert held.numel() * 4 < peak_memory_bytes() < 2**40
