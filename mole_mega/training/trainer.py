"""The loop: build a run, go on where it stopped, step, log, validate, save, and stop for a reason that is said."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from mole_mega import config as run_config
from mole_mega.adapters.methods import check_methods, method_entries
from mole_mega.adapters.routing import RouterMemory
from mole_mega.checkpoint import files
from mole_mega.checkpoint.base import load_base, read_size
from mole_mega.checkpoint.store import (
    LATEST,
    CheckpointStore,
    RunState,
    check_experts_of_tasks,
    check_trained_with,
    latest_checkpoint,
    load_weights,
    trainable_entries,
    used_otherwise,
    warm_start,
)
from mole_mega.config import ConfigError, RunConfig
from mole_mega.data import tally
from mole_mega.data.collate import Batch
from mole_mega.data.loader import Loader, build_loader
from mole_mega.data.sources import bytes_on_disk
from mole_mega.errors import CheckFailedError, ExitCode, StoppedError
from mole_mega.estimate.plan import misfit
from mole_mega.models.expert_parallel import expert_parallel
from mole_mega.models.llava import LLaVA
from mole_mega.models.sizes import LlavaSize
from mole_mega.monitor.alarms import Alarm, observe, progress_note
from mole_mega.monitor.experts import expert_row, measure_experts
from mole_mega.monitor.logs import RunLogs
from mole_mega.monitor.metrics import Row, StepResult, step_row
from mole_mega.monitor.throughput import Throughput, peak_memory_bytes, progress_line
from mole_mega.platform import fp8
from mole_mega.platform.meeting import check_agreement
from mole_mega.platform.parallel import Parallel
from mole_mega.platform.recipes import sequence_multiple
from mole_mega.platform.scaling import make_scales, remembers_scales, scale_entries
from mole_mega.platform.te import check_machine
from mole_mega.platform.watchdog import Watchdog
from mole_mega.training.evaluation import (
    Answer,
    answer_questions,
    answer_row,
    answers_name,
    evaluation_row,
    forget_answers,
    labelled_places,
    write_answers,
)
from mole_mega.training.optimizer import build_optimizer, set_lr
from mole_mega.training.reseed import Reseed, reseed_expert
from mole_mega.training.step import Evaluator, Stepper
from mole_mega.training.stopping import StopSignals
from mole_mega.wording import number_of, ranges


def build_model(run: RunConfig, size: LlavaSize, parallel: Parallel) -> DistributedDataParallel:
    """This rank's part of the model with the base loaded, wrapped for data parallelism."""
    model = LLaVA(run, size, parallel)
    load_base(model, Path(run.model.base))
    return wrap(model, run)


