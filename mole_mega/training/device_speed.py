"""Memory and throughput of training steps on one device, beside what the estimate says of them.

The model is a base's, with as many layers as fit, of random weights and full batches of the longest samples; it is
stepped by the run's own code.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mole_mega import config as run_config
from mole_mega.adapters.methods import shorten_methods
from mole_mega.config import ConfigError, ParallelConfig, RunConfig, ValidationConfig
from mole_mega.data.collate import Batch
from mole_mega.estimate.gpus import Gpu, find_gpu, usable_memory
from mole_mega.estimate.memory import Shape, micro_batch, num_micro_batches, stage_memory
from mole_mega.estimate.roofline import micro_batch_flops, step_time
from mole_mega.models.llava import LLaVA
from mole_mega.models.sizes import LlavaSize
from mole_mega.monitor.throughput import peak_memory_bytes
from mole_mega.platform import fp8
from mole_mega.platform import parallel as platform
from mole_mega.platform.launch import WITHOUT_GPUS, launch_worker
from mole_mega.platform.parallel import Parallel
from mole_mega.platform.processor import Device
from mole_mega.platform.te import check_machine
from mole_mega.training.device_parity import SETTINGS, Setting
from mole_mega.training.optimizer import build_optimizer, set_lr
from mole_mega.training.step import Stepper
from mole_mega.training.trainer import wrap

_WORKER = "mole_mega.training.device_speed"
WARM_STEPS, TIMED_STEPS = 3, 10
MICRO_BATCHES = 2  # a step
_TFLOP = 1e12


@dataclass(frozen=True)
class SpeedCase:
    """A run on a size, timed in one setting. `why_not`: the reason why it is left out."""

    setting: Setting
    run: RunConfig
    size: LlavaSize
    why_not: str = ""


@dataclass(frozen=True)
class Speed:
    """What was measured of steps: seconds, tokens (places), operations as the estimate counts them, bytes."""

    seconds_per_step: float
    tokens_per_step: int
    operations_per_step: float
    # of the device; on the CPU, of the whole process
    peak_bytes: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.seconds_per_step

    @property
    def tflops_per_second(self) -> float:
        return self.operations_per_step / self.seconds_per_step / _TFLOP


def speed_cases(run: RunConfig, size: LlavaSize, devices: Sequence[Device], te_error: str) -> list[SpeedCase]:
    """Every setting but fp32 on one device, with as many of the size's layers as its estimate lets fit in bf16. No
    devices: the CPU stands in for one, and all layers are taken."""
    length = min(run.data.max_length, size.language.max_length)
    run = replace(
        run,
        parallel=ParallelConfig(),
        model=replace(run.model, backend="local", base_hash=""),
        data=replace(run.data, max_length=length),
        train=replace(
            run.train,
            steps=WARM_STEPS + TIMED_STEPS,
            schedule_steps=None,
            warmup_steps=0,
            global_batch_size=MICRO_BATCHES * run.train.micro_batch_size,
            precision="bf16",
        ),
        adapter=replace(run.adapter, layers="all"),
        validation=ValidationConfig(),
        fp8=replace(run.fp8, store_base=False),
    )
    run = shorten_methods(run, run.train.steps)
    if devices:
        size = fitting(run, size, devices[0].memory)
    cases = []
    for setting in SETTINGS[1:]:
        if setting.processes > 1:
            continue
        why_not = setting.why_not(devices, te_error)
        computed = run
        try:
            computed = run if why_not else setting.of(run)
        except ConfigError as error:
            why_not = str(error)
        cases.append(SpeedCase(setting, computed, size, why_not))
    return cases


def fitting(run: RunConfig, size: LlavaSize, memory: float) -> LlavaSize:
    """The size with so many decoder layers, halved until a GPU of so many bytes holds them."""
    shape = micro_batch(run)
    while size.language.num_layers > 1 and stage_memory(run, size, 1, 0, shape).total > usable_memory(memory):
        size = replace(size, language=replace(size.language, num_layers=size.language.num_layers // 2))
    return size


def time_all(
    cases: Sequence[SpeedCase], devices: Sequence[Device], say: Callable[[str], None] = lambda _: None
) -> Iterator[dict[str, Any]]:
    """A row of plain figures a case, each timed in a process of its own."""
    gpu = find_gpu(devices[0].name) if devices else None
    for case in cases:
        row: dict[str, Any] = {"case": case.setting.name, "status": "skipped", "reason": case.why_not}
        if not case.why_not:
            say(f"timing {case.setting.name}")
            row |= _in_a_process(case, gpu, {} if devices else WITHOUT_GPUS)
        yield row


def _in_a_process(case: SpeedCase, gpu: Gpu | None, environment: Mapping[str, str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "size.json").write_text(case.size.to_json())
        (folder / "run.json").write_text(json.dumps(run_config.to_dict(case.run)))
        code = launch_worker(_WORKER, [str(folder)], 1, environment)
        found = folder / "speed.json"
        if not found.exists():
            return {"status": "failed", "reason": f"the process ended with exit code {code}"}
        tree = json.loads(found.read_text())
    if "error" in tree:
        return {"status": "failed", "reason": tree["error"]}
    return {"status": "measured", "reason": ""} | figures(case, Speed(**tree), gpu)


def figures(case: SpeedCase, speed: Speed, gpu: Gpu | None) -> dict[str, Any]:
    """What was measured, and the estimate's figures beside it; of a GPU whose data sheet is not known, no shares."""
    run, size, shape = case.run, case.size, micro_batch(case.run)
    row: dict[str, Any] = dataclasses.asdict(speed) | {
        "tokens_per_second": speed.tokens_per_second,
        "tflops_per_second": speed.tflops_per_second,
        "estimated_bytes": stage_memory(run, size, 1, 0, shape, gpu.capability if gpu else None).total,
        "decoder_layers": size.language.num_layers,
        "hidden_size": size.language.hidden_size,
        "length": shape.length,
        "micro_batch_size": shape.samples,
        "gpu": gpu.name if gpu else None,
        "share_of_peak": None,
        "estimated_seconds_per_step": None,
    }
    if gpu is not None:
        row["share_of_peak"] = speed.tflops_per_second * _TFLOP / gpu.peak(run.train.precision)
        row["estimated_seconds_per_step"] = step_time(run, size, 1, shape, gpu).total
    return row


