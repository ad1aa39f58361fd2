"""`mole-mega convert` as a user types it: the table, the exit codes, and no folder that only looks proved."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import commands
import pytest
import torch
from commands import EXAMPLE_BASE
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
INPUT_ERROR, CHECK_FAILED, INTERRUPTED = 2, 3, 130


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("log") / "log"


@pytest.fixture(scope="module")
def convert(log):
    """convert(*arguments, nproc, prepare): (exit code, what was printed)."""
    return partial(run_command, log)


def run_command(log, *arguments, nproc=1, prepare=None):
    return commands.run(arguments, log, nproc, prepare, "mole_mega.convert.command")


@pytest.fixture(scope="module")
def run_dir(make_run, tmp_path_factory):
    """A run of two steps; its learning rate makes B matter."""
    folder = tmp_path_factory.mktemp("run")
    path = make_run(folder, train={"steps": 2, "lr": 0.02, "warmup_steps": 1}, checkpoint={"every": 0})
    code, text = commands.run([path], folder / "log")
    assert code == 0, text
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run_dir, convert, tmp_path_factory):
    """{format: (folder, what was printed)}"""
    folder, made = tmp_path_factory.mktemp("exported"), {}
    for format in ("mole", "peft"):
        code, text = convert("megatron-to-hf", "--checkpoint", run_dir, "--format", format, "--out", folder / format)
        assert code == 0, text
        made[format] = folder / format, text
    return made


def rows(text):
    """{row of the table: its last word}."""
    lines = [line for line in text.splitlines() if line.endswith(("  equal", "  DIFFERS"))]
    return {line.split("  ")[0]: line.split()[-1] for line in lines}


def names(folder):
    return {path.name for path in folder.iterdir()}


def one_line(text):
    lines = text.strip().splitlines()
    return len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in text


# ---- proved


def test_an_import_ends_with_its_proof(convert, tmp_path):
    code, text = convert("hf-to-megatron", "--hf", EXAMPLE_BASE, "--out", tmp_path / "base")
    assert code == 0, text
    assert rows(text) == dict.fromkeys(("names", "tensors", "files", "logits"), "equal")
    assert f"wrote {tmp_path / 'base'}, hash " in text.splitlines()[-1]
    assert names(tmp_path) == {"base"}


def test_each_export_of_a_run_ends_with_its_proof(exported):
    assert rows(exported["mole"][1]) == dict.fromkeys(
        ("names", "tensors", "files", "base", "logits", "experts"), "equal"
    )
    parts = [*(f"expert_{i}" for i in range(4)), "router"]
    expected = [f"{part}: {row}" for part in parts for row in ("names", "tensors")]
    expected += ["base", *(f"expert_{i}: logits" for i in range(4))]
    assert rows(exported["peft"][1]) == dict.fromkeys(expected, "equal")


@pytest.mark.parametrize("format", [None, "llava"])
def test_a_base_goes_back_with_its_proof(format, base, convert, tmp_path):
    options = [] if format is None else ["--format", format]
    code, text = convert("megatron-to-hf", "--checkpoint", base, "--out", tmp_path / "back", *options)
    assert code == 0, text
    assert rows(text) == dict.fromkeys(("names", "tensors", "files", "logits"), "equal")
    theirs, back = (load_file(folder / "model.safetensors") for folder in (EXAMPLE_BASE, tmp_path / "back"))
    assert theirs.keys() == back.keys() and all(torch.equal(theirs[name], back[name]) for name in theirs)


def test_verify_in_processes_that_share_the_model(exported, run_dir, convert):
    arguments = ("verify", "--checkpoint", run_dir, "--hf", exported["mole"][0], "--tensor", 2)
    code, text = convert(*arguments, nproc=2)
    assert code == 0, text
    assert rows(text) == dict.fromkeys(("names", "tensors", "files", "base", "layout", "logits", "experts"), "equal")
    assert text.count("check ") == 1


# ---- not proved


def flip_a_bit(folder):
    path = folder / ("adapter_model.safetensors" if "peft" in str(folder) else "model.safetensors")
    tensors = load_file(path)
    name = next(name for name in tensors if "v_proj" in name and "vision" not in name)
    tensors[name].view(torch.int16)[0, 0] ^= 1
    save_file(tensors, path)
    return name


def test_verify_of_another_folder_ends_with_3_and_names_the_tensor(exported, run_dir, convert, tmp_path):
    shutil.copytree(exported["mole"][0], tmp_path / "mole")
    name = flip_a_bit(tmp_path / "mole")
    code, text = convert("verify", "--checkpoint", run_dir, "--hf", tmp_path / "mole")
    assert code == CHECK_FAILED
    assert rows(text)["tensors"] == "DIFFERS" and f"1 differ, first {name}" in text
    assert "are not the same model" in text.splitlines()[-1] and "Traceback" not in text


def spoil_what_is_written(rank):
    """For `prepare`: gate and up change places on the way in and back."""
    from mole_mega.convert import rules

    right = rules.gate_up()
    wrong = rules.Rule(lambda gate, up: right.to_ours(up, gate), lambda fused: right.to_hf(fused)[::-1])
    rules.gate_up = lambda: wrong


def fail_in_the_proof(rank):
    """For `prepare`: the proof itself ends in an error."""
    from mole_mega.convert import verify

    verify.verify = None


@pytest.mark.parametrize(
    ("prepare", "expected"), [(spoil_what_is_written, CHECK_FAILED), (fail_in_the_proof, 1)], ids=["differs", "error"]
)
def test_what_is_not_proved_does_not_keep_its_name(prepare, expected, convert, tmp_path):
    (tmp_path / "base.failed").mkdir()
    (tmp_path / "base.failed" / "of an earlier try").write_text("")
    code, text = convert("hf-to-megatron", "--hf", EXAMPLE_BASE, "--out", tmp_path / "base", prepare=prepare)
    assert code == expected
    assert names(tmp_path) == {"base.failed"} and "model.json" in names(tmp_path / "base.failed")
    assert "of an earlier try" not in names(tmp_path / "base.failed")
    assert f"what was written is now {tmp_path / 'base.failed'}" in text
    assert "wrote" not in text and "Traceback" not in text
    assert expected != CHECK_FAILED or rows(text)["logits"] == "DIFFERS"


# ---- refused


def test_an_existing_out_is_refused_and_left_alone(base, run_dir, exported, convert, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("")
    for arguments in (
        ("hf-to-megatron", "--hf", EXAMPLE_BASE),
        ("megatron-to-hf", "--checkpoint", base),
        ("megatron-to-hf", "--checkpoint", run_dir, "--format", "mole"),
        ("peft-to-megatron", "--peft", exported["peft"][0], "--base", base),
    ):
        code, text = convert(*arguments, "--out", out)
        assert code == INPUT_ERROR
        assert one_line(text) and "out exists; choose another folder" in text
    assert names(tmp_path) == {"out"} and names(out) == {"mine"}


def test_what_cannot_be_converted_is_told_in_one_line(base, run_dir, exported, convert, tmp_path):
    (tmp_path / "empty").mkdir()
    out = ("--out", tmp_path / "out")
    for arguments, says in (
        (("hf-to-megatron", "--hf", tmp_path / "gone", *out), "gone/config.json"),
        (("megatron-to-hf", "--checkpoint", tmp_path / "empty", *out), "is no base"),
        (("megatron-to-hf", "--checkpoint", run_dir, *out), "say how to write them, --format"),
        (("megatron-to-hf", "--checkpoint", run_dir, "--format", "merged", *out), "has 4 experts a layer"),
        (("megatron-to-hf", "--checkpoint", run_dir, "--format", "llava", *out), "is a run: no --format llava"),
        (("megatron-to-hf", "--checkpoint", base, "--format", "mole", *out), "is a base: no --format mole"),
        (("megatron-to-hf", "--checkpoint", base, "--base-reference", "x", *out), "--base-reference is for"),
        (("peft-to-megatron", "--peft", tmp_path / "empty", "--base", base, *out), "adapter_config.json"),
        (("verify", "--checkpoint", run_dir, "--hf", tmp_path / "empty"), "empty/config.json"),
        (("verify", "--checkpoint", base, "--hf", EXAMPLE_BASE, "--tensor", 2), "1 processes do not divide"),
    ):
        code, text = convert(*arguments)
        assert code == INPUT_ERROR and one_line(text) and says in text, text
    assert names(tmp_path) == {"empty"}


def test_from_a_checkout_the_tool_works_in_any_folder(tmp_path):
    tool = [sys.executable, ROOT / "tools" / "convert.py", "hf-to-megatron"]
    shown = subprocess.run([*tool, "--help"], cwd=tmp_path, env={}, capture_output=True, text=True)
    assert (shown.returncode, shown.stderr) == (0, "") and "--vision-tower" in shown.stdout
    wrong = subprocess.run([*tool, "--hf", "x"], cwd=tmp_path, env={}, capture_output=True, text=True)
    assert wrong.returncode == INPUT_ERROR and "required: --out" in wrong.stderr


# ---- a run from an adapter


@pytest.fixture(scope="module")
def start(exported, base, convert, tmp_path_factory):
    """Converted experts, and the settings that the command says a run needs."""
    out = tmp_path_factory.mktemp("start") / "start"
    code, text = convert("peft-to-megatron", "--peft", exported["peft"][0], "--base", base, "--out", out)
    assert code == 0, text
    assert set(rows(text).values()) == {"equal"} and len(rows(text)) == 14
    settings = text.split("start a run from it with ")[1].splitlines()[0].split()
    assert settings[0] == f"checkpoint.init_from={out}"
    return out, settings


def test_a_run_starts_from_a_converted_adapter(start, run_dir, write_run, tmp_path):
    _, settings = start
    path = write_run(train={"steps": 1, "lr": 1e-30, "warmup_steps": 0}, adapter={"rank": 2, "alpha": 1})
    code, text = commands.run([path, *settings], tmp_path / "log")
    assert code == 0, text
    step, before = (
        commands.read_checkpoint(f / "checkpoints" / n) for f, n in ((tmp_path / "run", "step_1"), (run_dir, "step_2"))
    )
    factors = [name for name in before if name.rpartition(".")[2].startswith("lora_") and not name.startswith("opt")]
    assert len(factors) == 4 * 14 and all(torch.equal(step[name], before[name]) for name in factors)


def test_how_experts_are_used_is_said_and_another_use_is_told(base, convert, write_run, tmp_path):
    keys = {
        "top_k": 2, "renormalize": True, "expert_parallel": "weights", "share_A": True, "scaling": "rslora",
    }  # fmt: skip
    path = write_run(train={"steps": 1}, adapter=keys)
    code, text = commands.run([path, f"run_dir={tmp_path / 'two'}"], tmp_path / "log")
    assert code == 0, text
    code, text = convert(
        "megatron-to-hf", "--checkpoint", tmp_path / "two", "--format", "peft", "--out", tmp_path / "p"
    )
    assert code == 0, text
    code, text = convert("peft-to-megatron", "--peft", tmp_path / "p", "--base", base, "--out", tmp_path / "start")
    assert code == 0, text
    settings = text.split("start a run from it with ")[1].splitlines()[0].split()
    assert {f"adapter.{key}={str(value).lower()}" for key, value in keys.items()} <= set(settings)
    plain = write_run(train={"steps": 1, "warmup_steps": 0}, adapter={"rank": 2, "alpha": 1})
    code, text = commands.run([plain, *settings, f"run_dir={tmp_path / 'same'}"], tmp_path / "log")
    assert code == 0 and "used otherwise" not in text, text
    other = [word for word in settings if "top_k" not in word and "renormalize" not in word]
    code, text = commands.run([plain, *other, f"run_dir={tmp_path / 'other'}"], tmp_path / "log")
    assert (
        code == 0 and "used otherwise than there: adapter.top_k (2 -> 1), adapter.renormalize (True -> False)" in text
    )


@pytest.mark.parametrize("key", ["alpha", "rank", "num_experts"])
def test_a_run_that_says_other_adapters_is_refused(key, start, write_run, tmp_path):
    _, settings = start
    wrong = [f"adapter.{key}=2" if word.startswith(f"adapter.{key}=") else word for word in settings]
    assert wrong != settings
    code, text = commands.run([write_run(), *wrong], tmp_path / "log")
    assert code == INPUT_ERROR
    assert f"made with adapter.{key} = " in text.splitlines()[-1] and "Traceback" not in text


# ---- interrupted


def signal_while_writing(number, which, rank):
    """For `prepare`: a signal to this process as the tensor of that number is read to be written."""
    from mole_mega.convert.hf_files import SafetensorsShard

    commands.heed_interrupts()
    read, count = SafetensorsShard.read, itertools.count(1)

    def read_or_signal(self, name):
        if next(count) == number:
            os.kill(os.getpid(), which)
            time.sleep(0.2)
        return read(self, name)

    SafetensorsShard.read = read_or_signal


def signal_the_proof(which, rank):
    """For `prepare`: a signal as the other model is asked."""
    from mole_mega.convert import probe

    commands.heed_interrupts()
    probe.ask_transformers = lambda *_: os.kill(os.getpid(), which) or time.sleep(10)


def kill_the_proof(rank):
    """For `prepare`: SIGKILL as the other model is asked."""
    from mole_mega.convert import probe

    probe.ask_transformers = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


IMPORT = ("hf-to-megatron", "--hf", EXAMPLE_BASE, "--out")


def test_nothing_is_written_into_a_checkpoint(base, convert, tmp_path):
    """One file more, and it would no longer be what its manifest says; a web page's manifest is another matter."""
    inside = shutil.copytree(base, tmp_path / "base")
    code, text = convert(*IMPORT, inside / "another")
    assert code == INPUT_ERROR and one_line(text) and "lies in the checkpoint" in text
    assert names(inside) == names(base)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "manifest.json").write_text("{}")
    assert convert(*IMPORT, tmp_path / "site" / "base")[0] == 0


