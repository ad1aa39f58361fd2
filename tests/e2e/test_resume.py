"""A run that was stopped goes on as if nothing had happened (DESIGN 6.2)."""

import json
import os
import shutil
import signal
from functools import partial

import commands
import pytest
import torch
from commands import (
    heed_interrupts,
    interrupt_twice_before_step,
    kill_before_step,
    read_checkpoint,
    read_rows,
    terminate_before_step,
)

# as between layouts anywhere (DESIGN 6.1): what a tensor-parallel sum rounds differently, Adam magnifies
# of a tensor's norm, and of any one weight
WEIGHT_TOLERANCE, ABSOLUTE_TOLERANCE = 1e-4, 1e-6
INPUT_ERROR, KILLED, STOPPED_ON_SIGNAL, INTERRUPTED = 2, -9, 75, 130


@pytest.fixture
def train(write_run, tmp_path):
    """train(name, sections..., nproc, prepare) runs the command on run directory `name`: (exit code, text)."""

    def train(name, nproc=1, prepare=None, **sections):
        return commands.run([write_run(name, **sections)], tmp_path / f"{name}.log", nproc, prepare)

    return train


def assert_same_tensors(folder, expected_folder):
    """Bit for bit: adapters, projector, routers and Adam's moments."""
    tensors, expected = read_checkpoint(folder), read_checkpoint(expected_folder)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name
    names = " ".join(expected)
    assert all(part in names for part in ("lora_gate_A", "router.weight", "vision_projection", "exp_avg_sq"))


def read_mixture(run_dir):
    return json.loads((run_dir / "mixture.json").read_text())


TOP_2 = {"top_k": 2, "renormalize": True, "expert_parallel": "weights"}
LAYOUTS = [
    ({}, 1, "fp32", False, {}),
    ({}, 1, "bf16", True, {}),
    ({"expert": 2}, 2, "bf16", False, {}),
    ({"expert": 2}, 2, "bf16", True, TOP_2),
    ({"expert": 2}, 2, "fp32", True, {}),
    ({"tensor": 2}, 2, "fp32", False, {}),
    ({"pipeline": 2}, 2, "bf16", True, {}),
]


@pytest.mark.parametrize(("parallel", "nproc", "precision", "distributed", "adapter"), LAYOUTS)
def test_a_killed_run_ends_bit_for_bit_as_one_that_was_not(
    train, tmp_path, parallel, nproc, precision, distributed, adapter
):
    sections = {
        "parallel": parallel,
        "train": {"precision": precision, "distributed_optimizer": distributed},
        "adapter": adapter,
    }
    assert train("straight", nproc, **sections)[0] == 0
    # two steps after the checkpoint at step 3: what they wrote to metrics.jsonl has to go
    code, text = train("split", nproc, partial(kill_before_step, 6), **sections)
    assert code == KILLED
    assert "saved" in text
    assert [row["step"] for row in read_rows(tmp_path / "split")] == [1, 2, 3, 4, 5]
    code, text = train("split", nproc, **sections)
    assert code == 0
    assert "going on after step 3" in text
    assert "step 1/6" not in text
    assert read_rows(tmp_path / "split") == read_rows(tmp_path / "straight")
    assert_same_tensors(tmp_path / "split/checkpoints/step_6", tmp_path / "straight/checkpoints/step_6")
    assert (tmp_path / "split/checkpoints/latest").read_text().strip() == "step_6"
    # what was trained on before the checkpoint counts, what was lost after it does not
    mixture = read_mixture(tmp_path / "split")
    assert mixture == read_mixture(tmp_path / "straight")
    assert mixture["samples"] == mixture["samples_counted"] == 24
    counts = [(entry["rows"], entry["share_asked"]) for entry in mixture["sources"].values()]
    assert counts == [(18, 0.75), (6, 0.25)]
    tokens = sum(row["tokens"] for row in read_rows(tmp_path / "split"))
    assert sum(entry["tokens"] for entry in mixture["sources"].values()) == tokens
    learned = sum(row["loss_tokens"] for row in read_rows(tmp_path / "split"))
    assert sum(entry["labelled_tokens"] for entry in mixture["sources"].values()) == learned


