"""What Megatron-Core is taught on a machine without CUDA: named symbols, nothing else, and the same numbers.

Megatron-Core is imported where it is needed: one of the two processes started here does without it.
"""

import contextlib
import importlib.metadata
import inspect
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mole_mega.config import ParallelConfig
from mole_mega.errors import ConfigError
from mole_mega.platform import cpu
from mole_mega.platform.cpu import PATCHES, TENSOR_METHODS, Patch

WORLD = 2


@pytest.fixture(scope="module")
def platform():
    from mole_mega.platform import parallel

    return parallel


@pytest.fixture(scope="module")
def parallel(platform):
    yield platform.initialize(ParallelConfig(), seed=0)
    platform.shutdown()


# the patched symbols


@pytest.mark.parametrize(
    ("patch", "symbol"),
    [pytest.param(patch, symbol, id=f"{patch.module}: {symbol}") for patch in PATCHES for symbol in patch.symbols],
)
def test_a_patched_symbol_exists(patch, symbol):
    assert symbol in inspect.getsource(importlib.import_module(f"megatron.core.{patch.module}")), patch.reason


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.module)
def test_a_symbol_that_is_gone_is_missed_by_name(monkeypatch, patch):
    getsource = inspect.getsource
    for symbol in patch.symbols:

        def source(module: Any, symbol: str = symbol) -> str:
            text = getsource(module)
            return text.replace(symbol, "") if module.__name__ == f"megatron.core.{patch.module}" else text

        with monkeypatch.context() as patched:
            patched.setattr(inspect, "getsource", source)
            assert f"megatron.core.{patch.module} no longer has `{symbol}` ({patch.reason})" in cpu.missing_symbols()


def test_nothing_is_missing_from_the_version_that_is_named():
    assert cpu.missing_symbols() == []
    assert importlib.metadata.version("megatron-core").startswith(cpu.TESTED_VERSION + ".")


FAKES = {
    "a symbol": (
        Patch("utils", ("def no_such_function",), "some reason"),
        "utils no longer has `def no_such_function`",
    ),
    "a module": (Patch("no_such_module", ("x",), "some reason"), "no_such_module is gone"),
}


@pytest.mark.parametrize("kind", FAKES)
def test_install_refuses_a_megatron_that_lacks_something_and_names_it(monkeypatch, kind):
    fake, says = FAKES[kind]
    monkeypatch.setattr(cpu, "PATCHES", (*PATCHES, fake))
    with pytest.raises(RuntimeError, match=rf"megatron-core is not 0\.19 as tested: .*{says} \(some reason\)"):
        cpu.install()


# what two fresh processes saw


def worker(rank: int, folder: str) -> None:
    """One of two processes: rank 0 reports what a refused install, an install and a second one change; then both
    leave the results of the collectives."""
    if rank == 0:
        Path(folder, "report.json").write_text(json.dumps(installs()))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    torch.save(collectives(rank), f"{folder}/collectives_{rank}.pt")
    dist.destroy_process_group()


def installs() -> list[list[list[str]]]:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    spaces: dict[str, Any] = {patch.module: cpu._module(patch) for patch in PATCHES}
    spaces |= {"torch": torch, "torch.cuda": torch.cuda, "torch.distributed": dist, "torch.Tensor": torch.Tensor}
    spaces["CudaRNGStatesTracker"] = CudaRNGStatesTracker
    snapshots = [{name: dict(vars(space)) for name, space in spaces.items()}]
    for patches in ((*PATCHES, FAKES["a symbol"][0]), PATCHES, PATCHES):
        cpu.PATCHES = patches
        with contextlib.suppress(RuntimeError):
            cpu.install()
        snapshots.append({name: dict(vars(space)) for name, space in spaces.items()})
    return [changed(before, after) for before, after in itertools.pairwise(snapshots)]


def changed(before: dict[str, dict], after: dict[str, dict]) -> list[list[str]]:
    """[space, name, "new" or "replaced"] of every name that is not what it was."""
    return [
        [space, name, "replaced" if name in before[space] or hasattr_of_base(space, name) else "new"]
        for space, names in after.items()
        for name, value in names.items()
        if value is not before[space].get(name)
    ]