def measure(run: RunConfig, size: LlavaSize, parallel: Parallel) -> Speed:
    """Build, warm up, and time steps. Raises ConfigError where this machine cannot compute as the run asks."""
    check_machine(run)
    model = LLaVA(run, size, parallel)
    _fill(model, parallel.device)
    ddp = wrap(model, run)
    optimizer = build_optimizer(ddp, run.train)
    stepper = Stepper(run, ddp, optimizer, parallel, num_domains=1)
    shape, number = micro_batch(run), num_micro_batches(run, 1)
    batches = [full_batch(size, shape, seed) for seed in range(number)]
    started = 0.0
    for step in range(WARM_STEPS + TIMED_STEPS):
        if step == WARM_STEPS:
            started = _now(parallel.device)
        set_lr(optimizer, step + 1, run.train)
        if not stepper.train_step(batches).applied:
            raise RuntimeError(f"step {step + 1} had a loss or gradient that is not finite")
    return Speed(
        seconds_per_step=(_now(parallel.device) - started) / TIMED_STEPS,
        tokens_per_step=number * shape.tokens,
        operations_per_step=number * micro_batch_flops(run, size, 0, shape),
        peak_bytes=peak_memory_bytes(),
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _fill(model: LLaVA, device: torch.device) -> None:
    """Random weights in place of a base, drawn where they lie. Adapters keep what a fresh run has."""
    generator = torch.Generator(device).manual_seed(0)
    kept = {id(linear.weight): linear for linear in fp8.kept_in_fp8(model).values()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if hasattr(parameter, "placement"):
                continue
            drawn = (
                torch.randn(parameter.shape, generator=generator, device=device) / max(parameter.shape[-1], 1) ** 0.5
            )
            if name.endswith("weight") and ("norm" in name or "ln_pre" in name):
                drawn.fill_(1)
            if id(parameter) in kept:
                fp8.keep(kept[id(parameter)], drawn)
            else:
                parameter.copy_(drawn)


def full_batch(size: LlavaSize, shape: Shape, seed: int) -> Batch:
    """A micro-batch without padding, its images at the beginning of its samples."""
    generator = torch.Generator().manual_seed(seed)
    rows = (shape.samples, shape.length)
    tokens = torch.randint(5, size.language.vocab_size, rows, generator=generator)
    image_mask = torch.zeros(rows, dtype=torch.bool)
    image_mask[:, 1 : 1 + size.vision.num_places] = True
    return Batch(
        tokens=tokens.masked_fill(image_mask, size.image_token_id),
        labels=tokens.roll(-1, dims=1),
        padding_mask=torch.ones(rows, dtype=torch.bool),
        position_ids=torch.arange(shape.length).expand(rows),
        pixels=torch.randn(shape.samples, 3, size.vision.image_size, size.vision.image_size, generator=generator),
        image_mask=image_mask,
        domains=torch.zeros(shape.samples, dtype=torch.long),
        sample_ids=tuple(map(str, range(shape.samples))),
    )


def main(arguments: list[str]) -> int:
    """The worker: time the run in a folder, and leave the figures, or the reason why there are none, beside it."""
    folder = Path(arguments[0])
    try:
        run = run_config.from_dict(json.loads((folder / "run.json").read_text()))
        parallel = platform.initialize(run.parallel, run.train.seed)
        found: Mapping[str, Any] = dataclasses.asdict(measure(run, LlavaSize.from_json(folder / "size.json"), parallel))
    except Exception as error:  # whatever a library or a driver raises is the result of this case
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    (folder / "speed.json").write_text(json.dumps(found))
    platform.shutdown()
    return 0