@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize(
    ("number", "code", "why"),
    [(signal.SIGTERM, STOPPED_ON_SIGNAL, "on a signal"), (signal.SIGINT, INTERRUPTED, "by Ctrl-C")],
)
def test_a_signal_to_any_rank_saves_and_exits_with_its_code_and_the_same_command_goes_on(
    train, tmp_path, nproc, number, code, why
):
    sections = {"checkpoint": {"every": 0}, "parallel": {"expert": nproc}}
    stop = partial(terminate_before_step, 4, nproc - 1, number=number)
    stopped_with, text = train("split", nproc, stop, **sections)
    assert stopped_with == code, text
    saved = tmp_path / "split/checkpoints/step_4"
    assert f"stopped {why} after step 4, saved in {saved}: run the same command again to go on\n" in text
    # the one who is typing is told at once; it is rank 0 that speaks
    hint = "Ctrl-C: saving and stopping after this step; once more stops at once, without saving\n"
    assert text.count(hint) == (number == signal.SIGINT and nproc == 1)
    assert [row["step"] for row in read_rows(tmp_path / "split")] == [1, 2, 3, 4]
    code, text = train("split", nproc, **sections)
    assert code == 0
    assert "going on after step 4" in text
    assert train("straight", nproc, **sections)[0] == 0
    assert read_rows(tmp_path / "split") == read_rows(tmp_path / "straight")
    assert_same_tensors(tmp_path / "split/checkpoints/step_6", tmp_path / "straight/checkpoints/step_6")


def test_a_second_ctrl_c_stops_at_once_and_saves_nothing(train, tmp_path):
    code, text = train("run", prepare=partial(interrupt_twice_before_step, 5))
    assert code == -signal.SIGINT, text
    assert "Ctrl-C: saving and stopping after this step" in text and "stopped" not in text.splitlines()[-1]
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step_*")] == ["step_3"]


def background(prepare, rank):
    """For `prepare`: a shell without job control starts what is in the background so."""
    prepare(rank)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def test_a_run_in_the_background_does_not_hear_what_is_typed(train):
    stop = partial(terminate_before_step, 4, 0, number=signal.SIGINT)
    code, text = train("run", prepare=partial(background, stop))
    assert code == 0, text
    assert "Ctrl-C" not in text


def test_ctrl_c_before_training_is_told(train, tmp_path):
    code, text = train("run", prepare=interrupt_the_start)
    assert (code, text) == (INTERRUPTED, "interrupted\n")


def interrupt_the_start(rank):
    """For `prepare`: Ctrl-C as the base is looked at."""
    from mole_mega.training import trainer

    heed_interrupts()
    trainer.read_size = lambda *_: os.kill(os.getpid(), signal.SIGINT)


def test_the_last_step_is_logged_whatever_the_interval(train, tmp_path):
    sections = {"adapter": {"method": "lora"}, "train": {"steps": 3}, "checkpoint": {"every": 0}}
    assert train("run", **sections, monitor={"every": 2})[0] == 0
    assert [row["step"] for row in read_rows(tmp_path / "run")] == [2, 3]


def test_a_finished_run_that_is_started_again_does_nothing(train, tmp_path):
    sections = {"train": {"steps": 2}, "checkpoint": {"every": 0}}
    assert train("run", **sections)[0] == 0
    rows = read_rows(tmp_path / "run")
    names = ("checkpoints/step_2/manifest.json", "mixture.json", "config.yaml", "events.jsonl")
    before = {name: (tmp_path / "run" / name).read_bytes() for name in names}
    changed_data = {"data": {"weights_in": "tokens", "temperature": 2.0}}
    for steps, more in ((2, {}), (1, {}), (2, changed_data)):
        code, text = train("run", **(sections | {"train": {"steps": steps}} | more))
        assert code == 0
        assert f"nothing to train: this run already has 2 steps, of {steps} asked (train.steps)" in text
        assert "saved" not in text and "done" not in text and "source mixed" not in text
        assert read_rows(tmp_path / "run") == rows
        assert {name: (tmp_path / "run" / name).read_bytes() for name in names} == before


def test_a_run_goes_on_only_with_the_adapters_that_it_began_with(train, tmp_path):
    """What the tensors' shapes do not show, too; and a finished run keeps the config that it was trained with."""
    sections = {"train": {"steps": 1}}
    assert train("run", **sections)[0] == 0
    config = (tmp_path / "run/config.yaml").read_bytes()
    for key, value, old in (("rank", 8, 4), ("alpha", 16, 8.0), ("gate", "none", "prob")):
        code, text = train("run", adapter={key: value}, **sections)
        assert code == INPUT_ERROR, text
        assert f"step_1 was written with adapter.{key} = {old}, this run has {value}" in text
    code, text = train("run", train={"steps": 1, "lr": 1.0})
    assert code == 0, text
    assert (tmp_path / "run/config.yaml").read_bytes() == config