def hasattr_of_base(space: str, name: str) -> bool:
    return space == "torch.Tensor" and hasattr(torch._C.TensorBase, name)


SIZES = {"unequal": (3, 5), "one empty": (0, 4), "all empty": (0, 0), "equal": (2, 2)}
SPLITS = {"tensor": torch.tensor, "array": np.array, "list": list}


def rows(rank: int, count: int) -> torch.Tensor:
    """Rows that say whose they are; not contiguous in memory."""
    return (100.0 * rank + torch.arange(3.0 * count)).reshape(3, count).T


def collectives(rank: int) -> dict[str, torch.Tensor]:
    stand_in = cpu._cpu_view().distributed
    results = {}
    for name, sizes in SIZES.items():
        whole = torch.full((sum(sizes), 3), -1.0)
        stand_in.all_gather(list(torch.split(whole, list(sizes))), rows(rank, sizes[rank]), group=dist.group.WORLD)
        results[f"all_gather {name}"] = whole
        mine = torch.full((sizes[rank], 3), -1.0)
        stand_in.reduce_scatter(mine, list(torch.split(rows(rank, sum(sizes)), list(sizes))), group=dist.group.WORLD)
        results[f"reduce_scatter {name}"] = mine
        for kind, make in SPLITS.items():
            # rank r sends sizes[to] + r rows to each
            sent = [size + rank for size in sizes]
            received = [sizes[rank] + other for other in range(WORLD)]
            output = torch.full((sum(received), 3), -1.0)
            stand_in.all_to_all_single(
                output, rows(rank, sum(sent)).contiguous(), output_split_sizes=make(received),
                input_split_sizes=make(sent), group=dist.group.WORLD,
            )  # fmt: skip
            results[f"all_to_all {name} {kind}"] = output
    output = torch.empty(2, 3)
    stand_in.all_to_all_single(output, rows(rank, 2).contiguous())
    results["all_to_all without sizes"] = output
    stand_in.barrier(device_ids=[0])
    return results


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """The folder in which two processes left what they saw."""
    folder = tmp_path_factory.mktemp("two_processes")
    mp.spawn(worker, (str(folder),), nprocs=WORLD)
    return folder


def changes(folder: Path, call: int) -> list[tuple[str, str, str]]:
    """What the first (refused), second and third call changed."""
    return [tuple(change) for change in json.loads((folder / "report.json").read_text())[call]]


def test_a_refused_install_changes_nothing(two_processes):
    assert changes(two_processes, 0) == []


def test_install_leaves_torch_itself_alone_but_for_the_named_tensor_methods(two_processes):
    names = {(space, name) for space, name, _ in changes(two_processes, 1) if space.startswith("torch")}
    assert names == {("torch.Tensor", method) for method in TENSOR_METHODS}


def test_install_gives_each_named_module_its_view_and_makes_up_no_name(two_processes):
    first = changes(two_processes, 1)
    assert {space for space, name, _ in first if name == "torch"} == {patch.module for patch in PATCHES}
    assert [change for change in first if change[2] != "replaced"] == []
    others = {(space, name) for space, name, _ in first if name != "torch" and not space.startswith("torch")}
    assert others == {
        ("tensor_parallel.random", "_get_cuda_rng_state"),
        ("tensor_parallel.random", "_set_cuda_rng_state"),
        ("CudaRNGStatesTracker", "fork"),
        ("dist_checkpointing.strategies.filesystem_async", "get_write_results_queue"),
    }


def test_a_second_install_changes_nothing(two_processes):
    assert changes(two_processes, 2) == []


