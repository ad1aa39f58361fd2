"""What the router board costs a training step: the same steps with the board and without, taken in turns.

`on` is a logged step as a run takes it by default: every router counts its tokens by source and modality and sums
entropies and margins, one all-reduce carries it all, alarms are judged, and the row goes to `metrics.jsonl` and
TensorBoard. `off` is the same step with what the balance loss needs and no more, whose row has no routing in it.
`experts` and `pictures` are what is done every 100th step beside that. The board costs by layer, expert and token, not
by width: a small model is the hard case.

Medians over pairs of steps. CPU time is summed over threads and tells a slow board from a busy machine. A step's time
varies by more than the board takes, so `own_cpu_ms` is measured beside it, within the same steps: the CPU time of the
routers' sums and of what is done with the step's result, which `off` has less of. `operations` counts what PyTorch is
asked to do in a step, forward and backward.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mole_mega.adapters.routers import MoLERouter, RouterSums
from mole_mega.adapters.routing import RouterMemory
from mole_mega.config import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from mole_mega.data.collate import Batch
from mole_mega.models.sizes import LanguageSize, LlavaSize, VisionSize
from mole_mega.monitor.alarms import observe
from mole_mega.monitor.experts import measure_experts
from mole_mega.monitor.logs import RunLogs
from mole_mega.monitor.metrics import step_row
from mole_mega.monitor.pictures import routing_pictures
from mole_mega.platform import parallel as platform
from mole_mega.platform.parallel import Parallel
from mole_mega.training.optimizer import build_optimizer, set_lr
from mole_mega.training.parity import make_base
from mole_mega.training.step import Stepper
from mole_mega.training.trainer import build_model

DOMAINS = ("a", "b", "c")
LIMIT = 0.01  # of a step's time


@dataclass(frozen=True)
class Sizes:
    """The model, and the tokens of a step."""

    layers: int = 2
    hidden: int = 1024
    ffn: int = 2752
    experts: int = 8
    rank: int = 16
    samples: int = 8
    length: int = 256


class BareSums(RouterSums):
    """What the balance and z losses need, and nothing for people."""

    @torch.no_grad()
    def add(self, x_TH, logits_TE, probs_TE, choice_TK, valid_T, group_T=None):
        valid = valid_T.to(torch.float32)
        probs = probs_TE * valid[:, None]
        lse = torch.logsumexp(logits_TE, dim=-1) * valid
        self.counts_GE.view(-1).scatter_add_(0, choice_TK[:, 0], valid)
        self.probs_E += probs.sum(0)
        self.z_sum += lse.square().sum()
        self._kept.append((x_TH, probs))
        if sum(len(x) for x, _ in self._kept) > self._most_kept:
            self._sum_pairs()


class Bench:
    """One model that is stepped with the board or without, and its logs."""

    def __init__(self, run: RunConfig, size: LlavaSize, parallel: Parallel, folder: Path, *, board: bool) -> None:
        self.run, self.parallel, self.board = run, parallel, board
        self.model = build_model(run, size, parallel)
        self.optimizer = build_optimizer(self.model, run.train)
        self.stepper = Stepper(run, self.model, self.optimizer, parallel, len(DOMAINS))
        layers = self.stepper.router_plan.layers
        self.memory = RouterMemory.empty(len(layers), run.adapter.num_experts)
        self.logs = RunLogs(folder, run.monitor, 0, layers, DOMAINS)
        self.own_seconds = 0.0
        for router in self.model.module.routers():
            if not board:
                _make_bare(router)
            router.sums.add = partial(self._timed, router.sums.add)
        if not board:
            self.stepper.router_plan = replace(self.stepper.router_plan, num_groups=1)

    def step(self, number: int, batch: Batch) -> None:
        lrs = set_lr(self.optimizer, number, self.run.train)
        self.own_seconds = 0.0
        self.result = self.stepper.train_step([batch])
        self._timed(self._log, number, lrs)

    def _log(self, number: int, lrs: dict[str, float]) -> None:
        logged = self.result if self.board else replace(self.result, routing=None)
        row = step_row(number, logged, lrs, DOMAINS)
        if self.board:
            monitor, routing = self.run.monitor, self.result.routing
            self.memory, alarms = observe(self.memory, routing, number, monitor.alarms, self.run.adapter)
            self.logs.alarms(alarms)
        self.logs.row(row)

    def _timed(self, action: Callable[..., Any], *args: Any) -> None:
        start = time.process_time()
        action(*args)
        self.own_seconds += time.process_time() - start

    def experts(self) -> None:
        blocks, layers = self.model.module.mole_layers(), self.stepper.router_plan.layers
        measure_experts(blocks, layers, self.run.adapter.num_experts, self.parallel.groups, self.parallel.device)

    def pictures(self) -> None:
        routing_pictures(self.result.routing, DOMAINS)


class CountOperations(TorchDispatchMode):
    """Counts what is dispatched inside the block."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


