"""Mixtures by mixed B, by sigmoid scores and of whole MLPs: a run that was split ends bit for bit as one that was not,
and what cannot express it refuses it with the reason. In this process; that a kill splits alike, test_mixtures shows.
"""

import io
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import read_checkpoint, read_rows

from mole_mega import config
from mole_mega.checkpoint import files
from mole_mega.checkpoint.trained import find_trained
from mole_mega.config import ConfigError, ParallelConfig
from mole_mega.convert.folders import find_counterpart
from mole_mega.convert.hf_export import export_merged
from mole_mega.convert.mole_folder import export_mole
from mole_mega.convert.peft import export_peft
from mole_mega.convert.verify import verify
from mole_mega.platform.parallel import seed_generators
from mole_mega.training.trainer import Trainer

NO_LOSSES = {"balance_weight": 0.0, "z_loss_weight": 0.0}
TWO = {"top_k": 2, "renormalize": True, "expert_parallel": "weights"}
FORMS = {
    "mixed B": {
        "router_scope": "task", "gate": "none", "num_experts": 2, "share_A": True, "shared_B": 3,
        "expert_parallel": "weights", **NO_LOSSES,
    },
    "sigmoid": {
        **TWO, **NO_LOSSES, "num_experts": 8, "rank": 1, "router_scope": "linear", "router_score": "sigmoid",
        "score_bias_rate": 0.01, "router_bias": False,
    },
    "whole MLPs": {**TWO, "expert_form": "mlp"},
}  # fmt: skip
STEPS = 4


@pytest.fixture(scope="module", params=FORMS)
def runs(request, make_run, alone, tmp_path_factory):
    """(the form, a straight run's directory, that of one that stopped half way and went on)."""
    folder = tmp_path_factory.mktemp("forms")
    sections = {"adapter": FORMS[request.param], "checkpoint": {"every": 2}, "train": {"schedule_steps": STEPS}}
    for name, stops in (("straight", [STEPS]), ("split", [STEPS // 2, STEPS])):
        path = make_run(folder, name, **sections)
        for steps in stops:
            run = config.load(path, [f"train.steps={steps}"])
            seed_generators(run.train.seed)
            assert Trainer(run, alone, io.StringIO()).train() == 0
    return request.param, folder / "straight", folder / "split"


def test_a_run_that_was_split_ends_bit_for_bit_as_one_that_was_not(runs):
    form, straight, split = runs
    tensors, expected = (read_checkpoint(run / "checkpoints" / f"step_{STEPS}") for run in (split, straight))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], tensor) for key, tensor in expected.items())
    assert [row["loss"] for row in read_rows(split)] == [row["loss"] for row in read_rows(straight)]
    biases = [tensor for key, tensor in expected.items() if key.endswith("score_bias")]
    assert bool(biases) == (form == "sigmoid") and all(bias.any() for bias in biases)
    assert any(key.endswith("lora_down_transform") for key in expected) == (form == "mixed B")


def test_other_values_of_what_the_tensors_do_not_show_are_refused(runs, alone):
    form, _, split = runs
    change = {
        "mixed B": "adapter.mix_temperature=0.5",
        "sigmoid": "adapter.top_k=3",
        "whole MLPs": "adapter.expert_form=linear",
    }[form]
    with pytest.raises(files.CheckpointError, match=change.split("=")[0]):
        Trainer(config.load(split / "config.yaml", [change]), alone, io.StringIO())


def test_an_export_that_cannot_express_it_is_refused_with_the_reason(runs, tmp_path):
    form, straight, _ = runs
    trained = find_trained(straight)
    refusals = {
        "mixed B": [(export_mole, "router_scope task"), (export_merged, "2 experts")],
        "sigmoid": [(export_peft, "router_scope linear")],
        "whole MLPs": [(export_merged, "4 experts")],
    }
    for export, reason in refusals[form]:
        with pytest.raises(ConfigError, match=reason):
            export(trained, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_export_that_can_has_equal_logits(runs, alone, tmp_path):
    """Of mixed B an adapter a task."""
    form, straight, _ = runs
    trained = find_trained(straight)
    (export_peft if form == "mixed B" else export_mole)(trained, tmp_path / "out")
    checks = verify(trained, partial(find_counterpart, trained, tmp_path / "out"), alone, ParallelConfig())
    assert all(check.equal for check in checks), checks
    compared = [check.what for check in checks if "logits" in check.what or "experts" in check.what]
    assert compared == (["expert_0: logits", "expert_1: logits"] if form == "mixed B" else ["logits", "experts"])


def test_a_run_that_starts_from_its_weights_must_mean_the_same_by_them(runs, alone, tmp_path):
    form, straight, _ = runs
    run = config.load(straight / "config.yaml", [f"run_dir={tmp_path / 'next'}", f"checkpoint.init_from={straight}"])
    changed = {
        "mixed B": (replace(run, adapter=replace(run.adapter, mix_temperature=2.0)), "adapter.mix_temperature = 0.1"),
        "sigmoid": (replace(run, adapter=replace(run.adapter, alpha=9.0)), "adapter.alpha"),
        "whole MLPs": (replace(run, adapter=replace(run.adapter, expert_form="linear")), "adapter.expert_form = mlp"),
    }
    other, message = changed[form]
    with pytest.raises(files.CheckpointError, match=message):
        Trainer(other, alone, io.StringIO())
    if form == "mixed B":
        swapped = replace(run, data=replace(run.data, sources=run.data.sources[::-1]))
        order = r"has experts for the sources (\w+), (\w+), in this order; this run has \2, \1"
        with pytest.raises(files.CheckpointError, match=order):
            Trainer(swapped, alone, io.StringIO())
        renamed = [replace(source, name=f"new {source.name}") for source in run.data.sources]
        Trainer(replace(run, data=replace(run.data, sources=tuple(renamed))), alone, io.StringIO())
    Trainer(run, alone, io.StringIO())


def test_whole_mlps_that_were_trained_in_bf16_have_equal_logits_once_exported(make_run, alone, tmp_path):
    path = make_run(tmp_path, adapter=FORMS["whole MLPs"], train={"steps": 1, "precision": "bf16"})
    run = config.load(path)
    seed_generators(run.train.seed)
    assert Trainer(run, alone, io.StringIO()).train() == 0
    trained = find_trained(Path(run.run_dir))
    export_mole(trained, tmp_path / "out")
    checks = verify(trained, partial(find_counterpart, trained, tmp_path / "out"), alone, ParallelConfig())
    assert [check.what for check in checks if check.equal] == [check.what for check in checks] and len(checks) > 1
