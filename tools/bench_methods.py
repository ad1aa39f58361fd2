"""Time a training step with each method, and with each form of mixture, against the plain step of MoLE: forward,
backward, method and optimizer.

The model, its step and the methods are the product's own, on one process; the base has random weights. Cases are
interleaved (each repeat runs all of them, starting with another one), each right after a plain step, by which it is
divided; the ratio of a case is the median over repeats. That of plain by plain says how much of it is noise.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mole_mega.adapters.methods import METHODS
from mole_mega.config import AdapterConfig, DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from mole_mega.models.sizes import LanguageSize, LlavaSize, VisionSize
from mole_mega.platform import parallel as platform
from mole_mega.platform.parallel import Parallel
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
_TWO = {"expert_parallel": "weights", "top_k": 2, "renormalize": True}
_TASK = {"expert_parallel": "weights", "router_scope": "task", "gate": "none", "balance_weight": 0.0}
# what a form of mixture changes of the plain run's adapter: examples/top_2 and its neighbours, with as many ranks
FORMS: dict[str, dict[str, Any]] = {
    "top-2": _TWO,
    "Octavius": _TWO | {"router_scope": "sample", "balance_weight": 0.0},
    "MoSLD": _TWO | {"share_A": True},
    "MixLoRA": _TWO | {"expert_form": "mlp"},
    "MTL-LoRA": _TASK | {"share_A": True, "shared_B": 3},
    "LoRAMoE": {
        "expert_parallel": "weights", "gate": "dense", "router_scope": "linear", "router_bias": False,
        "balance_weight": 0.0,
    },
    "SMoRA": _TWO | {
        "num_experts": 64, "rank": 1, "top_k": 8, "alpha": 16.0, "router_score": "sigmoid", "router_scope": "linear",
        "router_bias": False, "balance_weight": 0.0,
    },
}  # fmt: skip
TARGET = 1.1
REGULARISER_TARGET = 1.5


def main(argv: list[str] | None = None) -> int:
    """Run the bench; prints a line a case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--case", action="append", choices=list(_cases()), help="these alone, beside the plain step")
    args = parser.parse_args(argv)
    parallel = platform.initialize(ParallelConfig(), seed=0)
    size = _size(args.layers, args.hidden, args.tokens)
    cases = {name: case for name, case in _cases().items() if name in ("plain", *(args.case or _cases()))}
    with tempfile.TemporaryDirectory() as scratch:
        run = _run(Path(scratch) / "base", args.tokens, args.precision)
        parity.make_base(run, size, parallel, Path(run.model.base))
        benches = {name: _stepper(run, size, parallel, changes) for name, (changes, _) in cases.items()}
    batch = _batch(size, args.tokens)
    for bench in benches.values():
        set_lr(bench.optimizer, 1, run.train)

    def seconds(name: str) -> float:
        start = time.perf_counter()
        benches[name].train_step([batch])
        return time.perf_counter() - start

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    names = list(cases)
    for repeat in range(args.repeats + 1):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            plain, own = seconds("plain"), seconds(name)
            if repeat:  # the first is a warm-up
                times[name].append((plain, own))
    rows = []
    for name, (_, target) in cases.items():
        ratio = statistics.median(own / plain for plain, own in times[name])
        median = statistics.median(own for _, own in times[name])
        rows.append({"case": name, "seconds": median, "ratio": ratio, "target": target})
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


def _run(base: Path, tokens: int, precision: str) -> RunConfig:
    return RunConfig(
        run_dir="unused",
        model=ModelConfig(base=str(base)),
        adapter=AdapterConfig(num_experts=4, rank=16, alpha=32.0),
        train=TrainConfig(steps=1000, precision=precision, schedule="constant", global_batch_size=1),
        data=DataConfig(sources=(), max_length=tokens),
    )


def _cases() -> dict[str, tuple[dict[str, Any], float]]:
    """{case: (what it changes of the plain run's adapter, may cost so much of the plain step)}"""

    def of_method(name: str, **options: Any) -> dict[str, Any]:
        return {"methods": ({"name": name, **OPTIONS.get(name, {}), **options},)}

    return {
        "plain": ({}, 1.0),
        **{name: (of_method(name), TARGET) for name in METHODS},
        "lorasculpt, regulariser": (of_method("lorasculpt", conflict_weight=1e-3), REGULARISER_TARGET),
        **{name: (changes, TARGET) for name, changes in FORMS.items()},
    }


def _stepper(run: RunConfig, size: LlavaSize, parallel: Parallel, changes: dict[str, Any]) -> Stepper:
    run = replace(run, adapter=replace(run.adapter, **changes))
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
