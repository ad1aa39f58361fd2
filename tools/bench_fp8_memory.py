"""What a base kept in FP8 saves: memory of the base, and peak resident memory of a training step, bf16 against FP8.

A step is the product's own (bench_memory.py: forward, backward, routers' losses, Adam) on a base of about 0.6 GB in
bf16, each case in a fresh process. To reach: the base's memory at most 0.55 of bf16's, and at least 0.9 of what that
saves seen in the peak. Also the time of a step, and the relative difference of the logits: of random weights, which
magnify rounding from layer to layer (tests/unit/test_fp8.py holds a trained base's to 5 %).

Megabytes are 10^6 bytes, resident, from the process with everything imported and nothing built. Linux only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_memory
import torch

from mole_mega.config import AdapterConfig, DataConfig, Fp8Config, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from mole_mega.models.sizes import LanguageSize, LlavaSize, VisionSize
from mole_mega.platform import fp8
from mole_mega.platform import parallel as platform
from mole_mega.training.optimizer import build_optimizer, set_lr
from mole_mega.training.parity import make_base
from mole_mega.training.step import Stepper
from mole_mega.training.trainer import build_model

CASES = ("bf16", "channel", "block")
MOST_OF_BASE, LEAST_OF_SAVING = 0.55, 0.9
SAMPLES, LENGTH = 2, 64
SIZE = LlavaSize(
    vision=VisionSize(num_layers=2, hidden_size=16, ffn_hidden_size=16, num_heads=1, image_size=16, patch_size=8),
    language=LanguageSize(
        num_layers=24, hidden_size=1024, ffn_hidden_size=2816, num_heads=8, num_kv_heads=8, vocab_size=512,
        max_length=LENGTH,
    ),
    image_token_id=4,
)  # fmt: skip


def run_of(base: Path, case: str) -> RunConfig:
    return RunConfig(
        run_dir="",
        model=ModelConfig(base=str(base)),
        data=DataConfig(sources=(), max_length=LENGTH),
        train=TrainConfig(steps=3, precision="bf16", global_batch_size=SAMPLES, micro_batch_size=SAMPLES),
        adapter=AdapterConfig(num_experts=3, rank=16),
        fp8=Fp8Config() if case == "bf16" else Fp8Config(store_base=True, scale=case),  # type: ignore[arg-type]
    )


def measure(case: str, base: Path, logits: Path) -> dict[str, Any]:
    """{"case", "base_mb", "loaded_mb", "peak_mb", "step_s"} of one case, run in a process of its own; its logits go to
    a file."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    child = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--child", case, str(base), str(logits)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if child.returncode:
        raise RuntimeError(f"{case}: {child.stderr}")
    return json.loads(child.stdout.splitlines()[-1])


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the FP8 cases with what they are of bf16's, and "met"."""
    plain, *others = rows
    judged = []
    for row in others:
        saved = plain["base_mb"] - row["base_mb"]
        shares = {
            "of_base": row["base_mb"] / plain["base_mb"],
            "of_saving": (plain["peak_mb"] - row["peak_mb"]) / saved,
            "of_time": row["step_s"] / plain["step_s"],
        }
        met = shares["of_base"] <= MOST_OF_BASE and shares["of_saving"] >= LEAST_OF_SAVING
        judged.append(row | shares | {"met": met})
    return [plain, *judged]


def _run_child(case: str, base: Path, logits_file: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    parallel = platform.initialize(ParallelConfig(), seed=0)
    try:
        run = run_of(base, case)
        before = bench_memory._resident("VmRSS")
        model = build_model(run, SIZE, parallel)
        frozen = [p for p in model.module.parameters() if not p.requires_grad]
        scales = [linear.weight_scale for linear in fp8.kept_in_fp8(model.module).values()]
        base_bytes = sum(tensor.nbytes for tensor in (*frozen, *scales))
        loaded = bench_memory._resident("VmRSS")
        stepper = Stepper(run, model, build_optimizer(model, run.train), parallel, num_domains=1)
        batch = bench_memory._batch(SIZE, bench_memory.Sizes(samples=SAMPLES, length=LENGTH))
        model.module.eval()
        with torch.no_grad():
            logits = stepper._run(model, batch, None)
        torch.save(logits.float(), logits_file)
        del logits
        seconds = 0.0
        for step in (1, 2, 3):
            # the first step makes Adam's state; the others have it from the start
            Path("/proc/self/clear_refs").write_text("5")
            set_lr(stepper.optimizer, step, run.train)
            start = time.perf_counter()
            stepper.backward([batch])
            assert stepper.apply().applied
            seconds = time.perf_counter() - start
        peak = bench_memory._resident("VmHWM")
    finally:
        platform.shutdown()
    return {
        "case": case, "base_mb": base_bytes / 1e6, "loaded_mb": loaded - before, "peak_mb": peak - before,
        "step_s": seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        case, base, logits = args.child
        print(json.dumps(_run_child(case, Path(base), Path(logits))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        parallel = platform.initialize(ParallelConfig(), seed=0)
        make_base(replace(run_of(folder / "base", "bf16"), run_dir=""), SIZE, parallel, folder / "base")
        platform.shutdown()
        rows = [measure(case, folder / "base", folder / f"{case}.pt") for case in CASES]
        plain = torch.load(folder / "bf16.pt", weights_only=True)
        for row in rows[1:]:
            found = torch.load(folder / f"{row['case']}.pt", weights_only=True)
            row["of_logits"] = float((found - plain).norm() / plain.norm())
    rows = judge(rows)
    titles = f"{'base':8} {'base MB':>8} {'loaded MB':>9} {'peak MB':>8} {'of base':>8} {'of saving':>9} {'logits':>7}"
    print(f"{titles} {'step s':>7}")
    for row in rows:
        text = f"{row['case']:8} {row['base_mb']:8.1f} {row['loaded_mb']:9.1f} {row['peak_mb']:8.1f}"
        if "met" in row:
            text += f" {row['of_base']:8.3f} {row['of_saving']:9.3f} {row['of_logits']:7.2%} {row['step_s']:7.2f}"
            text += "  met" if row["met"] else "  MISSED"
        else:
            text += f" {'':26} {row['step_s']:7.2f}"
        print(text)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
