"""What a base kept in FP8 costs in loss: the demo's run, over seeds, without FP8, by channel and by block.

Rounding the base sets training on another path, and paths that part end at losses that differ, in either direction. One
pair of runs therefore says nothing. Here each seed trains all cases on the same samples from the same adapters, in
turn, and the differences to the run without FP8 are averaged over seeds: a mean that is more than two standard errors
from 0 is a cost, and the spread is chance. The case `control` differs from `none` in the order of sums alone (half the
micro-batch size), and shows how far apart rounding of fp32 leads; `ends` is `channel` with the decoder's first and last
layer left as they are. `signs` and `signs ends` keep nothing in FP8: their base is off by the errors of `channel` and
`ends`, each with a sign of chance. What they cost, any change of that size to the base costs, and FP8 no more.

To reach: the mean difference of the training loss, over the second half of the steps, within 2 %.
"""

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mole_mega import config
from mole_mega.config import Fp8Config, MonitorConfig, RunConfig
from mole_mega.convert.hf_import import import_hf
from mole_mega.errors import quiet_libraries
from mole_mega.platform import parallel as platform
from mole_mega.platform.fp8 import dequantise, quantise
from mole_mega.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "tiny_cpu"
# what each sets of section fp8
CASES: dict[str, dict[str, Any]] = {
    "none": {},
    "control": {},
    "channel": {"store_base": True},
    "block": {"store_base": True, "scale": "block"},
    "ends": {"store_base": True, "first_last_layers_bf16": True},
    "signs": {},
    "signs ends": {},
}
FIGURES = ("train", "held_out")
TARGET = 0.02


def run_of(case: str, seed: int, steps: int, folder: Path) -> RunConfig:
    """The demo's run, of the first `steps` of its own schedule, on one process."""
    made = folder / "data"
    base = folder / (f"base {case} {seed}" if case.startswith("signs") else "base")
    run = config.load(EXAMPLE / "run.yaml", [f"model.base={base}", f"run_dir={folder / f'{case} {seed}'}"])
    sources, validation = (
        tuple(replace(s, path=str(made / Path(s.path).name), image_folder=str(made)) for s in found)
        for found in (run.data.sources, run.data.validation)
    )
    micro_batch_size = run.train.micro_batch_size // (2 if case == "control" else 1)
    schedule_steps = run.train.schedule_steps or run.train.steps
    return replace(
        run,
        data=replace(run.data, sources=sources, validation=validation),
        train=replace(
            run.train, seed=seed, steps=steps, schedule_steps=schedule_steps, micro_batch_size=micro_batch_size
        ),
        validation=replace(run.validation, every=steps),
        checkpoint=replace(run.checkpoint, every=0),
        monitor=MonitorConfig(tensorboard=False, experts_every=0, pictures_every=0),
        fp8=Fp8Config(**CASES[case]),
    )


def change_signs(base_hf: Path, out: Path, seed: int, *, spare_ends: bool) -> None:
    """A copy of `base_hf` whose tower and decoder are off by the errors of FP8 by channel, each sign at random."""
    shutil.copytree(base_hf, out)
    (file,) = out.glob("*.safetensors")
    tensors, generator = load_file(file), torch.Generator().manual_seed(seed)
    layers = {int(found[1]) for name in tensors if (found := re.match(r"language_model\.model\.layers\.(\d+)\.", name))}
    spared = (
        tuple(f"language_model.model.layers.{layer}." for layer in (min(layers), max(layers))) if spare_ends else ()
    )
    for name, weight in tensors.items():
        if ".layers." in name and name.endswith(".weight") and weight.dim() == 2 and not name.startswith(spared):
            exact_OI = weight.float()
            error_OI = dequantise(*quantise(exact_OI, "channel"), torch.float32) - exact_OI
            sign_OI = torch.randint(2, error_OI.shape, generator=generator) * 2 - 1
            tensors[name] = exact_OI + sign_OI * error_OI
    save_file(tensors, file, metadata={"format": "pt"})


