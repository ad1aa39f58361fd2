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


def hang_in_the_passes(step, on_rank, rank):
    """For `prepare`: one rank does not come to the collectives of a step that it has begun as the others have."""
    from mole_mega.training.step import Stepper

    backward = Stepper.backward

    def backward_or_hang(self, *args, **kwargs):
        if self.applied_steps + 1 == step:
            time.sleep(60)
        return backward(self, *args, **kwargs)

    if rank == on_rank:
        Stepper.backward = backward_or_hang


def die_before_step(step, on_rank, rank):
    """For `prepare`: one rank is killed."""
    if rank == on_rank:
        commands._at_step(step, partial(os.kill, os.getpid(), signal.SIGKILL))


STEP, TRAINER = r"mole_mega/training/step\.py:\d+", r"mole_mega/training/trainer\.py:\d+"
READING = rf"reading data, at {TRAINER} Trainer\._step"
BETWEEN_STAGES = r"wait at megatron/core/pipeline_parallel/p2p_communication\.py:\d+ \w+\._communicate\w*"


@pytest.mark.parametrize(
    ("layout", "hang", "waits", "late"),
    [
        ({}, hang_before_step, rf"all_reduce at {STEP} Stepper\._finalize", READING),
        ({"pipeline": 2}, hang_before_step, BETWEEN_STAGES, READING),
        ({}, hang_in_the_passes, rf"all_reduce at {STEP} Stepper\._finalize",
         rf"passes and update, at {STEP} Stepper\.train_step"),
    ],
    ids=["between steps", "between stages", "in one place"],
)  # fmt: skip
def test_a_rank_that_hangs_is_named_with_its_line_and_the_collective_of_the_others(
    write_run, tmp_path, layout, hang, waits, late
):
    run = write_run(train={"steps": 4, "hang_seconds": 3}, parallel=layout)
    started = time.monotonic()
    code, text = commands.run([run], tmp_path / "log", 2, partial(hang, 3, 1))
    assert code == STOPPED_ITSELF, text
    assert time.monotonic() - started < 45
    (line,) = (line for line in text.splitlines() if "error (rank 0" in line)
    here = rf"no progress for \d+ s at step 3, passes and update, in {waits}"
    assert re.search(rf"{here}: rank 1 on \S+ late: at step 3, {late}$", line), line
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


def score_and_write_slowly(rank):
    """For `prepare`: a validation whose batches each take half of the patience."""
    from mole_mega.training import evaluation, step

    score, greedy = step.Evaluator._score, evaluation.greedy

    def slow_score(*args):
        time.sleep(1.5)
        return score(*args)

    def slow_greedy(*args):
        time.sleep(1.5)
        return greedy(*args)

    step.Evaluator._score, evaluation.greedy = slow_score, slow_greedy


@pytest.mark.parametrize("generate", [False, True])
def test_a_long_validation_is_not_taken_for_a_hang(write_run, data, tmp_path, generate):
    sources = [{"name": "text", "path": str(data / "text.json")}]
    run = write_run(
        train={"steps": 1, "hang_seconds": 3, "micro_batch_size": 1},
        data={"sources": sources, "validation": sources},
        validation={"every": 1, "samples": 10, "generate": generate, "max_new_tokens": 2},
    )
    started = time.monotonic()
    code, text = commands.run([run], tmp_path / "log", 2, score_and_write_slowly)
    assert code == 0, text
    assert "validation after step 1: loss/text" in text
    assert time.monotonic() - started > 5 * 1.5 * (1 + generate)  # more than the patience in each part
