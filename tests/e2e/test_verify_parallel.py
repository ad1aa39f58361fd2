"""`mole-mega verify-parallel`."""

import json
import subprocess
import sys

import commands
import pytest

from mole_mega import verify_parallel
from mole_mega.errors import ConfigError, ExitCode
from mole_mega.training import parity


def test_it_prints_the_table_and_nothing_else(write_run, tmp_path):
    """Started as a user does, and not in a fork of a process that has imported everything: imports warn too."""
    out = tmp_path / "rows.json"
    command = [sys.executable, "-m", "mole_mega.cli", "verify-parallel", write_run(), "--max-processes", "2"]
    done = subprocess.run([*command, "--json", out], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (ExitCode.DONE, "")
    head, *rows, note = done.stdout.splitlines()
    assert head.split()[:2] == ["case", "processes"]
    assert note.startswith("equal: at most 1e-05 from one process in loss and gradients, 1e-04 in weights")
    names = ["TP 2 + SP", "PP 2", "EP 2", "DP 2"]
    assert [row.split("  ")[0] for row in rows] == names
    assert all(row.endswith("equal") for row in rows)
    told = json.loads(out.read_text())
    assert [row["case"] for row in told] == names
    for row in told:
        assert row["equal"] and row["processes"] == 2
        assert max(row["loss"], row["gradient"]) <= 1e-5 and row["weight"] <= 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.lrr=1"], "unknown config key train.lrr"),
        (["--json", "/proc/none/rows.json"], "--json: "),
        (["model.base=nowhere"], "nowhere is not a complete checkpoint"),
        (["--max-processes", "1"], "--max-processes must be at least 2, got 1"),
    ],
)
def test_a_mistake_is_one_line(write_run, tmp_path, arguments, message):
    code, text = commands.run([write_run(), *arguments], tmp_path / "log", module="mole_mega.verify_parallel")
    assert code == ExitCode.INPUT_ERROR
    (line,) = text.splitlines()
    assert line.startswith("error: ") and message in line


NO_ROUTER = ("gate=none", "balance_weight=0", "z_loss_weight=0")
TASK = ["data.sources=[{name: only, path: made}]", "data.validation=[]"]
TASK += [f"adapter.{option}" for option in ("router_scope=task", "num_experts=1", *NO_ROUTER)]
SPARSE = "{name: lorasculpt, density: 0.001, prune_step: 2, conflict_weight: 0.0}"


@pytest.mark.parametrize(
    "overrides", [TASK, ["adapter.rank=1", f"adapter.methods=[{SPARSE}]"]], ids=["one source", "hardly a number left"]
)
def test_what_is_little_in_a_run_can_be_proved_too(write_run, tmp_path, overrides):
    """A task's only expert; a density that of a small model's factors would keep nothing."""
    arguments = [write_run(), *overrides, "--max-processes", "2"]
    code, text = commands.run(arguments, tmp_path / "log", module="mole_mega.verify_parallel")
    assert code == ExitCode.DONE, text
    assert "TP 2 + SP" in text and "DIFFERS" not in text


@pytest.fixture
def recording(alone, monkeypatch):
    """recording(code): what records is this process itself; or nothing does, and its exit code is that."""

    def refuse(*_):
        raise ConfigError("density 0.1 keeps none of the 8 numbers")

    monkeypatch.setattr(parity, "record", refuse)
    monkeypatch.setattr(verify_parallel, "quiet_libraries", lambda: None)

    def record(code=None):
        run = (lambda *_: code) if code else lambda module, arguments, nproc: parity.main(arguments)
        monkeypatch.setattr(parity, "launch_worker", run)

    return record


def test_a_process_that_cannot_record_says_so_in_one_line(write_run, recording, capfd):
    recording()
    assert verify_parallel.main([str(write_run())]) == ExitCode.INPUT_ERROR
    assert capfd.readouterr() == ("", "error: density 0.1 keeps none of the 8 numbers\n")
    verify_parallel.main([str(write_run()), "--debug"])
    told = capfd.readouterr().err
    assert "ConfigError: density 0.1" in told and "on 1 processes ended with exit code 2" in told


@pytest.mark.parametrize("code", [ExitCode.STOPPED_ON_SIGNAL, ExitCode.INTERRUPTED])
def test_ended_by_a_signal_it_keeps_nothing_and_asks_for_no_restart(write_run, recording, capfd, code):
    recording(code)
    assert verify_parallel.main([str(write_run())]) == ExitCode.INTERRUPTED
    assert capfd.readouterr() == ("", "interrupted\n")


def test_where_no_layout_is_left_it_has_checked_nothing(write_run, monkeypatch, capsys):
    def refuse(candidate):
        raise ConfigError("not this one")

    monkeypatch.setattr(verify_parallel.config, "validate", refuse)
    monkeypatch.setattr(verify_parallel, "quiet_libraries", lambda: None)
    assert verify_parallel.main([str(write_run()), "--max-processes", "2"]) == ExitCode.NOTHING_CHECKED
    assert "left out PP 2: not this one" in capsys.readouterr().out.splitlines()
