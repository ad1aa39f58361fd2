"""Fixtures that more than one room of tests needs."""

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
