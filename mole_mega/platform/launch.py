"""Several processes on this host, under torchrun."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from mole_mega.errors import ExitCode


def launch(module: str, arguments: Sequence[str], nproc: int) -> int:
    """Run `python -m module` as `nproc` processes under torchrun on this host; returns the first failure's code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args = ["--standalone", f"--nproc-per-node={nproc}", "-m", module, *arguments]
    try:
        run(get_args_parser().parse_args(args))
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except SignalException:
        return (
            ExitCode.STOPPED_ON_SIGNAL
        )  # the launcher has passed the signal on, and the processes have saved and stopped
    return ExitCode.DONE
