"""What a distributed run finds out before it trains: processes that do not come, or come with something else."""

import os
import re
import signal
from functools import partial

import commands
import pytest
from torch.distributed import TCPStore

from mole_mega.outputs import holding

INPUT_ERROR, STOPPED_ON_SIGNAL = 2, 75


def other_learning_rate(rank):
    """For `prepare`: rank 1 reads another config."""
    if rank == 1:
        import dataclasses

        from mole_mega import config

        load = config.load

        def load_other(path, overrides=()):
            run = load(path, overrides)
            return dataclasses.replace(run, train=dataclasses.replace(run.train, lr=0.5))

        config.load = load_other


def other_layout(rank):
    """For `prepare`: rank 1 would make other groups, and wait in them for ever."""
    if rank == 1:
        import dataclasses

        from mole_mega import config

        load = config.load
        tensor_parallel = config.ParallelConfig(tensor=2)
        config.load = lambda *args: dataclasses.replace(load(*args), parallel=tensor_parallel)


def other_version(rank):
    """For `prepare`: rank 1 has another transformers."""
    if rank == 1:
        import importlib.metadata

        version = importlib.metadata.version
        importlib.metadata.version = lambda name: "4.99" if name == "transformers" else version(name)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (other_learning_rate, "rank 1 differs from rank 0 in train.lr: 0.5 there, 0.003 on rank 0"),
        (other_layout, "rank 1 differs from rank 0 in parallel.tensor: 2 there, 1 on rank 0"),
        (other_version, "rank 1 differs from rank 0 in transformers: 4.99 there, "),
    ],
)
def test_a_rank_that_differs_is_named_with_what_it_has(write_run, tmp_path, prepare, message):
    code, text = commands.run([write_run()], tmp_path / "log", 2, prepare)
    assert code == INPUT_ERROR, text
    (line,) = text.splitlines()
    assert line.startswith(f"error: {message}")
    assert not (tmp_path / "run").exists()


def other_base(rank):
    """For `prepare`: rank 1's host has another base at the same path."""
    if rank == 1:
        from mole_mega.checkpoint import files

        files.folder_hash = lambda folder: "another"


def other_checkpoints(rank):
    """For `prepare`: rank 1's host has a run_dir of its own."""
    if rank == 1:
        from mole_mega.checkpoint.store import CheckpointStore

        CheckpointStore.latest = lambda self: None


def other_rows(rank):
    """For `prepare`: rank 1's host has a longer file."""
    if rank == 1:
        import dataclasses

        from mole_mega.training import trainer

        build = trainer.build_run_loader

        def build_other(*args):
            loader = build(*args)
            loader.plan = dataclasses.replace(loader.plan, sizes=tuple(size + 1 for size in loader.plan.sizes))
            return loader

        trainer.build_run_loader = build_other


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (other_base, r"the hash of model\.base: another there, \w+ on rank 0"),
        (other_checkpoints, r"run_dir's newest checkpoint: none there, step_\d+ on rank 0"),
        (other_rows, r"the rows of data\.sources '\w+': (\d+) there, (\d+) on rank 0"),
    ],
)
def test_hosts_that_do_not_share_their_files_do_not_train(write_run, tmp_path, prepare, message):
    assert commands.run([write_run()], tmp_path / "log", 2)[0] == 0
    before = sorted((tmp_path / "run").rglob("*"))
    code, text = commands.run([write_run(), "train.steps=20"], tmp_path / "log", 2, prepare)
    assert code == INPUT_ERROR, text
    (line,) = text.splitlines()
    assert re.match(f"error: rank 1 differs from rank 0 in {message}", line), line
    assert sorted((tmp_path / "run").rglob("*")) == before


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_that_another_process_is_at_is_left_alone(write_run, tmp_path, world_size):
    run = tmp_path / "run"
    with holding(run, "run_dir"):
        code, text = commands.run([write_run()], tmp_path / "log", world_size)
        assert [path.name for path in run.iterdir()] == [".lock"]
    assert code == INPUT_ERROR, text
    (line,) = text.splitlines()
    assert line.startswith(f"error: run_dir: process {os.getpid()} on ") and f"is already at work in {run};" in line
    assert commands.run([write_run()], tmp_path / "log", world_size)[0] == 0


