"""A run with methods that was killed goes on as if nothing had happened, whatever they remember (DESIGN 6.2)."""

from functools import partial

import commands
import pytest
import torch
from commands import kill_before_step, read_checkpoint, read_rows

LAST = {"name": "riemannian", "delta": 0.001}
PRIOR = [{"name": "bora", "tau": 0.1, "init_noise": 0.001}, LAST]
# masked at step 2, before the checkpoint of step 3
MASKS = [
    {"name": "lorasculpt", "density": 0.2, "prune_step": 2, "ramp_steps": 2, "regularise": ["q", "gate"]},
    LAST,
]
KILLED, INPUT_ERROR = -9, 2


@pytest.fixture
def train(write_run, tmp_path):
    def train(name, methods, nproc=1, prepare=None, **sections):
        sections["adapter"] = {"methods": methods} | sections.get("adapter", {})
        return commands.run([write_run(name, **sections)], tmp_path / f"{name}.log", nproc, prepare)

    return train


@pytest.mark.parametrize(
    ("methods", "parallel", "nproc", "precision", "distributed", "optimizer"),
    [
        (MASKS, {}, 1, "bf16", False, "adam"),
        (MASKS, {"tensor": 2}, 2, "bf16", True, "adam"),
        (PRIOR, {"tensor": 2}, 2, "bf16", False, "adam"),
        (PRIOR, {"expert": 2}, 2, "fp32", True, "adam"),
        (MASKS, {"expert": 2}, 2, "fp32", True, "adam"),
        (MASKS, {"pipeline": 2}, 2, "bf16", False, "sgd"),
    ],
)
def test_split_equals_straight_bit_for_bit(
    train, tmp_path, methods, parallel, nproc, precision, distributed, optimizer
):
    train_section = {
        "precision": precision, "distributed_optimizer": distributed, "lora_plus_ratio": 2, "optimizer": optimizer,
    }  # fmt: skip
    sections = {"parallel": parallel, "train": train_section}
    code, text = train("straight", methods, nproc, **sections)
    assert code == 0, text
    code, text = train("split", methods, nproc, partial(kill_before_step, 5), **sections)
    assert code == KILLED, text
    code, text = train("split", methods, nproc, **sections)
    assert code == 0 and "going on after step 3" in text, text
    assert read_rows(tmp_path / "split") == read_rows(tmp_path / "straight")
    tensors, expected = (read_checkpoint(tmp_path / name / "checkpoints/step_6") for name in ("split", "straight"))
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name
    rows = read_rows(tmp_path / "split")
    if methods is PRIOR:
        assert any(name.startswith("methods.bora.theta.") for name in expected)
        assert rows[-1]["method/bora/prior"] > 0
        return
    # what is saved is sparse: the weights, Adam's moments and the fp32 master weights
    masks = {name: mask for name, mask in expected.items() if name.startswith("methods.lorasculpt.mask.")}
    factor = "language_model.decoder.layers.1.mlp.experts.lora_gate_B"
    mask = masks["methods.lorasculpt.mask.layers.1.mlp.gate.B"].bool()
    assert mask.sum() == len(mask) * int(0.2 * mask[0].numel())
    held = [name for name in expected if name.endswith(factor)]
    has_master, num_moments = precision == "bf16" or distributed, 2 if optimizer == "adam" else 0
    assert len(held) == 1 + has_master + num_moments
    for name in held:
        assert not expected[name][~mask].any() and expected[name][mask].any(), name
    assert rows[0]["method/lorasculpt/density"] == 1
    assert rows[0]["method/lorasculpt/waiting"] == 0
    kept = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    assert rows[-1]["method/lorasculpt/density"] == pytest.approx(kept) and kept < 0.5
    # an expert that had no token yet waits
    whole = sum(int(mask.flatten(-2).bool().all(-1).sum()) for name, mask in masks.items() if name.endswith(".B"))
    assert rows[-1]["method/lorasculpt/waiting"] == whole


@pytest.mark.parametrize(
    ("methods", "keys", "first", "then"),
    [
        (PRIOR, ("method/bora/prior",), {"pipeline": 2}, {"tensor": 2}),
        (MASKS, ("method/lorasculpt/conflict", "method/lorasculpt/density"), {"pipeline": 2}, {"tensor": 2}),
        # experts that had no token wait, one rank's alone
        (MASKS, ("method/lorasculpt/density", "method/lorasculpt/waiting"), {"tensor": 2}, {"expert": 2}),
    ],
)
def test_what_methods_remember_goes_on_under_another_layout(train, tmp_path, methods, keys, first, then):
    sections = {"adapter": {"dropout": 0.0}, "train": {"lr": 0.0001}}
    assert train("straight", methods, **sections)[0] == 0
    code, text = train("split", methods, 2, partial(kill_before_step, 4), parallel=first, **sections)
    assert code == KILLED, text
    code, text = train("split", methods, 2, parallel=then, **sections)
    assert code == 0, text
    assert methods is PRIOR or read_rows(tmp_path / "straight")[-1]["method/lorasculpt/waiting"] > 0
    for row, expected in zip(read_rows(tmp_path / "split"), read_rows(tmp_path / "straight"), strict=True):
        for key in ("loss", *keys):
            assert row[key] == pytest.approx(expected[key], rel=1e-4), key
    split, straight = (read_checkpoint(tmp_path / name / "checkpoints/step_6") for name in ("split", "straight"))
    for name, tensor in straight.items():
        if not name.startswith("optimizer."):
            difference = (split[name].double() - tensor.double()).norm()
            assert float(difference) <= 1e-4 * float(tensor.double().norm()) + 1e-6, name


def test_a_run_goes_on_only_with_the_methods_that_it_began_with(train, tmp_path):
    assert train("run", PRIOR, train={"steps": 4})[0] == 0
    code, text = train("run", PRIOR[:1], train={"steps": 5})
    assert code == INPUT_ERROR
    assert "written with adapter.methods ['bora', 'riemannian'], this run has ['bora']" in text
    code, text = train("run", [PRIOR[0] | {"tau": 0.2}, LAST], train={"steps": 5})
    assert code == 0, text
    assert "changed since step_4: adapter.methods" in text
