"""The `mole-mega` command: one sub-command a task, each handed to the room that does it."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mole_mega import config
from mole_mega.errors import CheckFailedError, ConfigError

INPUT_ERROR, CHECK_FAILED = 2, 3


@dataclass
class Outcome:
    """The exit code of a command, as far as it got."""

    code: int = 0


@contextlib.contextmanager
def report_errors(*, debug: bool) -> Iterator[Outcome]:
    """The process edge: an error becomes one line on standard error and an exit code; a traceback only with --debug.

    2: the user's input; 3: a check that failed; 1: our own fault. Under torchrun rank 0 speaks first; the launcher
    ends the others, so that one error is one line.
    """
    outcome = Outcome()
    try:
        yield outcome
    except KeyboardInterrupt:
        outcome.code = 130
    except Exception as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(5)
        if debug:
            traceback.print_exc()
        else:
            where = "" if rank == "0" else f" (rank {rank})"
            known = isinstance(error, ValueError | OSError | CheckFailedError)
            kind = "" if known else f"{type(error).__name__}: "
            print(f"error{where}: {kind}{' '.join(str(error).split())}", file=sys.stderr, flush=True)
        failed_check, input_error = isinstance(error, CheckFailedError), isinstance(error, ValueError | OSError)
        outcome.code = CHECK_FAILED if failed_check else INPUT_ERROR if input_error else 1


def launch(module: str, arguments: Sequence[str], nproc: int) -> int:
    """Run `python -m module` as `nproc` processes under torchrun on this host; returns the first failure's code."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args = ["--standalone", f"--nproc-per-node={nproc}", "-m", module, *arguments]
    try:
        run(get_args_parser().parse_args(args))
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    return 0


def quiet_libraries() -> None:
    """Megatron-Core and torch warn about optional packages and coming changes at every start."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def _train(argv: list[str]) -> int:
    return _run_file_command("train", "Train a run, or go on with one.", "mole_mega.train", argv)


def _eval(argv: list[str]) -> int:
    return _run_file_command("eval", "Loss and accuracy by domain.", "mole_mega.evaluate", argv)


def _run_file_command(name: str, description: str, module: str, argv: list[str]) -> int:
    """A command over a run file whose module runs in `--nproc` processes."""
    parser = argparse.ArgumentParser(prog=f"mole-mega {name}", description=description, add_help=False)
    parser.add_argument("--nproc", type=int, default=1, help="processes on this host (starts torchrun)")
    args, rest = parser.parse_known_args(argv)
    worker = importlib.import_module(module)
    if args.nproc == 1:
        return worker.main(rest)
    parsed = worker.parse(rest)
    with report_errors(debug=parsed.debug) as outcome:
        if args.nproc < 1:
            raise ConfigError(f"--nproc must be at least 1, got {args.nproc}")
        config.load(parsed.run, parsed.overrides)  # a wrong config is told once, before processes start
        outcome.code = launch(module, rest, args.nproc)
    return outcome.code


def _convert(argv: list[str]) -> int:
    from mole_mega.convert import command

    return command.main(argv)


def _verify_parallel(argv: list[str]) -> int:
    from mole_mega.training import parity

    return parity.command(argv)


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (_train, "train a run, or go on with one"),
    "eval": (_eval, "loss and accuracy of a checkpoint, by domain"),
    "verify-parallel": (_verify_parallel, "prove that layouts compute what one process computes"),
    "convert": (_convert, "checkpoints from Hugging Face"),
}


def main() -> int:
    """Entry point of `mole-mega`."""
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(f"usage: mole-mega COMMAND ...\n\n{listing}\n\nmole-mega COMMAND --help says more.")
        return 0 if len(sys.argv) > 1 else INPUT_ERROR
    name = sys.argv[1]
    if name not in COMMANDS:
        print(f"error: unknown command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return INPUT_ERROR
    return COMMANDS[name][0](sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
