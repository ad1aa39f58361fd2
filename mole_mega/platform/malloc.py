"""How glibc's malloc keeps the memory of tensors on a machine without a GPU."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

# options of mallopt(3), and advice of madvise(2)
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
_MADV_HUGEPAGE = 14

_MOST_MAPPINGS = 65536  # glibc's own M_MMAP_MAX
_LARGEST_THRESHOLD = 32 << 20  # and the largest M_MMAP_THRESHOLD that it takes
_HUGE_PAGE = 2 << 20
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")  # proc_sys_vm(5): "2" counts what is reserved as used


def keep_freed_memory() -> None:
    """Let malloc hand out freed memory again in place of giving it back to the system, and take huge pages where the
    system has them.

    An activation of the same size comes in the next layer, and each page that is new costs a fault (measured: 22 MB
    written in 7.5 ms new, in 1.0 ms reused; a MoLE layer of 2048 tokens in bf16 176 ms and 153 ms). Rows of a wide
    tensor lie on a small page each, of which a processor remembers too few.

    Who has told malloc by glibc's own variables what to do is obeyed.
    """
    if any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")):
        return
    libc = ctypes.CDLL(None)
    mallopt = getattr(libc, "mallopt", None)  # macOS and musl have none, or one that does nothing
    if mallopt is None:
        return
    mallopt(_M_TRIM_THRESHOLD, -1)  # never
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
    # Tensors beyond the threshold are kept too, and lie on huge pages, where the heap has room for them: so it grows by
    # half of the machine's memory at once, of which only what is written to is taken.
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    tried = size + _LARGEST_THRESHOLD  # malloc asks for a little more
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_ssize_t, [ctypes.c_ssize_t]
    # Not from other processes, nor beyond a limit on this one: then at least tensors up to some size are kept.
    if _takes_from_others() or libc.sbrk(tried) == -1:
        mallopt(_M_TOP_PAD, 8 * _LARGEST_THRESHOLD)
        return
    libc.sbrk(-tried)  # a malloc that failed would leave the heap for good
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    mallopt(_M_MMAP_MAX, 0)
    room = libc.malloc(size)
    mallopt(_M_MMAP_MAX, _MOST_MAPPINGS)
    if room is not None:
        start = -(-room // _HUGE_PAGE) * _HUGE_PAGE
        libc.madvise(start, room + size - start, _MADV_HUGEPAGE)
        libc.free(room)


def _takes_from_others() -> bool:
    """Whether the system counts memory that is reserved as used."""
    try:
        return _OVERCOMMIT.read_text().strip() == "2"
    except OSError:
        return False
