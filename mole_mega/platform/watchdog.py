"""Who is late: says which rank on which host a run waits for, when it stands still or loses a process.

A collective whose peer hangs waits for the backend's own timeout, and then names nobody; one whose peer is gone fails
with the words of a socket. So each process tells the store at which all met, from a thread, what it does. A process
that stands in one place for longer than it may looks up where the others are, says who is behind or gone, and ends.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import linecache
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import megatron.core
import torch
import torch.distributed as dist
from torch._C import _distributed_c10d

from mole_mega.errors import ExitCode, StoppedError

_KEY, _REASON = "mole_mega/place", "mole_mega/reason"
_MOST_BETWEEN_BEATS = 5.0  # seconds
_NAMED = 4  # ranks, at most
_OURS, _MEGATRON = Path(__file__).parents[1], Path(megatron.core.__file__).parents[1]


@dataclass(frozen=True)
class Place:
    """Where one process stands. `passed` counts the places before, the same on all ranks that are at one; `inside` is
    the collective that it waits in, if any, and `line` where, both looked up once it stands for longer than a beat;
    `beat` counts its signs of life."""

    rank: int
    host: str
    step: int = 0
    doing: str = "starting"
    passed: int = 0
    inside: str = ""
    line: str = ""
    beat: int = 0

    def __str__(self) -> str:
        where = [text for text in (self.inside and f"in {self.inside}", self.line and f"at {self.line}") if text]
        return f"step {self.step}, {self.doing}" + (f", {' '.join(where)}" if where else "")


class Watchdog(contextlib.AbstractContextManager["Watchdog"]):
    """Watches this process while it is entered; does nothing in a world of one, or with a patience of 0.

    `patience_seconds`: how long a process may stand in one place. Ends the process with `ExitCode.STOPPED_ITSELF` then,
    from its thread: nothing else can, while the main thread waits in a collective.
    """

    def __init__(self, patience_seconds: float) -> None:
        self.patience_seconds = patience_seconds
        self.interval = min(_MOST_BETWEEN_BEATS, patience_seconds / 5)
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = dist.get_world_size()
        self._host = socket.gethostname()
        # each written by one thread alone, and whole
        self._standing = (0, "starting", 0)
        self._beats = 0
        self._since = time.monotonic()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self.world_size > 1 and self.patience_seconds > 0:
            self._store = _join_store(timeout_seconds=max(4 * self.interval, 1.0))
            if self.rank == 0:
                self._store.delete_key(_REASON)  # of an attempt before
            self._beat()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        """A failure that comes of a process that is gone is told as that: raises StoppedError for it."""
        self._over.set()
        if self._thread is None:
            return
        self._thread.join(2 * self.interval)
        if isinstance(error, RuntimeError) and not isinstance(error, StoppedError):
            reason = self._find(only_gone=True)
            if reason:
                raise StoppedError(f"{reason}. Here: {self._mine}: {' '.join(str(error).split())[:200]}") from error

    def at(self, step: int, doing: str) -> None:
        """This process begins to do this."""
        self._standing = (step, doing, self._standing[2] + 1)
        self._since = time.monotonic()

    def going_on(self) -> None:
        """This process is where it was, and not stuck: a validation may have more batches than patience lasts for."""
        self._since = time.monotonic()

    @property
    def _mine(self) -> Place:
        step, doing, passed = self._standing
        stand = _where_it_stands() if time.monotonic() - self._since > self.interval else _Stand()
        return Place(self.rank, self._host, step, doing, passed, stand.inside, stand.line, self._beats)

    def _watch(self) -> None:
        while not self._over.wait(self.interval):
            stands = time.monotonic() - self._since
            with contextlib.suppress(RuntimeError):  # told below
                self._beat()
            if stands <= self.patience_seconds:
                continue
            reason = self._find() or "all ranks are at this place"
            if self._over.is_set():  # it went on meanwhile, and is done
                return
            if self.rank:
                time.sleep(self.interval)  # rank 0 speaks first
            where = f"rank {self.rank} on {self._host}"
            text = f"error ({where}): no progress for {stands:.0f} s at {self._mine}: {reason}"
            print(text, file=sys.stderr, flush=True)
            os._exit(ExitCode.STOPPED_ITSELF)

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"{_KEY}/{self.rank}", json.dumps(asdict(self._mine)))

    def _find(self, *, only_gone: bool = False) -> str:
        """Whom this process waits for, in words; empty when nobody stands out. The first that finds it says it for all:
        those that end for it are soon gone themselves."""
        try:
            before = self._places()
            for _ in range(3):  # others look for whom they wait too, and go on beating
                time.sleep(self.interval)
                self._beat()
            reason = _compare(before, self._places(), self.rank, only_gone=only_gone)
            return self._store.compare_set(_REASON, "", reason).decode() if reason else ""
        except RuntimeError:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            return f"{place}, where the processes met, does not answer: rank 0 has ended, or its host is cut off"

    def _places(self) -> list[Place]:
        """Of all ranks; one that never came is at the start."""
        places = []
        for rank in range(self.world_size):
            key = f"{_KEY}/{rank}"
            found = self._store.get(key) if self._store.check([key]) else None
            places.append(Place(**json.loads(found)) if found else Place(rank, "a host that did not begin"))
        return places


def _join_store(timeout_seconds: float) -> dist.Store:
    """A connection of the watchdog's own: torch.distributed's may be waiting in the main thread."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = datetime.timedelta(seconds=timeout_seconds)
    store = dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
    # An attempt that torchrun starts again has nothing to do with the places of the one before. Where its agent keeps
    # the store, that is told by the count of restarts, as torch does; elsewhere the store is new, and the count of a
    # host that only joined again is not the others'.
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if kept else "0", store)


