"""Layouts of a run that a number of GPUs can hold, the fastest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mole_mega.adapters.methods import check_methods
from mole_mega.config import ConfigError, ParallelConfig, RunConfig, check_batch, validate
from mole_mega.estimate.gpus import Gpu
from mole_mega.estimate.plan import Estimate, Sample, estimate
from mole_mega.models.mcore_config import check_layout
from mole_mega.models.sizes import LlavaSize
from mole_mega.platform.parallel import check_world
from mole_mega.platform.recipes import dotted, recipe_of
from mole_mega.platform.te import check_precision
from mole_mega.wording import number_of

_MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
_CONTEXTS = (1, 2, 4, 8)


def check(run: RunConfig, size: LlavaSize, world_size: int) -> None:
    """Raise ConfigError, with the numbers, unless the run's layout and batch divide over `world_size` processes."""
    validate(run)
    check_methods(run)
    check_world(run.parallel, world_size)
    check_precision(run)
    check_layout(run, size)
    check_batch(run.train, run.parallel.data(world_size))


def check_gpu(run: RunConfig, gpu: Gpu) -> None:
    """Raise ConfigError where a GPU has no products by the run's FP8 recipe."""
    recipe = recipe_of(run)
    if recipe is not None and (why := recipe.why_not(gpu.capability, recipe.cuda)):
        raise ConfigError(f"fp8.recipe {run.fp8.recipe} {why}; {gpu.name} is of {dotted(gpu.capability)}")


def search(run: RunConfig, size: LlavaSize, world_size: int, gpu: Gpu, sample: Sample) -> tuple[list[Estimate], int]:
    """(layouts that fit, the fastest first; how many were looked at): tensor, pipeline and expert parallelism, with
    Transformer Engine context parallelism too, micro-batch and recompute vary, all else is the run's. Tensor-parallel
    ranks stay on one host. Raises ConfigError, with the numbers of the simplest layout, where none divides."""
    found = [
        estimate(candidate, size, world_size, gpu, sample) for candidate in _candidates(run, size, world_size, gpu)
    ]
    if not found:
        simplest = replace(run, parallel=ParallelConfig(), train=replace(run.train, micro_batch_size=1))
        try:
            check(simplest, size, world_size)
        except ConfigError as error:
            text = f"no layout divides over {number_of(world_size, 'GPU')}; data parallelism alone: {error}"
            raise ConfigError(text) from error
    return sorted((e for e in found if e.fits), key=lambda e: e.time.total), len(found)


def _candidates(run: RunConfig, size: LlavaSize, world_size: int, gpu: Gpu) -> Iterator[RunConfig]:
    experts = _divisors(run.adapter.num_experts) if run.adapter.method == "mole" else [1]
    shares_sequences = run.model.backend == "transformer_engine" and run.train.precision != "fp32"
    contexts = sorted({*_CONTEXTS, run.parallel.context}) if shares_sequences else [1]
    layouts = [
        ParallelConfig(tensor=tensor, pipeline=pipeline, expert=expert, context=context)
        for tensor in _divisors(size.language.num_kv_heads)
        if tensor <= gpu.per_host
        for pipeline in _divisors(size.language.num_layers)
        for expert in experts
        for context in contexts
    ]
    for layout in layouts:
        for micro_batch_size in _MICRO_BATCHES:
            for recompute in ("none", "selective", "full"):
                train = replace(run.train, micro_batch_size=micro_batch_size, recompute=recompute)
                candidate = replace(run, parallel=layout, train=train)
                try:
                    check(candidate, size, world_size)
                except ConfigError:
                    continue
                yield candidate


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
