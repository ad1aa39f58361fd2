"""What Megatron-Core 0.19 needs to run without a CUDA device; nothing else in the project asks for the device.

Megatron-Core writes "cuda" in three ways: as the device of buffers, as streams and RNG state, and through collectives
that only NCCL has. `install()` gives the modules named in `PATCHES` a view of `torch` in which those names mean the
CPU. The view is a module's own: `torch` itself is left alone but for the `Tensor` methods in `TENSOR_METHODS`, which
no view can reach, and the products in `PRODUCTS`, where the processor has none for bfloat16. `missing_symbols()` says
by name what an upgrade of Megatron-Core has moved.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import queue
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mole_mega.platform.malloc import keep_freed_memory
from mole_mega.platform.processor import multiplies_bf16

TESTED_VERSION = "0.19"


@dataclass(frozen=True)
class Patch:
    """One Megatron-Core module that gets the CPU view of torch; `symbols` are the texts in its source that need it."""

    module: str
    symbols: tuple[str, ...]
    reason: str


_DEVICE = "torch.cuda.current_device()"
_FACTORY = "cuda"

PATCHES: tuple[Patch, ...] = (
    Patch("tensor_parallel.mappings", (_DEVICE, "torch.distributed.all_gather(", "torch.distributed.reduce_scatter(",
          "torch.distributed.all_to_all_single("), "receive buffers; gloo collectives of unequal sizes"),
    Patch("tensor_parallel.layers", (_DEVICE,), "weights and gather buffers"),
    Patch("tensor_parallel.utils", (_DEVICE,), "gather buffers"),
    Patch("tensor_parallel.random", ("torch.cuda.get_rng_state", "torch.cuda.manual_seed", "def _get_cuda_rng_state",
          "def _set_cuda_rng_state", "def fork("), "the RNG tracker keeps CUDA generator states"),
    Patch("pipeline_parallel.p2p_communication", (_DEVICE,), "receive buffers and shapes between stages"),
    Patch("pipeline_parallel.schedules", (_FACTORY,), "the token counter of the per-token loss"),
    Patch("optimizer.optimizer", (_FACTORY, "torch.cuda.FloatTensor"), "loss scale, found-inf, parameter type names"),
    Patch("optimizer.distrib_optimizer", (_DEVICE, "torch.cuda.FloatTensor"), "shard buffers, parameter type names"),
    Patch("optimizer.clip_grads", (_FACTORY, "torch.cuda.FloatTensor"), "norms and parameter type names"),
    Patch("optimizer.grad_scaler", (_FACTORY,), "scale tensors"),
    Patch("distributed.param_and_grad_buffer", (_DEVICE,), "gradient buffers"),
    Patch("distributed.distributed_data_parallel", ("torch.cuda.",), "streams of the gradient all-reduce"),
    Patch("transformer.dot_product_attention", (_DEVICE,), "sink and window buffers"),
    Patch("transformer.attention", (_DEVICE,), "key-value caches"),
    Patch("transformer.utils", (_FACTORY,), "the causal mask"),
    Patch("transformer.module", (_DEVICE,), "buffers of wrapped modules"),
    Patch("transformer.moe.token_dispatcher", ("torch.cuda.Stream()", "torch.cuda.current_stream()"),
          "device-to-host copies of the split sizes run on a stream of their own"),
    Patch("models.common.embeddings.rotary_pos_embedding", (_DEVICE,), "inverse frequencies"),
    Patch("models.common.embeddings.rope_utils", ("pin_memory=True",), "the rotations of a context-parallel rank"),
    Patch("models.common.language_module.language_module", (".cuda()",), "embedding tying at pipeline ends"),
    Patch("models.vision.clip_vit_model", (".cuda()",), "position ids"),
    Patch("dist_checkpointing.exchange_utils", (_FACTORY,), "tensors exchanged between ranks on load"),
    Patch("dist_checkpointing.strategies.state_dict_saver", (_FACTORY,), "flags agreed between ranks on save"),
    Patch("dist_checkpointing.strategies.async_utils", (_DEVICE,), "flags agreed between ranks on save"),
    Patch("dist_checkpointing.strategies.filesystem_async", ("def get_write_results_queue", "torch.cuda.synchronize()"),
          "a synchronous save waits for a device, and starts a second process for its result queue"),
    Patch("extensions.transformer_engine", (_DEVICE,), "the device that Transformer Engine's modules are built on"),
    Patch("parallel_state", (_DEVICE,), "device ids of barriers"),
    Patch("utils", ("torch.cuda",), "stream and synchronize helpers"),
)  # fmt: skip

# Called on tensors, so that a module's view of torch cannot catch them.
TENSOR_METHODS = {
    "cuda": "the ViT's position ids and the optimizer's state call Tensor.cuda()",
    "type": "clipping and the distributed optimizer compare Tensor.type() with 'torch.cuda.FloatTensor'",
}


# What linears, their gradients, attention and grouped products come down to.
PRODUCTS = ("mm", "mm.out", "addmm", "addmm_", "addmm.out", "bmm", "bmm.out", "baddbmm", "baddbmm_", "baddbmm.out")
_product_overrides: list[torch.library.Library] = []  # they hold as long as these live


def install() -> None:
    """Teach Megatron-Core to run on this machine's CPUs, before a model is built; a second call is a no-op."""
    missing = missing_symbols()
    if missing:
        raise RuntimeError(f"megatron-core is not {TESTED_VERSION} as tested: {'; '.join(missing)}")
    if isinstance(vars(_module(PATCHES[0]))["torch"], _View):
        return
    view = _cpu_view()
    for patch in PATCHES:
        vars(_module(patch))["torch"] = view
    rng: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    rng._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    rng._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    keep_freed_memory()
    rng.CudaRNGStatesTracker.fork = _fork
    writer: Any = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    writer.get_write_results_queue = lambda *args: queue.Queue()
    for module, names in _plain_kernels().items():
        vars(importlib.import_module(f"megatron.core.{module}")).update(names)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.type = _type_named_as_cuda  # type: ignore[method-assign,assignment]
    if not multiplies_bf16():
        multiply_bf16_in_fp32()


