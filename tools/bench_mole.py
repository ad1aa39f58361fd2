"""Time one MLP of the decoder, forward and backward, as it trains: frozen, with plain LoRA, with MoLE, with two experts
a token, and dense.

All layers but `dense` are the product's own, built by `models/specs.py` on one process: Megatron-Core's MLP, and its
MoELayer with our router and experts (and dispatcher, where tokens are put in order). What is timed is what a user's
step pays: routing, balance statistics, factors, the gradients of the input and of everything trainable. `dense` is here
for comparison only: what a mixture costs that computes every expert for every token.

Cases are interleaved (each repeat runs all of them, starting with another one) and each reports its medians. CPU time
is summed over threads: it tells a slow layer from a busy machine. Where other processes want the same cores, set
OMP_WAIT_POLICY=passive: by default a thread spins at the end of every product until the others are scheduled again,
which multiplies the time of a layer of many small products.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mole_mega.adapters.routers import MoLERouter
from mole_mega.config import AdapterConfig, DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from mole_mega.models import specs
from mole_mega.models.backend import backend_called
from mole_mega.models.mcore_config import DTYPES, build_configs
from mole_mega.models.sizes import LanguageSize, LlavaSize, VisionSize
from mole_mega.platform import parallel as platform
from mole_mega.platform.parallel import Parallel

SEED = 0
# (dtype, largest E, may cost so much of plain LoRA)
LORA_TARGETS = (("fp32", 16, 1.10), ("fp32", 64, 1.20), ("bf16", 16, 1.15), ("bf16", 64, 1.50))
FROZEN_TARGET = (16, 1.35)  # largest E, may cost so much of the frozen MLP
TOP_2_TARGET = 1.10  # of a token's one expert
_TOP_2 = {"expert_parallel": "weights", "top_k": 2}
# whose layer has experts of ours: tokens that go to one, to two, to two whole MLPs (timed where they are asked for)
MIXTURES = {"mole": {}, "top 2": _TOP_2, "MLPs": _TOP_2 | {"renormalize": True, "expert_form": "mlp"}}


@dataclass(frozen=True)
class Sizes:
    """One MLP and what it reads."""

    hidden: int = 1024
    ffn: int = 2752
    tokens: int = 2048
    rank: int = 32


@dataclass(frozen=True)
class Case:
    """One row of the table. `experts` is 1 where there is nothing to choose from."""

    case: str
    experts: int
    dtype: str


CASES = tuple(
    Case(case, experts, dtype)
    for dtype in ("fp32", "bf16")
    for case, experts in (
        ("frozen", 1),
        ("lora", 1),
        ("mole", 1),
        ("mole", 4),
        ("mole", 16),
        ("mole", 64),
        ("top 2", 4),
        ("top 2", 16),
        ("top 2", 64),
        ("dense", 16),
    )
)


class DenseMixture(nn.Module):
    """Every expert's output for every token: on each linear y = W x + sum_e p_e s B_e A_e x, p = softmax(R x)."""

    def __init__(self, base: nn.Module, num_experts: int, sizes: Sizes, dtype: torch.dtype, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.router = nn.Linear(sizes.hidden, num_experts)
        for projection, width_in, width_out in _projections(sizes):
            self.register_parameter(
                f"{projection}_A", nn.Parameter(torch.empty(num_experts, sizes.rank, width_in, dtype=dtype))
            )
            self.register_parameter(
                f"{projection}_B", nn.Parameter(torch.empty(num_experts, width_out, sizes.rank, dtype=dtype))
            )

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        p = torch.softmax(self.router(x.float()), dim=-1).to(x.dtype)
        gate, up = self.base.linear_fc1(x)[0].chunk(2, dim=-1)
        h = nn.functional.silu(gate + self._mixed("gate", x, p)) * (up + self._mixed("up", x, p))
        return self.base.linear_fc2(h)[0] + self._mixed("down", h, p), None

    def _mixed(self, projection: str, x: Tensor, p: Tensor) -> Tensor:
        pairs = zip(getattr(self, f"{projection}_A"), getattr(self, f"{projection}_B"), strict=True)
        return sum(p[..., e, None] * (self.scale * (x @ A.t()) @ B.t()) for e, (A, B) in enumerate(pairs))


class Bench:
    """One case, built: the layer, its input and the gradient that comes back."""

    def __init__(self, case: Case, sizes: Sizes, parallel: Parallel, *, gate: str = "prob") -> None:
        self.case = case
        dtype = DTYPES[case.dtype]
        adapter = AdapterConfig(
            method="lora" if case.case == "lora" else "mole", num_experts=case.experts, rank=sizes.rank,
            alpha=2.0 * sizes.rank, gate=gate, balance_weight=0.01, **MIXTURES.get(case.case, {}),
        )  # fmt: skip
        carries_adapters = case.case == "lora" or case.case in MIXTURES
        self.layer = build_mlp(case.dtype, adapter if carries_adapters else None, sizes, parallel)
        for parameter in self.layer.parameters():
            parameter.requires_grad = hasattr(parameter, "placement")
        self.base = self.layer.experts if case.case in MIXTURES else self.layer
        if case.case == "dense":
            scale = adapter.alpha / adapter.rank
            self.layer = DenseMixture(self.base, case.experts, sizes, dtype, scale).to(parallel.device)
        self.routers = [module for module in self.layer.modules() if isinstance(module, MoLERouter)]
        generator = torch.Generator().manual_seed(SEED)
        with torch.no_grad():
            # the same numbers whatever the case: first the base, then the input, then what only some cases have
            for linear in (self.base.linear_fc1, self.base.linear_fc2):
                linear.weight.copy_(_normal(linear.weight.shape, generator))
            shape = (sizes.tokens, 1, sizes.hidden)
            self.x = torch.randn(shape, generator=generator).to(parallel.device, dtype).requires_grad_()
            self.grad = torch.randn(shape, generator=generator).to(parallel.device, dtype)
            for parameter in self.layer.parameters():
                if parameter.requires_grad:
                    parameter.copy_(_normal(parameter.shape, generator))
        self.padding_mask = torch.zeros(1, sizes.tokens, dtype=torch.bool, device=parallel.device)

    def factors(self) -> dict[str, Tensor]:
        """The trainable LoRA factors by "<projection>.A" and "<projection>.B", with a leading axis of experts."""
        found = {}
        for projection in ("gate", "up", "down"):
            for factor in ("A", "B"):
                if self.case.case == "dense":
                    found[f"{projection}.{factor}"] = getattr(self.layer, f"{projection}_{factor}")
                elif self.case.case in MIXTURES:
                    found[f"{projection}.{factor}"] = getattr(self.base, f"lora_{projection}_{factor}")
                elif self.case.case == "lora":
                    linear = self.base.linear_fc2 if projection == "down" else self.base.linear_fc1
                    found[f"{projection}.{factor}"] = getattr(linear, f"lora_{projection}_{factor}")[None]
        return found

    def run(self) -> Tensor:
        """Forward and backward; returns the output. Gradients are left on the parameters and on `x`."""
        if self.case.case in MIXTURES:
            output, _ = self.layer(self.x, padding_mask=self.padding_mask)
        else:
            output, _ = self.layer(self.x)
        output.backward(self.grad)
        for router in self.routers:  # as at the end of a step whose global batch is this one micro-batch
            router.sums.balance_gradient(router.sums.counts_E / router.sums.counts_E.sum())
        return output

    def renew(self, seed: int) -> None:
        """Not timed: what a step does once for all its micro-batches, and other tokens, for the next ones choose other
        experts too (an expert's number of tokens is a shape, and some libraries compile a kernel for each shape)."""
        tokens = torch.randn(self.x.shape, generator=torch.Generator().manual_seed(seed))
        self.x.data.copy_(tokens)
        self.x.grad = None
        self.layer.zero_grad(set_to_none=True)
        for router in self.routers:
            router.sums.clear()


def run_cases(
    cases: Sequence[Case], sizes: Sizes, parallel: Parallel, repeats: int, *, warmups: int = 2
) -> list[dict[str, Any]]:
    """One row a case: {"case", "experts", "dtype", "ms", "cpu_ms"}, medians over `repeats`."""
    benches = [Bench(case, sizes, parallel) for case in cases]
    times: list[list[tuple[float, float]]] = [[] for _ in benches]
    for repeat in range(-warmups, repeats):
        for place in range(len(benches)):
            index = (place + repeat) % len(benches)
            benches[index].renew(seed=repeat + warmups)
            wall, cpu = _time(benches[index].run, parallel)
            if repeat >= 0:
                times[index].append((wall, cpu))
    return [
        {
            "case": case.case, "experts": case.experts, "dtype": case.dtype,
            "ms": 1e3 * statistics.median(wall for wall, _ in measured),
            "cpu_ms": 1e3 * statistics.median(cpu for _, cpu in measured),
        }
        for case, measured in zip(cases, times, strict=True)
    ]  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for people: ratios of medians to the frozen MLP, plain LoRA and MoLE with one expert, and targets."""
    lines = [
        f"{'dtype':5} {'case':6} {'E':>3} {'ms':>8} {'cpu ms':>8}   of frozen: wall   cpu   of lora: wall   cpu"
        "   of mole E=1: wall   cpu   target"
    ]
    for row in rows:
        peers = {(r["case"], r["experts"]): r for r in rows if r["dtype"] == row["dtype"]}
        ratios = {
            name: (row["ms"] / peer["ms"], row["cpu_ms"] / peer["cpu_ms"])
            for name in (("frozen", 1), ("lora", 1), ("mole", 1), ("mole", row["experts"]))
            if (peer := peers.get(name))
        }
        shown = [
            "    -     -" if name not in ratios else f"{ratios[name][0]:5.2f} {ratios[name][1]:5.2f}"
            for name in (("frozen", 1), ("lora", 1), ("mole", 1))
        ]
        lines.append(
            f"{row['dtype']:5} {row['case']:6} {row['experts']:3} {row['ms']:8.1f} {row['cpu_ms']:8.1f}"
            f"            {shown[0]}          {shown[1]}              {shown[2]}   {_judge(row, ratios)}"
        )
    return "\n".join(lines)


def _judge(row: dict[str, Any], ratios: dict[tuple[str, int], tuple[float, float]]) -> str:
    """Whether a MoLE row meets its targets, by wall time."""
    if row["case"] == "MLPs" and ("mole", row["experts"]) in ratios:
        return f"{ratios['mole', row['experts']][0]:.2f} of mole"
    if row["case"] == "top 2" and ("mole", row["experts"]) in ratios:
        ratio, _ = ratios["mole", row["experts"]]
        return f"{'met' if ratio <= TOP_2_TARGET else 'MISSED'} <= {TOP_2_TARGET:.2f} mole ({ratio:.2f})"
    if row["case"] != "mole":
        return ""
    verdicts = []
    for dtype, most, limit in LORA_TARGETS:
        if dtype == row["dtype"] and row["experts"] <= most:
            for name, label in ((("lora", 1), "lora"), (("mole", 1), "mole E=1")):
                if name in ratios and not (label == "mole E=1" and row["experts"] == 1):
                    verdicts.append(f"{'met' if ratios[name][0] <= limit else 'MISSED'} <= {limit:.2f} {label}")
            break
    most, limit = FROZEN_TARGET
    if row["experts"] <= most and ("frozen", 1) in ratios:
        verdicts.append(f"{'met' if ratios['frozen', 1][0] <= limit else 'MISSED'} <= {limit:.2f} frozen")
    return "; ".join(verdicts)


def build_mlp(
    precision: str,
    adapter: AdapterConfig | None,
    sizes: Sizes,
    parallel: Parallel,
    layout: ParallelConfig = ParallelConfig(),  # noqa: B008 - frozen
) -> Any:
    """The MLP of a decoder's first layer, as `LLaVA` would build it."""
    run = RunConfig(
        run_dir="", model=ModelConfig(base=""), train=TrainConfig(steps=1, precision=precision),
        data=DataConfig(sources=(), max_length=sizes.tokens), adapter=adapter or AdapterConfig(method="lora"),
        parallel=layout,
    )  # fmt: skip
    size = LlavaSize(
        vision=VisionSize(num_layers=2, hidden_size=8, ffn_hidden_size=8, num_heads=1, image_size=8, patch_size=8),
        language=LanguageSize(
            num_layers=1, hidden_size=sizes.hidden, ffn_hidden_size=sizes.ffn, num_heads=1, num_kv_heads=1,
            vocab_size=8, max_length=sizes.tokens,
        ),
        image_token_id=0,
    )  # fmt: skip
    config = build_configs(run, size).language
    plan = specs.AdapterPlan(adapter, SEED, parallel, backend_called("local"))
    block = specs.decoder_block(config, range(1), plan)
    assert block.layer_specs is not None
    build = block.layer_specs[0].submodules.mlp
    return build(config=config, pg_collection=parallel.groups, is_mtp_layer=False).to(parallel.device)


def _projections(sizes: Sizes) -> tuple[tuple[str, int, int], ...]:
    return (("gate", sizes.hidden, sizes.ffn), ("up", sizes.hidden, sizes.ffn), ("down", sizes.ffn, sizes.hidden))


def _normal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator) / shape[-1] ** 0.5


