"""What a run shows is what it did: every step once, in files that any reader takes."""

import io
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from mole_mega.adapters.routing import RouterMemory, RoutingSummary
from mole_mega.config import MonitorConfig
from mole_mega.errors import ExitCode, report_errors
from mole_mega.monitor import pictures, throughput
from mole_mega.monitor.alarms import Alarm
from mole_mega.monitor.experts import ExpertStatistics, expert_row
from mole_mega.monitor.logs import RunLogs
from mole_mega.monitor.metrics import MetricsFile, StepResult, read_rows, step_row
from mole_mega.monitor.tensorboard import Board, board_layout
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


@pytest.mark.parametrize("line", [b"{broken", b'{"loss": 1}', b"[1, 2]", b"null", b'{"step": "2"}', b"\xff\xfe"])
def test_a_whole_line_that_is_no_row_is_named_and_nothing_is_dropped(tmp_path, line):
    write_rows(tmp_path / "m", 0, rows(1, 2, 3))
    first, *others = (tmp_path / "m").read_bytes().splitlines(keepends=True)
    (tmp_path / "m").write_bytes(b"".join([first, line + b"\n", *others]))
    before = (tmp_path / "m").read_bytes()
    with pytest.raises(OSError, match=r"line 2 of .*m is no row with a step"):
        MetricsFile(tmp_path / "m", 3)
    assert (tmp_path / "m").read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_disk_that_is_full_is_told_with_the_file(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file._file = open("/dev/full", "w")  # noqa: SIM115 - as a run holds it
    with report_errors(debug=False) as outcome:
        file.write({"step": 1})
    assert outcome.code == ExitCode.INPUT_ERROR
    assert capsys.readouterr().err == f"error: {tmp_path / 'metrics.jsonl'}: No space left on device\n"


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


def make_routing():
    """Layers 0 and 5, two experts, three domains of which the second has no token; docs has text alone."""
    counts_LDME = torch.zeros(2, 3, 2, 2).double()
    counts_LDME[:, 0, 0] = torch.tensor([[6.0, 2.0], [0.0, 8.0]])  # docs, text
    counts_LDME[:, 2, 0] = torch.tensor([[3.0, 1.0], [0.0, 4.0]])  # general, text
    counts_LDME[:, 2, 1] = torch.tensor([[1.0, 3.0], [0.0, 4.0]])  # general, image
    return RoutingSummary(
        layers=(0, 5), counts_LGE=counts_LDME.flatten(1, 2), balance_L=torch.tensor([0.625, 0.5]),
        z_L=torch.tensor([1.0, 3.0]), entropy_L=torch.tensor([0.5, 0.25]), margin_L=torch.tensor([0.375, 0.75]),
        balance_loss=0.5625, z_loss=2.0,
    )  # fmt: skip


def test_a_row_holds_what_each_layers_router_did():
    row = step_row(1, make_result(routing=make_routing()), LRS, DOMAINS)
    share = 10 / 16
    expected = {
        "balance_loss": 0.5625, "balance_loss/layer_0": 0.625, "balance_loss/layer_5": 0.5,
        "z_loss": 2.0, "z_loss/layer_0": 1.0, "z_loss/layer_5": 3.0,
        "router/max_over_mean/layer_0": 2 * share, "router/max_over_mean/layer_5": 2.0,
        "router/cv/layer_0": 2 * share - 1, "router/cv/layer_5": 1.0,
        "router/dead_experts/layer_0": 0, "router/dead_experts/layer_5": 1,
        "router/load_entropy/layer_0": -share * math.log(share) - (1 - share) * math.log(1 - share),
        "router/load_entropy/layer_5": 0.0,
        "router/choice_entropy/layer_0": 0.5, "router/choice_entropy/layer_5": 0.25,
        "router/gate_margin/layer_0": 0.375, "router/gate_margin/layer_5": 0.75,
    }  # fmt: skip
    for name, (zero, five) in {
        "load": ((share, 1 - share), (0, 1)),
        "load_text": ((0.75, 0.25), (0, 1)),
        "load_image": ((0.25, 0.75), (0, 1)),
        "load_source/docs": ((0.75, 0.25), (0, 1)),
        "load_source/general": ((0.5, 0.5), (0, 1)),
    }.items():
        for layer, loads in ((0, zero), (5, five)):
            expected |= {f"{name}/layer_{layer}/expert_{expert}": load for expert, load in enumerate(loads)}
    found = {key: row[key] for key in row if key not in step_row(1, make_result(), LRS, DOMAINS)}
    assert found == {key: pytest.approx(value) for key, value in expected.items()}


def test_a_row_is_plain_numbers_that_both_writers_take(tmp_path):
    row = step_row(1, make_result(loss=math.nan, applied=False), LRS, DOMAINS)
    assert all(type(value) in (int, float) for value in row.values()) and row["skipped"] == 1
    write_rows(tmp_path / "m", 0, [row])
    board_rows(tmp_path / "board", 0, [row])
    assert strict_rows(tmp_path / "m")[0]["loss"] == "nan" and "train/lr" in events(tmp_path / "board")


# pictures


def test_a_picture_shows_each_value_in_its_cell_and_grey_where_there_is_none():
    values = np.array([[0.0, 1.0], [math.nan, 0.25]])
    panel = pictures.Panel("title", values, ["a", "b"], ["x", "y"])
    drawn = pictures.draw([panel])
    assert drawn.dtype == np.uint8 and drawn.shape[2] == 3
    cells = [[pictures.colour(value, 0, 1) for value in row] for row in values]
    assert len({cell for row in cells for cell in row}) == 4
    places = [[np.argwhere((drawn == cell).all(-1)).mean(0) for cell in row] for row in cells]
    (top_left, top_right), (bottom_left, bottom_right) = places
    # rows go down, columns to the right
    assert top_left[0] == pytest.approx(top_right[0], abs=3) and bottom_left[0] - top_left[0] > 20
    assert top_left[1] == pytest.approx(bottom_left[1], abs=3) and bottom_right[1] - bottom_left[1] > 20


def test_colours_run_from_end_to_end_and_signs_have_two():
    assert pictures.colour(-3.0, 0, 1) == pictures.colour(0.0, 0, 1) != pictures.colour(1.0, 0, 1)
    lightness = [sum(pictures.colour(value, 0, 1)) for value in np.linspace(0, 1, 9)]
    assert lightness == sorted(lightness)
    (red, _, blue), (other_red, _, other_blue) = (pictures.colour(value, -1, 1) for value in (0.5, -0.5))
    assert red > blue and other_red < other_blue
    assert len(set(pictures.colour(0.0, -1, 1))) == 1


def test_the_boards_pictures_and_alarms_come_back_from_tensorboard(tmp_path):
    alarm = Alarm(3, "collapse", 5, 1, 2.0, 1.5)
    config = MonitorConfig(tensorboard=True)
    logs = RunLogs(tmp_path, config, 0, (0, 5), DOMAINS)
    logs.row(step_row(3, make_result(routing=make_routing()), LRS, DOMAINS))
    logs.alarms([alarm])
    logs.pictures(make_routing(), 3)
    logs.close()
    assert strict_rows(tmp_path / "events.jsonl") == [alarm.row()]
    read = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    read.Reload()
    (text,) = read.Tensors("alarms/text_summary")
    assert (text.step, text.tensor_proto.string_val[0].decode()) == (3, f"- {alarm}")
    expected = pictures.routing_pictures(make_routing(), DOMAINS)
    assert set(read.Tags()["images"]) == expected.keys() and len(expected) == 3
    for tag, drawn in expected.items():
        (event,) = read.Images(tag)
        assert event.step == 3
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), drawn)


