"""Time MoLE blocks over expert-parallel processes with travelling tokens and with travelling weights, forward and
backward, and count what they send, against the formula (adapters/traffic.py) and against what `auto` chooses. With
several layers weights are timed both ways: gathered when a block needs them, and while the block before it computes, as
training does. Figures are those of one layer.

Each process has a part of the experts and tokens of its own. A setting's two forms take turns; a row has the medians
over repeats of the slowest process. Starts its processes itself.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_mole import Sizes, build_mlp

from mole_mega.adapters.mixture import prefetch_along
from mole_mega.adapters.traffic import Traffic, choose_expert_parallel
from mole_mega.config import AdapterConfig, ParallelConfig
from mole_mega.models.mcore_config import DTYPES
from mole_mega.platform import parallel as platform
from mole_mega.platform.parallel import Parallel

SEED = 0
EXPERTS = (2, 4, 8, 16, 32, 64)
TOKENS = (256, 1024)
FORMS = ("tokens", "weights")
AHEAD = "ahead"


class Sent:
    """Counts the bytes that this process sends to others in collectives over `group`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.bytes = group, 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count inside the block."""
        names = ("all_to_all_single", "all_gather_single", "reduce_scatter_single")
        kept = {name: getattr(dist, name) for name in names}
        try:
            for name in names:
                setattr(dist, name, self._counted(kept[name], getattr(self, f"_{name}")))
            yield
        finally:
            for name, function in kept.items():
                setattr(dist, name, function)

    def _counted(self, function: Callable[..., Any], count: Callable[..., int]) -> Callable[..., Any]:
        def call(output: torch.Tensor, input: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
            if group is self.group:
                self.bytes += count(output, input, **kwargs)
            return function(output, input, *args, group=group, **kwargs)

        return call

    def _all_to_all_single(
        self, output: torch.Tensor, input: torch.Tensor, input_split_sizes: Sequence[int] | None = None, **_: Any
    ) -> int:
        ranks = self.group.size()
        rows = [len(input) // ranks] * ranks if input_split_sizes is None else list(map(int, input_split_sizes))
        elsewhere = sum(rows) - rows[self.group.rank()]
        return elsewhere * input[:1].numel() * input.element_size()

    def _all_gather_single(self, output: torch.Tensor, input: torch.Tensor, **_: Any) -> int:
        return input.numel() * input.element_size() * (self.group.size() - 1)

    def _reduce_scatter_single(self, output: torch.Tensor, input: torch.Tensor, **_: Any) -> int:
        return output.numel() * output.element_size() * (self.group.size() - 1)


def measure(
    num_experts: int, sizes: Sizes, precision: str, parallel: Parallel, repeats: int, num_layers: int = 1
) -> dict[str, float | int | str]:
    """One row: milliseconds and bytes of either form, a layer and pass, beside the formula's bytes and the choice of
    `auto`; with several layers also milliseconds of weights that are gathered ahead."""
    forms = FORMS if num_layers == 1 else (*FORMS, AHEAD)
    layout = ParallelConfig(expert=parallel.ep_size)
    dtype, group = DTYPES[precision], parallel.groups.ep
    generator = torch.Generator().manual_seed(SEED + parallel.rank)
    shape = (sizes.tokens, 1, sizes.hidden)
    x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(shape, generator=generator).to(dtype)
    stacks: dict[str, torch.nn.ModuleList] = {}
    for form in forms:
        travels: Any = "weights" if form == AHEAD else form
        adapter = AdapterConfig(num_experts=num_experts, rank=sizes.rank, expert_parallel=travels, balance_weight=0.0)
        stacks[form] = torch.nn.ModuleList(
            build_mlp(precision, adapter, sizes, parallel, layout) for _ in range(num_layers)
        )
        same = torch.Generator().manual_seed(SEED)
        with torch.no_grad():
            for parameter in stacks[form].parameters():
                parameter.requires_grad = hasattr(parameter, "placement")
                parameter.copy_(torch.randn(parameter.shape, generator=same) / parameter.shape[-1] ** 0.5)
    if AHEAD in stacks:
        prefetch_along([layer.experts for layer in stacks[AHEAD]])
    times: dict[str, list[float]] = {form: [] for form in forms}
    sent = {form: Sent(group) for form in forms}
    for repeat in range(-1, repeats):
        for form in forms if repeat % 2 else reversed(forms):
            dist.barrier()
            start = time.perf_counter()
            with sent[form].counting():
                hidden = x
                for layer in stacks[form]:
                    hidden = hidden + layer(hidden)[0]
                hidden.backward(grad)
            took = torch.tensor((time.perf_counter() - start) / num_layers)
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            stacks[form].zero_grad(set_to_none=True)
            x.grad = None
            if repeat >= 0:
                times[form].append(float(took))
    mean_sent = torch.tensor([float(sent[form].bytes) for form in FORMS])
    dist.all_reduce(mean_sent)
    passes = 2 * (repeats + 1) * group.size() * num_layers
    adapter = AdapterConfig(num_experts=num_experts, rank=sizes.rank, expert_parallel="auto")
    formula = Traffic.of(adapter, layout, sizes.hidden, sizes.ffn, sizes.tokens)
    choice = choose_expert_parallel(adapter, layout, sizes.hidden, sizes.ffn, sizes.tokens)
    row: dict[str, float | int | str] = {"experts": num_experts, "tokens": sizes.tokens, "auto": choice.form}
    for form, total in zip(FORMS, mean_sent.tolist(), strict=True):
        row[f"{form}_ms"] = 1e3 * statistics.median(times[form])
        row[f"{form}_bytes"] = total / passes
        row[f"{form}_formula"] = getattr(formula, form) * dtype.itemsize
    if AHEAD in times:
        row[f"{AHEAD}_ms"] = 1e3 * statistics.median(times[AHEAD])
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For people."""
    lines = [
        f"{'E':>3} {'tokens':>6}   {'tokens ms':>9} {'bytes a pass':>12} {'of formula':>10}"
        f"   {'weights ms':>10} {'bytes a pass':>12} {'of formula':>10}"
        f"{'   ahead ms' if any(f'{AHEAD}_ms' in row for row in rows) else ''}   faster   auto"
    ]
    right = 0
    for row in rows:
        weights = row.get(f"{AHEAD}_ms", row["weights_ms"])
        faster = "tokens" if row["tokens_ms"] < weights else "weights"
        right += faster == row["auto"]
        cells = [
            f"{row[f'{form}_ms']:{width}.1f} {row[f'{form}_bytes']:12,.0f} "
            f"{row[f'{form}_bytes'] / row[f'{form}_formula']:10.2f}"
            for form, width in zip(FORMS, (9, 10), strict=True)
        ]
        lines.append(
            f"{row['experts']:3} {row['tokens']:6}   {cells[0]}   {cells[1]}"
            f"{f'   {weights:8.1f}' if f'{AHEAD}_ms' in row else ''}   {faster:7}  {row['auto']:7} "
            f"{'' if faster == row['auto'] else 'SLOWER'}".rstrip()
        )
    return "\n".join([*lines, f"auto chose the faster form in {right} of {len(rows)} settings"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--processes", type=int, default=2, help="each with a part of the experts (default 2)")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--layers", type=int, default=1, help="blocks one after the other (default 1)")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=1376)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}", *sys.argv]
        sys.exit(subprocess.run([sys.executable, *command]).returncode)
    torch.set_num_threads(1)
    parallel = platform.initialize(ParallelConfig(expert=args.processes), seed=SEED)
    rows = [
        measure(
            experts, Sizes(args.hidden, args.ffn, tokens, args.rank), args.dtype, parallel, args.repeats, args.layers
        )
        for tokens in TOKENS
        for experts in EXPERTS
        if experts % args.processes == 0
    ]
    if parallel.is_main:
        print(
            f"{args.processes} processes, hidden {args.hidden}, ffn {args.ffn}, rank {args.rank}, {args.dtype}, "
            f"layers {args.layers}"
        )
        print(table(rows))
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    platform.shutdown()


if __name__ == "__main__":
    main()
