"""The data-conflict experiment of LLaVA-MoLE (arXiv 2401.16160) in miniature: plain LoRA against MoLE on three domains
of real pictures whose conventions contradict, over seeds, with the claims answered from the figures.

Everything is computed by this command; runs that are finished in --out are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tools")]

import evidence  # noqa: E402
import make_conflict_data as scenes  # noqa: E402
import runs  # noqa: E402

from mole_mega.errors import ConfigError, report_errors  # noqa: E402

TUNING_SEED = 1000  # none of the reported ones
LORA_LRS = (5e-3, 1e-2, 2e-2, 4e-2)
MOLE_LRS = ((1e-2, 1e-2), (2e-2, 1e-2), (2e-2, 4e-2), (4e-2, 1e-2))  # (lr, router_lr): as many as LORA_LRS

Point = tuple[runs.Row, dict[str, float]]  # a row to try, and its rates


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("conflict_out"), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--quick", action="store_true", help="every phase, with runs too short to mean anything")
    parser.add_argument("--tune", action="store_true", help="only search the learning rates, and write them to --tuned")
    parser.add_argument("--so-far", action="store_true", help="run nothing: the table and answers of finished runs")
    parser.add_argument("--tuned", type=Path, help="rates to use, searched for if missing (default: OUT/tuned.yaml)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Prepare, then tune or run all and answer; returns the exit code."""
    args = parse(argv)
    with report_errors(debug=args.debug) as outcome:
        if args.seeds < 1 or args.processes < 1:
            raise ConfigError(f"--seeds and --processes must be at least 1, got {args.seeds} and {args.processes}")
        started = time.monotonic()
        settings = yaml.safe_load((HERE / "settings.yaml").read_text())
        # a folder of its own: the data of a quick run are few
        args.out = (args.out / "quick" if args.quick else args.out).resolve()
        args.tuned = args.tuned or args.out / "tuned.yaml"
        if args.quick:
            settings["train"]["steps"], settings["validation"]["samples"] = 6, 24
        prepare(args.out, settings)
        if args.tune or not (args.tuned.exists() or args.so_far):
            tune(args, settings)
        if not args.tune:
            experiment(args, settings)
        print(f"\ntook {(time.monotonic() - started) / 60:.1f} minutes")
    return outcome.code


def prepare(out: Path, settings: Mapping[str, Any]) -> None:
    """The base as a checkpoint and the data of a full run, each made once in --out."""
    base, data = out / "base", out / "data"
    if not base.exists():
        say("the base model becomes a checkpoint")
        command("-m", "mole_mega.cli", "convert", "hf-to-megatron", "--hf", HERE / "base_hf", "--out", base)
    if not (data / "complete").exists():
        say("pictures and answers")
        train = settings["train"]
        # a run of twice the samples sees none twice
        count = 2 * train["steps"] * train["global_batch_size"] // len(scenes.DOMAINS)
        scenes.write_data(data, {"train": count, "validation": 300, "test": 300})
        (data / "complete").touch()


def tune(args: argparse.Namespace, settings: Mapping[str, Any]) -> None:
    """Try each method's grid on the mix with one seed; write down the rates of the best validation accuracy."""
    grids = grid(settings["adapter"]["rank"])
    rows = [row for points in grids.values() for row, _ in points]
    tried = {row.tuned: values for points in grids.values() for row, values in points}
    jobs = list(runs.make_jobs(rows, [TUNING_SEED], settings, tried, args.out, scenes.DOMAINS, "validation"))
    say(f"{len(jobs)} runs, {len(LORA_LRS)} settings a method, scored on validation pictures")
    figures = runs.read_figures(runs.run_all(jobs, args.processes))
    best = {}
    for name, points in grids.items():
        chosen, rates = best_point(points, figures)
        for row, values in points:
            mark = "  <" if row == chosen else ""
            print(f"{name:<22} {rate_text(values):<26} {mean_over_domains(figures[row.key], 'accuracy'):.3f}{mark}")
        score = mean_over_domains(figures[chosen.key], "accuracy")
        best[name] = {"rates": rates, "validation_accuracy": round(score, 3)}
    args.tuned.write_text(
        "# The best of each method's grid by validation accuracy on the mix, one seed; written by\n"
        f"#   python examples/data_conflict/run.py --tune{' --quick' if args.quick else ''}\n"
        + yaml.safe_dump(best, sort_keys=False)
    )
    print(f"wrote {args.tuned}")


def best_point(points: Sequence[Point], figures: evidence.Figures) -> Point:
    """The best by `goodness`."""
    return max(points, key=lambda point: goodness(figures[point[0].key]))


def goodness(row: Mapping[str, Mapping[int, float]]) -> tuple[float, float]:
    """What a search ranks by: mean accuracy, and between equal ones the loss. Rounded, for as many right answers are
    equal however the domains share them."""
    return round(mean_over_domains(row, "accuracy"), 9), -mean_over_domains(row, "loss")


