"""Several processes on this host, under torchrun."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from mole_mega.errors import STOP_SIGNALS, ExitCode


def launch(module: str, arguments: Sequence[str], nproc: int) -> int:
    """Run `python -m module` as `nproc` processes under torchrun on this host; returns the first failure's code, or
    what a signal to the launcher stands for."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signals = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # torchrun's own, and SIGUSR1
    args = ["--standalone", signals, f"--nproc-per-node={nproc}", "-m", module, *arguments]
    try:
        run(get_args_parser().parse_args(args))
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except SignalException as error:
        # The launcher has passed the signal on. Only on STOP_SIGNALS do the processes save before they stop; any other
        # ends them where they are, and the code is the shell's: 130 (INTERRUPTED) for Ctrl-C.
        return ExitCode.STOPPED_ON_SIGNAL if error.sigval in STOP_SIGNALS else 128 + error.sigval
    return ExitCode.DONE