def wrap(model: LLaVA, run: RunConfig) -> DistributedDataParallel:
    """A model with the buffers that gradients are summed in over data-parallel ranks."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=run.train.distributed_optimizer,
    )
    return DistributedDataParallel(model.config, ddp_config, model)


def build_run_loader(run: RunConfig, size: LlavaSize, parallel: Parallel) -> Loader:
    """The data of a run, padded so that sequence parallelism and FP8 divide it."""
    check_batch(run, parallel)
    return build_loader(
        run.data,
        run.model.base,
        run.train.seed,
        size.vision.num_places,
        size.image_token_id,
        size.pad_token_id,
        sequence_multiple(run),
        run.train.global_batch_size,
    )


def check_batch(run: RunConfig, parallel: Parallel) -> None:
    """Raise ConfigError unless the global batch divides over the data-parallel ranks."""
    run_config.check_batch(run.train, parallel.dp_size)


@dataclass(frozen=True)
class Evaluation:
    """Scores by domain, the answers that the model wrote (none unless asked for), and what was left out, in words."""

    scores: Row
    answers: list[Answer]
    left_out: list[str]


def evaluate_checkpoint(
    run: RunConfig, parallel: Parallel, checkpoint: Path | None, *, generate: bool = True
) -> Evaluation:
    """Scores of a checkpoint, or of the base alone, on the first samples of `data.validation`; with `generate` its
    answers too. Raises ConfigError for a source of which no sample can be used."""
    base = Path(run.model.base)
    size = read_size(base)
    if checkpoint is not None:
        check_trained_with(checkpoint, run, files.folder_hash(base))
    loader = build_run_loader(run, size, parallel)
    batches = _validation_batches(run, loader, parallel)
    skipped = skipped_samples(loader, parallel)
    places = labelled_places(batches, len(loader.domains), parallel)
    check_scorable([source.name for source in run.data.validation], places, loader, skipped)
    model = LLaVA(run, size, parallel, adapters=checkpoint is not None)
    load_base(model, base)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    evaluator = Evaluator(run, model, parallel, len(loader.domains))
    scores, answers = _validate(run, evaluator, model, loader, batches, generate=generate)
    return Evaluation(scores, answers, _skipped_lines(skipped, loader))


def check_scorable(names: Sequence[str], places: torch.Tensor, loader: Loader, skipped: tally.Tally) -> None:
    """Raise ConfigError, with the reasons in `skipped`, for a validation source without one of the labelled `places`,
    [D]: before a model is run, which on the other sources may take long."""
    for name in names:
        if not places[loader.domains.index(name)]:
            why = ", ".join(f"{count} {kind}" for kind, count in skipped.get(name, {}).items())
            raise ConfigError(f"data.validation {name!r} has no sample that can be scored: {why}")


def _validation_batches(run: RunConfig, loader: Loader, parallel: Parallel) -> list[Batch]:
    rows = run.train.micro_batch_size
    return list(loader.validation_batches(run.validation.samples, rows, parallel.dp_rank, parallel.dp_size))


def _validate(
    run: RunConfig, evaluator: Evaluator, model: LLaVA, loader: Loader, batches: Sequence[Batch], *, generate: bool
) -> tuple[Row, list[Answer]]:
    scores = evaluation_row(evaluator, batches, loader.domains)
    answers: list[Answer] = []
    if generate:
        base, rows, longest = Path(run.model.base), run.train.micro_batch_size, run.validation.max_new_tokens
        answers = answer_questions(
            model, batches, loader.domains, loader.encoder, base, rows, longest, evaluator.each_batch
        )
    return scores | answer_row(answers), answers


def skipped_samples(loader: Loader, parallel: Parallel) -> tally.Tally:
    """{source: {kind of reason: how many samples all ranks left out}}."""
    return tally.add(_of_each_reader(loader.skipped, parallel))


def _skipped_lines(skipped: tally.Tally, loader: Loader) -> list[str]:
    """For people: a line a kind, and examples from this rank."""
    lines = [
        f"left out {number_of(count, 'sample')} of {source}: {kind}"
        for source, kinds in skipped.items()
        for kind, count in kinds.items()
    ]
    return lines + [f"  for example: {message}" for message in loader.skipped_messages[:3]]


def _of_each_reader(counts: tally.Tally, parallel: Parallel) -> list[tally.Tally]:
    """`counts` of every rank that reads samples of its own: tensor- and pipeline-parallel ranks read the same ones, so
    of each data-parallel rank one."""
    gathered: list[tally.Tally] = [{} for _ in range(parallel.world_size)]
    dist.all_gather_object(gathered, counts)
    return [gathered[rank] for rank in dist.get_process_group_ranks(parallel.groups.dp)]


class Trainer:
    """One process of a run."""

    def __init__(self, run: RunConfig, parallel: Parallel, out: TextIO = sys.stdout) -> None:
        self.run, self.parallel, self._out = run, parallel, out
        check_methods(run)
        check_machine(run)
        base = Path(run.model.base)
        self.size = read_size(base)
        self.base_hash = files.folder_hash(base)
        if run.model.base_hash and run.model.base_hash != self.base_hash:
            raise ConfigError(f"{base} has hash {self.base_hash}, model.base_hash asks for {run.model.base_hash}")
        self.store = CheckpointStore(run, parallel)
        self.loader = build_run_loader(run, self.size, parallel)
        assert self.loader.plan is not None
        self.plan = self.loader.plan
        self.plan.check(run.train.steps)
        self._data_bytes = {source.name: bytes_on_disk(source) for source in run.data.sources}
        check_agreement(self._found_on_disk())
        self.model = build_model(run, self.size, parallel)
        self.optimizer = build_optimizer(self.model, run.train)
        self.stepper = Stepper(run, self.model, self.optimizer, parallel, len(self.loader.domains))
        self.state = self._start()
        self._counted_before = self.state.data_counts
        self._first_of_phase, self._phases_before = self._mixtures_before()
        if run.adapter.method == "mole":
            self._remember(self.state.routers or RouterMemory.empty(len(self._router_layers), run.adapter.num_experts))
        # trainable tensors that no gradient was seen to reach yet; a resumed run saw them before
        self._unproved = set() if self.state.applied_steps else _names_to_prove(run, self.model)
        self._signals = StopSignals(parallel)
        self._watchdog = Watchdog(run.train.hang_seconds)
        self.stepper.each_batch = self._watchdog.going_on

    def train(self) -> int:
        """Run to the last step; returns the exit code."""
        run = self.run
        if self.state.step >= run.train.steps:
            had = number_of(self.state.step, "step")
            self._say(f"nothing to train: this run already has {had}, of {run.train.steps:,} asked (train.steps)")
            return ExitCode.DONE
        with self._signals, self._watchdog:
            return self._train()

    def _train(self) -> int:
        run = self.run
        self._announce()
        logs = self._open_logs()
        throughput = Throughput()
        saved = self.state.step
        code = ExitCode.DONE
        while self.state.step < run.train.steps:
            step = self.state.step + 1
            row, result = self._step(step)
            row |= throughput.step(result.places)
            self._log_step(row, result, self._watch_routing(step, result), logs)
            if run.data.validation and self._due(run.validation.every, step):
                self._watchdog.at(step, "validation")
                self._log_validation(step, logs)
                throughput.restart()
            if self.state.bad_steps_in_row >= run.train.max_bad_steps:
                self._say(
                    f"stopped: {self.state.bad_steps_in_row} steps in a row had a loss or gradient that is not finite. "
                    f"Last good checkpoint: {self.store.latest() or 'none was written'}"
                )
                self._say_doubt()
                code = ExitCode.STOPPED_ITSELF
                break
            stop = self._signals.agreed()
            if stop or self._due(run.checkpoint.every, step) or step == run.train.steps:
                if not self.state.bad_steps_in_row:
                    self._watchdog.at(step, "saving")
                    try:
                        self._save()
                    except StoppedError as error:
                        self._say(
                            f"stopped after step {step}, not saved: {error}. "
                            f"Last good checkpoint: {self.store.latest() or 'none'}"
                        )
                        code = ExitCode.STOPPED_ITSELF
                        break
                    saved = step
                throughput.restart()
            if stop and step < run.train.steps:
                why = "by Ctrl-C" if stop == ExitCode.INTERRUPTED else "on a signal"
                last = self.store.latest() or "none"
                left = f"saved in {last}" if saved == step else f"skipped; last good checkpoint: {last}"
                self._say(f"stopped {why} after step {step}, {left}: run the same command again to go on")
                code = ExitCode(stop)
                break
        if code == ExitCode.DONE and self.state.bad_steps_in_row:
            self._say(
                f"stopped after step {self.state.step}, not saved: the last {self.state.bad_steps_in_row} steps had a "
                f"loss or gradient that is not finite. Last good checkpoint: {self.store.latest() or 'none'}"
            )
            code = ExitCode.STOPPED_ITSELF
        elif code == ExitCode.DONE:
            self._say(
                f"done: {number_of(self.state.step, 'step')}, last checkpoint at step {saved} in {self.store.folder}"
            )
        self._say_skipped_samples()
        self._take_stock()
        for line in tally.table(self._write_mixture()):
            self._say(line)
        self._say(f"peak memory of rank 0: {peak_memory_bytes() / 2**20:.0f} MiB")
        if logs is not None:
            logs.close()
        return code

    def validate(self) -> Row:
        """Scores of each validation source's first samples, without sources of which none can be scored; the answers,
        if the model writes any, go to a file."""
        run, model = self.run, self.model.module
        batches = _validation_batches(run, self.loader, self.parallel)
        scores, answers = _validate(run, self.stepper, model, self.loader, batches, generate=run.validation.generate)
        if answers:  # every rank has those of all
            path = Path(run.run_dir) / "eval" / answers_name(self.state.step)
            with files.shared_disk_errors("writing", path):
                if self.parallel.is_main:
                    write_answers(answers, path)
        return scores

    def _step(self, step: int) -> tuple[Row, StepResult]:
        train = self.run.train
        self._watchdog.at(step, "reading data")
        batches = self.loader.micro_batches(
            step - 1, train.global_batch_size, train.micro_batch_size, self.parallel.dp_rank, self.parallel.dp_size
        )
        lrs = set_lr(self.optimizer, step, train)
        self._watchdog.at(step, "passes and update")
        if self._unproved:
            with _watch_gradients(self.model) as seen:
                result = self.stepper.train_step(batches)
            self._check_gradients(seen, had_images=any(len(batch.pixels) for batch in batches))
        else:
            result = self.stepper.train_step(batches)
        self.state = replace(
            self.state,
            step=step,
            applied_steps=self.state.applied_steps + int(result.applied),
            bad_steps_in_row=0 if result.applied else self.state.bad_steps_in_row + 1,
        )
        return step_row(step, result, lrs, self.loader.domains), result

    def _found_on_disk(self) -> dict[str, str]:
        """What ranks on hosts that do not share their files would find different, and train on without a word."""
        latest = self.store.latest()
        found = {
            "the hash of model.base": self.base_hash,
            "run_dir's newest checkpoint": latest.name if latest else "none",
        }
        for source, size in zip(self.run.data.sources, self.plan.sizes, strict=True):
            found[f"the rows of data.sources {source.name!r}"] = f"{size:,}"
        for name, size in self._data_bytes.items():
            found[f"the bytes of data.sources {name!r}"] = f"{size:,}"
        return found

    def _other_files(self, before: Mapping[str, int]) -> list[str]:
        """Sources whose files have another size than when they were trained on, in words."""
        return [
            f"the files of data.sources {name!r} ({before[name]:,} bytes -> {size:,})"
            for name, size in self._data_bytes.items()
            if size != before.get(name, size)
        ]

    def _start(self) -> RunState:
        """Where this run begins: its own newest checkpoint, another run's weights, or the base alone."""
        latest = self.store.latest()
        if latest is not None:
            if remembers_scales(self.run) and remembers_scales(self.store.written_by(latest)):
                make_scales(self.model.module.language_model.decoder)
            state = self.store.load(latest, self.model, self.optimizer, self._remembered())
            self.stepper.applied_steps = state.applied_steps
            if state.base_hash != self.base_hash:
                raise ConfigError(
                    f"{latest} was trained on a base with hash {state.base_hash}; {self.run.model.base} has "
                    f"{self.base_hash}"
                )
            self._say(f"going on after step {state.step} from {latest}")
            if changes := [*self.store.changes_since(latest), *self._other_files(state.data_bytes)]:
                self._say(f"changed since {latest.name}: {', '.join(changes)}")
            if (named := self.store.named()) not in (None, latest.name):
                self._say(f"latest names {named}, which is older: remove {latest.name} to go on from there")
            if self.run.checkpoint.init_from:
                self._say("checkpoint.init_from is for a run that has no checkpoint yet: not heard")
            return state
        if self.run.checkpoint.init_from:
            source = Path(self.run.checkpoint.init_from)
            source = latest_checkpoint(source / "checkpoints") or source
            check_experts_of_tasks(source, self.run)
            kept = warm_start(self.model, source, self.run.adapter)
            self.optimizer.reload_model_params()
            self._say(f"starting from the adapters of {source}")
            if changes := used_otherwise(source, self.run.adapter):
                self._say(f"used otherwise than there: {', '.join(changes)}")
            if kept:
                self._say(f"not in it, and as a fresh run has them: {len(kept)} tensors, first {kept[0]}")
        elif self.stepper.methods:
            for method in self.stepper.methods.values():
                method.init(self.stepper.pairs)
            self.optimizer.reload_model_params()
        return RunState(step=0, base_hash=self.base_hash, applied_steps=0)

    def _save(self) -> None:
        self._take_stock()
        try:
            path = self.store.save(self.model, self.optimizer, self.state, self._remembered())
        except files.CheckpointError as error:
            raise files.CheckpointError(f"{error}. Last good checkpoint: {self.store.latest() or 'none'}") from error
        self._write_mixture()
        self._say(f"saved {path}")

    def _remembered(self) -> ShardedStateDict:
        """The checkpoint entries of what neither weights nor optimizer hold; all ranks call it."""
        entries = method_entries(self.stepper.methods, self.parallel.groups)
        if remembers_scales(self.run):
            entries |= scale_entries(self.model.module.language_model.decoder, self.parallel.groups.tp_dp_cp)
        return entries

    def _mixtures_before(self) -> tuple[int, tuple[tally.Phase, ...]]:
        """(the step after which this run's mixture began, the phases before it): a run that goes on with the mixture
        that it had goes on with its phase."""
        phases, step = tuple(self.state.data_phases), self.state.step
        if not phases:
            return 0, ()
        *before, last = phases
        first = last["from_step"] - 1
        if tally.ask_the_same(last, tally.phase(self.plan, first, step, {})):
            return first, tuple(before)
        return step, phases

    def _take_stock(self) -> None:
        """Bring up to date what the whole run has trained on so far, by source and by phase; all ranks call it."""
        counts = tally.add([self._counted_before, *_of_each_reader(self.loader.read, self.parallel)])
        taken = tally.taken_since(self._phases_before, counts)
        phase = tally.phase(self.plan, self._first_of_phase, self.state.step, taken)
        phases = (*self._phases_before, phase)
        self.state = replace(self.state, data_counts=counts, data_phases=phases, data_bytes=self._data_bytes)

    def _write_mixture(self) -> dict[str, Any]:
        """Write `mixture.json`, asked against realised, and return what it holds."""
        path = Path(self.run.run_dir) / "mixture.json"
        tree = tally.manifest(self.state.data_phases, self.state.data_counts)
        with files.shared_disk_errors("writing", path):
            if self.parallel.is_main:
                beside = path.with_name(f".{path.name}.new")
                beside.write_text(json.dumps(tree, indent=1) + "\n")
                beside.replace(path)
        return tree

    @property
    def _router_layers(self) -> tuple[int, ...]:
        return self.stepper.router_plan.layers

    def _remember(self, routers: RouterMemory) -> None:
        self.state = replace(self.state, routers=routers)
        self.stepper.balance_factor = routers.balance_factor

    def _watch_routing(self, step: int, result: StepResult) -> list[Alarm]:
        """Count the step's tokens, and sound the alarms that it sets off and react to them. The same on every rank."""
        if result.routing is None or not result.applied:
            return []
        run, memory = self.run, self.state.routers
        assert memory is not None
        memory, alarms = observe(memory, result.routing, step, run.monitor.alarms, run.adapter)
        self._remember(memory)
        for alarm in alarms:
            if alarm.source is not None:
                assert alarm.expert is not None
                reseed = Reseed(step, alarm.layer, alarm.expert, alarm.source, run.monitor.alarms.reseed_noise)
                reseed_expert(reseed, self.model, self.optimizer, self.parallel.groups, run.train.seed)
        return alarms

    def _open_logs(self) -> RunLogs | None:
        folder, logs = Path(self.run.run_dir), None
        with files.shared_disk_errors("writing", folder):
            if self.parallel.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "config.yaml").write_text(run_config.dump(self.run))
                forget_answers(folder / "eval", self.state.step)
                logs = RunLogs(folder, self.run.monitor, self.state.step, self._router_layers, self.loader.domains)
        return logs

    def _log_step(self, row: Row, result: StepResult, alarms: Sequence[Alarm], logs: RunLogs | None) -> None:
        """Write a step down where that is due. All ranks call it: those with the experts measure them together."""
        monitor, step, routing = self.run.monitor, int(row["step"]), result.routing
        with_experts, with_pictures = (
            routing is not None and (self._due(every, step) or (every > 0 and step == self.run.train.steps))
            for every in (monitor.experts_every, monitor.pictures_every)
        )
        if with_experts:
            assert self.state.routers is not None
            statistics = measure_experts(
                self.model.module.mole_layers(),
                self._router_layers,
                self.run.adapter.num_experts,
                self.parallel.groups,
                self.parallel.device,
            )
            row |= expert_row(statistics, self.state.routers)
        if logs is None:
            return
        logs.alarms(alarms)
        if with_pictures:
            assert routing is not None
            logs.pictures(routing, step)
        is_last = step == self.run.train.steps
        if step % monitor.every == 0 or is_last or not result.applied or alarms or with_experts:
            logs.row(row)
            self._say(progress_line(row, self.run.train.steps, progress_note(alarms)))

    def _log_validation(self, step: int, logs: RunLogs | None) -> None:
        scores = self.validate()
        if logs is not None and scores:
            logs.row({"step": step} | {f"validation_{key}": value for key, value in scores.items()})
        parts = [f"{key} {value:.4f}" for key, value in scores.items()]
        if unscored := [source.name for source in self.run.data.validation if f"loss/{source.name}" not in scores]:
            parts.append(f"not scored, for want of a sample that can be: {', '.join(unscored)}")
        self._say(f"validation after step {step}: {'  '.join(parts)}")

    def _announce(self) -> None:
        for line in run_config.describe_idle(self.run):
            self._say(line)
        for line in describe_trainable(self.model, self.parallel):
            self._say(line)
        kept, instead_of = fp8.bytes_kept(self.model.module)
        if kept:
            twice = ", for each is kept twice, as it is and turned" if kept > 0.75 * instead_of else ""
            self._say(
                f"base kept in FP8: its linears take {kept / 2**20:,.1f} MiB of rank 0 instead of "
                f"{instead_of / 2**20:,.1f} MiB{twice}"
            )
        if self.run.model.backend == "transformer_engine":
            how = f"in FP8, recipe {self.run.fp8.recipe}" if self.run.train.precision == "fp8" else self.run.train.dtype
            self._say(f"base computed by Transformer Engine, {how}")
        p = self.parallel
        context = f"context {p.cp_size} x " if p.cp_size > 1 else ""
        self._say(
            f"layout: {p.world_size} processes = tensor {p.tp_size} x pipeline {p.pp_size} x {context}"
            f"data {p.dp_size}, experts over {p.ep_size}; global batch {self.run.train.global_batch_size}"
        )
        if self.run.adapter.method == "mole":
            chosen = expert_parallel(self.run, self.size)
            self._say(f"between expert-parallel ranks travel: {chosen.form} ({chosen.reason})")
        for name, method in self.stepper.methods.items():
            options = ", ".join(f"{key} {value}" for key, value in vars(method.options).items())
            self._say(f"method {name}: {options}")
        self._say(f"prompts: {self.loader.encoder.prompts}")
        if self._phases_before:
            self._say(f"this mixture is asked from step {self._first_of_phase + 1} on, another one before:")
        for line in self.plan.describe(self.run.train.steps, self._first_of_phase):
            self._say(line)
        if p.device_memory is not None:
            warning = misfit(self.run, self.size, p.world_size, p.device_memory, p.device_capability)
            if warning is not None:
                self._say(warning)

    def _check_gradients(self, seen: set[str], *, had_images: bool) -> None:
        """Raise CheckFailedError unless a gradient reached everything that it should reach: at the first step, and the
        projector at the first one with an image."""
        self._unproved -= seen
        missing = [
            name
            for name, parameter in self.model.module.named_parameters()
            if name in self._unproved and (had_images or parameter.lr_group != "projector")
        ]
        if missing:
            raise CheckFailedError(
                f"no gradient at step {self.state.step + 1} for {len(missing)} tensors, first {missing[0]}"
            )

    def _say(self, text: str) -> None:
        if self.parallel.is_main:
            print(text, file=self._out, flush=True)

    def _say_doubt(self) -> None:
        """A checkpoint is finite, but it may be what no step can go on from: its weights are far out, say."""
        *older, newest = self.store.complete() or [Path()]
        if newest.name == f"step_{self.state.step - self.state.bad_steps_in_row}":
            self._say(
                f"no step after {newest.name} was good: if none is when the same command goes on from it, remove it "
                f"and {newest.with_name(LATEST)} to go on from {older[-1].name if older else 'the start'}"
            )

    def _say_skipped_samples(self) -> None:
        for line in _skipped_lines(skipped_samples(self.loader, self.parallel), self.loader):
            self._say(line)

    @staticmethod
    def _due(every: int, step: int) -> bool:
        return every > 0 and step % every == 0