def _plain_kernels() -> dict[str, dict[str, Any]]:
    """{module: names} that Megatron-Core takes from Transformer Engine or Apex where these can be imported, as it has
    them without: their kernels know no CPU."""
    own: Any = importlib.import_module("megatron.core.utils")
    scale = {
        "multi_tensor_applier": own.local_multi_tensor_applier,
        "multi_tensor_scale_impl": own.local_multi_tensor_scale,
    }
    norm = {"l2_norm_impl": own.local_multi_tensor_l2_norm, "multi_tensor_scale_tensor_impl": None}
    return {
        "optimizer": {"Adam": torch.optim.AdamW, "SGD": torch.optim.SGD, "USING_PYTORCH_OPTIMIZER": True},
        "optimizer.distrib_optimizer": {
            "Adam": torch.optim.Adam, "HAVE_APEX_OR_TE": False, "USING_TE_OPTIMIZER": False,
            "USING_APEX_OPTIMIZER": False,
        },
        "optimizer.optimizer": scale,
        "optimizer.clip_grads": scale | norm,
        "transformer.moe.moe_utils": {"te_general_gemm": None},
    }  # fmt: skip


def multiply_bf16_in_fp32() -> None:
    """Let `PRODUCTS` of bfloat16 CPU tensors run in fp32, rounded once at the end, as a bfloat16 product should be."""
    overrides = torch.library.Library("aten", "IMPL")
    for name in PRODUCTS:
        plain = torch.library.get_kernel(f"aten::{name}", "CPU")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel is replaced is the point
            overrides.impl(name, functools.partial(_product, plain, name), "CPU", with_keyset=True)
    _product_overrides.append(overrides)


