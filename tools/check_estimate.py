"""What `mole-mega estimate` says of memory, against real runs on this machine's CPUs in several layouts.

Each run trains a small LLaVA by the product's own trainer, one process a rank, on samples of the longest length with
one image each. Measured of every rank: the bytes of its weights, gradient buffers and optimizer state, and the peak of
its resident memory over what the process held before a model was built (everything imported, data read once). Each
stage's fullest rank is compared. Megabytes are 10^6 bytes. The allocator is told to give large blocks back at once
(MALLOC_MMAP_THRESHOLD_), and oneDNN to keep no compiled kernels, which only CPUs have. Linux only.
"""

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from mole_mega import config
from mole_mega.checkpoint.base import read_size, save_base
from mole_mega.config import ParallelConfig, RunConfig
from mole_mega.errors import quiet_libraries
from mole_mega.estimate.memory import micro_batch, stage_memory
from mole_mega.models.llava import LLaVA
from mole_mega.models.sizes import LanguageSize, LlavaSize, VisionSize
from mole_mega.platform import parallel as platform
from mole_mega.training.trainer import Trainer, build_run_loader

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny_cpu" / "base_hf"
SIZE = LlavaSize(
    vision=VisionSize(num_layers=3, hidden_size=160, ffn_hidden_size=640, num_heads=4, image_size=48, patch_size=8),
    language=LanguageSize(
        num_layers=4, hidden_size=512, ffn_hidden_size=1408, num_heads=8, num_kv_heads=4, vocab_size=4096,
        max_length=512,
    ),
    image_token_id=4,
)  # fmt: skip
LENGTH = 256
# name: (processes, overrides)
LAYOUTS = {
    "one process, fp32": (1, ["train.precision=fp32"]),
    "one process, bf16": (1, []),
    "lora, fp32": (1, ["train.precision=fp32", "adapter.method=lora"]),
    "full recompute, fp32": (1, ["train.precision=fp32", "train.recompute=full"]),
    "selective, fp32": (1, ["train.precision=fp32", "train.recompute=selective"]),
    "TP 2, fp32": (2, ["train.precision=fp32", "parallel.tensor=2"]),
    "PP 2, fp32": (2, ["train.precision=fp32", "parallel.pipeline=2"]),
    "EP 2, fp32": (2, ["train.precision=fp32", "parallel.expert=2"]),
    "DP 2, bf16, distributed": (2, ["train.distributed_optimizer=true"]),
    "TP 2 x EP 2, fp32": (4, ["train.precision=fp32", "parallel.tensor=2", "parallel.expert=2"]),
}
STATIC_MARGIN, TOTAL_MARGIN = 0.10, 0.20


def prepare(folder: Path) -> Path:
    """A base, samples of the longest length, and the run file over them; the file's path."""
    tree = {
        "run_dir": str(folder / "run"),
        "model": {"base": str(folder / "base")},
        "adapter": {"num_experts": 4, "rank": 32},
        "train": {"steps": 2, "global_batch_size": 16, "micro_batch_size": 4},
        "data": {
            "max_length": LENGTH,
            "sources": [{"name": "made", "path": str(folder / "made.json"), "image_folder": str(EXAMPLE.parent)}],
        },
        "monitor": {"tensorboard": False},
    }
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump(tree))
    run = config.load(run_file)
    parallel = platform.initialize(ParallelConfig(), seed=0)
    model = LLaVA(run, SIZE, parallel, adapters=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1]))
    save_base(model, folder / "base", [path for path in EXAMPLE.iterdir() if path.name != "model.safetensors"])
    words = 0
    while write_samples(folder / "made.json", words + 8) and longest(run, parallel) <= LENGTH:
        words += 8
    write_samples(folder / "made.json", words)
    platform.shutdown()
    return run_file


def write_samples(path: Path, words: int) -> bool:
    turns = [{"from": "human", "value": "<image>\n" + "so " * words}, {"from": "gpt", "value": "eight"}]
    path.write_text(json.dumps([{"id": n, "image": "board.png", "conversations": turns} for n in range(32)]))
    return True


def longest(run: RunConfig, parallel: platform.Parallel) -> int:
    """Places of the samples, padded."""
    roomy = replace(run, data=replace(run.data, max_length=SIZE.language.max_length))
    return build_run_loader(roomy, SIZE, parallel).micro_batches(0, 4, 4, 0, 1)[0].tokens.shape[1]


