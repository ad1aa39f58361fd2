"""The methods of the field on one footing: the three domains, base and measure of examples/data_conflict, for each
method a search of the same size on one seed, then all seeds, one table.

Everything is computed by this command; runs that are finished in --out are not repeated.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "data_conflict"), str(HERE.parents[1] / "tools")]

import evidence  # noqa: E402
import make_conflict_data as scenes  # noqa: E402
import run as conflict  # noqa: E402
import runs  # noqa: E402

from mole_mega.errors import ConfigError, quiet_libraries, report_errors  # noqa: E402

LRS = (5e-3, 1e-2, 2e-2, 4e-2)
ROUTER_LR = 1e-2
RANK = 2  # not the 1 of data_conflict, with which rsLoRA is plain LoRA and a transform of the ranks a number


@dataclass(frozen=True)
class Method:
    """A row: what it is, what of the paper is built, where that departs from it, and the four settings that are tried
    for it, each keys of `adapter` and of `train`."""

    key: str
    title: str
    paper: str
    built: str
    departs: str
    adapter: Mapping[str, Any]
    train: Mapping[str, Any] = field(default_factory=dict)
    points: tuple[Mapping[str, Mapping[str, Any]], ...] = tuple({"train": {"lr": lr}} for lr in LRS)


def methods(rank: int, steps: int) -> list[Method]:
    """All rows. Three experts of `rank` each where there are experts; as many as there are domains."""
    lora = {"method": "lora", "rank": rank, "alpha": 2 * rank}
    mole = {"method": "mole", "num_experts": runs.EXPERTS, "rank": rank, "alpha": 2 * rank, "gate": "prob"}
    two = {**mole, "top_k": 2, "renormalize": True, "expert_parallel": "weights"}
    dense = {**mole, "gate": "dense", "expert_parallel": "weights"}
    task = {**mole, "gate": "none", "router_scope": "task", "balance_weight": 0.0}
    # as many ranks in all, and as many for each token, as one expert of `rank` has
    ranks = {
        **mole, "num_experts": runs.EXPERTS * rank, "rank": 1, "top_k": rank, "renormalize": True,
        "router_scope": "linear", "router_score": "sigmoid", "score_bias_rate": 1e-3, "router_bias": False,
        "balance_weight": 0.0, "expert_parallel": "weights",
    }  # fmt: skip
    sculpt = {
        "name": "lorasculpt", "density": 0.5, "prune_step": max(1, steps // 4), "regularise": ["gate", "up", "down"],
    }  # fmt: skip
    tied = tuple(
        {"train": {"lr": lr}, "adapter": {"methods": [{"name": "bora", "tau": tau}]}}
        for lr in (1e-2, 2e-2)
        for tau in (1e-3, 1e-1)
    )
    # the published damping, and one as large as the Gram matrices become
    damped = tuple(
        {"train": {"lr": lr}, "adapter": {"methods": [{"name": "riemannian", "delta": delta}]}}
        for lr in (2e-2, 4e-2)
        for delta in (1e-6, 1.0)
    )
    return [
        Method(
            "lora", "plain LoRA", "2106.09685", "a pair for each of gate, up and down", "no LoRA on the attention", lora
        ),
        Method(
            "rslora", "rsLoRA", "2312.03732", "plain LoRA scaled by alpha / sqrt(rank)", "none known",
            {**lora, "scaling": "rslora"},
        ),
        Method(
            "lora_plus", "LoRA+", "2402.12354", "B's learning rate 16 times A's", "A's rate searched, the ratio not",
            lora, {"lora_plus_ratio": 16.0}, tuple({"train": {"lr": lr}} for lr in (5e-4, 1e-3, 2e-3, 4e-3)),
        ),
        Method(
            "lorasculpt", "LoRASculpt", "2503.16843",
            "plain LoRA of which half of each factor's numbers stay after a quarter of the steps",
            "masked after each step; its regulariser is on gate, up and down, for q, k and v have no LoRA here",
            {**lora, "methods": [sculpt]},
        ),
        Method(
            "mole", "LLaVA-MoLE, gate `prob`", "2401.16160", "top-1, the expert's output times its probability",
            "published with weight 1; balance loss by layer and trains the router alone", mole,
        ),
        Method(
            "mole_none", "LLaVA-MoLE, as published", "2401.16160", "top-1, weight 1: the balance loss alone routes",
            "balance loss by layer and over the global batch", {**mole, "gate": "none"},
        ),
        Method(
            "top_2", "top-2", "2401.16160", "two experts a token, weights renormalised", "the paper has one", two
        ),
        Method(
            "dense", "all experts", "2401.16160", "all experts by their softmax, as the released inference class",
            "the balance loss counts the likeliest", dense,
        ),
        Method(
            "loramoe", "LoRAMoE", "2312.09979", "all experts by their softmax, a router a linear",
            "without the constraint on groups, known here in its released form alone, whose sign is the reverse of its "
            "purpose; with LLaVA-MoLE's balance loss, and a bias in the router",
            {**dense, "router_scope": "linear"},
        ),
        Method(
            "octavius", "Octavius", "2311.02684", "top-2 for a whole sample, by a router that reads its instruction",
            "on the MLP and not on q, k, v, o; the instruction without padding and images. All domains are asked the "
            "same here, so that its router cannot tell them apart",
            {**two, "router_scope": "sample", "balance_weight": 0.0},
        ),
        Method(
            "mosld", "MoSLD", "2412.08946", "top-2, one A a linear for all experts", "no dropout on A",
            {**two, "share_A": True},
        ),
        Method(
            "riemannian", "Riemannian MoE-LoRA", "2502.15828", "top-2; gradients preconditioned, gate rescaled",
            "on the MLP and not on q, k, v, o; both preconditioners from the old weights; a router a block, by the "
            "same Adam, with bias correction, with LLaVA-MoLE's balance loss and a bias; delta searched (published: "
            "1e-6)",
            {**two, "rescale_gate": True}, {"clip_grad": 0.0}, damped,
        ),
        Method(
            "task", "an expert a source", "2407.15857 (tau 0)", "each sample by its source's expert, no router",
            "on the MLP and not on q and v", task,
        ),
        Method(
            "bora", "BoRA", "2407.15857", "an expert a source, tied to their learned mean",
            "on the MLP and not on q and v; tau by mean token loss, and the learning rate not in proportion to it; the "
            "mean goes to its optimum and not by Adam; experts begin apart and not as noisy copies",
            task, points=tied,
        ),
        Method(
            "mtl_lora", "MTL-LoRA", "2410.09437",
            "one A, three B mixed by each source's softmax(w / 0.1), an r x r transform a source",
            "on the MLP and not on q, k, v, o", {**task, "share_A": True, "shared_B": 3, "expert_parallel": "weights"},
        ),
        Method(
            "smora", "SMoRA", "2501.15103", "each rank an expert; sigmoid scores, whose bias follows the load",
            "on the MLP alone; the bias moves once a step by the global batch, by 1e-3 (600 steps); a third of the "
            "ranks, not an eighth",
            ranks,
        ),
        Method(
            "mixlora", "MixLoRA", "2404.15159", "top-2 of whole MLPs, each with its own activation",
            "no LoRA on the attention; balance loss as LLaVA-MoLE's", {**two, "expert_form": "mlp"},
        ),
    ]  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("methods_out"), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--only", nargs="+", metavar="KEY", help="these rows")
    parser.add_argument("--quick", action="store_true", help="every phase, with runs too short to mean anything")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Prepare, search, run all, write the table; returns the exit code."""
    args = parse(argv)
    with report_errors(debug=args.debug) as outcome:
        started = time.monotonic()
        settings = yaml.safe_load((HERE.parent / "data_conflict" / "settings.yaml").read_text())
        args.out = (args.out / "quick" if args.quick else args.out).resolve()
        if args.quick:
            settings["train"]["steps"], settings["validation"]["samples"] = 6, 24
        settings["train"]["router_lr"] = ROUTER_LR
        rows = methods(RANK, settings["train"]["steps"])
        if args.only:
            if unknown := set(args.only) - {row.key for row in rows}:
                raise ConfigError(f"no row is called {min(unknown)}; there are {', '.join(row.key for row in rows)}")
            rows = [row for row in rows if row.key in args.only]
        conflict.prepare(args.out, settings)
        chosen = search(rows, settings, args)
        text = measure(rows, chosen, settings, args)
        (args.out / "results.md").write_text(text)
        print(f"{text}\ntook {(time.monotonic() - started) / 60:.1f} minutes")
    return outcome.code


