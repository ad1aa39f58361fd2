"""Time a training step with each method against the same step without: forward, backward, method and optimizer.

The model, its step and the methods are the product's own, on one process; the base has random weights. Cases are
interleaved (each repeat runs all of them, starting with another one) and the ratio of each is the median over repeats.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from mole_mega.adapters.methods import METHODS
from mole_mega.config import AdapterConfig, DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from mole_mega.models.sizes import LanguageSize, LlavaSize, VisionSize
from mole_mega.platform import parallel as platform
from mole_mega.training import parity
from mole_mega.training.optimizer import build_optimizer, set_lr
from mole_mega.training.step import Stepper
from mole_mega.training.trainer import build_model

# options that make a method do its work from the first step on
OPTIONS = {
    "bora": {"tau": 1e-3},
    "lorasculpt": {"prune_step": 1, "conflict_weight": 0.0},
    "riemannian": {},
}
# (case, method, its options, may cost so much of the plain step)
EXTRA = {"lorasculpt, regulariser": ("lorasculpt", {"prune_step": 1, "conflict_weight": 1e-3}, 1.5)}
TARGET = 1.1


def main(argv: list[str] | None = None) -> int:
    """Run the bench; prints a line a case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1024)
    args = parser.parse_args(argv)
    parallel = platform.initialize(ParallelConfig(), seed=0)
    size = _size(args.layers, args.hidden, args.tokens)
    cases = {"plain": (None, {}, 1.0)} | {n: (n, OPTIONS.get(n, {}), TARGET) for n in METHODS} | EXTRA
    with tempfile.TemporaryDirectory() as scratch:
        run = _run(Path(scratch) / "base", args.tokens)
        parity.make_base(run, size, parallel, Path(run.model.base))
        benches = {name: _stepper(run, size, parallel, method, options) for name, (method, options, _) in cases.items()}
    batch = _batch(size, args.tokens)
    times: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for repeat in range(args.repeats + 1):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            set_lr(benches[name].optimizer, repeat + 1, run.train)
            start = time.perf_counter()
            benches[name].train_step([batch])
            if repeat:  # the first is a warm-up
                times[name].append(time.perf_counter() - start)
    rows = []
    for name, (_, _, target) in cases.items():
        ratio = statistics.median(own / plain for own, plain in zip(times[name], times["plain"], strict=True))
        rows.append({"case": name, "seconds": statistics.median(times[name]), "ratio": ratio, "target": target})
        print(f"{name:<26} {rows[-1]['seconds']:8.3f} s  {ratio:6.3f} of plain, at most {target:.2f}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    platform.shutdown()
    return 0


def _size(layers: int, hidden: int, tokens: int) -> LlavaSize:
    return LlavaSize(
        vision=VisionSize(
            num_layers=3, hidden_size=32, ffn_hidden_size=64, num_heads=4, image_size=16, patch_size=8
        ),
        language=LanguageSize(
            num_layers=layers, hidden_size=hidden, ffn_hidden_size=hidden * 43 // 16, num_heads=8, num_kv_heads=8,
            vocab_size=512, max_length=tokens,
        ),
        image_token_id=4,
    )  # fmt: skip


def _run(base: Path, tokens: int) -> RunConfig:
    return RunConfig(
        run_dir="unused",
        model=ModelConfig(base=str(base)),
        adapter=AdapterConfig(num_experts=4, rank=16, alpha=32.0),
        train=TrainConfig(steps=1000, precision="fp32", schedule="constant", global_batch_size=1),
        data=DataConfig(sources=(), max_length=tokens),
    )


def _stepper(run: RunConfig, size: LlavaSize, parallel, method: str | None, options: dict) -> Stepper:
    if method is not None:
        run = replace(run, adapter=replace(run.adapter, methods=({"name": method, **options},)))
    model = build_model(run, size, parallel)
    return Stepper(run, model, build_optimizer(model, run.train), parallel, num_domains=2)


def _batch(size: LlavaSize, tokens: int):
    """One full sample of text."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(5, size.language.vocab_size, (1, tokens), generator=generator)
    return replace(
        parity.batches(size, 0, 0, 1)[0],
        tokens=text,
        labels=text.roll(-1, dims=1),
        padding_mask=torch.ones(1, tokens, dtype=torch.bool),
        position_ids=torch.arange(tokens)[None],
        pixels=torch.empty(0, 3, size.vision.image_size, size.vision.image_size),
        image_mask=torch.zeros(1, tokens, dtype=torch.bool),
        domains=torch.zeros(1, dtype=torch.int64),
    )


if __name__ == "__main__":
    raise SystemExit(main())