def grid(rank: int) -> dict[str, list[Point]]:
    """{method: [(row, its rates)]}, equally many for each. The row's key and its tuned name are one."""
    found: dict[str, list[Point]] = {}
    for name, factor in (("lora", 1), ("lora_wide", runs.EXPERTS)):
        for lr in LORA_LRS:
            key = f"tune-{name}-{lr:g}"
            found.setdefault(name, []).append((runs.lora_row(key, key, factor * rank, tuned=key), {"lr": lr}))
    for gate in runs.GATES:
        row = runs.mole_row(gate, runs.EXPERTS, rank)
        for lr, router_lr in MOLE_LRS:
            key = f"tune-{row.tuned}-{lr:g}-{router_lr:g}"
            point = replace(row, key=key, tuned=key)
            found.setdefault(row.tuned, []).append((point, {"lr": lr, "router_lr": router_lr}))
    return found


def experiment(args: argparse.Namespace, settings: Mapping[str, Any]) -> None:
    """All rows and seeds, the step's cost, the table and the answers."""
    if not args.tuned.exists():
        raise ConfigError(f"no rates have been searched for yet: {args.tuned} is missing")
    tuned = {name: entry["rates"] for name, entry in yaml.safe_load(args.tuned.read_text()).items()}
    rows = runs.table_rows(settings["adapter"]["rank"], len(scenes.DOMAINS))
    jobs = list(runs.make_jobs(rows, range(args.seeds), settings, tuned, args.out, scenes.DOMAINS, "test"))
    if args.so_far:
        complete = runs.complete_rows(jobs)
        print(report(complete, {}, {row.key: row.title for row in rows if row.key in complete}, args, settings))
        return
    say(f"{len(jobs)} runs: {len(rows)} rows, {args.seeds} seeds")
    results = runs.run_all(runs.by_need(jobs), args.processes)
    say("what a training step costs")
    seconds = measure_cost(args, jobs, {"mix", *(row.key for row in rows if row.key.startswith("mole-prob"))})
    text = report(runs.read_figures(results), seconds, {row.key: row.title for row in rows}, args, settings)
    (args.out / "results.json").write_text(json.dumps({"runs": results, "step_seconds": seconds}, indent=1) + "\n")
    (args.out / "results.md").write_text(text)
    print(text)


def measure_cost(args: argparse.Namespace, jobs: list[runs.Job], rows: Collection[str]) -> dict[str, list[float]]:
    """{row: seconds of a step, by block} of these rows, in a process of its own."""
    wanted = [job for job in jobs if job.seed == 0 and job.row in rows]
    request = args.out / "cost_request.json"
    request.write_text(
        json.dumps(
            {
                "runs": {job.row: cost_settings(job, args.out) for job in wanted},
                "blocks": 3 if args.quick else 7,
                "steps": 3 if args.quick else 15,
            }
        )
    )
    answer = subprocess.run([sys.executable, HERE / "cost.py", request], capture_output=True, text=True, check=False)
    if answer.returncode:
        raise RuntimeError(f"measuring the step's cost failed: {answer.stderr.strip()[-500:]}")
    return json.loads(answer.stdout.splitlines()[-1])


def cost_settings(job: runs.Job, out: Path) -> dict[str, Any]:
    return {**job.settings, "run_dir": str(out / "cost" / job.row)}


def report(
    figures: evidence.Figures,
    seconds: Mapping[str, list[float]],
    titles: Mapping[str, str],
    args: argparse.Namespace,
    settings: Mapping[str, Any],
) -> str:
    """Table, cost and answers as Markdown."""
    domains = scenes.DOMAINS
    steps = settings["train"]["steps"]
    parts = [
        f"Test pictures, mean ± standard deviation over {args.seeds} seeds; accuracy is the share of answers that are "
        f"right word for word, loss is a label's cross-entropy. A run on the mix takes {steps} steps."
        + (" A quick run: the figures mean nothing." if args.quick else ""),
        evidence.table(figures, titles, domains),
        "A step, as a multiple of plain LoRA's (rank for rank, in turns on this machine):\n\n"
        + evidence.cost_table(seconds, "mix")
        if seconds
        else "The step's cost is measured at the end.",
        "```\n" + "\n".join(map(str, evidence.claims(figures, seconds, domains, runs.EXPERTS, runs.GATES))) + "\n```",
        f"The rule: {evidence.RULE}",
    ]
    return "\n\n".join(parts) + "\n"


def mean_over_domains(row: Mapping[str, Mapping[int, float]], metric: str) -> float:
    return statistics.fmean(value for domain in scenes.DOMAINS for value in row[f"{metric}/{domain}"].values())


def rate_text(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in rates.items())


def command(*arguments: object) -> None:
    """Run Python; an error ends the experiment."""
    subprocess.run([sys.executable, *map(str, arguments)], check=True)


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