def test_what_plain_lora_does_not_hear_changes_nothing_in_it(train, tmp_path):
    """Every key of a mixture changed in the middle of a run: told, and bit for bit the run without them."""
    plain = {"method": "lora", "num_experts": 3, "z_loss_weight": 0.0}
    unheard = {
        "method": "lora", "num_experts": 8, "gate": "none", "top_k": 2, "router_scope": "task", "renormalize": True,
        "rescale_gate": True, "share_A": True, "shared_B": 2, "mix_temperature": 0.5, "expert_form": "mlp",
        "router_score": "sigmoid", "score_bias_rate": 0.1, "balance_weight": 0.5, "balance_scope": "model",
        "z_loss_weight": 0.1, "expert_parallel": "weights", "router_bias": False,
    }  # fmt: skip
    validation = {"every": 1}  # and no data for it
    code, text = train("straight", adapter=plain, train={"steps": 3}, validation=validation)
    assert code == 0, text
    assert "have no effect" not in text
    assert "validation after step" not in text
    assert "validation.every is 1, but data.validation is empty: nothing is validated\n" in text
    short = {"steps": 2, "schedule_steps": 3}
    assert train("split", adapter=plain, train=short)[0] == 0
    code, text = train("split", adapter=unheard, train={"steps": 3, "router_lr": 1.0})
    assert code == 0, text
    (line,) = [line for line in text.splitlines() if "have no effect" in line]
    assert line.startswith("adapter.method lora: these keys have no effect: adapter.num_experts 8, adapter.gate none,")
    assert all(f"adapter.{key} " in line for key in unheard.keys() - {"method"}) and "train.router_lr 1.0" in line
    assert changed(text) == []
    rows = [[{**row, "lr/router": None} for row in read_rows(tmp_path / name)] for name in ("split", "straight")]
    assert rows[0] == rows[1]
    tensors, expected = (read_checkpoint(tmp_path / name / "checkpoints/step_3") for name in ("split", "straight"))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def changed(text):
    return [line for line in text.splitlines() if line.startswith("changed since")]


def test_what_a_run_goes_on_with_otherwise_than_before_is_said(train, tmp_path, data):
    first = {"steps": 1, "schedule_steps": 3}
    assert train("run", train=first)[0] == 0
    code, text = train("run", train=first | {"steps": 2}, monitor={"every": 2}, checkpoint={"keep": 3})
    assert code == 0, text
    assert changed(text) == []
    code, text = train(
        "run",
        adapter={"balance_weight": 0.5},
        train={"steps": 4, "lr": 0.001},
        data={"sources": [{"name": "text", "path": str(data / "text.json")}]},
    )
    assert code == 0, text
    assert changed(text) == [
        "changed since step_2: adapter.balance_weight 0.01 -> 0.5, train.schedule_steps 3 -> 4 (follows train.steps, "
        "which moves the learning rates), train.lr 0.003 -> 0.001, data.sources"
    ]
    assert "lr: 0.001" in (tmp_path / "run/config.yaml").read_text()
    # each mixture is held against the steps in which it was asked
    assert "this mixture is asked from step 3 on, another one before:" in text
    assert "source text: 9 rows, asked 100.0% of the samples, planned 8 of 8 samples = 0.89 epochs" in text
    mixture = read_mixture(tmp_path / "run")
    assert [(part["from_step"], part["to_step"], list(part["sources"])) for part in mixture["phases"]] == [
        (1, 2, ["mixed", "text"]), (3, 4, ["text"]),
    ]  # fmt: skip
    counts = {name: (entry["share_asked"], entry["drawn"], entry["rows"]) for name, entry in mixture["sources"].items()}
    assert counts == {"text": (0.625, 10, 10), "mixed": (0.375, 6, 6)}
    assert mixture["samples"] == mixture["samples_counted"] == 16


def test_a_source_of_other_contents_is_said(train, tmp_path, data):
    copy = shutil.copyfile(data / "text.json", tmp_path / "text.json")
    sources = {"sources": [{"name": "text", "path": str(copy)}]}
    assert train("run", data=sources, train={"steps": 1, "schedule_steps": 3})[0] == 0
    before = copy.stat().st_size
    copy.write_text(copy.read_text().replace('"answer ', '"another answer ', 1))
    code, text = train("run", data=sources, train={"steps": 2, "schedule_steps": 3})
    assert code == 0, text
    now = before + len("another ")
    assert changed(text) == [f"changed since step_1: the files of data.sources 'text' ({before:,} bytes -> {now:,})"]
    code, text = train("run", data=sources, train={"steps": 3, "schedule_steps": 3})
    assert code == 0 and changed(text) == []