def train(run: RunConfig) -> dict[str, float]:
    """Mean loss of the second half of the steps, and of the held-out samples, mean over domains, at the end."""
    parallel = platform.initialize(run.parallel, run.train.seed)
    with open(os.devnull, "w") as nowhere:
        code = Trainer(run, parallel, nowhere).train()
    if code:
        raise RuntimeError(f"{run.run_dir} ended with exit code {code}")
    platform.leave_groups()
    rows = [json.loads(line) for line in (Path(run.run_dir) / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row and row["step"] > run.train.steps // 2]
    held_out = [v for row in rows for key, v in row.items() if key.startswith("validation_loss/")]
    return {"train": statistics.fmean(losses), "held_out": statistics.fmean(held_out)}


def compare(rows: list[dict[str, Any]], figure: str) -> list[dict[str, Any]]:
    """Of each case but `none`: mean, standard error and the seeds' own relative differences to it; "met" where the mean
    is within TARGET."""
    by_case = {case: {row["seed"]: row[figure] for row in rows if row["case"] == case} for case in CASES}
    compared = []
    for case in list(CASES)[1:]:
        seeds = sorted(by_case[case].keys() & by_case["none"].keys())
        apart = [by_case[case][seed] / by_case["none"][seed] - 1 for seed in seeds]
        if not apart:
            continue
        mean = statistics.fmean(apart)
        error = statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else math.inf
        compared.append({
            "case": case, "figure": figure, "seeds": len(apart), "mean": mean, "error": error, "apart": apart,
            "met": abs(mean) <= TARGET, "is_chance": abs(mean) <= 2 * error,
        })  # fmt: skip
    return compared


def describe(rows: list[dict[str, Any]]) -> list[str]:
    """For people."""
    lines = []
    for figure in FIGURES:
        plain = [row[figure] for row in rows if row["case"] == "none"]
        lines.append(f"{figure} loss without FP8 {statistics.fmean(plain):.4f} (mean of {len(plain)} seeds)")
        for one in compare(rows, figure):
            verdict = f"  {one['case']:10} {one['mean']:+.2%}  {'met' if one['met'] else 'MISSED':6}  "
            if one["seeds"] == 1:
                lines.append(f"{verdict}one seed: chance cannot be told from cost")
                continue
            chance = "within two standard errors of 0" if one["is_chance"] else "not chance alone"
            own = "  ".join(f"{value:+.1%}" for value in one["apart"])
            lines.append(f"{verdict}+- {one['error']:.2%}, {chance}; by seed: {own}")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Train all cases of all seeds, and print the comparison after each seed: what was done stands if it is stopped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, after each seed")
    parser.add_argument("--seeds", type=int, default=8, help="how many (default 8)")
    parser.add_argument(
        "--case", action="append", choices=list(CASES)[1:], help="this one and `none` alone; may be repeated"
    )
    parser.add_argument("--steps", type=int, default=200, help="of each run (default 200, the demo's)")
    args = parser.parse_args(argv)
    quiet_libraries()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    names = ["none", *args.case] if args.case else list(CASES)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        maker = [sys.executable, str(ROOT / "tools" / "make_demo_data.py"), "--out", str(folder / "data")]
        subprocess.run(maker, check=True, stdout=subprocess.DEVNULL)
        platform.initialize(config.ParallelConfig(), seed=0)
        import_hf(EXAMPLE / "base_hf", folder / "base")
        platform.leave_groups()
        for seed in range(args.seeds):
            for case in names[seed % len(names) :] + names[: seed % len(names)]:
                if case.startswith("signs"):
                    changed = folder / f"hf {case} {seed}"
                    change_signs(EXAMPLE / "base_hf", changed, seed, spare_ends=case == "signs ends")
                    platform.initialize(config.ParallelConfig(), seed=0)
                    import_hf(changed, folder / f"base {case} {seed}")
                    platform.leave_groups()
                found = train(run_of(case, seed, args.steps, folder))
                rows.append({"case": case, "seed": seed, "steps": args.steps} | found)
                print(f"seed {seed} {case:10} train {found['train']:.4f}  held out {found['held_out']:.4f}", flush=True)
            print("\n".join(describe(rows)), flush=True)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1) + "\n")
    platform.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
