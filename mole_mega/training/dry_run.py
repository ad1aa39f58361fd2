"""Every rank's part of a run's model, built without memory in one process: what a layout cannot hold is found out
before a cluster is booked.

Ranks that differ in nothing but their data-parallel index hold the same part; each part is built once. Not looked at:
the data, the devices' memory (estimate/), whether processes can reach one another, and whether the machines that will
run it have Transformer Engine: built is the local backend's model, which has the same tensors (tests/te).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from mole_mega.adapters.methods import check_methods
from mole_mega.checkpoint.base import model_entries, stored_shapes
from mole_mega.config import ConfigError, ParallelConfig, RunConfig
from mole_mega.errors import CheckFailedError
from mole_mega.estimate.parameters import Parameters
from mole_mega.estimate.plan import layout_words
from mole_mega.models.backend import on_local_backend
from mole_mega.models.llava import LLaVA
from mole_mega.models.mcore_config import check_layout
from mole_mega.models.sizes import LlavaSize
from mole_mega.platform.parallel import check_world
from mole_mega.platform.pretend import rank_of
from mole_mega.platform.te import check_precision
from mole_mega.training.trainer import check_batch, wrap
from mole_mega.wording import number_of


@dataclass(frozen=True)
class DryRun:
    """What was built. `stages`: the parameters of one rank of each pipeline stage."""

    run: RunConfig
    world_size: int
    num_parts: int
    stages: tuple[Parameters, ...]
    num_tensors: int
    compared_with_base: bool
    seconds: float

    def describe(self) -> list[str]:
        """For people: the layout, a row a stage, and what was checked."""
        layout, projector = self.run.parallel, self.run.train.projector
        data = self.world_size // (layout.tensor * layout.pipeline)
        header = ("stage", "ranks", "frozen", "trainable", "experts", "other adapters", "routers")
        rows: list[tuple[str, ...]] = [header]
        for index, stage in enumerate(self.stages):
            numbers = (
                stage.frozen(projector=projector), stage.trainable(projector=projector), stage.experts,
                stage.dense_adapters, stage.routers,
            )  # fmt: skip
            rows.append((str(index), str(layout.tensor * data), *(f"{number:,}" for number in numbers)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        base = "named and shaped as the base has them" if self.compared_with_base else "NOT compared with a base"
        return [
            f"{self.world_size:,} processes = {layout_words(self.run, self.world_size)}",
            *("  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows),
            "  (parameters of one rank)",
            f"built {number_of(self.num_parts, 'part')}, all there are: ranks that differ in their data-parallel index "
            f"alone hold the same; {self.seconds:.0f} s",
            f"checked: sizes and batch divide; {self.num_tensors} tensors, each held whole by the ranks together; the "
            f"frozen ones {base}",
            "not looked at: the data (mole-mega data preview), memory (mole-mega estimate)",
        ]


def dry_run(run: RunConfig, size: LlavaSize, world_size: int, base: Path | None) -> DryRun:
    """Build every part of the model for a world of `world_size` ranks; with `base` compare what is asked of it.

    Raises ConfigError where the layout does not divide, or the base holds other tensors than the model asks for, and
    CheckFailedError where the ranks together do not hold a tensor whole.
    """
    start = time.perf_counter()
    check_world(run.parallel, world_size)
    check_precision(run)
    check_layout(run, size)
    check_methods(run)
    buildable = on_local_backend(run)
    tensors, frozen = _Tensors(), _Tensors()
    stages: dict[int, Parameters] = {}
    ranks = list(_one_of_each_part(run.parallel, world_size))
    for rank in ranks:
        with rank_of(run.parallel, rank, world_size) as parallel:
            check_batch(run, parallel)
            model = LLaVA(buildable, size, parallel)
            wrap(model, buildable)
            tensors.add(model_entries(model).values())
            frozen.add(model_entries(model, trainable=False).values())
            counted = count_parameters(model)
            expected = stages.setdefault(parallel.pp_rank, counted)
            assert counted == expected, (rank, counted, expected)
    tensors.check_whole()
    if base is not None:
        frozen.check_stored(base, stored_shapes(base), size.language.vocab_size)
    return DryRun(
        run=run, world_size=world_size, num_parts=len(ranks), stages=tuple(stages[stage] for stage in sorted(stages)),
        num_tensors=len(tensors.shapes), compared_with_base=base is not None, seconds=time.perf_counter() - start,
    )  # fmt: skip


def count_parameters(model: LLaVA) -> Parameters:
    """The parameters of one rank's part of a model, told apart by the modules that hold them."""
    routers = {id(parameter): parameter for parameter in model.router_parameters()}
    score_biases = sum(p.numel() for p in routers.values() if not p.requires_grad)
    placed = {id(p): p for p in model.parameters() if hasattr(p, "placement") and id(p) not in routers}
    experts = sum(p.numel() for p in placed.values() if p.placement.expert_axis is not None)

    def frozen(*modules: torch.nn.Module | None) -> int:
        parameters = [p for module in modules if module is not None for p in module.parameters()]
        return sum(p.numel() for p in parameters if id(p) not in placed and id(p) not in routers)

    language = model.language_model
    return Parameters(
        vision=frozen(getattr(model, "vision_model", None)),
        projector=frozen(getattr(model, "vision_projection", None)),
        embedding=frozen(getattr(language, "embedding", None)),
        decoder=frozen(language.decoder),
        output=frozen(getattr(language, "output_layer", None)),
        dense_adapters=sum(p.numel() for p in placed.values()) - experts,
        experts=experts,
        routers=sum(p.numel() for p in routers.values()) - score_biases,
        score_biases=score_biases,
    )