def search(rows: Sequence[Method], settings: Mapping[str, Any], args: argparse.Namespace) -> dict[str, int]:
    """{row: which of its points had the best validation accuracy on the mix, with one seed}."""
    tried = {row.key: [as_row(row, i, f"tune-{row.key}-{i}") for i in range(len(row.points))] for row in rows}
    everything = [entry for entries in tried.values() for entry in entries]
    conflict.say(f"{len(everything)} runs: 4 settings a method, one seed, scored on validation pictures")
    jobs = make_jobs(everything, [conflict.TUNING_SEED], settings, args, "validation")
    figures = runs.read_figures(runs.run_all(jobs, args.processes))
    return {
        key: max(range(len(entries)), key=lambda i: conflict.goodness(figures[entries[i][0].key]))
        for key, entries in tried.items()
    }


def measure(
    rows: Sequence[Method], chosen: Mapping[str, int], settings: Mapping[str, Any], args: argparse.Namespace
) -> str:
    """All rows over all seeds, and the step's cost: the table as Markdown."""
    entries = [as_row(row, chosen[row.key], row.key) for row in rows]
    jobs = make_jobs(entries, range(args.seeds), settings, args, "test")
    conflict.say(f"{len(jobs)} runs: {len(rows)} rows, {args.seeds} seeds, scored on test pictures")
    figures = runs.read_figures(runs.run_all(jobs, args.processes))
    conflict.say("what a training step costs")
    seconds = conflict.measure_cost(args, jobs, {row.key for row in rows})
    trained = numbers_trained(jobs, args.out / "base")
    accuracy = [f"accuracy {domain}" for domain in (*scenes.DOMAINS, "mean")]
    columns = ["method", "paper", "what was built", "where it departs", *accuracy, "loss mean", "step",
               "numbers trained", "chosen of 4"]  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [row.title, row.paper, row.built, row.departs]
        places = [*(("accuracy", domain) for domain in scenes.DOMAINS), ("accuracy", "mean"), ("loss", "mean")]
        cells += [evidence.cell(figures[row.key], metric, name, scenes.DOMAINS) for metric, name in places]
        cells.append(_ratio(seconds, row.key, rows[0].key))
        cells.append(f"{trained[row.key]:,}")
        cells.append(_point_text(row.points[chosen[row.key]]))
        lines.append("| " + " | ".join(cells) + " |")
    note = " A quick run: the figures mean nothing." if args.quick else ""
    steps = settings["train"]["steps"]
    about = f"Test pictures, mean ± standard deviation over {args.seeds} seeds, {steps} steps on the mix"
    return f"{about}; a step as a multiple of the first row's.{note}\n\n" + "\n".join(lines) + "\n"