def result(folder: Path, rank: int, name: str) -> torch.Tensor:
    return torch.load(folder / f"collectives_{rank}.pt")[name]


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("name", SIZES)
def test_all_gather_of_unequal_pieces_puts_them_side_by_side(two_processes, name, rank):
    expected = torch.cat([rows(r, size) for r, size in enumerate(SIZES[name])])
    assert torch.equal(result(two_processes, rank, f"all_gather {name}"), expected)


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("name", SIZES)
def test_reduce_scatter_of_unequal_pieces_is_ones_own_piece_of_the_sum(two_processes, name, rank):
    total = sum(rows(r, sum(SIZES[name])) for r in range(WORLD))
    expected = torch.split(total, list(SIZES[name]))[rank]
    assert torch.equal(result(two_processes, rank, f"reduce_scatter {name}"), expected)


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("kind", SPLITS)
@pytest.mark.parametrize("name", SIZES)
def test_all_to_all_takes_split_sizes_of_any_kind(two_processes, name, kind, rank):
    sizes = SIZES[name]
    sent = [torch.split(rows(r, sum(sizes) + WORLD * r), [size + r for size in sizes]) for r in range(WORLD)]
    expected = torch.cat([sent[r][rank] for r in range(WORLD)])
    assert torch.equal(result(two_processes, rank, f"all_to_all {name} {kind}"), expected)


@pytest.mark.parametrize("rank", range(WORLD))
def test_all_to_all_without_sizes_splits_evenly(two_processes, rank):
    expected = torch.stack([rows(r, 2)[rank] for r in range(WORLD)])
    assert torch.equal(result(two_processes, rank, "all_to_all without sizes"), expected)


# the view of torch


def test_stream_and_event_are_classes_that_do_nothing():
    cuda = cpu._cpu_view().cuda
    assert isinstance(cuda.Stream, type) and isinstance(cuda.Event, type)
    stream, event = cuda.Stream(), cuda.Event(enable_timing=True)
    assert stream == cuda.current_stream() == cuda.default_stream(0) and len({stream, cuda.Stream()}) == 1
    stream.wait_stream(cuda.current_stream())
    stream.wait_event(stream.record_event(event))
    event.record(stream)
    event.wait()
    for thing in (stream, event, cuda):
        thing.synchronize()
    with cuda.stream(stream):
        assert (torch.ones(2) + 1).tolist() == [2, 2]


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 1), "cpu", torch.device("cpu"), None])
def test_the_views_factories_make_cpu_tensors_wherever_they_are_asked_to(device):
    view = cpu._cpu_view()
    for made in (
        view.zeros(2, device=device), view.full((2,), 3, device=device), view.tensor([1.0], device=device),
        view.empty_like(torch.ones(2), device=device), view.arange(3, device=device),
        view.ones(2, device=view.cuda.current_device()),
    ):  # fmt: skip
        assert made.device.type == "cpu"
    assert view.zeros(2, dtype=torch.int, device=device).dtype == torch.int


def test_the_view_reads_through_to_torch_for_all_else():
    view = cpu._cpu_view()
    assert view.nn is torch.nn and view.Tensor is torch.Tensor and view.float32 is torch.float32
    assert view.cuda.is_available is torch.cuda.is_available and view.distributed.all_reduce is dist.all_reduce
    with pytest.raises(AttributeError):
        view.no_such_name  # noqa: B018


def test_tensors_call_themselves_cuda_tensors_and_still_convert(parallel):
    tensor = torch.ones(2)
    assert tensor.type() == "torch.cuda.FloatTensor" and tensor.bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert tensor.type(torch.int64).dtype == torch.int64 and tensor.type("torch.DoubleTensor").dtype == torch.float64
    assert tensor.cuda() is tensor and tensor.cuda(0, non_blocking=True) is tensor


# random states


@pytest.fixture
def tracker(parallel):
    from megatron.core import tensor_parallel

    tracker = tensor_parallel.get_cuda_rng_tracker()
    states = tracker.get_states()
    tracker.reset()
    yield tracker
    tracker.reset()
    tracker.set_states(states)


def draws(count: int = 3) -> list[float]:
    return torch.rand(count).tolist()


def seeded(seed: int, count: int = 3) -> list[float]:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()


