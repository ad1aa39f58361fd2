"""The measurement: short runs of one model from one start, and the sources' gradients, under any layout.

Every run and every gradient goes through the `Stepper` that training uses. Inner products of gradients count each
tensor's parts once: those that a checkpoint would write.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import batched
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import is_main_replica

from mole_mega import config as run_config
from mole_mega.checkpoint.base import read_size
from mole_mega.checkpoint.store import trainable_entries
from mole_mega.config import ConfigError, RunConfig, SourceConfig
from mole_mega.conflict.statistics import KINDS, Measurement, Place
from mole_mega.data import tally
from mole_mega.data.collate import Batch
from mole_mega.data.loader import Loader
from mole_mega.errors import CheckFailedError
from mole_mega.platform.parallel import Parallel, seed_generators
from mole_mega.platform.te import check_machine
from mole_mega.training.evaluation import labelled_places
from mole_mega.training.loss import SCORE_ROWS
from mole_mega.training.optimizer import build_optimizer, set_lr
from mole_mega.training.step import Stepper
from mole_mega.training.trainer import build_model, build_run_loader, check_scorable, skipped_samples
from mole_mega.wording import number_of

_LAYER = re.compile(r"language_model\.decoder\.layers\.(\d+)\.(self_attention|mlp)\.")
_GROUPS = {"self_attention": "attention", "mlp": "mlp"}


@dataclass(frozen=True)
class Plan:
    """`steps` of each source alone; the mix takes that many times the number of sources; all of it `repeats` times with
    rows in another order. `warm_steps` on the mix before gradients are taken; `batches` of gradient and at most
    `chunks` of held-out rows a source, each of the global batch size."""

    steps: int
    warm_steps: int
    repeats: int
    batches: int
    chunks: int


def shared_adapter(run: RunConfig, plan: Plan) -> RunConfig:
    """The user's run with one plain LoRA for all sources, its learning rate going down to 0 over each short run, so
    that a run's end says more than its last batch. Of the sources it keeps what `set_aside` does not name. Raises
    ConfigError for fewer than two sources, and where experts would have no MLP to sit in."""
    sources = tuple(
        replace(source, weight=weight, epochs=None)
        for source in run.data.sources
        if (weight := _mean_weight(source, run.train.steps)) > 0
    )
    if len(sources) < 2:
        raise ConfigError(f"data.sources has {len(sources)} source with a weight above 0; a conflict takes two")
    if not run.adapter.layers:
        raise ConfigError("adapter.layers is empty: experts sit in MLPs, so there is nothing that they could help")
    validation = tuple(source for source in run.data.validation if source.name in {s.name for s in sources})
    shared = replace(
        run,
        adapter=replace(run.adapter, method="lora", methods=()),
        parallel=replace(run.parallel, expert=1),
        train=replace(
            run.train,
            steps=plan.steps * len(sources),
            schedule="linear",
            schedule_steps=None,
            min_lr_ratio=0.0,
            warmup_steps=min(run.train.warmup_steps, plan.steps // 5),
            distributed_optimizer=False,
        ),
        # all sources are judged by rows of one kind
        data=replace(run.data, sources=sources, validation=validation if len(validation) == len(sources) else ()),
    )
    run_config.validate(shared)
    return shared


def set_aside(run: RunConfig) -> list[str]:
    """What these short runs do otherwise than the user's config asks, in words."""
    limited = [source.name for source in run.data.sources if source.epochs is not None]
    scheduled = [source for source in run.data.sources if len(source.points) > 1]
    lines = []
    if run.adapter.methods:
        names = ", ".join(method["name"] for method in run.adapter.methods)
        lines.append(f"adapter.methods {names}: left out, what is trained here is plain LoRA")
    if limited:
        lines.append(f"epochs of {', '.join(limited)}: ignored, these are short runs that may read rows again")
    if scheduled:
        means = ", ".join(f"{source.name} {_mean_weight(source, run.train.steps):.4g}" for source in scheduled)
        lines.append(f"schedules of weights: taken as their means over train.steps {run.train.steps}: {means}")
    return lines


def _mean_weight(source: SourceConfig, steps: int) -> float:
    """Over the steps of the user's whole run: a short run would see the beginning of a schedule alone."""
    return math.fsum(map(source.weight_at, range(steps))) / steps if len(source.points) > 1 else source.points[0][1]