def test_a_picture_of_a_source_without_tokens_is_grey():
    by_source = pictures.routing_pictures(make_routing(), DOMAINS)["pictures/load_by_source"]
    assert (by_source == pictures.colour(math.nan, 0, 1)).all(-1).sum() > 1000


def test_the_custom_scalars_layout_shows_every_scalar_of_the_routers_once(tmp_path):
    domains = ("docs", "bio", "a+b (c)")
    logs = RunLogs(tmp_path, MonitorConfig(), 0, (0, 5), domains)
    row = step_row(1, make_result(routing=make_routing()), LRS, domains)
    row |= expert_row(ExpertStatistics((0, 5), torch.ones(2, 2), torch.ones(2, 2, 2)), RouterMemory.empty(2, 2))
    logs.row(row)
    logs.close()
    read = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    (event,) = read.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    charts = {(c.title, chart.title): list(chart.multiline.tag) for c in layout.category for chart in c.chart}
    tags = read.Tags()["scalars"]
    shown = {name: [tag for tag in tags if any(re.search(p, tag) for p in ps)] for name, ps in charts.items()}
    routers = [tag for tag in tags if re.match("load|router/|expert/|(balance|z)_loss/", tag)]
    assert len(routers) == 46
    assert all(sum(tag in found for found in shown.values()) == 1 for tag in routers)
    assert shown["load of a+b (c)", "layer 5"] == [f"load_source/a+b (c)/layer_5/expert_{e}" for e in (0, 1)]
    assert shown["training", "loss by source"] == ["loss/docs", "loss/a+b (c)"]
    empty = [name for name, found in shown.items() if not found]
    # no validation in the row, and no token of the second source
    assert empty == [("training", "validation"), ("load of bio", "layer 0"), ("load of bio", "layer 5")]


def test_a_run_without_routers_has_a_layout_without_them():
    assert board_layout((), DOMAINS).keys() == {"training"}


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


def test_the_first_progress_line_claims_no_speed_and_no_time_left():
    line = progress_line(step_row(1, make_result(), LRS, DOMAINS) | Throughput().step(1000), 20)
    assert line == "step 1/20  loss 0.5000  grad 2  lr 0.1  - tok/s  left -"


def test_peak_memory_is_in_bytes_and_at_least_what_is_held():
    held = torch.ones(2**22)
    assert held.numel() * 4 < peak_memory_bytes() < 2**40
