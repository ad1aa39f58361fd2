"""`mole-mega verify-parallel`."""

import json
import subprocess
import sys

import commands
import pytest

from mole_mega.errors import ExitCode


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
    ],
)
def test_a_mistake_is_one_line(write_run, tmp_path, arguments, message):
    code, text = commands.run([write_run(), *arguments], tmp_path / "log", module="mole_mega.verify_parallel")
    assert code == ExitCode.INPUT_ERROR
    (line,) = text.splitlines()
    assert line.startswith("error: ") and message in line