def _time(run: Callable[[], Any], parallel: Parallel) -> tuple[float, float]:
    """(wall, CPU) seconds of one run; CPU summed over the process's threads."""
    on_cuda = parallel.device.type == "cuda"
    if on_cuda:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    if on_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def _cases(asked: Sequence[str] | None) -> Sequence[Case]:
    if asked is None:
        return CASES
    named = [one.rpartition(":") for one in asked]
    return [Case(name, int(experts), dtype) for dtype in ("fp32", "bf16") for name, _, experts in named]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--hidden", type=int, default=Sizes.hidden)
    parser.add_argument("--ffn", type=int, default=Sizes.ffn)
    parser.add_argument("--tokens", type=int, default=Sizes.tokens)
    parser.add_argument("--rank", type=int, default=Sizes.rank)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="this one alone (default: both)")
    parser.add_argument("--case", action="append", metavar="NAME:EXPERTS", help="this one alone; may be given again")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    parallel = platform.initialize(ParallelConfig(), seed=SEED)
    try:
        sizes = Sizes(args.hidden, args.ffn, args.tokens, args.rank)
        cases = [case for case in _cases(args.case) if args.dtype in (None, case.dtype)]
        rows = run_cases(cases, sizes, parallel, args.repeats)
    finally:
        platform.shutdown()
    print(f"{sizes}, {args.threads} threads, medians of {args.repeats} interleaved repeats\n{table(rows)}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
