"""Fixtures that more than one room of tests needs."""

import platform

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def alone():
    """Process groups of this one process, as a `Parallel`."""
    # importing Megatron-Core costs seconds: only where a test asks
    from mole_mega.config import ParallelConfig
    from mole_mega.platform import parallel

    yield parallel.initialize(ParallelConfig(), seed=0)
    parallel.shutdown()


@pytest.fixture
def kernels():
    """kernels(dtype): the compiled products. Skips where there is no compiler or the processor has none; a source that
    does not compile is an error."""
    from mole_mega.adapters import cpu_kernels
    from mole_mega.platform import compiler

    def of(dtype):
        if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
            pytest.skip("the kernels are for Linux on x86-64")
        if compiler.find_compiler() is None:
            pytest.skip("no C++ compiler in PATH")
        if (found := cpu_kernels.library(dtype)) is None:
            compiler.load(cpu_kernels.SOURCE)  # says why, if that is why
            pytest.skip(f"oneDNN has no small products of {dtype} on this processor")
        return found

    return of
