"""Which runs the experiment is made of, and a worker's way through one.

A run is the product's own: `settings.yaml` with a few keys changed, through mole_mega's Trainer. A finished run leaves
`runs/<name>/result.json` behind and is not repeated while its settings stay the same.
"""

from __future__ import annotations

import copy
import functools
import gc
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mole_mega import config
from mole_mega.config import ConfigError, RunConfig

EXPERTS = 3  # of the rows that are compared with one another; as many as there are domains
GATES = ("none", "prob", "straight_through")
Result = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A row of the table. `tuned` names the rates it trains with; `share` is its length, as a share of the steps that
    a run on the mix takes; `alone` trains a model for each domain on nothing else."""

    key: str
    title: str
    tuned: str
    adapter: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0
    alone: bool = False


@dataclass(frozen=True)
class Job:
    """One run: its row, its seed, the domains it trains and is scored on, its settings."""

    row: str
    seed: int
    domains: tuple[str, ...]
    run: RunConfig

    @property
    def folder(self) -> Path:
        return Path(self.run.run_dir)

    @property
    def settings(self) -> dict[str, Any]:
        """As they come back from JSON."""
        return json.loads(json.dumps(config.to_dict(self.run)))


def lora_row(key: str, title: str, rank: int, tuned: str = "lora", **fields: Any) -> Row:
    return Row(key, title, tuned, {"method": "lora", "rank": rank, "alpha": 2 * rank}, **fields)


def mole_row(gate: str, experts: int, rank: int, title: str = "", **adapter: Any) -> Row:
    """`rank` is that of one expert."""
    fields = {"method": "mole", "num_experts": experts, "gate": gate, "rank": rank, "alpha": 2 * rank, **adapter}
    key = "-".join(["mole", gate, str(experts), *map(str, adapter.values())])
    return Row(key, title or f"MoLE on the mix, gate `{gate}`, {experts} experts", f"mole_{gate}", fields)


def table_rows(rank: int, num_domains: int) -> list[Row]:
    """The paper's comparison, then MoLE by gate and number of experts."""
    wide = EXPERTS * rank
    alone = "LoRA, a domain alone"
    return [
        lora_row("alone_samples", f"{alone}, the mix's samples of it", rank, share=1 / num_domains, alone=True),
        lora_row("alone_steps", f"{alone}, the mix's steps: the ceiling", rank, alone=True),
        lora_row("mix", "LoRA on the mix", rank),
        lora_row("mix_twice", "LoRA on the mix, twice the samples", rank, share=2),
        lora_row("mix_wide", f"LoRA on the mix, {EXPERTS} x the rank", wide, "lora_wide"),
        mole_row("prob", 1, rank, "MoLE on the mix, 1 expert (all gates alike)"),
        *(mole_row(gate, experts, rank) for gate in GATES for experts in (2, 3, 4, 8)),
        mole_row("prob", EXPERTS, rank, f"as gate `prob`, {EXPERTS} experts, but scope model", balance_scope="model"),
    ]


def make_jobs(
    rows: Sequence[Row],
    seeds: Sequence[int],
    settings: Mapping[str, Any],
    tuned: Mapping[str, Mapping[str, float]],
    out: Path,
    domains: Sequence[str],
    split: str,
) -> Iterator[Job]:
    """Every run of every row, seed by seed, scored on `split`. `tuned` holds keys of the train section by name."""
    for seed in seeds:
        for row in rows:
            for chosen in [(domain,) for domain in domains] if row.alone else [tuple(domains)]:
                name = "-".join([row.key, *(chosen if row.alone else ()), f"seed{seed}"])
                tree = copy.deepcopy(dict(settings))
                tree["run_dir"], tree["model"] = str(out / "runs" / name), {"base": str(out / "base")}
                tree["adapter"] |= row.adapter
                tree["train"] |= {**tuned[row.tuned], "seed": seed, "steps": round(row.share * tree["train"]["steps"])}
                tree["data"] |= {"sources": _sources(out, chosen, "train"), "validation": _sources(out, chosen, split)}
                yield Job(row.key, seed, chosen, config.from_dict(tree))


def _sources(out: Path, domains: Sequence[str], split: str) -> list[dict[str, str]]:
    folder = out / "data"
    return [{"name": d, "path": str(folder / f"{d}_{split}.json"), "image_folder": str(folder)} for d in domains]