def test_what_is_set_and_not_heard_when_a_run_goes_on_is_said(train, tmp_path):
    assert train("run", train={"steps": 2, "schedule_steps": 4}, checkpoint={"every": 1})[0] == 0
    checkpoints = tmp_path / "run/checkpoints"
    (checkpoints / "latest").write_text("step_1\n")
    code, text = train("run", train={"steps": 3, "schedule_steps": 4}, checkpoint={"init_from": "nowhere"})
    assert code == 0, text
    assert "latest names step_1, which is older: remove step_2 to go on from there" in text.splitlines()
    assert "checkpoint.init_from is for a run that has no checkpoint yet: not heard" in text.splitlines()
    code, text = train("run", train={"steps": 4, "schedule_steps": 4})
    assert code == 0 and "latest names" not in text and "not heard" not in text
    (checkpoints / "latest").unlink()
    code, text = train("run", train={"steps": 4, "schedule_steps": 4})
    assert code == 0 and "going on after step 4" in text and "latest names" not in text


def test_answers_of_steps_that_are_trained_again_are_forgotten(train, tmp_path, data):
    validation = [{"name": "text", "path": str(data / "text.json")}]
    sections = {
        "data": {"validation": validation},
        "validation": {"every": 1, "samples": 1, "generate": True, "max_new_tokens": 2},
        "checkpoint": {"every": 1},
    }
    assert train("run", train={"steps": 2, "schedule_steps": 3}, **sections)[0] == 0
    answers, checkpoints = tmp_path / "run/eval", tmp_path / "run/checkpoints"
    (answers / "step_2_eval.jsonl").write_text("")  # of `mole-mega eval`, which was asked for
    assert {path.name for path in answers.iterdir()} == {"step_1.jsonl", "step_2.jsonl", "step_2_eval.jsonl"}
    shutil.rmtree(checkpoints / "step_2")
    (checkpoints / "latest").write_text("step_1\n")
    sections["validation"]["every"] = 0
    assert train("run", train={"steps": 2, "schedule_steps": 3}, **sections)[0] == 0
    assert {path.name for path in answers.iterdir()} == {"step_1.jsonl", "step_2_eval.jsonl"}


def test_recompute_draws_the_dropout_that_the_first_pass_drew(train, tmp_path):
    for recompute in ("none", "full"):
        assert train(recompute, 2, parallel={"tensor": 2}, train={"recompute": recompute, "steps": 2})[0] == 0
    assert read_rows(tmp_path / "full") == read_rows(tmp_path / "none")


# fp32 and without dropout, whose draws belong to a layout; small steps, as Adam magnifies rounding by their size
EXACT = {"adapter": {"dropout": 0.0}, "train": {"lr": 0.0001}}
FOUR = {"tensor": 2, "expert": 2}


@pytest.fixture(scope="module")
def straight(make_run, tmp_path_factory):
    """(rows, final weights, mixture) of an unbroken run on one process."""
    folder = tmp_path_factory.mktemp("straight")
    code, text = commands.run([make_run(folder, **EXACT)], folder / "log")
    assert code == 0, text
    run = folder / "run"
    return read_rows(run), read_checkpoint(run / "checkpoints/step_6"), read_mixture(run)


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize(
    ("first", "then"),
    [((FOUR, 4), ({}, 1)), (({}, 1), (FOUR, 4)), (({"pipeline": 2}, 2), ({"expert": 2}, 2)), (({}, 1), ({}, 2))],
    ids=["TP 2 x EP 2 to one process", "one process to TP 2 x EP 2", "PP 2 to EP 2", "one process to DP 2"],
)
def test_a_checkpoint_goes_on_under_another_layout(train, tmp_path, straight, first, then, distributed):
    sections = EXACT | {"train": EXACT["train"] | {"distributed_optimizer": distributed}}
    (layout, nproc), (next_layout, next_nproc) = first, then
    code, _ = train("split", nproc, partial(kill_before_step, 4), parallel=layout, **sections)
    assert code == KILLED
    code, text = train("split", next_nproc, parallel=next_layout, **sections)
    assert code == 0, text
    assert "going on after step 3" in text
    rows, weights, mixture = straight
    assert read_mixture(tmp_path / "split") == mixture
    for row, expected in zip(read_rows(tmp_path / "split"), rows, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        # the same samples in the same order
        counts = ("step", "tokens", "loss_tokens", "lr")
        assert {key: row[key] for key in counts} == {key: expected[key] for key in counts}
    measured = read_checkpoint(tmp_path / "split/checkpoints/step_6")
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("optimizer.")}
    differences = {name: (measured[name] - tensor) for name, tensor in weights.items()}
    assert max(float(difference.abs().max()) for difference in differences.values()) <= ABSOLUTE_TOLERANCE
    relative = {name: float(differences[name].norm() / tensor.norm()) for name, tensor in weights.items()}
    assert max(relative.values()) <= WEIGHT_TOLERANCE
