"""Runs the project's commands, and tests' own workers, in forks of one process that has imported everything already:
the code is that of the real command from its `main` on, and a launch costs tenths of a second instead of ten."""

import contextlib
import functools
import gc
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from mole_mega.monitor.metrics import TIMING_KEYS

EXAMPLE_BASE = Path(__file__).parents[1] / "examples" / "tiny_cpu" / "base_hf"

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "mole_mega.train",
        "mole_mega.training.parity",
        "mole_mega.training.trainer",
        "transformers.models.clip.configuration_clip",
        "transformers.models.llama.configuration_llama",
        "transformers.models.llava.configuration_llava",
        "torch.utils.tensorboard",
    ]
)

TIMEOUT = 120
_random = random.SystemRandom()  # not the seeded one, by which processes would choose alike


@dataclass
class Command:
    """A command that runs as one process or more; what all of them print goes to one log."""

    processes: list
    log: Path

    def wait(self, timeout: float = TIMEOUT) -> int:
        """The exit code: the first process's that failed, as under torchrun, which then ends the others."""
        deadline = time.monotonic() + timeout
        waiting = list(self.processes)
        while waiting:
            multiprocessing.connection.wait([p.sentinel for p in waiting], timeout=deadline - time.monotonic())
            done = [p for p in waiting if p.exitcode is not None]
            failed = [p.exitcode for p in done if p.exitcode]
            if failed or not done:
                self.kill()
            if failed:
                return failed[0]
            assert done, f"not done after {timeout} s:\n{self.text}"
            waiting = [p for p in waiting if p not in done]
        return 0

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    @property
    def text(self) -> str:
        return self.log.read_text()


def free_port() -> int:
    """One that nobody listens at, below those that connections get of the system: such a one is soon another's."""
    while True:
        port = _random.randrange(10_000, 30_000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("localhost", port))
            return port


def start(
    arguments: Sequence[object],
    log: Path,
    nproc: int = 1,
    prepare: Callable[[int], None] | None = None,
    module: str = "mole_mega.train",
) -> Command:
    """Start `python -m module arguments...` as `nproc` processes; `prepare(rank)` runs in each before its main."""
    port, processes = free_port(), []
    log.write_bytes(b"")
    for rank in range(nproc):
        environment = {}
        if nproc > 1:
            environment |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nproc}
            environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        target = functools.partial(_main, rank, environment, str(log), prepare, module, [str(a) for a in arguments])
        processes.append(_context.Process(target=target))
        processes[-1].start()
    return Command(processes, log)


def run(*args, **kwargs) -> tuple[int, str]:
    """`start` and wait: (exit code, what was printed)."""
    command = start(*args, **kwargs)
    return command.wait(), command.text


def launch(module: str, arguments: Sequence[str], nproc: int) -> int:
    """The exit code of the module's `main(arguments)` on `nproc` processes; what they printed is shown if it is not 0.
    In place of `mole_mega.platform.launch.launch_worker`, which starts torchrun and processes that import everything.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = start(arguments, Path(folder) / "log", nproc, module=module)
        code = command.wait(timeout=600)
        if code:
            print(command.text)
    return code


def kill_before_step(step: int, rank: int) -> None:
    """For `prepare`: SIGKILL before step `step` reads its data."""
    _at_step(step, functools.partial(os.kill, os.getpid(), signal.SIGKILL))


def terminate_before_step(step: int, on_rank: int, rank: int, number: int = signal.SIGTERM) -> None:
    """For `prepare`: SIGTERM, or another signal, to one rank before step `step` reads its data."""
    heed_interrupts()
    if rank == on_rank:
        _at_step(step, functools.partial(os.kill, os.getpid(), number))


def interrupt_twice_before_step(step: int, rank: int) -> None:
    """For `prepare`: Ctrl-C and again Ctrl-C before step `step` reads its data."""
    heed_interrupts()
    _at_step(step, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])


def heed_interrupts() -> None:
    """As a command in the foreground does; a shell starts those in the background deaf to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _at_step(step: int, action: Callable[[], object]) -> None:
    from mole_mega.data.loader import Loader

    read = Loader.micro_batches

    def read_or_act(self, position, *args, **kwargs):
        if position + 1 == step:
            action()
        return read(self, position, *args, **kwargs)

    Loader.micro_batches = read_or_act


def snapshot_saves(snapshots: Path, rank: int) -> None:
    """For `prepare`: while a checkpoint is saved, copy the checkpoints folder before each file is opened, renamed or
    removed: what a kill at that moment would leave behind."""
    from mole_mega.checkpoint.store import CheckpointStore

    save = CheckpointStore.save
    saving: list[Path] = []

    def take(event, arguments):
        if saving and event.partition(".")[0] in ("open", "os", "shutil"):
            folder = saving.pop()  # copying opens files too
            target = snapshots / f"{time.monotonic_ns()}"
            with contextlib.suppress(shutil.Error):  # a file that went away meanwhile
                if folder.exists():
                    shutil.copytree(folder, target / "checkpoints")
            saving.append(folder)

    def save_watched(self, *args, **kwargs):
        saving.append(self.folder)
        try:
            return save(self, *args, **kwargs)
        finally:
            saving.clear()

    sys.addaudithook(take)
    CheckpointStore.save = save_watched


def limit_file_size(num_bytes: int, on_rank: int, rank: int) -> None:
    """For `prepare`: writing fails on that rank as soon as a file would grow larger."""
    if rank == on_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def read_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """Every whole tensor of a distributed checkpoint by name."""
    with tempfile.NamedTemporaryFile() as file:
        dcp_to_torch_save(folder, file.name)
        tree = torch.load(file.name, weights_only=False)
    return {name: tensor for name, tensor in tree.items() if isinstance(tensor, torch.Tensor)}


def read_rows(run_dir: Path) -> list[dict]:
    """The rows of `metrics.jsonl` but for what depends on the machine."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMING_KEYS} for row in rows]


def _main(rank, environment, log, prepare, module, arguments):
    os.environ.update({key: str(value) for key, value in environment.items()})
    torch.set_num_threads(1)  # OMP_NUM_THREADS was heard when torch was imported
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    gc.freeze()  # what was imported stays: looking for garbage in it takes a third of a second each time
    if prepare is not None:
        prepare(rank)
    code = 1
    try:
        code = importlib.import_module(module).main(arguments)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
