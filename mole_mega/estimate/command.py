"""mole-mega estimate RUN.yaml --gpus N: memory by part, bytes sent, and step time of a layout, or which layouts fit."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mole_mega import config
from mole_mega.errors import ConfigError, quiet_libraries, report_errors
from mole_mega.estimate.gpus import GPUS, usable_memory
from mole_mega.estimate.memory import Memory
from mole_mega.estimate.plan import Estimate, Sample, estimate, layout_words
from mole_mega.estimate.roofline import ASSUMPTIONS, fp8_assumptions
from mole_mega.estimate.traffic import Traffic
from mole_mega.models.sizes import SIZES, find_size
from mole_mega.outputs import check_file
from mole_mega.platform.recipes import recipe_of
from mole_mega.wording import number_of

SHOWN = 10
_MB, _GB = 1e6, 1e9


def main(argv: list[str]) -> int:
    """Parse, estimate, print. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="mole-mega estimate", description="What a run will take on so many GPUs: memory, bytes sent, step time."
    )
    parser.add_argument("run", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="processes, one a GPU")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="which GPU (default h100)")
    parser.add_argument("--search", action="store_true", help="rank the layouts that fit, instead of the run's own")
    parser.add_argument("--size", choices=SIZES, help="the base's size, where model.base is not at hand")
    parser.add_argument("--length", type=int, help="places of the longest sample (default data.max_length)")
    parser.add_argument("--images", type=float, default=1.0, help="images a sample (default 1)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--debug", action="store_true", help="show warnings and tracebacks")
    args = parser.parse_intermixed_args(argv)
    with report_errors(debug=args.debug) as outcome:
        if not args.debug:
            quiet_libraries()
        run = config.load(args.run, args.overrides)
        if args.gpus not in (bounds := config.Range(1, config.LARGEST_COUNT)):
            raise ConfigError(f"--gpus must be {bounds}, got {args.gpus}")
        if args.length is not None and not 1 <= args.length <= run.data.max_length:
            raise ConfigError(f"--length must be in [1, data.max_length {run.data.max_length}], got {args.length}")
        if not 0 <= args.images < math.inf:
            raise ConfigError(f"--images must be a number of at least 0, got {args.images}")
        if args.json:
            check_file(args.json, "--json")
        size = find_size(Path(run.model.base), args.size)
        _check_images(args.images, args.length, run, size.vision.num_places)
        # with the rooms that build come torch and Megatron-Core
        from mole_mega.estimate.search import check, check_gpu, search

        gpu, sample = GPUS[args.gpu], Sample(length=args.length, images=args.images)
        check_gpu(run, gpu)
        if args.search:
            found, num_candidates = search(run, size, args.gpus, gpu, sample)
            lines = describe_search(found, num_candidates, args.gpus, gpu.name)
            figures: Any = [as_tree(one) for one in found]
        else:
            check(run, size, args.gpus)
            one = estimate(run, size, args.gpus, gpu, sample)
            lines, figures = describe(one), as_tree(one)
        print("\n".join(lines))
        if args.json:
            args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return outcome.code


def _check_images(images: float, length: int | None, run: config.RunConfig, places: int) -> None:
    """Raise ConfigError where so many images, of so many `places` each, are longer than the longest sample."""
    most, named = (run.data.max_length, "data.max_length") if length is None else (length, "--length")
    if images * places > most:
        raise ConfigError(
            f"--images must be at most {most / places:.4g}, got {images:g}: an image takes {places} places, a "
            f"sample has {most:,} at most ({named})"
        )


def describe(one: Estimate) -> list[str]:
    """An estimate for people."""
    run, shape, gpu, time = one.run, one.shape, one.gpu, one.time
    usable, fullest = usable_memory(gpu.memory), one.fullest
    parts = ", ".join(f"{field.name} {getattr(time, field.name):.3g}" for field in dataclasses.fields(time))
    travels = [f"between expert-parallel ranks {one.expert_parallel.form} travel: {one.expert_parallel.reason}"]
    need = f"stage {fullest} needs {one.memory[fullest].total / _GB:.1f} GB a GPU"
    return [
        f"{one.world_size:,} x {gpu.name}: {layout_words(run, one.world_size)}; recompute "
        f"{run.train.recompute}; micro-batch of {shape.samples} x {shape.length:,} places with "
        f"{number_of(shape.images, 'image')}",
        *(travels if run.parallel.expert > 1 else []),
        "memory of one rank at its peak, MB:",
        *_table(_by_stage(one.memory)),
        f"{'fits' if one.fits else 'DOES NOT FIT'}: {need}, {usable / _GB:.1f} GB are usable of {gpu.memory / _GB:.1f}",
        "sent by one rank in a step, MB:",
        *_table(_by_stage(one.traffic)),
        f"a step of {run.train.global_batch_size:,} samples takes {time.total:.3g} s, "
        f"{one.tokens_per_second:,.0f} tokens/s: {parts} (seconds, slowest stage)",
        f"assumed: {ASSUMPTIONS}",
        *([f"assumed of FP8: {fp8_assumptions(recipe, gpu)}"] if (recipe := recipe_of(run)) else []),
    ]


def describe_search(found: Sequence[Estimate], num_candidates: int, world_size: int, gpu: str) -> list[str]:
    """The fastest layouts for people."""
    if not found:
        return [f"none of {num_candidates:,} layouts fits on {world_size:,} x {gpu}"]
    shared = any(one.run.parallel.context > 1 for one in found[:SHOWN])
    columns = ["tensor", "pipeline", "expert", *(["context"] if shared else []), "data"]
    rows = [(*columns, "micro-batch", "recompute", "GB a GPU", "s a step", "tokens/s")]
    for one in found[:SHOWN]:
        parallel, train = one.run.parallel, one.run.train
        rows.append((
            str(parallel.tensor), str(parallel.pipeline), str(parallel.expert),
            *([str(parallel.context)] if shared else []),
            str(parallel.data(world_size)), str(train.micro_batch_size), train.recompute,
            f"{one.memory[one.fullest].total / _GB:.1f}", f"{one.time.total:.3g}", f"{one.tokens_per_second:,.0f}",
        ))  # fmt: skip
    return [
        f"{len(found):,} of {num_candidates:,} layouts fit on {world_size:,} x {gpu}; the fastest:",
        *_table(rows),
    ]


def as_tree(one: Estimate) -> dict[str, Any]:
    """An estimate as plain numbers: bytes and seconds."""
    run = one.run
    return {
        "gpus": one.world_size,
        "gpu": one.gpu.name,
        "parallel": dataclasses.asdict(run.parallel),
        "expert_parallel": one.expert_parallel.form,
        "micro_batch_size": run.train.micro_batch_size,
        "recompute": run.train.recompute,
        "length": one.shape.length,
        "fits": one.fits,
        "usable_bytes": usable_memory(one.gpu.memory),
        "memory": [dataclasses.asdict(memory) | {"total": memory.total} for memory in one.memory],
        "sent": [dataclasses.asdict(traffic) | {"total": traffic.total} for traffic in one.traffic],
        "seconds": dataclasses.asdict(one.time) | {"total": one.time.total},
        "tokens_per_second": one.tokens_per_second,
    }


def _by_stage(stages: Sequence[Memory] | Sequence[Traffic]) -> list[tuple[str, ...]]:
    """A row a stage of what they count, in MB."""
    names = [field.name for field in dataclasses.fields(stages[0])] + ["total"]
    rows = [tuple(f"{getattr(stage, name) / _MB:,.0f}" for name in names) for stage in stages]
    return [("stage", *names), *((str(index), *row) for index, row in enumerate(rows))]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
