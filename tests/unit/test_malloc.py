"""malloc keeps freed memory, on huge pages where the system has them. Each process here measures itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")

START = """
import os, re, resource, torch
from pathlib import Path
from mole_mega.platform.malloc import keep_freed_memory
{before}
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
"""
FREED = """
torch.empty(1 << 20, dtype=torch.uint8)  # for which the heap may grow: a first tensor beyond the limit is mapped
held = torch.empty({size} << 20, dtype=torch.uint8).fill_(1)
before = resident()
del held
print(before - resident())
"""
HUGE = """
held = torch.empty({size} << 20, dtype=torch.uint8).fill_(1)
print(sum(1024 * int(kb) for kb in re.findall(r"AnonHugePages: +(\\d+) kB", Path("/proc/self/smaps").read_text())))
"""


def number_of(script: str, before: str, size: int) -> int:
    done = subprocess.run(
        [sys.executable, "-c", (START + script).format(before=before, size=size)], capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    return int(done.stdout)


@pytest.fixture(autouse=True)
def nobody_tells_malloc(monkeypatch):
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("size", [30, 45, 1000])  # MB; beyond 32 malloc would map them
def test_freed_memory_is_kept_for_the_next_tensor(size):
    assert number_of(FREED, "", size) >= (size - 1) << 20
    assert number_of(FREED, "keep_freed_memory()", size) < 2 << 20


def test_who_has_told_malloc_otherwise_is_obeyed(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    assert number_of(FREED, "keep_freed_memory()", 30) >= 30 << 20


def test_where_the_heap_cannot_grow_so_far_smaller_tensors_are_kept():
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    limited = f"resource.setrlimit(resource.RLIMIT_DATA, ({limit}, {limit})); keep_freed_memory()"
    assert number_of(FREED, limited, 45) < 2 << 20
    assert number_of(HUGE, limited, 100) < 10 << 20  # the heap did not grow


def test_nothing_is_reserved_where_that_would_take_it_from_other_processes(tmp_path):
    (tmp_path / "overcommit").write_text("2\n")
    counted = f"from mole_mega.platform import malloc; malloc._OVERCOMMIT = Path({str(tmp_path / 'overcommit')!r})"
    assert number_of(FREED, f"{counted}; keep_freed_memory()", 45) < 2 << 20
    assert number_of(HUGE, f"{counted}; keep_freed_memory()", 100) < 10 << 20


def test_tensors_lie_on_huge_pages():
    mode = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not mode.exists() or "[never]" in mode.read_text():
        pytest.skip("this system has no huge pages for heaps")
    if "[madvise]" in mode.read_text():
        assert number_of(HUGE, "", 100) < 10 << 20
    assert number_of(HUGE, "keep_freed_memory()", 100) > 80 << 20