def _compare(before: Sequence[Place], after: Sequence[Place], rank: int, *, only_gone: bool) -> str:
    """Who stands out of all ranks, looked up twice by one of them, in words; empty when nobody does."""
    gone = [new for old, new in zip(before, after, strict=True) if new.beat == old.beat and new.rank != rank]
    if gone:
        return f"no sign of life from {_names(gone)}, last seen at {gone[0]}"
    if only_gone:
        return ""
    behind = min(place.passed for place in after)
    late = [place for place in after if place.passed == behind]
    if len(late) == len(after):  # at one place, of which some are in a collective that the others do not come to
        late = [place for place in after if not place.inside]
    if late and len(late) < len(after):
        return f"{_names(late)} late: at {late[0]}"
    unlike = {place.inside + place.line: place for place in after}
    return f"ranks wait in unlike collectives: {'; '.join(_stands(unlike.values()))}" if len(unlike) > 1 else ""


def _stands(places: Iterable[Place]) -> list[str]:
    """Of each, its rank and host and where it stands; of the first few."""
    return [f"rank {place.rank} on {place.host} at {place}" for place in places][:_NAMED]


def _names(places: Sequence[Place]) -> str:
    """rank 2 on node7, rank 3 on node7 and 6 more"""
    named = ", ".join(f"rank {place.rank} on {place.host}" for place in places[:_NAMED])
    return named + (f" and {len(places) - _NAMED} more" if len(places) > _NAMED else "")


@dataclass(frozen=True)
class _Stand:
    """What a process waits in, if in any collective, and the line of ours or of Megatron-Core's that it is at."""

    inside: str = ""
    line: str = ""


def _where_it_stands() -> _Stand:
    """Of the thread that waits in a collective; where none does, of the main one. All threads are looked at: on CUDA
    the backward pass, with its collectives, runs in autograd's."""
    frames = sys._current_frames()
    main = frames.get(threading.main_thread().ident or 0)
    for thread, frame in frames.items():
        if thread != threading.get_ident() and (inside := _waits_in(frame)):
            return _Stand(inside, _line(frame))
    # the host may be ahead of the device, and what it is at not be what it waits for
    return _Stand(_unfinished("nccl"), _line(main))


def _waits_in(frame: FrameType) -> str:
    """The collective that a thread with this innermost frame waits in; empty for one that waits in none."""
    for outer in _outwards(frame):
        name = outer.f_code.co_name
        if outer.f_code.co_filename == dist.distributed_c10d.__file__ and not name.startswith("_"):
            return name
    if ".wait()" in linecache.getline(frame.f_code.co_filename, frame.f_lineno or 0):  # for one that began before
        return _unfinished("") or "wait"
    return ""


def _unfinished(backend: str) -> str:
    """The oldest collective that a backend (any, where it is empty) has not done, as torch's flight recorder has it."""
    # private, and not in torch's stubs
    dumps = [_distributed_c10d._dump_fr_trace_json]  # type: ignore[attr-defined]
    if torch.cuda.is_available():
        dumps.append(_distributed_c10d._dump_nccl_trace_json)  # type: ignore[attr-defined]
    entries = []
    for dump in dumps:
        with contextlib.suppress(RuntimeError, ValueError):  # what is said of a hang must not end the watch over it
            entries += json.loads(dump(True, True)).get("entries", [])
    waiting = [one for one in entries if not one["retired"] and one["profiling_name"].startswith(backend)]
    oldest = min(waiting, key=lambda one: one["time_created_ns"], default=None)
    return oldest["profiling_name"].partition(":")[2] if oldest else ""


def _line(frame: FrameType | None) -> str:
    """mole_mega/training/step.py:188 Stepper._finalize: the innermost of ours, or of Megatron-Core's. What stands in
    `platform` stands there for others."""
    for outer in _outwards(frame):
        path, code = Path(outer.f_code.co_filename), outer.f_code
        for package in (_OURS, _MEGATRON):
            if path.is_relative_to(package) and not path.is_relative_to(_OURS / "platform"):
                return f"{path.relative_to(package.parent)}:{outer.f_lineno} {code.co_qualname}"
    return ""


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