def other_steps(rank):
    """For `prepare`: rank 1 is asked for something else."""
    if rank == 1:
        from mole_mega.conflict import command

        parse = command.parse
        command.parse = lambda argv: parse([*argv, "--steps", "7"])


@pytest.mark.parametrize(
    ("module", "arguments", "prepare", "message"),
    [
        ("evaluate", ["--base"], other_learning_rate, "train.lr: 0.5 there, 0.003 on rank 0"),
        ("evaluate", ["--base"], other_version, "transformers: 4.99 there, "),
        ("conflict.command", [], other_learning_rate, "train.lr: 0.5 there, 0.003 on rank 0"),
        ("conflict.command", [], other_steps, "--steps: 7 there, 50 on rank 0"),
    ],
)
def test_commands_that_only_look_compare_their_ranks_too(
    write_run, data, tmp_path, module, arguments, prepare, message
):
    sources = [{"name": name, "path": str(data / "text.json")} for name in ("text", "again")]
    run = write_run(data={"sources": sources, "validation": sources[:1]})
    code, text = commands.run([run, *arguments], tmp_path / "log", 2, prepare, module=f"mole_mega.{module}")
    assert code == INPUT_ERROR, text
    (line,) = text.splitlines()
    assert line.startswith(f"error: rank 1 differs from rank 0 in {message}")


def alone_as(rank, port, _):
    """For `prepare`: be one rank of two, whose other never comes."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@pytest.mark.parametrize(
    ("rank", "message"),
    [(0, "error: not all processes came to"), (1, "error (rank 1): nobody answered at")],
)
def test_a_rendezvous_in_vain_ends_in_time_with_host_and_port(write_run, tmp_path, rank, message):
    port = commands.free_port()
    arguments = [write_run(), "--rendezvous-timeout", 1]
    code, text = commands.run(arguments, tmp_path / "log", prepare=partial(alone_as, rank, port))
    assert code == INPUT_ERROR, text
    assert f"{message} 127.0.0.1:{port} (MASTER_ADDR:MASTER_PORT) within 1 s" in text
    assert len(text.splitlines()) == 1, text


def as_under_torchrun(port, _):
    """For `prepare`: one rank of two, whose store torchrun's agent keeps."""
    alone_as(0, port, _)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"


def test_how_many_processes_came_is_said_where_the_agent_waits_for_none(write_run, tmp_path):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    arguments = [write_run(), "--rendezvous-timeout", 1]
    code, text = commands.run(arguments, tmp_path / "log", prepare=partial(as_under_torchrun, store.port))
    assert code == INPUT_ERROR, text
    assert f"error: 1 of 2 processes came to 127.0.0.1:{store.port} (MASTER_ADDR:MASTER_PORT) within 1 s" in text


def test_sigusr1_saves_and_stops_as_sigterm_does(write_run, tmp_path):
    prepare = partial(commands.terminate_before_step, 2, 1, number=signal.SIGUSR1)
    code, text = commands.run([write_run()], tmp_path / "log", 2, prepare)
    assert code == STOPPED_ON_SIGNAL, text
    assert "stopped on a signal after step 2, saved" in text
    assert (tmp_path / "run/checkpoints/step_2").is_dir()


def small_gpu(rank):
    """For `prepare`: stand-in for a GPU of 1.7 GB, of which all but some MB are reserved."""
    from mole_mega.platform.parallel import Parallel

    Parallel.device_memory = 1_700_000_000


def test_a_run_that_may_not_fit_says_so_with_the_numbers_and_trains(write_run, tmp_path):
    code, text = commands.run([write_run(), "train.steps=1"], tmp_path / "log", prepare=small_gpu)
    assert code == 0, text
    (line,) = [line for line in text.splitlines() if line.startswith("warning")]
    assert "samples of data.max_length 256 do not fit: a rank of stage 0 needs 0.1 GB" in line
    assert "0.0 GB of its GPU's 1.7 are usable; mole-mega estimate --search names layouts that fit" in line


def test_a_dry_run_compares_every_layout_with_the_base(write_run, tmp_path):
    arguments = ["--dry-run", "--world-size", 16, "parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=4"]
    code, text = commands.run([write_run(), *arguments, "train.global_batch_size=8"], tmp_path / "log")
    assert code == 0, text
    assert "the frozen ones named and shaped as the base has them" in text
    assert "built 16 parts, all there are" in text
    assert not (tmp_path / "run").exists()