def _product(plain: Any, name: str, keys: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`plain`, with bfloat16 tensors taken for fp32; the results go where the product's name says."""
    target = kwargs.get("out", args[0] if name.endswith("_") else None)
    if args[0].dtype is not torch.bfloat16:
        return plain.call_boxed(keys, *args, **kwargs)
    args = tuple(arg.float() if isinstance(arg, torch.Tensor) else arg for arg in args)
    if target is None:
        return plain.call_boxed(keys, *args, **kwargs).to(torch.bfloat16)
    if "out" in kwargs:
        kwargs["out"] = torch.empty(target.shape)
    return target.copy_(plain.call_boxed(keys, *args, **kwargs))


def missing_symbols() -> list[str]:
    """Names of patched symbols that this Megatron-Core does not have, one text each; empty when all are in place."""
    missing = []
    for patch in PATCHES:
        try:
            source = inspect.getsource(_module(patch))
        except ImportError:
            missing.append(f"megatron.core.{patch.module} is gone ({patch.reason})")
            continue
        missing += [
            f"megatron.core.{patch.module} no longer has `{symbol}` ({patch.reason})"
            for symbol in patch.symbols
            if symbol not in source
        ]
    return missing


def _module(patch: Patch) -> types.ModuleType:
    return importlib.import_module(f"megatron.core.{patch.module}")


class _View(types.ModuleType):
    """A module that reads through to another one, but for the names set on it."""

    def __init__(self, target: types.ModuleType, **names: Any) -> None:
        super().__init__(target.__name__)
        self.__dict__.update(names)
        self.__dict__["_target"] = target

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_target"], name)


def _cpu_view() -> _View:
    cuda = _View(
        torch.cuda,
        current_device=lambda: torch.device("cpu"),
        current_stream=lambda *args: Stream(),
        default_stream=lambda *args: Stream(),
        Stream=Stream,
        Event=Event,
        stream=lambda stream: contextlib.nullcontext(),
        synchronize=lambda *args: None,
        empty_cache=lambda: None,
        get_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
        set_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
        manual_seed=torch.manual_seed,
    )
    distributed = _View(
        dist,
        all_to_all_single=_all_to_all_single,
        all_gather=_all_gather,
        reduce_scatter=_reduce_scatter,
        barrier=_barrier,
    )
    factories = {
        name: _on_cpu(getattr(torch, name))
        for name in (
            "tensor",
            "empty",
            "zeros",
            "ones",
            "full",
            "arange",
            "randn",
            "empty_like",
            "zeros_like",
            "ones_like",
        )
    }
    return _View(torch, cuda=cuda, distributed=distributed, **factories)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


class Stream:
    """Stands for `torch.cuda.Stream`: the CPU runs in order, so there is nothing to wait for. A class, because
    annotations name it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0

    def wait_stream(self, stream: Stream) -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        return Event()

    def synchronize(self) -> None: ...


class Event:
    """Stands for `torch.cuda.Event`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Stream | None = None) -> None: ...

    def wait(self, stream: Stream | None = None) -> None: ...

    def synchronize(self) -> None: ...


@contextlib.contextmanager
def _fork(self: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """`CudaRNGStatesTracker.fork` on the CPU generator, nested ones included: that of the state in use goes on with
    it. The original also checks that the CPU generator stood still, which here is the one that is meant to move."""
    if name not in self.states_:
        raise KeyError(f"rng state {name} is not added")
    outer, outer_name = torch.get_rng_state(), self._current_state_name
    is_nested = outer_name != "default-rng"
    if is_nested:
        self.states_[outer_name] = outer
    torch.set_rng_state(self.states_[name])
    self._current_state_name = name
    try:
        yield
    finally:
        self.states_[name] = torch.get_rng_state()
        torch.set_rng_state(self.states_[outer_name] if is_nested else outer)
        self._current_state_name = outer_name


def _barrier(*args: Any, device_ids: Any = None, **kwargs: Any) -> Any:
    return dist.barrier(*args, **kwargs)


def _all_to_all_single(
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: Any = None,
    input_split_sizes: Any = None,
    **kwargs: Any,
) -> Any:
    """The dispatcher hands its split sizes over as CPU tensors; the collective takes lists."""

    def as_list(sizes: Any) -> list[int] | None:
        return None if sizes is None else [int(size) for size in sizes]

    return dist.all_to_all_single(output, input, as_list(output_split_sizes), as_list(input_split_sizes), **kwargs)


def _all_gather(outputs: Sequence[torch.Tensor], input: torch.Tensor, group: Any = None, **kwargs: Any) -> None:
    """`dist.all_gather` for pieces of unequal length, which gloo lacks: pad to the longest, gather, cut."""
    longest = max(piece.shape[0] for piece in outputs)
    if all(piece.shape[0] == longest for piece in outputs):
        dist.all_gather(list(outputs), input.contiguous(), group=group, **kwargs)
        return
    padded = input.new_zeros((longest, *input.shape[1:]))
    padded[: input.shape[0]] = input
    gathered = [torch.empty_like(padded) for _ in outputs]
    dist.all_gather(gathered, padded, group=group, **kwargs)
    for piece, whole in zip(outputs, gathered, strict=True):
        piece.copy_(whole[: piece.shape[0]])


def _reduce_scatter(output: torch.Tensor, inputs: Sequence[torch.Tensor], group: Any = None, **kwargs: Any) -> None:
    """`dist.reduce_scatter` for pieces of unequal length, which gloo lacks: sum everything, keep one's own piece."""
    total = torch.cat([piece.contiguous() for piece in inputs])
    dist.all_reduce(total, group=group, **kwargs)
    start = sum(piece.shape[0] for piece in inputs[: dist.get_rank(group)])
    output.copy_(total[start : start + output.shape[0]])


_plain_type = torch.Tensor.type


def _type_named_as_cuda(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
    if dtype is not None:
        return _plain_type(self, dtype, **kwargs)
    return _plain_type(self).replace("torch.", "torch.cuda.", 1)
