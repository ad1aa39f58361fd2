"""One process stands where a rank of a large world would stand: groups of fake members, tensors without memory.

What is built there has the names and shapes of the real rank's, and nothing can be computed with it: collectives do
nothing, and every tensor that is made lies on torch's meta device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"

from mole_mega.config import ParallelConfig
from mole_mega.platform import cpu
from mole_mega.platform.parallel import Parallel, check_world

_FACTORIES = frozenset(
    getattr(torch, name)
    for name in (
        "empty", "zeros", "ones", "full", "arange", "linspace", "eye", "tensor", "rand", "randn", "triu_indices",
        "tril_indices", "empty_like", "zeros_like", "ones_like", "full_like",
    )
)  # fmt: skip


class _OnMeta(TorchFunctionMode):
    """Whatever device a factory is told, the tensor has no memory. (`with torch.device("meta")` leaves alone what
    names a device, as Megatron-Core does everywhere.)"""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func in _FACTORIES:
            options["device"] = "meta"
        return func(*args, **options)


@contextlib.contextmanager
def rank_of(config: ParallelConfig, rank: int, world_size: int) -> Iterator[Parallel]:
    """Be rank `rank` of `world_size` while inside. For a process that is in no process group.

    Raises ConfigError when the world does not divide.
    """
    check_world(config, world_size)
    assert not dist.is_initialized(), "this process has a rank of its own"
    cpu.install()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor,
            pipeline_model_parallel_size=config.pipeline,
            context_parallel_size=config.context,
            expert_model_parallel_size=config.expert,
            expert_tensor_parallel_size=config.tensor,
            create_gloo_process_groups=False,  # they would be real
        )
        with _OnMeta():
            yield Parallel(ProcessGroupCollection.use_mpu_process_groups(), torch.device("meta"))
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
