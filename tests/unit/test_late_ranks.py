"""Who is said to be late, from where all ranks stand, and what a thread that waits is said to wait in."""

import datetime
import threading
import time

import pytest
import torch
import torch.distributed as dist

from mole_mega.platform.watchdog import Place, _compare, _unfinished, _where_it_stands


def place(rank, passed=7, inside="", line="", beat=1, doing="passes and update"):
    return Place(rank, "node", 3, doing, passed, inside, line, beat)


SUM, GATHER = {"inside": "all_reduce", "line": "a.py:1 f"}, {"inside": "all_gather", "line": "b.py:2 g"}


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        ([place(0, **SUM), place(1, 6, doing="reading data")], "rank 1 on node late: at step 3, reading data"),
        (
            [place(0, **SUM), place(1, line="c.py:3 h")],
            "rank 1 on node late: at step 3, passes and update, at c.py:3 h",
        ),
        (
            [place(0, **SUM), place(1, **GATHER)],
            "ranks wait in unlike collectives: rank 0 on node at step 3, passes and update, in all_reduce at a.py:1 f; "
            "rank 1 on node at step 3, passes and update, in all_gather at b.py:2 g",
        ),
        ([place(0, **SUM), place(1, **SUM)], ""),
        ([place(0), place(1)], ""),
    ],
    ids=["behind", "in no collective", "in unlike ones", "in one", "in none"],
)
def test_whoever_stands_out_is_named_with_where_it_is(after, reason):
    before = [place(0, beat=0), place(1, beat=0)]
    assert _compare(before, after, 0, only_gone=False) == reason
    assert _compare(before, after, 0, only_gone=True) == ""


def test_whoever_beats_no_more_is_gone():
    before = [place(0), place(1, line="c.py:3 h")]
    for only_gone in (True, False):
        reason = _compare(before, before, 0, only_gone=only_gone)
        assert reason == "no sign of life from rank 1 on node, last seen at step 3, passes and update, at c.py:3 h"


def test_a_wait_for_a_collective_that_began_before_is_named_by_it(tmp_path):
    """Two ranks in one process; the other one comes later."""

    def join(rank, first):
        store = dist.FileStore(str(tmp_path / "store"), 2)
        group = dist.ProcessGroupGloo(store, rank, 2, datetime.timedelta(seconds=30))
        met.wait(30)
        work = group.allreduce([torch.ones(2)]) if first or late.wait(30) else None
        work.wait()

    met, late = threading.Barrier(2), threading.Event()
    threads = [threading.Thread(target=join, args=(rank, rank == 0), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    assert wait_until(lambda: _where_it_stands().inside) == "all_reduce"
    late.set()
    for thread in threads:
        thread.join(30)
    # torch's recorder hears of an end a moment after those who waited for it
    assert wait_until(lambda: not _unfinished(""))
    assert _where_it_stands().inside == ""


def wait_until(ask):
    """The first answer that is true, or the last one after 30 s."""
    deadline = time.monotonic() + 30
    while not (answer := ask()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return answer
