"""What the bench of FP8's loss calls a cost and what chance, and that its cases differ in what they say."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools")
    return importlib.import_module("bench_fp8_loss")


def rows_of(bench, costs):
    """Rows of 4 seeds in which each case's losses are those of `none` times 1 + cost, the seeds' own chance added."""
    chance = {0: 0.1, 1: -0.1, 2: 0.08, 3: -0.08}
    rows = []
    for seed, apart in chance.items():
        plain = 1.0 + seed
        rows.append({"case": "none", "seed": seed, "train": plain, "held_out": plain})
        for case, (cost, spread) in costs.items():
            loss = plain * (1 + cost + spread * apart)
            rows.append({"case": case, "seed": seed, "train": loss, "held_out": loss})
    return rows


def test_a_cost_is_told_from_chance_and_from_the_target(bench):
    rows = rows_of(bench, {"control": (0.0, 0.01), "channel": (0.01, 1.0), "block": (0.05, 0.01)})
    control, channel, block = bench.compare(rows, "train")
    assert (control["case"], channel["case"], block["case"]) == ("control", "channel", "block")
    assert channel["mean"] == pytest.approx(0.01) and channel["met"] and channel["is_chance"]
    assert block["mean"] == pytest.approx(0.05) and not block["met"] and not block["is_chance"]
    assert control["error"] == pytest.approx(channel["error"] / 100)
    assert "MISSED" in "\n".join(bench.describe(rows))


def test_one_seed_alone_is_never_called_a_cost(bench):
    rows = [row for row in rows_of(bench, {"channel": (0.3, 0.0)}) if row["seed"] == 0]
    (channel,) = bench.compare(rows, "held_out")
    assert channel["is_chance"] and channel["seeds"] == 1


def test_the_cases_are_the_demos_run_but_for_what_they_say(bench, tmp_path):
    none, control, channel, block, ends = (bench.run_of(case, 3, 20, tmp_path) for case in bench.CASES)
    assert none.train.seed == 3 and (none.train.steps, none.train.schedule_steps) == (20, 200)
    same = replace(control.train, micro_batch_size=none.train.micro_batch_size)
    assert same == none.train and control.train.micro_batch_size < none.train.micro_batch_size
    assert not none.fp8.store_base
    assert (channel.fp8.scale, block.fp8.scale) == ("channel", "block")
    assert ends.fp8.first_last_layers_bf16
    assert replace(channel, fp8=none.fp8, run_dir=none.run_dir) == none
