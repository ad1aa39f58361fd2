"""What asks a run to stop from outside: it ends the step that it is in, the same on all ranks, saves and ends."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType

import torch
import torch.distributed as dist

from mole_mega.errors import STOP_SIGNALS, ExitCode
from mole_mega.platform.parallel import Parallel


class StopSignals(contextlib.AbstractContextManager["StopSignals"]):
    """While it is entered, a stop signal or Ctrl-C asks this process to stop.

    A second Ctrl-C ends it at once, without saving. torchrun, which alone gets what is typed, passes the first one on
    as SIGINT, and after the second one sends SIGTERM.
    """

    def __init__(self, parallel: Parallel) -> None:
        self.parallel = parallel
        self._code = 0

    def __enter__(self) -> StopSignals:
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        # a shell makes what it starts in the background deaf to Ctrl-C; the processes of torchrun are in no terminal
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is not signal.SIG_IGN or self.parallel.world_size > 1:
            signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def agreed(self) -> int:
        """The exit code that any rank was asked to stop with, 0 to go on; all ranks call it, and get the same."""
        code = torch.tensor(self._code, device=self.parallel.device)
        dist.all_reduce(code, op=dist.ReduceOp.MAX)
        return int(code)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._code = max(self._code, ExitCode.STOPPED_ON_SIGNAL)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        self._code = ExitCode.INTERRUPTED
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, signal.SIG_DFL)
        if self.parallel.is_main:  # not print, which may be what was interrupted
            os.write(2, b"Ctrl-C: saving and stopping after this step; once more stops at once, without saving\n")
