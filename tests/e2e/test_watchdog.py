"""A run that stands still, or loses a process, says which rank it waits for, and ends with 4 in a set time."""

import os
import re
import signal
import time
from functools import partial

import commands
import pytest

STOPPED_ITSELF = 4


def hang_before_step(step, on_rank, rank):
    """For `prepare`: one rank's data do not come."""
    if rank == on_rank:
        commands._at_step(step, partial(time.sleep, 60))


def die_before_step(step, on_rank, rank):
    """For `prepare`: one rank is killed."""
    if rank == on_rank:
        commands._at_step(step, partial(os.kill, os.getpid(), signal.SIGKILL))


def test_a_rank_that_hangs_is_named_with_what_it_does_and_where_the_others_wait(write_run, tmp_path):
    run = write_run(train={"steps": 4, "hang_seconds": 3})
    started = time.monotonic()
    code, text = commands.run([run], tmp_path / "log", 2, partial(hang_before_step, 3, 1))
    assert code == STOPPED_ITSELF, text
    assert time.monotonic() - started < 45
    assert "rank 1 on " in text and "late: at step 3, reading data" in text
    (line,) = (line for line in text.splitlines() if "error (rank 0" in line)
    assert "no progress for" in line and "step 3, passes and update, in " in line
    assert "Traceback" not in text


def test_a_rank_that_is_gone_is_named(write_run, tmp_path):
    run = write_run(train={"steps": 4, "hang_seconds": 5})
    command = commands.start([run], tmp_path / "log", 2, partial(die_before_step, 3, 1))
    (survivor,) = (process for rank, process in enumerate(command.processes) if rank == 0)
    survivor.join(45)
    assert survivor.exitcode == STOPPED_ITSELF, command.text
    command.kill()
    assert re.search(r"no sign of life from rank 1 on \S+, last seen at step [0-3], ", command.text), command.text
    assert "Traceback" not in command.text


@pytest.mark.parametrize("seconds", [0, 1000])
def test_a_run_that_moves_is_left_alone(write_run, tmp_path, seconds):
    run = write_run(train={"steps": 2, "hang_seconds": seconds})
    code, text = commands.run([run], tmp_path / "log", 2)
    assert code == 0 and "no progress" not in text, text
