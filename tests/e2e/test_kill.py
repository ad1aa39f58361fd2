"""kill -9 at any moment leaves whole checkpoints, and a run that goes on from them as if it had not been killed.

Covered: a killed process, whatever it was doing. Not covered: a machine that loses power, where the disk may also lose
what was not synced.
"""

import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import commands
import pytest
from commands import read_checkpoint, read_rows, snapshot_saves

from mole_mega.checkpoint import files
from mole_mega.checkpoint.store import complete_checkpoints

SMALL = {"train": {"steps": 60, "global_batch_size": 2, "warmup_steps": 2, "schedule_steps": 60}}
EVERY_STEP = SMALL | {"checkpoint": {"every": 1, "keep": 2}}
KILLS = 20


def newest_whole_step(checkpoints: Path) -> int:
    """Check every checkpoint that calls itself complete; the newest one's step, 0 if there is none."""
    found = complete_checkpoints(checkpoints)
    for path in found:
        files.verify(path)
    return int(found[-1].name.removeprefix("step_")) if found else 0


def wait_for(condition, process_is_alive):
    deadline = time.monotonic() + commands.TIMEOUT
    while not condition():
        assert process_is_alive(), "ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def assert_same_end(run_dir, expected_run_dir, step):
    assert read_rows(run_dir) == read_rows(expected_run_dir)
    tensors = read_checkpoint(run_dir / f"checkpoints/step_{step}")
    expected = read_checkpoint(expected_run_dir / f"checkpoints/step_{step}")
    assert tensors.keys() == expected.keys()
    assert all(tensors[name].equal(tensor) for name, tensor in expected.items())


def test_a_run_killed_twenty_times_while_saving_ends_bit_for_bit_as_one_that_was_not(write_run, tmp_path):
    run, log = write_run("killed", **EVERY_STEP), tmp_path / "log"
    checkpoints = tmp_path / "killed" / "checkpoints"
    rng = random.Random(0)
    step = kills_inside = 0
    duration = 0.0
    for _ in range(KILLS):
        command = commands.start([run], log)
        (process,) = command.processes
        # each launch gets a random number of steps further, and dies a random time after a save has begun
        target = step + rng.randint(1, 2)
        begun = checkpoints / f".step_{target}.incomplete"
        wait_for(begun.exists, process.is_alive)
        if not duration:
            # the first save is left alone: it says how long one takes
            target, start = target + 1, time.monotonic()
            wait_for(begun.with_name(f"step_{target - 1}").exists, process.is_alive)
            duration = time.monotonic() - start
            begun = begun.with_name(f".step_{target}.incomplete")
            wait_for(begun.exists, process.is_alive)
        time.sleep(rng.uniform(0, duration))
        command.kill()
        assert process.exitcode == -signal.SIGKILL
        kills_inside += begun.exists()
        newest = newest_whole_step(checkpoints)
        assert newest >= max(step, target - 1), command.text
        step = newest
    # most kills hit a checkpoint half written
    assert kills_inside >= KILLS // 4, kills_inside
    assert step < 60
    end = step + 2
    steps = f"train.steps={end}"
    code, text = commands.run([run, steps], log)
    assert code == 0, text
    assert f"going on after step {step}" in text
    straight = write_run("straight", **SMALL | {"checkpoint": {"every": 0}})
    assert commands.run([straight, steps], log)[0] == 0
    assert_same_end(tmp_path / "killed", tmp_path / "straight", end)
    # nothing half written is left
    assert {path.name for path in checkpoints.iterdir()} == {f"step_{end - 1}", f"step_{end}", "latest"}


@pytest.fixture(scope="module")
def snapshots(make_run, tmp_path_factory):
    """(folder of a run of 4 steps, [what its checkpoints folder was before each file operation of its saves])."""
    folder = tmp_path_factory.mktemp("snapshots")
    steps = "train.steps=4"
    prepare = partial(snapshot_saves, folder / "taken")
    code, text = commands.run([make_run(folder, **EVERY_STEP), steps], folder / "log", prepare=prepare)
    assert code == 0, text
    return folder / "run", sorted((folder / "taken").iterdir(), key=lambda path: int(path.name))


def test_a_whole_checkpoint_is_there_before_every_single_file_operation_of_a_save(snapshots):
    _, taken = snapshots
    steps = [newest_whole_step(snapshot / "checkpoints") for snapshot in taken]
    assert len(taken) > 60
    assert steps == sorted(steps)
    assert set(steps) == {0, 1, 2, 3, 4}
    half_written = [list(snapshot.glob("checkpoints/.*")) for snapshot in taken]
    assert sum(map(bool, half_written)) > 20


def test_a_run_goes_on_from_what_a_kill_left_behind(snapshots, make_run, tmp_path):
    run_dir, taken = snapshots

    def names(snapshot):
        return sorted(path.name for path in (snapshot / "checkpoints").iterdir())

    # one snapshot of each kind during the third save, when an old checkpoint goes
    during_third = [s for s in taken if ".step_3.incomplete" in names(s) or newest_whole_step(s / "checkpoints") == 3]
    during_third = [s for s in during_third if ".step_4.incomplete" not in names(s)]
    kinds = [next(group) for _, group in itertools.groupby(during_third, key=names)]
    assert len(kinds) >= 4, [names(s) for s in kinds]
    for number, snapshot in enumerate(kinds):
        run = make_run(tmp_path, f"again_{number}", **EVERY_STEP)
        again = tmp_path / f"again_{number}"
        shutil.copytree(snapshot, again)
        shutil.copyfile(run_dir / "metrics.jsonl", again / "metrics.jsonl")
        code, text = commands.run([run, "train.steps=4"], tmp_path / "log")
        assert code == 0, (names(snapshot), text)
        assert_same_end(again, run_dir, 4)
        assert names(again) == ["latest", "step_3", "step_4"]


def test_the_whole_command_killed_on_two_processes_goes_on(write_run, tmp_path):
    """The real command line, torchrun included, killed as a machine would kill it: all processes at once."""
    sections = SMALL | {"parallel": {"expert": 2}, "checkpoint": {"every": 2}}
    sections["train"] = SMALL["train"] | {"global_batch_size": 4, "steps": 6}
    command = [Path(sys.executable).with_name("mole-mega"), "train", write_run("killed", **sections), "--nproc", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(tmp_path / "killed.log", "w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        wait_for((tmp_path / "killed/checkpoints/step_2").exists, lambda: process.poll() is None)
        # torchrun's workers have sessions of their own
        kill_tree(process.pid)
        process.wait()
    rows = read_rows(tmp_path / "killed")
    assert 2 <= len(rows) < 6
    again = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert again.returncode == 0, again.stderr
    assert "going on after step" in again.stdout
    assert commands.run([write_run("straight", **sections)], tmp_path / "log", nproc=2)[0] == 0
    assert_same_end(tmp_path / "killed", tmp_path / "straight", 6)


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and to all that it started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # the fields after the command's name, which may hold anything
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    tree = [pid]
    for parent in tree:
        tree += [child for child, its_parent in parents.items() if its_parent == parent]
    for process in tree:
        os.kill(process, signal.SIGKILL)