def _one_of_each_part(parallel: ParallelConfig, world_size: int) -> Iterator[int]:
    """One rank for each place in tensor x pipeline x expert: Megatron-Core numbers tensor-parallel ranks first, then
    data-parallel ones, of which neighbours hold the parts of one expert-parallel group, then stages."""
    stage_size = world_size // parallel.pipeline
    for stage in range(parallel.pipeline):
        yield from range(stage * stage_size, stage * stage_size + parallel.tensor * parallel.expert)


@dataclass(frozen=True)
class _Tensors:
    """The whole model's tensors, as the entries of its ranks describe them."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    parts: dict[str, dict[tuple[int, ...], int]] = field(default_factory=dict)  # {tensor: {offset: numbers there}}

    def add(self, entries: Iterable[object]) -> None:
        state = {"entries": list(entries)}
        apply_factories(state)
        for entry in nested_values(state):
            assert isinstance(entry, ShardedTensor), entry
            self.shapes[entry.key] = tuple(entry.global_shape)
            self.parts.setdefault(entry.key, {})[tuple(entry.global_offset)] = math.prod(entry.local_shape)

    def check_whole(self) -> None:
        for key, shape in self.shapes.items():
            held = sum(self.parts[key].values())
            if held != math.prod(shape):
                raise CheckFailedError(f"the ranks together hold {held:,} of the {math.prod(shape):,} numbers of {key}")

    def check_stored(self, base: Path, stored: dict[str, tuple[int, ...]], vocabulary: int) -> None:
        """Raise ConfigError unless these are the tensors of `base`; rows that pad the vocabulary are in no base."""
        for kind, names in (("lacks", self.shapes.keys() - stored.keys()), ("has", stored.keys() - self.shapes.keys())):
            if names:
                more = "" if kind == "lacks" else ", which the model does not ask for"
                raise ConfigError(f"{base} {kind} {number_of(len(names), 'tensor')}{more}, first {min(names)}")
        for key, shape in self.shapes.items():
            unpadded = (min(shape[0], vocabulary), *shape[1:]) if shape[0] > vocabulary else shape
            if stored[key] not in (shape, unpadded):
                raise ConfigError(f"{base} has {key} as {list(stored[key])}, the model asks for {list(shape)}")