def numbers_trained(jobs: Sequence[runs.Job], base: Path) -> dict[str, int]:
    """{row: how many numbers its adapters and routers have}."""
    # not above: the command itself needs no Megatron-Core, whose import warns of what a processor does not have
    quiet_libraries()
    from mole_mega.checkpoint.base import read_size
    from mole_mega.estimate.parameters import stage_parameters

    size = read_size(base)
    return {job.row: stage_parameters(job.run, size, 0).adapters for job in jobs}


def as_row(method: Method, point: int, key: str) -> tuple[runs.Row, dict[str, Any]]:
    """A row of the experiment under one of its points, and its keys of the train section."""
    tried = method.points[point]
    adapter = {**method.adapter, **tried.get("adapter", {})}
    return runs.Row(key, method.title, key, adapter), {**method.train, **tried["train"]}


def make_jobs(
    entries: Sequence[tuple[runs.Row, dict[str, Any]]], seeds: Sequence[int], settings: Mapping[str, Any],
    args: argparse.Namespace, split: str,
) -> list[runs.Job]:  # fmt: skip
    tuned = {row.key: train for row, train in entries}
    return list(runs.make_jobs([row for row, _ in entries], seeds, settings, tuned, args.out, scenes.DOMAINS, split))


def _ratio(seconds: Mapping[str, Sequence[float]], key: str, base: str) -> str:
    mean, deviation = evidence.spread(evidence.ratios(seconds, key, base))
    return f"{mean:.2f} ± {deviation:.2f}"


def _point_text(point: Mapping[str, Mapping[str, Any]]) -> str:
    words = [f"{key} {value:g}" for key, value in point["train"].items()]
    for method in point.get("adapter", {}).get("methods", ()):
        words += [f"{key} {value:g}" for key, value in method.items() if key != "name"]
    return ", ".join(words)


if __name__ == "__main__":
    sys.exit(main())