def test_a_fork_draws_from_its_own_state_and_leaves_the_others_where_they_were(tracker):
    tracker.add("a", 1)
    tracker.add("b", 2)
    torch.manual_seed(3)
    drawn: dict[str, list[float]] = {"a": [], "b": [], "outside": []}
    for name in "abba":
        with tracker.fork(name):
            drawn[name] += draws(2)
        drawn["outside"] += draws(1)
    assert drawn == {"a": seeded(1, 4), "b": seeded(2, 4), "outside": seeded(3, 4)}


def test_adding_a_state_does_not_move_the_outer_one(tracker):
    torch.manual_seed(3)
    tracker.add("a", 1)
    assert draws() == seeded(3)


def test_a_fork_that_fails_gives_the_outer_state_back(tracker):
    tracker.add("a", 1)
    torch.manual_seed(3)
    with pytest.raises(ZeroDivisionError), tracker.fork("a"):
        draws(2)
        _ = 1 / 0
    assert draws() == seeded(3)
    with tracker.fork("a"):
        assert draws(1) == seeded(1)[2:]


def test_forks_nest(tracker):
    tracker.add("a", 1)
    tracker.add("b", 2)
    torch.manual_seed(3)
    with tracker.fork("a"):
        first = draws(1)
        with tracker.fork("b"):
            assert draws() == seeded(2)
        assert first + draws(2) == seeded(1)
    assert draws() == seeded(3)


def test_a_fork_of_the_state_in_use_goes_on_with_it(tracker):
    tracker.add("a", 1)
    with tracker.fork("a"):
        first = draws(1)
        with tracker.fork("a"):
            second = draws(1)
        assert first + second + draws(2) == seeded(1, 4)


def test_an_unknown_state_is_named(tracker):
    with pytest.raises(KeyError, match="rng state nobody is not added"), tracker.fork("nobody"):
        pass


def test_dropout_seeds_differ_by_name_after_initialize(parallel):
    from megatron.core import tensor_parallel

    states = tensor_parallel.get_cuda_rng_tracker().get_states()
    assert {"model-parallel-rng", "expert-parallel-rng"} <= states.keys()
    assert not torch.equal(states["model-parallel-rng"], states["expert-parallel-rng"])


# process groups


def test_one_process_is_first_last_and_main(parallel):
    sizes = (parallel.world_size, parallel.tp_size, parallel.pp_size, parallel.ep_size, parallel.dp_size)
    ranks = (parallel.rank, parallel.tp_rank, parallel.pp_rank, parallel.ep_rank, parallel.dp_rank)
    assert sizes == (1,) * 5 and ranks == (0,) * 5
    assert parallel.is_main and parallel.is_first_stage and parallel.is_last_stage
    assert parallel.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("sizes", "world", "says"),
    [
        ({"tensor": 2}, 3, "3 processes do not divide into tensor 2 x pipeline 1 x context 1 = 2"),
        ({"tensor": 2, "pipeline": 2}, 2, "2 processes do not divide into tensor 2 x pipeline 2 x context 1 = 4"),
        ({"tensor": 2, "expert": 2}, 2, "parallel.expert 2 does not divide the 1 data-parallel ranks"),
        ({"expert": 4}, 6, "parallel.expert 4 does not divide the 6 data-parallel ranks"),
    ],
)
def test_a_world_that_cannot_hold_the_layout_is_refused_with_the_numbers(platform, sizes, world, says):
    with pytest.raises(ConfigError) as caught:
        platform.check_world(ParallelConfig(**sizes), world)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "world"),
    [({}, 1), ({}, 7), ({"tensor": 2, "pipeline": 2}, 8), ({"expert": 2, "tensor": 2}, 4), ({"expert": 3}, 6)],
)
def test_a_world_that_holds_the_layout_passes(platform, sizes, world):
    platform.check_world(ParallelConfig(**sizes), world)


def test_a_layout_can_be_left_for_another_in_the_same_world(platform, parallel):
    """Only in a world of one; that more processes can is shown where layouts are compared."""
    platform.leave_groups()
    again = platform.initialize(ParallelConfig(), seed=1)
    assert again.tp_size == 1 and dist.is_initialized()