def measure(sizes: Sizes, parallel: Parallel, repeats: int, *, warmups: int = 3) -> list[dict[str, Any]]:
    """Rows {"case", "ms", "cpu_ms"}; of `on` and `off` also "own_cpu_ms", and "operations" of a step."""
    with tempfile.TemporaryDirectory() as folder:
        benches = build(sizes, parallel, Path(folder))
        times: dict[str, list[tuple[float, float]]] = {"on": [], "off": []}
        own: dict[str, list[float]] = {"on": [], "off": []}
        for number in range(1, warmups + repeats + 1):
            batch = make_batch(sizes, number)
            # in turns, each first in half of the pairs
            for case in ("on", "off") if number % 2 else ("off", "on"):
                taken = _time(partial(benches[case].step, number, batch))
                if number > warmups:
                    times[case].append(taken)
                    own[case].append(benches[case].own_seconds)
        for case in ("experts", "pictures"):
            times[case] = [_time(getattr(benches["on"], case)) for _ in range(5)]
        rows = [
            {
                "case": case,
                "ms": 1e3 * statistics.median(wall for wall, _ in taken),
                "cpu_ms": 1e3 * statistics.median(cpu for _, cpu in taken),
            }
            for case, taken in times.items()
        ]
        for row in rows[:2]:
            row["own_cpu_ms"] = 1e3 * statistics.median(own[row["case"]])
            with CountOperations() as count:
                benches[row["case"]].step(warmups + repeats + 1, make_batch(sizes, 0))
            row["operations"] = count.number
        for bench in benches.values():
            bench.logs.close()
    return rows


def build(sizes: Sizes, parallel: Parallel, folder: Path) -> dict[str, Bench]:
    """The two benches, on one base."""
    size = LlavaSize(
        vision=VisionSize(num_layers=2, hidden_size=16, ffn_hidden_size=16, num_heads=1, image_size=16, patch_size=8),
        language=LanguageSize(
            num_layers=sizes.layers, hidden_size=sizes.hidden, ffn_hidden_size=sizes.ffn, num_heads=8, num_kv_heads=8,
            vocab_size=512, max_length=sizes.length,
        ),
        image_token_id=4,
    )  # fmt: skip
    run = RunConfig(
        run_dir="unused",
        model=ModelConfig(base=str(folder / "base")),
        data=DataConfig(
            sources=tuple(SourceConfig(name=name, path="made") for name in DOMAINS), max_length=sizes.length
        ),
        train=TrainConfig(
            steps=1000, precision="fp32", global_batch_size=sizes.samples, micro_batch_size=sizes.samples
        ),
        adapter=AdapterConfig(num_experts=sizes.experts, rank=sizes.rank, z_loss_weight=0.0),
    )
    make_base(run, size, parallel, folder / "base")
    return {case: Bench(run, size, parallel, _new(folder / case), board=case == "on") for case in ("on", "off")}


def make_batch(sizes: Sizes, seed: int) -> Batch:
    """Text of all three sources."""
    shape = (sizes.samples, sizes.length)
    tokens = torch.randint(5, 512, shape, generator=torch.Generator().manual_seed(seed))
    return Batch(
        tokens=tokens,
        labels=tokens.roll(-1, dims=1),
        padding_mask=torch.ones(shape, dtype=torch.bool),
        position_ids=torch.arange(sizes.length).expand(shape),
        pixels=torch.zeros(0, 3, 16, 16),
        image_mask=torch.zeros(shape, dtype=torch.bool),
        domains=torch.arange(sizes.samples) % len(DOMAINS),
        sample_ids=tuple(str(sample) for sample in range(sizes.samples)),
    )


def share(rows: Sequence[dict[str, Any]], every: int) -> float:
    """The board's share of a step's CPU time; `experts` and `pictures` count once in `every` steps."""
    by_case = {row["case"]: row for row in rows}
    extra = by_case["on"]["own_cpu_ms"] - by_case["off"]["own_cpu_ms"]
    seldom = by_case["experts"]["cpu_ms"] + by_case["pictures"]["cpu_ms"]
    return (extra + seldom / every) / by_case["off"]["cpu_ms"]


def table(rows: Sequence[dict[str, Any]], every: int) -> str:
    """The rows for people, and the verdict."""
    lines = [f"{'case':9} {'ms':>8} {'cpu ms':>8} {'own cpu ms':>11} {'operations':>11}"]
    for row in rows:
        own = f"{row['own_cpu_ms']:11.2f} {row['operations']:11}" if "operations" in row else ""
        lines.append(f"{row['case']:9} {row['ms']:8.1f} {row['cpu_ms']:8.1f} {own}".rstrip())
    cost = share(rows, every)
    lines.append(f"the board takes {cost:.2%} of a step: {'met' if cost <= LIMIT else 'MISSED'}, at most {LIMIT:.0%}")
    return "\n".join(lines)


def _make_bare(router: MoLERouter) -> None:
    router.sums.__class__ = BareSums
    router.sums.count_groups(1)


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _time(action: Callable[[], Any]) -> tuple[float, float]:
    """(wall, CPU) seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--hidden", type=int, default=Sizes.hidden)
    parser.add_argument("--ffn", type=int, default=Sizes.ffn)
    parser.add_argument("--layers", type=int, default=Sizes.layers)
    parser.add_argument("--experts", type=int, default=Sizes.experts)
    args = parser.parse_args()
    torch.set_num_threads(1)
    parallel = platform.initialize(ParallelConfig(), seed=0)
    try:
        sizes = Sizes(hidden=args.hidden, ffn=args.ffn, layers=args.layers, experts=args.experts)
        rows = measure(sizes, parallel, args.repeats)
    finally:
        platform.shutdown()
    print(f"{sizes}, medians of {args.repeats} pairs\n{table(rows, every=100)}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