def by_need(jobs: Iterable[Job]) -> list[Job]:
    """What MoLE is compared with first, over all seeds, then a domain alone, then the other rows: an experiment that is
    stopped early can answer what it has."""
    compared = {"mix", "mix_twice", "mix_wide", *(f"mole-{gate}-{EXPERTS}" for gate in GATES)}

    def turn(job: Job) -> int:
        return 0 if job.row in compared else 1 if len(job.domains) == 1 else 2

    return sorted(jobs, key=turn)  # stable: seed by seed, as they come


def finished(job: Job) -> Result | None:
    """The stored result of a job, if there is one and it was made with the same settings. A key that the config did not
    have yet stands at its default."""
    path = job.folder / "result.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    try:
        settings = replace(job, run=config.from_dict(result["settings"])).settings
    except ConfigError:  # a key that there is no more
        return None
    return result if settings == job.settings else None


def conduct(job: Job) -> Result:
    """Train and score one run in this process."""
    # not above: the command itself needs no Megatron-Core
    import torch

    from mole_mega.errors import quiet_libraries

    quiet_libraries()
    from mole_mega.platform import parallel as platform
    from mole_mega.training.trainer import Trainer

    torch.set_num_threads(1)
    parallel = platform.initialize(job.run.parallel, job.run.train.seed)
    with open(job.folder / "log.txt", "w") as log:
        trainer = Trainer(job.run, parallel, log)
        trainer.loader.kept = _kept(job.run.data.validation[0].path)
        code = trainer.train()
    if code:
        raise RuntimeError(f"{job.folder.name} ended with exit code {code}, see {job.folder / 'log.txt'}")
    scores = trainer.validate()
    del trainer
    gc.collect()  # models are full of cycles, and the next is built at once
    return {"scores": scores}


@functools.cache
def _kept(_validation_path: str) -> dict:
    """What this process has read for runs that are scored on these pictures."""
    return {}


def run_all(jobs: Sequence[Job], processes: int, work: Callable[[Job], Result] = conduct) -> list[Result]:
    """The results of all jobs in their order: those at hand, and the others by `work` in worker processes."""
    todo = [job for job in jobs if finished(job) is None]
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are at hand", flush=True)
    started = time.monotonic()
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(_work_and_store, work, job): job for job in todo}
        try:
            for count, future in enumerate(as_completed(waiting), start=1):
                result = future.result()
                minutes = (time.monotonic() - started) / 60
                print(f"{count:4d} of {len(todo)}  {minutes:5.1f} min  {summary(result)}", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    results = [finished(job) for job in jobs]
    assert all(result is not None for result in results)
    return results  # type: ignore[return-value]


def _work_and_store(work: Callable[[Job], Result], job: Job) -> Result:
    shutil.rmtree(job.folder, ignore_errors=True)  # what an interrupted run, or one of other settings, left
    job.folder.mkdir(parents=True)
    started = time.monotonic()
    result = {"row": job.row, "seed": job.seed, "domains": job.domains, **work(job)}
    result |= {"seconds": time.monotonic() - started, "settings": job.settings}
    beside = job.folder / "result.json.new"
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(job.folder / "result.json")
    return result


def summary(result: Result) -> str:
    """One run in one line."""
    cells = [f"{domain} {result['scores'][f'accuracy/{domain}']:.3f}" for domain in result["domains"]]
    return f"{Path(result['settings']['run_dir']).name}: accuracy {', '.join(cells)} ({result['seconds']:.0f} s)"


def complete_rows(jobs: Sequence[Job]) -> dict[str, dict[str, dict[int, float]]]:
    """`read_figures` of the rows of which every run is finished."""
    results = [(job.row, finished(job)) for job in jobs]
    open_rows = {row for row, result in results if result is None}
    return read_figures([result for row, result in results if result is not None and row not in open_rows])


def read_figures(results: Sequence[Result]) -> dict[str, dict[str, dict[int, float]]]:
    """{row: {"accuracy/<domain>": {seed: value}}} of results; runs of one row on different domains come together."""
    figures: dict[str, dict[str, dict[int, float]]] = {}
    for result in results:
        for column, value in result["scores"].items():
            figures.setdefault(result["row"], {}).setdefault(column, {})[result["seed"]] = value
    return figures