def test_a_layout_that_was_left_keeps_no_thread(platform, parallel):
    counts = []
    for _ in range(3):
        platform.leave_groups()
        platform.initialize(ParallelConfig(), seed=1)
        counts.append(len(os.listdir("/proc/self/task")))
    assert counts[0] > 1 and len(set(counts)) == 1, counts


def test_shutdown_twice_is_harmless(platform):
    platform.shutdown()
    platform.shutdown()
    assert not dist.is_initialized()


# products of bfloat16 on processors that have none


@pytest.fixture
def seen_dtypes(monkeypatch):
    """The products' override, put in place whatever this processor can, and the dtypes that reach the kernels below."""
    seen: dict[str, list[torch.dtype]] = {}
    plain = torch.library.get_kernel

    class Spy:
        def __init__(self, name: str, key: str) -> None:
            self.name, self.kernel = name.removeprefix("aten::"), plain(name, key)

        def call_boxed(self, keys: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            seen.setdefault(self.name, []).extend(tensor.dtype for tensor in tensors)
            return self.kernel.call_boxed(keys, *args, **kwargs)

    monkeypatch.setattr(torch.library, "get_kernel", Spy)
    cpu.multiply_bf16_in_fp32()
    yield seen
    cpu._product_overrides.pop()._destroy()


def products(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The result of each of PRODUCTS, by name; in place and into a part of a larger tensor where the name says so."""
    rng = torch.Generator().manual_seed(0)
    c, a, b = (torch.randn(shape, generator=rng).to(torch.bfloat16).to(dtype) for shape in ((9, 5), (9, 700), (700, 5)))
    results = {}
    for batch in (False, True):
        c_, a_, b_ = (t.expand(2, *t.shape).contiguous() if batch else t for t in (c, a, b))
        plain, added = ("bmm", "baddbmm") if batch else ("mm", "addmm")
        results[plain] = getattr(torch, plain)(a_, b_)
        results[added] = getattr(torch, added)(c_, a_, b_, beta=0.5, alpha=2)
        results[f"{added}_"] = getattr(c_.clone(), f"{added}_")(a_, b_, alpha=-1)
        for name, args in ((plain, (a_, b_)), (added, (c_, a_, b_))):
            whole = torch.zeros(2, *c_.shape, dtype=dtype)
            getattr(torch, name)(*args, out=whole[1])
            results[f"{name}.out"] = whole
    return results


def test_bf16_products_run_in_fp32_and_are_rounded_once(seen_dtypes):
    exact = products(torch.float32)
    seen_dtypes.clear()
    found = products(torch.bfloat16)
    assert set(found) == set(cpu.PRODUCTS) == set(seen_dtypes)
    for name, dtypes in seen_dtypes.items():
        assert set(dtypes) == {torch.float32}, name
    for name, result in found.items():
        assert result.dtype == torch.bfloat16 and torch.equal(result, exact[name].bfloat16()), name


def test_other_products_are_left_as_they_are(seen_dtypes):
    for dtype in (torch.float32, torch.float64):
        seen_dtypes.clear()
        found = products(dtype)
        assert {kind for kinds in seen_dtypes.values() for kind in kinds} == {dtype}
        assert {result.dtype for result in found.values()} == {dtype}


def test_what_products_are_made_of_runs_in_fp32_too(seen_dtypes):
    """Linears, their gradients and grouped products come down to PRODUCTS."""
    rng = torch.Generator().manual_seed(0)
    x, w = torch.randn(6, 16, generator=rng).bfloat16().requires_grad_(), torch.randn(8, 16, generator=rng).bfloat16()
    y = torch.nn.functional.linear(x, w)
    y.backward(torch.ones_like(y))
    ends = torch.tensor([2, 6], dtype=torch.int32)
    torch.nn.functional.grouped_mm(x.detach(), w.t().expand(2, 16, 8).contiguous(), offs=ends)
    assert seen_dtypes and {kind for kinds in seen_dtypes.values() for kind in kinds} == {torch.float32}
