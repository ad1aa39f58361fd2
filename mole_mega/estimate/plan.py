"""All figures of a run under one layout; whether it is one at all is checked elsewhere (search.py)."""

from __future__ import annotations

from dataclasses import dataclass

from mole_mega.adapters.traffic import ExpertParallel
from mole_mega.config import RunConfig
from mole_mega.estimate.gpus import Gpu, usable_memory
from mole_mega.estimate.memory import Memory, Shape, micro_batch, stage_memory
from mole_mega.estimate.roofline import StepTime, step_time
from mole_mega.estimate.traffic import Traffic, stage_traffic
from mole_mega.models.expert_parallel import expert_parallel
from mole_mega.models.sizes import LlavaSize


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What is assumed of the data: places a sample at most (None: `data.max_length`), and images in it."""

    length: int | None = None
    images: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A run under its layout on `world_size` GPUs: a figure a pipeline stage, of one rank each."""

    run: RunConfig
    world_size: int
    gpu: Gpu
    shape: Shape
    memory: tuple[Memory, ...]
    traffic: tuple[Traffic, ...]
    time: StepTime
    expert_parallel: ExpertParallel

    @property
    def fullest(self) -> int:
        """The stage whose ranks hold most."""
        return max(range(len(self.memory)), key=lambda stage: self.memory[stage].total)

    @property
    def fits(self) -> bool:
        return self.memory[self.fullest].total <= usable_memory(self.gpu.memory)

    @property
    def tokens_per_second(self) -> float:
        return self.run.train.global_batch_size * self.shape.length / self.time.total


def estimate(run: RunConfig, size: LlavaSize, world_size: int, gpu: Gpu, sample: Sample) -> Estimate:
    """All figures of a run under its own layout, which must divide."""
    shape = micro_batch(run, sample.length, sample.images)
    stages = range(run.parallel.pipeline)
    return Estimate(
        run=run,
        world_size=world_size,
        gpu=gpu,
        shape=shape,
        memory=tuple(stage_memory(run, size, world_size, stage, shape, gpu.capability) for stage in stages),
        traffic=tuple(stage_traffic(run, size, world_size, stage, shape) for stage in stages),
        time=step_time(run, size, world_size, shape, gpu),
        expert_parallel=expert_parallel(run, size),
    )


def layout_words(run: RunConfig, world_size: int) -> str:
    """tensor 4 x pipeline 4 x data 4, experts over 1."""
    parallel = run.parallel
    context = f"context {parallel.context} x " if parallel.context > 1 else ""
    return (
        f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x {context}data {parallel.data(world_size):,}, "
        f"experts over {parallel.expert}"
    )


def misfit(
    run: RunConfig,
    size: LlavaSize,
    world_size: int,
    device_memory: float,
    capability: tuple[int, int] | None = None,
) -> str | None:
    """What to warn of before training on GPUs of so many bytes and a compute capability, with the numbers; None when
    the estimate fits."""
    shape, num_stages = micro_batch(run), run.parallel.pipeline
    stages = [stage_memory(run, size, world_size, stage, shape, capability) for stage in range(num_stages)]
    fullest = max(stages, key=lambda memory: memory.total)
    usable = usable_memory(device_memory)
    if fullest.total <= usable:
        return None
    return (
        f"warning: by the estimate, samples of data.max_length {run.data.max_length} do not fit: a rank of stage "
        f"{stages.index(fullest)} needs {fullest.total / 1e9:.1f} GB ({fullest.static / 1e9:.1f} for weights and "
        f"optimizer, {fullest.activations / 1e9:.1f} for activations), {usable / 1e9:.1f} GB of its GPU's "
        f"{device_memory / 1e9:.1f} are usable; mole-mega estimate --search names layouts that fit"
    )
