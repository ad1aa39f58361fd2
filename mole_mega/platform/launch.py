"""Several processes under torchrun; as a command, torchrun itself with exit codes that a scheduler can tell apart."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence

from mole_mega.errors import STOP_SIGNALS, ExitCode

# For `environment`: processes find no GPU, whatever the host has.
WITHOUT_GPUS = {"CUDA_VISIBLE_DEVICES": ""}
# torchrun 2.13 tells the meeting point of its first round only: processes that it starts again would wait in vain.
_FRESH_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
# What processes may take after a signal to finish their step and save; torchrun would kill them after 30 s.
_SAVE_SECONDS = 600


def launch(module: str, arguments: Sequence[str], nproc: int, environment: Mapping[str, str] | None = None) -> int:
    """Run `python -m module` as `nproc` processes under torchrun on this host, with `environment` added to this
    process's own; returns what `torchrun` does."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with _environment(environment or {}):
        return torchrun(["--standalone", f"--nproc-per-node={nproc}", "-m", module, *arguments])


def launch_worker(
    module: str, arguments: Sequence[str], nproc: int, environment: Mapping[str, str] | None = None
) -> int:
    """`launch` of the module's `main(arguments)`, in which libraries warn of nothing."""
    return launch("mole_mega.platform.worker", [module, *arguments], nproc, environment)


def torchrun(arguments: Sequence[str]) -> int:
    """torchrun with these arguments of its own; returns the first failure's code, or what a signal to it stands for,
    where the command `torchrun` ends with 1 for either. SIGUSR1 goes to the processes too."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    signals = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # torchrun's own, and SIGUSR1
    try:
        with _environment(_FRESH_STORE):
            run(get_args_parser().parse_args([signals, f"--shutdown-timeout={_SAVE_SECONDS}", *arguments]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _ended_by(-failure.exitcode, rank, failure.pid) if failure.exitcode < 0 else failure.exitcode
    except SignalException as error:
        # The launcher has passed the signal on. A run saves on STOP_SIGNALS and on Ctrl-C; any other ends it where it
        # is. Only the former say that it wants to be started again; else the code is the shell's: 130 (INTERRUPTED).
        return ExitCode.STOPPED_ON_SIGNAL if error.sigval in STOP_SIGNALS else 128 + error.sigval
    return ExitCode.DONE


def _ended_by(number: int, rank: int, process: int) -> ExitCode:
    """The code of a run of which a process did not end by itself; says which, and by what signal."""
    why = " (so the system ends what takes too much memory)" if number == signal.SIGKILL else ""
    name = signal.Signals(number).name
    print(f"error: rank {rank}, process {process}, was ended by {name}{why}", file=sys.stderr, flush=True)
    return ExitCode.STOPPED_ON_SIGNAL if number in STOP_SIGNALS else ExitCode.STOPPED_ITSELF


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """torchrun hands its own environment on to the processes."""
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


if __name__ == "__main__":
    sys.exit(torchrun(sys.argv[1:]))
