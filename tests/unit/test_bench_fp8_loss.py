"""What the bench of FP8's loss calls a cost and what chance, and that its cases differ in what they say."""

import importlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mole_mega.platform.fp8 import dequantise, quantise


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
    none, control, channel, block, ends, *signs = (bench.run_of(case, 3, 20, tmp_path) for case in bench.CASES)
    assert none.train.seed == 3 and (none.train.steps, none.train.schedule_steps) == (20, 200)
    same = replace(control.train, micro_batch_size=none.train.micro_batch_size)
    assert same == none.train and control.train.micro_batch_size < none.train.micro_batch_size
    assert not none.fp8.store_base
    assert (channel.fp8.scale, block.fp8.scale) == ("channel", "block")
    assert ends.fp8.first_last_layers_bf16
    assert replace(channel, fp8=none.fp8, run_dir=none.run_dir) == none
    for run in signs:  # which differ in their base
        assert run.model.base != none.model.base and replace(run, model=none.model, run_dir=none.run_dir) == none


@pytest.mark.parametrize("spare_ends", [False, True])
def test_a_base_with_other_signs_is_off_by_fp8s_errors(bench, tmp_path, spare_ends):
    bench.change_signs(bench.EXAMPLE / "base_hf", tmp_path / "hf", 0, spare_ends=spare_ends)
    plain, changed = (
        load_file(folder / "model.safetensors") for folder in (bench.EXAMPLE / "base_hf", tmp_path / "hf")
    )
    off = {name for name, weight in plain.items() if not torch.equal(weight.float(), changed[name].float())}
    ends = {name for name in plain if re.match(r"language_model\.model\.layers\.[03]\..*_proj", name)}
    others = {name for name in plain if re.match(r".*layers\..*(_proj|fc.)\.weight", name)} - ends
    assert ends and others and off == (others if spare_ends else others | ends)
    for name in off:
        exact = plain[name].float()
        q, scale = quantise(exact, "channel")
        error, found = dequantise(q, scale, torch.float32) - exact, changed[name] - exact
        torch.testing.assert_close(found.abs(), error.abs(), atol=1e-7, rtol=1e-4)
        assert 0.4 < (found * error > 0).sum() / (error != 0).sum() < 0.6
