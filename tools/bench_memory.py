"""Peak resident memory of one training step: plain LoRA against MoLE, each case in a fresh process.

A step is the product's own: forward and backward of a small LLaVA, the routers' losses, Adam. MoLE may take more than
plain LoRA by what its additional trainable parameters take themselves (weight, gradient, Adam's state), and 5%.

Megabytes are 10^6 bytes. They count from the process with everything imported and nothing built, so that the 5% is of
the model and its step alone; the whole process's peak is shown beside. The allocator is told to give large blocks back
at once (MALLOC_MMAP_THRESHOLD_): what is counted is memory in use, not what glibc keeps for later. Linux only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mole_mega.config import AdapterConfig, DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from mole_mega.data.collate import Batch
from mole_mega.models.sizes import LanguageSize, LlavaSize, VisionSize
from mole_mega.platform import parallel as platform
from mole_mega.training.optimizer import build_optimizer, set_lr
from mole_mega.training.parity import make_base
from mole_mega.training.step import Stepper
from mole_mega.training.trainer import build_model

CASES = (("lora", 1), ("mole", 1), ("mole", 4), ("mole", 16))
MARGIN = 1.05
# bytes a trainable parameter takes for good: weight, fp32 gradient, Adam's two moments, and bf16's fp32 master weight
BYTES_PER_PARAMETER = {"fp32": 4 + 4 + 8, "bf16": 2 + 4 + 8 + 4}


@dataclass(frozen=True)
class Sizes:
    """The decoder and its micro-batch: `samples` of `length` tokens; short ones, for attention is not the subject."""

    hidden: int = 512
    ffn: int = 1408
    layers: int = 4
    samples: int = 16
    length: int = 128
    rank: int = 32
    precision: str = "fp32"


def measure(case: str, experts: int, sizes: Sizes) -> dict[str, Any]:
    """{"case", "experts", "peak_mb", "process_mb", "trainable"} of a step of one case, run in a process of its own."""
    request = json.dumps({"case": case, "experts": experts, "sizes": asdict(sizes)})
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    child = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--child", request],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if child.returncode:
        raise RuntimeError(f"{case} with {experts} experts: {child.stderr}")
    return json.loads(child.stdout.splitlines()[-1])


def judge(rows: Sequence[dict[str, Any]], precision: str) -> list[dict[str, Any]]:
    """The rows with "allowed_mb" (plain LoRA's own: its peak) and "met" added."""
    lora = next(row for row in rows if row["case"] == "lora")
    judged = []
    for row in rows:
        own = (row["trainable"] - lora["trainable"]) * BYTES_PER_PARAMETER[precision] / 1e6
        allowed = lora["peak_mb"] if row is lora else MARGIN * lora["peak_mb"] + own
        judged.append(row | {"allowed_mb": allowed, "met": row["peak_mb"] <= allowed})
    return judged


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Judged rows for people."""
    lines = [f"{'case':5} {'E':>3} {'trainable':>11} {'peak MB':>9} {'allowed':>9} {'of it':>6} {'process MB':>11}"]
    for row in rows:
        share, verdict = row["peak_mb"] / row["allowed_mb"], "met" if row["met"] else "MISSED"
        lines.append(
            f"{row['case']:5} {row['experts']:3} {row['trainable']:11,} {row['peak_mb']:9.1f} {row['allowed_mb']:9.1f} "
            f"{share:6.3f} {row['process_mb']:11.1f}  {verdict}"
        )
    return "\n".join(lines)


def _run_child(case: str, experts: int, sizes: Sizes) -> dict[str, Any]:
    torch.set_num_threads(1)
    parallel = platform.initialize(ParallelConfig(), seed=0)
    try:
        size = LlavaSize(
            vision=VisionSize(
                num_layers=2, hidden_size=16, ffn_hidden_size=16, num_heads=1, image_size=16, patch_size=8
            ),
            language=LanguageSize(
                num_layers=sizes.layers, hidden_size=sizes.hidden, ffn_hidden_size=sizes.ffn, num_heads=8,
                num_kv_heads=8, vocab_size=512, max_length=sizes.length,
            ),
            image_token_id=4,
        )  # fmt: skip
        run = RunConfig(
            run_dir="", model=ModelConfig(base=""), data=DataConfig(sources=(), max_length=sizes.length),
            train=TrainConfig(
                steps=2, precision=sizes.precision, global_batch_size=sizes.samples, micro_batch_size=sizes.samples
            ),
            adapter=AdapterConfig(method=case, num_experts=experts, rank=sizes.rank),
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            make_base(run, size, parallel, Path(folder) / "base")
            before = _resident("VmRSS")
            run = replace(run, model=ModelConfig(base=str(Path(folder) / "base")))
            model = build_model(run, size, parallel)
        optimizer = build_optimizer(model, run.train)
        stepper = Stepper(run, model, optimizer, parallel, num_domains=1)
        for step in (1, 2):
            # the first step makes Adam's state; the second has it from the start, as all others have
            Path("/proc/self/clear_refs").write_text("5")
            set_lr(optimizer, step, run.train)
            stepper.backward([_batch(size, sizes)])
            assert stepper.apply().applied
        peak = _resident("VmHWM")
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    finally:
        platform.shutdown()
    return {
        "case": case, "experts": experts, "peak_mb": peak - before, "process_mb": peak, "trainable": trainable,
    }  # fmt: skip


def _batch(size: LlavaSize, sizes: Sizes) -> Batch:
    generator = torch.Generator().manual_seed(0)
    shape = (sizes.samples, sizes.length)
    tokens = torch.randint(5, size.language.vocab_size, shape, generator=generator)
    return Batch(
        tokens=tokens,
        labels=tokens.roll(-1, dims=1),
        padding_mask=torch.ones(shape, dtype=torch.bool),
        position_ids=torch.arange(sizes.length).expand(shape),
        pixels=torch.zeros(0, 3, size.vision.image_size, size.vision.image_size),
        image_mask=torch.zeros(shape, dtype=torch.bool),
        domains=torch.zeros(sizes.samples, dtype=torch.long),
        sample_ids=tuple(str(sample) for sample in range(sizes.samples)),
    )


def _resident(kind: str) -> float:
    """Megabytes resident now (VmRSS), or at most since the last reset (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {kind}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--precision", choices=BYTES_PER_PARAMETER, default="fp32")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        request = json.loads(args.child)
        print(json.dumps(_run_child(request["case"], request["experts"], Sizes(**request["sizes"]))))
        return
    sizes = Sizes(precision=args.precision)
    rows = judge([measure(case, experts, sizes) for case, experts in CASES], args.precision)
    print(f"{sizes}\n{table(rows)}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
