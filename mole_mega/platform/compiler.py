"""C++ sources of ours, built for this processor when they are first wanted, and kept in the user's cache.

No ranks, no Megatron-Core.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

# contract: a product that is subtracted from its equal gives 0 only where neither goes unrounded into the difference
_FLAGS = (
    "-O3", "-march=native", "-mprefer-vector-width=512", "-ffp-contract=off", "-std=c++20", "-shared", "-fPIC",
    "-fopenmp",
)  # fmt: skip
_COMPILERS = ("g++", "c++")
_LIMIT = 300  # seconds


class CannotCompileError(Exception):
    """Why a source could not be built or loaded here, in one line."""


def find_compiler() -> str | None:
    """Path of a C++ compiler."""
    return next((found for name in _COMPILERS if (found := shutil.which(name))), None)


def load(source: Path) -> ctypes.CDLL:
    """The library of one C++ source that uses torch's headers; built where the cache has none of this source, torch,
    compiler and processor. Processes that want it at once wait for the one that builds.

    Raises CannotCompileError.
    """
    compiler = find_compiler()
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise CannotCompileError(f"not for {platform.system()} on {platform.machine()}")
    if compiler is None:
        raise CannotCompileError(f"no C++ compiler ({' or '.join(_COMPILERS)}) in PATH")
    try:
        parts = (source.read_text(), torch.__version__, compiler, *_FLAGS, _processor())
        key = hashlib.sha256("\0".join(parts).encode())
        folder = _cache()
        library = folder / f"{source.stem}-{key.hexdigest()[:20]}.so"
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # given up by the kernel if the builder dies
            if library.exists():
                with contextlib.suppress(OSError):  # what a full disk or a crash cut short is built again
                    return ctypes.CDLL(str(library))
            _build(compiler, source, library)
            return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as problem:
        raise CannotCompileError(str(problem)) from problem


def _build(compiler: str, source: Path, library: Path) -> None:
    home = Path(torch.__file__).parent
    half = library.with_suffix(".part")
    command = [compiler, *_FLAGS, f"-I{home / 'include'}", str(source), "-o", str(half), f"-L{home / 'lib'}"]
    done = subprocess.run([*command, "-ltorch_cpu", "-lc10"], capture_output=True, text=True, timeout=_LIMIT)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:])
        raise CannotCompileError(f"{compiler} ended with exit code {done.returncode}: {said}")
    half.replace(library)


def _cache() -> Path:
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mole_mega"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # no home, or none that may be written to: this process's own
        return Path(tempfile.mkdtemp(prefix="mole_mega_"))


def _processor() -> str:
    """What instructions it has: a cache may be shared by unlike machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith("flags")), "")