def test_an_interrupt_while_writing_leaves_nothing(convert, tmp_path):
    code, text = convert(*IMPORT, tmp_path / "base", prepare=partial(signal_while_writing, 40, signal.SIGINT))
    assert code == INTERRUPTED, text
    assert not names(tmp_path) and text.splitlines()[-1] == "interrupted" and "Traceback" not in text


def test_a_kill_while_writing_leaves_what_is_no_base_and_no_hindrance(convert, tmp_path):
    kill = partial(signal_while_writing, 40, signal.SIGKILL)
    assert convert(*IMPORT, tmp_path / "base", prepare=kill)[0] == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name == "..base.unproved.incomplete"
    code, text = convert("megatron-to-hf", "--checkpoint", left, "--out", tmp_path / "out")
    assert code == INPUT_ERROR and one_line(text)
    assert convert(*IMPORT, tmp_path / "base")[0] == 0
    assert names(tmp_path) == {"base"}


def test_a_kill_during_the_proof_leaves_no_base(convert, tmp_path):
    assert convert(*IMPORT, tmp_path / "base", prepare=kill_the_proof)[0] == -signal.SIGKILL
    assert names(tmp_path) == {".base.unproved"}
    assert convert(*IMPORT, tmp_path / "base")[0] == 0
    assert names(tmp_path) == {"base"}


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_proof_leaves_it_unproved(convert, tmp_path, which):
    code, text = convert(*IMPORT, tmp_path / "base", prepare=partial(signal_the_proof, which))
    assert code == INTERRUPTED, text
    assert names(tmp_path) == {"base.failed"} and "Traceback" not in text