def measure(run_file: Path, processes: int, overrides: list[str], folder: Path) -> list[dict[str, float]]:
    """{"stage", "static", "peak"} of each rank, in bytes, of a run in processes of its own."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
        # or oneDNN keeps what it compiles for each shape of a bf16 product: measured, 0.9 MB each
        "LRU_CACHE_CAPACITY": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",
    }  # fmt: skip
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    worker = [__file__, "--worker", str(folder), str(run_file), *overrides]
    command = [sys.executable, "-W", "ignore", "-m", *torchrun, *worker]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"{' '.join(overrides)}: {child.stderr[-4000:]}")
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank_*.json"))]


def work(run_file: Path, overrides: list[str], folder: Path) -> None:
    """One rank of a measured run."""
    quiet_libraries()
    torch.set_num_threads(1)
    run = config.load(run_file, [*overrides, f"run_dir={folder / 'run'}"])
    parallel = platform.initialize(run.parallel, run.train.seed)
    loader = build_run_loader(run, read_size(Path(run.model.base)), parallel)
    batch = loader.micro_batches(0, 4 * parallel.dp_size, 4, parallel.dp_rank, parallel.dp_size)[0]
    assert batch.tokens.shape[1] == LENGTH, batch.tokens.shape
    del loader, batch
    gc.collect()
    before = resident("VmRSS")
    with open(os.devnull, "w") as silence:
        trainer = Trainer(run, parallel, out=silence)
        assert trainer.train() == 0
    figures = {"stage": parallel.pp_rank, "static": held(trainer), "peak": resident("VmHWM") - before}
    (folder / f"rank_{parallel.rank}.json").write_text(json.dumps(figures))
    platform.shutdown()


def held(trainer: Trainer) -> int:
    """Bytes of weights, gradient buffers and optimizer state, each storage once."""
    model, tensors = trainer.model, [*trainer.model.parameters()]
    tensors += [buffer.grad_data for buffer in (*model.buffers, *model.expert_parallel_buffers)]
    for part in trainer.optimizer.chained_optimizers:
        if part.optimizer is not None:
            for parameter, state in part.optimizer.state.items():
                tensors += [parameter, *(value for value in state.values() if isinstance(value, torch.Tensor))]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def resident(kind: str) -> int:
    """Bytes resident now (VmRSS) or at most so far (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {kind}")


def compare(run: RunConfig, processes: int, ranks: list[dict[str, float]]) -> list[dict[str, float]]:
    """A row a stage: estimated and measured, the fullest rank's."""
    rows = []
    for stage in range(run.parallel.pipeline):
        estimated = stage_memory(run, SIZE, processes, stage, micro_batch(run))
        mine = [rank for rank in ranks if rank["stage"] == stage]
        rows.append({
            "stage": stage,
            "static_estimated": estimated.static, "static_measured": max(rank["static"] for rank in mine),
            "total_estimated": estimated.total, "total_measured": max(rank["peak"] for rank in mine),
        })  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", nargs="*", choices=LAYOUTS, default=list(LAYOUTS), help="default: all of them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if args.worker:
        work(Path(rest[0]), rest[1:], args.worker)
        return 0
    quiet_libraries()
    rows, missed = [], 0
    header = ("", "stage", "static MB", "measured", "off", "total MB", "measured", "off")
    print("{:26} {:>5} {:>10} {:>9} {:>6} {:>9} {:>9} {:>6}".format(*header))
    with tempfile.TemporaryDirectory() as scratch:
        run_file = prepare(Path(scratch))
        for name in args.layouts:
            processes, overrides = LAYOUTS[name]
            folder = Path(scratch) / str(len(rows))
            folder.mkdir()
            ranks = measure(run_file, processes, overrides, folder)
            for row in compare(config.load(run_file, overrides), processes, ranks):
                off = [row[f"{kind}_estimated"] / row[f"{kind}_measured"] - 1 for kind in ("static", "total")]
                met = abs(off[0]) <= STATIC_MARGIN and abs(off[1]) <= TOTAL_MARGIN
                missed += not met
                rows.append({"layout": name, **row, "met": met})
                print(
                    f"{name:26} {row['stage']:5} {row['static_estimated'] / 1e6:10.1f} "
                    f"{row['static_measured'] / 1e6:9.1f} {off[0]:+6.1%} {row['total_estimated'] / 1e6:9.1f} "
                    f"{row['total_measured'] / 1e6:9.1f} {off[1]:+6.1%}{'' if met else '  MISSED'}",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 3 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
