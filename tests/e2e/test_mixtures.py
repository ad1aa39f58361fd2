"""Mixtures through the commands: a run that answers while it trains, killed and gone on with; and what uses it."""

import json
from functools import partial

import commands
import pytest
import torch
from commands import kill_before_step, read_checkpoint, read_rows

from mole_mega import config
from mole_mega.checkpoint.store import read_adapter
from mole_mega.checkpoint.tensors import StoredTensors

INPUT_ERROR, KILLED = 2, -9
NO_LOSSES = {"balance_weight": 0.0, "z_loss_weight": 0.0}
# (adapter, layout, processes, what the run says travels)
MIXTURES = {
    "task": (
        {"router_scope": "task", "gate": "none", "num_experts": 2, **NO_LOSSES}, {"expert": 2}, 2,
        "tokens (as adapter.expert_parallel says)",
    ),
    "sample": (
        {"router_scope": "sample", "top_k": 2, "renormalize": True, "expert_parallel": "auto", **NO_LOSSES},
        {"pipeline": 2}, 2, "weights (adapter.top_k is 2; a token can travel to one whole expert alone)",
    ),
    "linear": (
        {"router_scope": "linear", "gate": "dense", "share_A": True, "expert_parallel": "weights"}, {"expert": 2}, 2,
        "weights (as adapter.expert_parallel says)",
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=MIXTURES)
def runs(request, make_run, data, tmp_path_factory):
    """(name, run file, run directories of an unbroken run and of one that was killed at step 4, what the last said)."""
    adapter, layout, nproc, _ = MIXTURES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    source = {"name": "text", "path": str(data / "text.json")}
    sections = {
        "adapter": adapter,
        "parallel": layout,
        "train": {"steps": 4},
        "data": {"validation": [source]},
        "validation": {"every": 2, "samples": 4, "generate": True, "max_new_tokens": 6},
        "checkpoint": {"every": 2},
        "monitor": {"tensorboard": False, "experts_every": 2},
    }
    straight, split = (make_run(folder, name, **sections) for name in ("straight", "split"))
    code, text = commands.run([straight], folder / "log", nproc)
    assert code == 0, text
    code, text = commands.run([split], folder / "log", nproc, partial(kill_before_step, 4))
    assert code == KILLED, text
    code, text = commands.run([split], folder / "log", nproc)
    assert code == 0, text
    return request.param, straight, folder / "straight", folder / "split", text


def test_a_killed_run_ends_bit_for_bit_as_one_that_was_not(runs):
    name, _, straight, split, text = runs
    assert "going on after step 2" in text
    assert f"between expert-parallel ranks travel: {MIXTURES[name][3]}" in text
    assert read_rows(split) == read_rows(straight)
    tensors, expected = (read_checkpoint(run / "checkpoints/step_4") for run in (split, straight))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], tensor) for key, tensor in expected.items())
    routers = {key.partition("router")[2] for key in expected if "router" in key and key.startswith("language_model")}
    kinds = ("weight", "bias")
    assert (
        routers
        == {
            "task": set(),
            "sample": {f".{kind}" for kind in kinds},
            "linear": {f".{linear}.{kind}" for linear in ("gate", "up", "down") for kind in kinds},
        }[name]
    )


def test_eval_on_one_process_gives_what_training_logged(runs, tmp_path):
    _, run, straight, _, _ = runs
    out = tmp_path / "figures.json"
    layout = ["parallel.expert=1", "parallel.pipeline=1"]
    code, text = commands.run([run, "--json", out, *layout], tmp_path / "log", module="mole_mega.evaluate")
    assert code == 0, text
    logged = [row for row in read_rows(straight) if "validation_loss/text" in row][-1]
    figures = {key: value for key, value in json.loads(out.read_text()).items() if "/" in key}
    assert "loss/text" in figures
    for key, value in figures.items():
        assert logged[f"validation_{key}"] == pytest.approx(value, rel=1e-5), key


def test_generate_answers_and_asks_for_the_source_where_experts_serve_a_task_each(runs, tmp_path):
    name, _, straight, _, _ = runs
    asked = ["--model", straight, "--prompt", "question 1?", "--max-new-tokens", 4, "--json"]
    options = {"task": ["--source", "text"]}.get(name, [])
    code, text = commands.run([*asked, *options], tmp_path / "log", module="mole_mega.generate")
    assert code == 0 and '"tokens"' in text, text
    wrong = {"task": [], "sample": ["--source", "text"], "linear": ["--source", "text"]}[name]
    code, text = commands.run([*asked, *wrong], tmp_path / "log", module="mole_mega.generate")
    assert code == INPUT_ERROR
    assert ("has an expert for each of mixed, text; no --source" if name == "task" else "not route by task") in text


def test_an_export_that_cannot_express_it_is_refused_with_the_reason(runs, tmp_path):
    name, _, straight, _, _ = runs
    for kind in ("mole", "peft"):
        arguments = ["megatron-to-hf", "--checkpoint", straight, "--out", tmp_path / kind, "--format", kind]
        code, text = commands.run(arguments, tmp_path / "log", module="mole_mega.convert.command")
        if (name, kind) == ("task", "peft"):
            assert code == 0 and (tmp_path / kind / "expert_1").is_dir(), text
            base = config.load(straight / "config.yaml").model.base
            back = ["peft-to-megatron", "--peft", tmp_path / kind, "--base", base, "--out", tmp_path / "back"]
            code, text = commands.run(back, tmp_path / "log", module="mole_mega.convert.command")
            assert code == 0, text
            assert read_adapter(tmp_path / "back").router_scope == "task"
            trained, found = read_checkpoint(straight / "checkpoints/step_4"), StoredTensors(tmp_path / "back")
            banks = [key for key in found if "lora" in key]
            assert len(banks) == sum("lora" in key and not key.startswith("optimizer.") for key in trained)
            assert all(torch.equal(found.read(key), trained[key]) for key in banks)
        elif (name, kind) == ("linear", "mole"):  # proved by the command itself, experts of each router included
            assert code == 0 and "the same for every token" in text, text
        else:
            assert code == INPUT_ERROR and f"adapter.router_scope {name}" in text, text
            assert not (tmp_path / kind).exists()