def describe_trainable(model: DistributedDataParallel, parallel: Parallel) -> list[str]:
    """The trainable set over the whole model: of each group what it is called, how many tensors and numbers, and then
    their names and shapes, those that layers have alike as one line, `layers.{0-3}`."""
    groups = {
        name: parameter.lr_group for name, parameter in model.module.named_parameters() if parameter.requires_grad
    }
    mine = {entry.key: (groups[name], entry.global_shape) for name, entry in trainable_entries(model).items()}
    everyone: list[dict[str, tuple[str, tuple[int, ...]]]] = [{} for _ in range(parallel.world_size)]
    dist.all_gather_object(everyone, mine)
    whole = {key: value for part in everyone for key, value in part.items()}
    lines = []
    for group in sorted({group for group, _ in whole.values()}):
        shapes = {name: shape for name, (g, shape) in whole.items() if g == group}
        numbers = sum(math.prod(shape) for shape in shapes.values())
        lines.append(f"trainable {group}: {numbers:,} numbers in {len(shapes)} tensors")
        alike: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
        for name, shape in shapes.items():
            found = re.fullmatch(r"(?:(.*?\blayers\.)(\d+))?(.*)", name)
            assert found is not None
            before, layer, after = found.groups(default="")
            alike.setdefault((before, after, shape), []).extend([int(layer)] if layer else [])
        for (before, after, shape), layers in sorted(alike.items()):
            lines.append(f"  {before}{f'{{{ranges(layers)}}}' if layers else ''}{after} {list(shape)}")
    return lines


def _names_to_prove(run: RunConfig, model: DistributedDataParallel) -> set[str]:
    """The trainable tensors that the language loss must reach. In gate mode none it does not reach a router, whose own
    losses are added after the backward pass; nor does it reach a stage's copy of a shared router that routes nothing
    there."""
    llava = model.module
    idle = set() if llava.mole_layers() else set(llava.shared_parameters())
    return {
        name
        for name, parameter in llava.named_parameters()
        if parameter.requires_grad
        and not (parameter.lr_group == "router" and run.adapter.gate == "none")
        and parameter not in idle
    }


@contextlib.contextmanager
def _watch_gradients(model: DistributedDataParallel) -> Iterator[set[str]]:
    """The names of the parameters that a gradient reaches inside the block."""
    seen: set[str] = set()
    hooks = [
        parameter.register_hook(lambda _, name=name: seen.add(name))
        for name, parameter in model.module.named_parameters()
        if parameter.requires_grad
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
