"""What autograd keeps of mixtures on ranks that hold a part of the experts, or of each tensor, is what the estimate
says. All cases of both layouts run in one launch."""

import commands
import pytest
from test_estimate import MIXTURES, SIZE, kept_by_autograd, run_of

from mole_mega.adapters import cpu_kernels
from mole_mega.config import ParallelConfig
from mole_mega.estimate.memory import micro_batch, saved_activations
from mole_mega.platform import parallel as platform

WORLD = 2
KINDS = ("top-2", "top-2 of 66", "dense", "shared A", "a router a linear", "mixed B", "whole MLPs")


def main(_):
    """The worker."""
    cpu_kernels.library = lambda dtype: None  # as on a GPU
    for name in ("expert", "tensor"):
        layout = ParallelConfig(**{name: WORLD})
        parallel = platform.initialize(layout, seed=0)
        for kind in KINDS:
            run = run_of(layout, **MIXTURES[kind], train={"global_batch_size": 4})
            expected = saved_activations(run, SIZE, 0, micro_batch(run))
            assert kept_by_autograd(run, SIZE, parallel) == pytest.approx(expected, rel=0.01), (kind, layout)
        platform.leave_groups()
    platform.shutdown()
    return 0


def test_activations_on_two_ranks_are_what_autograd_keeps():
    assert commands.launch(__name__, [], WORLD) == 0