def measure(run: RunConfig, plan: Plan, parallel: Parallel, say: Callable[[str], None]) -> Measurement:
    """Measure the mixture of a `shared_adapter` run; every rank returns the same. Raises CheckFailedError for a loss or
    gradient that is not finite."""
    return _Laboratory(run, plan, parallel).measure(say)


class _Laboratory:
    """One model that is put back to its start before each run. `alone`: each source's own stream, for the gradients and
    the held-out rows."""

    def __init__(self, run: RunConfig, plan: Plan, parallel: Parallel) -> None:
        check_machine(run)
        self.run, self.plan, self.parallel = run, plan, parallel
        self.sources = tuple(source.name for source in run.data.sources)
        self.size = read_size(Path(run.model.base))
        self.alone = [self._loader(name) for name in self.sources]
        self._check_shares()
        self.left_out = self._check_held_out()
        self.model = build_model(run, self.size, parallel)
        self.entries = trainable_entries(self.model)
        parameters = dict(self.model.module.named_parameters())
        self.parameters = {name: parameters[name] for name in self.entries}
        self.start = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.trained_on: set[tuple[int, str]] = set()  # (source, sample id), of this rank

    def measure(self, say: Callable[[str], None]) -> Measurement:
        plan = self.plan
        stepper = self._fresh()
        self._train(stepper, self._loader(None), plan.warm_steps, schedule_steps=max(plan.steps, plan.warm_steps))
        products, repeated = self._gradients(stepper)
        say(f"gradients: {plan.batches} batches of each source, after {number_of(plan.warm_steps, 'step')} on the mix")
        mix_steps, samples = plan.steps * len(self.sources), None
        losses: dict[str, list[list[np.ndarray]]] = {kind: [] for kind in KINDS}
        for repeat in range(plan.repeats):
            mix = self._loader(None, repeat)
            found, tables = self._run(mix, mix_steps, repeat)
            losses["mix_samples"].append(tables)
            if samples is None:
                # before the shorter run, which reads some of these rows again
                self.left_out += _left_out(skipped_samples(mix, self.parallel), f"{mix_steps} steps on the mix")
                samples = [int(count) for count in found]
                own_steps = [max(1, round(count / self.run.train.global_batch_size)) for count in samples]
            losses["mix"].append(self._run(mix, plan.steps, repeat)[1])
            say(f"the mix, repeat {repeat + 1} of {plan.repeats}: {plan.steps} and {mix_steps} steps")
            alone, alone_samples = [], []
            for source, own in enumerate(own_steps):
                loader = self._loader(self.sources[source], repeat)
                after = {steps: self._run(loader, steps, repeat, source)[1] for steps in {plan.steps, own}}
                alone += after[plan.steps]
                alone_samples += after[own]
                lengths = " and ".join(number_of(steps, "step") for steps in sorted(after))
                say(f"{self.sources[source]} alone: {lengths}")
            losses["alone"].append(alone)
            losses["alone_samples"].append(alone_samples)
        assert samples is not None
        return Measurement(
            sources=self.sources,
            steps=plan.steps,
            mix_steps=mix_steps,
            warm_steps=plan.warm_steps,
            batch_size=self.run.train.global_batch_size,
            own_steps=tuple(own_steps),
            mix_samples=tuple(samples),
            products=products,
            losses={kind: [np.stack(tables) for tables in zip(*found, strict=True)] for kind, found in losses.items()},
            held_out="data.validation" if self.run.data.validation else "rows of the training stream further on",
            seen=self._share_seen(),
            repeated=repeated,
            left_out=self.left_out,
        )

    def _check_shares(self) -> None:
        """Raise ConfigError, before anything is trained, for a source of which the mix reads so little that no number
        of steps alone reads as much."""
        mix, batch = self._loader(None).plan, self.run.train.global_batch_size
        assert mix is not None
        for source, samples in zip(self.sources, mix.drawn(self.run.train.steps), strict=True):
            if 2 * samples < batch:
                raise ConfigError(
                    f"data.sources {source!r}: {self.run.train.steps} steps on the mix read {samples} of its samples, "
                    f"less than half a batch of {batch}; raise --steps or its weight"
                )

    def _check_held_out(self) -> tuple[str, ...]:
        """Which rows of `data.validation` are left out, in words. Raises ConfigError, before anything is trained, for a
        source whose rows cannot give a loss with an uncertainty."""
        lines: tuple[str, ...] = ()
        for source, loader in enumerate(self.alone if self.run.data.validation else ()):
            name, batch = self.sources[source], self.run.train.global_batch_size
            places = [labelled_places(chunk, len(loader.domains), self.parallel) for chunk in self._chunks(source)]
            skipped = skipped_samples(loader, self.parallel)
            check_scorable([name], sum(places, torch.zeros(len(loader.domains))), loader, skipped)
            usable = sum(bool(chunk[source]) for chunk in places)
            if usable < 2:
                raise ConfigError(
                    f"data.validation {name!r}: {usable} of {len(places)} batches of {batch} held-out rows can be "
                    "scored, an uncertainty needs 2; give it more rows or lower train.global_batch_size"
                )
            lines += _left_out(skipped, "held-out rows")
        return lines

    def _loader(self, only: str | None, repeat: int = 0) -> Loader:
        """The mix (None), or one source's stream alone: its rows in the order in which the mix brings them."""
        data = self.run.data
        if only is None:
            data = replace(data, validation=())
        else:
            sources = tuple(replace(source, weight=float(source.name == only)) for source in data.sources)
            data = replace(data, sources=sources, validation=tuple(s for s in data.validation if s.name == only))
        train = replace(self.run.train, seed=self.run.train.seed + repeat)
        return build_run_loader(replace(self.run, data=data, train=train), self.size, self.parallel)

    def _fresh(self, repeat: int = 0) -> Stepper:
        """The model at its start, with an optimizer that has seen nothing."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.start[name])
        seed_generators(self.run.train.seed + repeat)
        optimizer = build_optimizer(self.model, self.run.train)
        return Stepper(self.run, self.model, optimizer, self.parallel, len(self.sources))

    def _run(
        self, loader: Loader, steps: int, repeat: int, source: int | None = None
    ) -> tuple[torch.Tensor, list[np.ndarray]]:
        """Train for `steps` steps from the start: how many samples of each source that read, and the tables of `source`
        (None: of every source)."""
        stepper = self._fresh(repeat)
        samples = self._train(stepper, loader, steps, schedule_steps=steps)
        asked = range(len(self.sources)) if source is None else [source]
        return samples, [self._evaluate(stepper, one) for one in asked]

    def _train(self, stepper: Stepper, loader: Loader, steps: int, *, schedule_steps: int) -> torch.Tensor:
        """Returns how many samples of each source the steps read, [S]."""
        samples = torch.zeros(len(self.sources), dtype=torch.long, device=self.parallel.device)
        train = replace(self.run.train, steps=schedule_steps)
        for step in range(steps):
            batches = self._global_batch(loader, step)
            for batch in batches:
                samples += batch.domains.bincount(minlength=len(self.sources)).to(samples.device)
                self.trained_on |= _ids(batch)
            set_lr(stepper.optimizer, step + 1, train)
            if not stepper.train_step(batches).applied:
                raise CheckFailedError(f"step {step + 1} had a loss or gradient that is not finite")
        dist.all_reduce(samples, group=self.parallel.groups.dp)
        return samples.cpu()

    def _global_batch(self, loader: Loader, step: int) -> list[Batch]:
        """This rank's micro-batches."""
        train, parallel = self.run.train, self.parallel
        sizes = train.global_batch_size, train.micro_batch_size
        return loader.micro_batches(step, *sizes, parallel.dp_rank, parallel.dp_size)

    def _gradients(self, stepper: Stepper) -> tuple[dict[Place, np.ndarray], tuple[float, ...]]:
        """Inner products of all batches' gradients by place, [S, K, S, K]; and of each source's rows in them, the share
        that is not new. Rows come from behind those that the warm run read."""
        plan, gradients, repeated = self.plan, [], []
        mine = [name for name, entry in self.entries.items() if is_main_replica(entry.replica_id)]
        for loader in self.alone:
            ids: list[tuple[int, str]] = []
            for step in range(plan.warm_steps, plan.warm_steps + plan.batches):
                batches = self._global_batch(loader, step)
                ids += [pair for batch in batches for pair in _ids_in_order(batch)]
                stepper.backward(batches, whole_gradients=True)
                gradients.append(
                    {name: self.parameters[name].main_grad.to("cpu", torch.float32, copy=True) for name in mine}
                )
            everyone = self._gather(ids)
            repeated.append(1 - len(set(everyone)) / len(everyone))
        local: dict[Place, np.ndarray] = {}
        for name in mine:
            flat = torch.stack([gradient[name].flatten() for gradient in gradients]).double()
            place = _place(self.entries[name].key)
            local[place] = local.get(place, 0) + (flat @ flat.T).numpy()
        parts: list[dict[Place, np.ndarray]] = [{} for _ in range(self.parallel.world_size)]
        dist.all_gather_object(parts, local)
        total: dict[Place, np.ndarray] = {}
        for part in parts:
            for place, table in part.items():
                total[place] = total.get(place, 0) + table
        if not all(np.isfinite(table).all() for table in total.values()):
            raise CheckFailedError("a gradient is not finite")
        shape = 2 * (len(self.sources), plan.batches)
        return {place: table.reshape(shape) for place, table in sorted(total.items(), key=_order)}, tuple(repeated)

    def _evaluate(self, stepper: Stepper, source: int) -> np.ndarray:
        """[chunks, 2]: sum of the loss, labelled places, of each chunk of the source's held-out rows."""
        rows = [SCORE_ROWS.index("loss"), SCORE_ROWS.index("tokens")]
        return np.stack([stepper.evaluate(chunk)[rows, source].numpy() for chunk in self._chunks(source)])

    def _chunks(self, source: int) -> Iterator[list[Batch]]:
        """Held-out rows of a source, at most a global batch a chunk: in every layout the same rows."""
        train, parallel, loader = self.run.train, self.parallel, self.alone[source]
        if self.run.data.validation:
            rows = self.plan.chunks * train.global_batch_size
            batches = loader.validation_batches(rows, train.micro_batch_size, parallel.dp_rank, parallel.dp_size)
            per_chunk = train.global_batch_size // (train.micro_batch_size * parallel.dp_size)
            yield from map(list, batched(batches, per_chunk))
        else:  # no run is longer than the mix's
            for step in range(self.run.train.steps, self.run.train.steps + self.plan.chunks):
                yield self._global_batch(loader, step)

    def _share_seen(self) -> tuple[float, ...]:
        """Of each source's held-out rows, the share that some run had trained on, as their ids tell."""
        if self.run.data.validation:
            return (0.0,) * len(self.sources)
        trained_on, shares = set(self._gather(self.trained_on)), []
        for source in range(len(self.sources)):
            ids = {pair for chunk in self._chunks(source) for batch in chunk for pair in _ids(batch)}
            everyone = set(self._gather(ids))
            shares.append(len(everyone & trained_on) / len(everyone))
        return tuple(shares)

    def _gather(self, ids: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
        """All data-parallel ranks' ids, in the order of ranks."""
        parts: list[list[tuple[int, str]]] = [[] for _ in range(self.parallel.dp_size)]
        dist.all_gather_object(parts, list(ids), group=self.parallel.groups.dp)
        return [pair for part in parts for pair in part]


def _left_out(skipped: tally.Tally, where: str) -> tuple[str, ...]:
    return tuple(
        f"{source}: {number_of(count, 'sample')} left out of the {where}: {kind}"
        for source, kinds in skipped.items()
        for kind, count in kinds.items()
    )


def _ids_in_order(batch: Batch) -> list[tuple[int, str]]:
    return list(zip(batch.domains.tolist(), batch.sample_ids, strict=True))


def _ids(batch: Batch) -> set[tuple[int, str]]:
    return set(_ids_in_order(batch))


def _place(key: str) -> Place:
    """Where in the model a trainable tensor sits, by its checkpoint name, which numbers layers over the whole model."""
    if match := _LAYER.match(key):
        return _GROUPS[match[2]], int(match[1])
    assert key.startswith("vision_projection."), key
    return "projector", None


def _order(item: tuple[Place, np.ndarray]) -> tuple[str, int]:
    (group, layer), _ = item
    return group, -1 if layer is None else layer
