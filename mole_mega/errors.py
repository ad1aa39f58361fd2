"""Errors that end a command with an exit code of their own, and the process edge where they do."""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass


class ExitCode(enum.IntEnum):
    """What a command's exit code says."""

    DONE = 0
    OUR_FAULT = 1
    INPUT_ERROR = 2
    CHECK_FAILED = 3
    STOPPED_ITSELF = 4
    STOPPED_ON_SIGNAL = 75
    NOTHING_CHECKED = 77
    INTERRUPTED = 130


# On these a run saves and stops: what a scheduler sends before the end of a job. Slurm sends SIGUSR1 where it is asked
# to (`--signal=USR1@120`).
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class ConfigError(ValueError):
    """The user's config or input cannot be honoured. The message is one line and carries the numbers."""


class CheckFailedError(RuntimeError):
    """A check that the project promises has failed."""


class StoppedError(RuntimeError):
    """The run has stopped itself, and says why."""


@dataclass
class Outcome:
    """The exit code of a command, as far as it got."""

    code: int = ExitCode.DONE


_CODES = (
    (CheckFailedError, ExitCode.CHECK_FAILED),
    (StoppedError, ExitCode.STOPPED_ITSELF),
    (ValueError, ExitCode.INPUT_ERROR),
    (OSError, ExitCode.INPUT_ERROR),
)


@contextlib.contextmanager
def report_errors(*, debug: bool) -> Iterator[Outcome]:
    """The process edge: an error becomes one line on standard error and an exit code; a traceback only with --debug.

    Under torchrun rank 0 speaks first; the launcher ends the others, so that one error is one line.
    """
    outcome = Outcome()
    try:
        yield outcome
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr, flush=True)
        outcome.code = ExitCode.INTERRUPTED
    except BrokenPipeError:
        # who reads our output (`| head`) has seen enough; what Python still has of it goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        outcome.code = 128 + signal.SIGPIPE
    except Exception as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # training answers it by saving, which is over
            time.sleep(5)
        if debug:
            traceback.print_exc()
        else:
            where = "" if rank == "0" else f" (rank {rank})"
            known = isinstance(error, ValueError | OSError | CheckFailedError | StoppedError)
            kind = "" if known else f"{type(error).__name__}: "
            print(f"error{where}: {kind}{' '.join(_words(error).split())}", file=sys.stderr, flush=True)
        outcome.code = next((code for kind, code in _CODES if isinstance(error, kind)), ExitCode.OUR_FAULT)
        if "RANK" in os.environ:
            # An ordinary exit takes down the process group's threads, which now and then aborts (SIGABRT, code 250).
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(outcome.code)


def _words(error: Exception) -> str:
    """What it says, but for the number of an error of the system's."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


def quiet_libraries() -> None:
    """Megatron-Core and torch warn about optional packages and coming changes at every start."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
