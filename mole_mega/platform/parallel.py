"""Process groups: start them, and one small view of them for the rest of the project.

Everything outside this file and Megatron-Core itself asks a `Parallel` where it stands; nobody reads Megatron-Core's
global state.
"""

from __future__ import annotations

import datetime
import gc
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from mole_mega.config import ConfigError, ParallelConfig
from mole_mega.platform import cpu
from mole_mega.platform.meeting import check_agreement, join_world


@dataclass(frozen=True)
class Parallel:
    """Where this process stands. Sizes and ranks of each axis of the process grid, its groups, and its device."""

    groups: ProcessGroupCollection
    device: torch.device

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def is_main(self) -> bool:
        """The one process that writes logs and prints."""
        return self.rank == 0

    @property
    def tp_size(self) -> int:
        return self.groups.tp.size()

    @property
    def tp_rank(self) -> int:
        return self.groups.tp.rank()

    @property
    def pp_size(self) -> int:
        return self.groups.pp.size()

    @property
    def pp_rank(self) -> int:
        return self.groups.pp.rank()

    @property
    def cp_size(self) -> int:
        return self.groups.cp.size()

    @property
    def cp_rank(self) -> int:
        return self.groups.cp.rank()

    @property
    def ep_size(self) -> int:
        return self.groups.ep.size()

    @property
    def ep_rank(self) -> int:
        return self.groups.ep.rank()

    @property
    def dp_size(self) -> int:
        return self.groups.dp.size()

    @property
    def dp_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def device_memory(self) -> int | None:
        """Bytes of this rank's GPU; None on the CPU, whose memory processes share."""
        return torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else None

    @property
    def device_capability(self) -> tuple[int, int] | None:
        """The compute capability of this rank's GPU; None on the CPU."""
        return torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else None

    def barrier(self) -> None:
        dist.barrier()


def initialize(
    config: ParallelConfig,
    seed: int,
    timeout_minutes: float = 10,
    *,
    patience_seconds: float = 300,
    facts: Mapping[str, str] | None = None,
) -> Parallel:
    """Start torch.distributed (from torchrun's environment, or alone) and Megatron-Core's groups, and seed the RNGs.

    Without a CUDA device Megatron-Core is first taught to do without (`platform/cpu.py`) and gloo carries the
    collectives. Raises ConfigError when the world does not divide, when its processes do not meet within
    `patience_seconds`, or when they do not all hold the same `facts` (platform/meeting.py).
    """
    on_cuda = torch.cuda.is_available()
    if not on_cuda:
        cpu.install()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_world(config, world_size)
    if on_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.backends.cudnn.allow_tf32 = False  # the tower's convolution: fp32 means fp32, as it does on the CPU
    if not dist.is_initialized():
        timeout = datetime.timedelta(minutes=timeout_minutes)
        backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        if "RANK" in os.environ:
            join_world(backend, timeout, patience_seconds)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    if facts is not None:
        check_agreement(facts)  # before groups are made: unlike layouts would wait for each other
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor,
            pipeline_model_parallel_size=config.pipeline,
            context_parallel_size=config.context,
            expert_model_parallel_size=config.expert,
            expert_tensor_parallel_size=config.tensor,
            create_gloo_process_groups=True,
        )
    seed_generators(seed)
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    return Parallel(ProcessGroupCollection.use_mpu_process_groups(), device)


def seed_generators(seed: int) -> None:
    """Seed the default generators and Megatron-Core's tracker for dropout: the same on tensor-parallel ranks, which
    share activations, and different where other samples, other places or other layers
    are."""
    stage = parallel_state.get_pipeline_model_parallel_rank()
    data = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    offset = 10_000 * stage + 100_000 * data
    tensor_parallel.model_parallel_cuda_manual_seed(seed + offset, force_reset_rng=True)


def leave_groups() -> None:
    """Give up the layout, but not the world: `initialize` can then make another. All ranks call it.

    Megatron-Core only forgets its groups. Each of gloo's keeps a thread that wakes a hundred times a second; a process
    that tries one layout after another would come to wait for its own. The thread ends with the last reference to its
    group, and models, which refer to many, are full of cycles.
    """
    if not parallel_state.model_parallel_is_initialized():
        return
    dist.barrier()  # nobody closes a connection that another still reads from
    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()


def shutdown() -> None:
    """Leave all process groups; safe to call when there are none."""
    leave_groups()
    if dist.is_initialized():
        dist.destroy_process_group()


def check_world(config: ParallelConfig, world_size: int) -> None:
    """Raise ConfigError unless `world_size` processes can hold the layout."""
    model = config.tensor * config.pipeline * config.context
    if world_size % model:
        raise ConfigError(
            f"{world_size} processes do not divide into tensor {config.tensor} x pipeline {config.pipeline} "
            f"x context {config.context} = {model}"
        )
    data = world_size // model
    # Megatron-Core's expert groups: expert x expert-tensor inside each pipeline stage
    if data * config.context % config.expert:
        raise ConfigError(
            f"parallel.expert {config.expert} does not divide the {data * config.context} data-parallel ranks "
            f"that {world_size} processes leave at tensor {config.tensor} x pipeline {config.pipeline}"
        )
