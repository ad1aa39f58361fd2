"""What autograd keeps of mixtures on ranks that hold a part of the experts, or of each tensor, is what the estimate
says. All cases of both layouts run in one launch."""

import os

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from test_estimate import MIXTURES, SIZE, kept_by_autograd, run_of

from mole_mega.adapters import cpu_kernels
from mole_mega.config import ParallelConfig
from mole_mega.estimate.memory import micro_batch, saved_activations
from mole_mega.platform import parallel as platform

WORLD = 2
KINDS = ("top-2", "top-2 of 66", "dense", "shared A", "a router a linear", "mixed B", "whole MLPs")


def worker(rank, folder):
    os.environ["WORLD_SIZE"] = str(WORLD)
    cpu_kernels.library = lambda dtype: None  # as on a GPU
    for name in ("expert", "tensor"):
        layout = ParallelConfig(**{name: WORLD})
        dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=WORLD)
        parallel = platform.initialize(layout, seed=0)
        for kind in KINDS:
            run = run_of(layout, **MIXTURES[kind], train={"global_batch_size": 4})
            expected = saved_activations(run, SIZE, 0, micro_batch(run))
            assert kept_by_autograd(run, SIZE, parallel) == pytest.approx(expected, rel=0.01), (kind, layout)
        platform.shutdown()


def test_activations_on_two_ranks_are_what_autograd_keeps(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=WORLD)
