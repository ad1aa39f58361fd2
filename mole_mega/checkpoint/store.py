"""What a run's checkpoints are: written whole or not at all, found again, and loaded under any layout.

    checkpoints/step_<n>/   distributed checkpoint of adapters, projector and optimizer; state.json;
                            rng_<rank>.safetensors; config.yaml; manifest.json
    checkpoints/latest      the name of the newest complete one

Adapters and Adam's moments are entered by their names and shapes in the whole model, so any TP, PP, EP and DP reads
them. RNG states belong to a layout: another layout starts its dropout anew from (seed, step).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
import yaml
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint import FileSystemReader

from mole_mega import config as run_config
from mole_mega.adapters.routing import RouterMemory
from mole_mega.checkpoint import files
from mole_mega.checkpoint.base import bytes_to_write, model_entries
from mole_mega.checkpoint.stream import LazyTensor, write_tensors
from mole_mega.config import AdapterConfig, RunConfig
from mole_mega.errors import StoppedError
from mole_mega.platform.parallel import Parallel, seed_generators

# What converted adapters say of themselves; a step has its run's `config.yaml`.
ADAPTER_FILE = "adapter.yaml"
LATEST = "latest"
_STEP = re.compile(r"step_(\d+)")
# What adapters are: under another value, the same tensors compute something else, or do not fit.
_ADAPTER_KEYS = (
    "method", "num_experts", "rank", "alpha", "scaling", "gate", "top_k", "router_scope", "renormalize", "share_A",
    "shared_B", "mix_temperature", "expert_form", "router_score", "router_bias", "attention", "layers",
)  # fmt: skip
# Of these the ones that another run may begin with otherwise: it trains its own choice of the same experts.
_KEYS_OF_USE = ("gate", "top_k", "router_scope", "renormalize", "router_score")


@dataclass(frozen=True)
class RunState:
    """What a run remembers beside tensors. The data position is the step: the mixture is a function of it."""

    step: int
    base_hash: str
    # steps in which the weights moved: Adam's own count
    applied_steps: int
    bad_steps_in_row: int = 0
    # by source, what was trained on since the run began (data/tally.py)
    data_counts: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    # the mixtures that the run was trained on, one after the other (data/tally.py)
    data_phases: Sequence[Mapping[str, Any]] = ()
    # by source, what its files came to; not of its images
    data_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    # of a run whose adapters have routers
    routers: RouterMemory | None = None

    def to_tree(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**vars(self), "routers": self.routers and self.routers.to_tree()}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> RunState:
        """The inverse of `to_tree`; also of one that an older version wrote."""
        routers = tree.get("routers")
        return cls(**{**tree, "routers": routers and RouterMemory.from_tree(routers)})


class CheckpointStore:
    """The checkpoints of one run directory."""

    def __init__(self, run: RunConfig, parallel: Parallel) -> None:
        self.run, self.parallel = run, parallel
        self.folder = Path(run.run_dir) / "checkpoints"

    def save(
        self,
        model: DistributedDataParallel,
        optimizer: MegatronOptimizer,
        state: RunState,
        more: ShardedStateDict | None = None,
    ) -> Path:
        """Write the checkpoint of `state.step`, point `latest` at it and drop the oldest beyond `checkpoint.keep`.
        `more` are entries that no other of it holds: what methods and FP8's scales remember.

        Raises StoppedError when a weight is not finite, from which no run could go on, and CheckpointError when the
        disk fails, on every rank; earlier checkpoints stay as they were.
        """
        if broken := not_finite(model):
            raise StoppedError(f"numbers that are not finite in {_first_of(broken)}")
        final = self.folder / f"step_{state.step}"
        folder = files.incomplete_name(final)
        entries = weight_entries(model) | _optimizer_entries(model, optimizer, is_loading=False) | (more or {})
        needed = bytes_to_write(entries)
        with files.shared_disk_errors("saving", final, needed):
            if self.parallel.is_main:
                self.folder.mkdir(parents=True, exist_ok=True)
                for leftover in self.folder.glob(".*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                folder.mkdir()
        with files.shared_disk_errors("saving", final, needed):
            dist_checkpointing.save(entries, str(folder), async_sharded_save=False)
            rng = folder / f"rng_{self.parallel.rank}.safetensors"
            rng.write_bytes(safetensors.torch.save(_rng_state()))  # save_file would keep other users from reading it
        with files.shared_disk_errors("saving", final, needed):
            if self.parallel.is_main:
                (folder / "config.yaml").write_text(run_config.dump(self.run))
                (folder / "state.json").write_text(json.dumps(state.to_tree() | {"layout": self._layout()}) + "\n")
                files.publish(folder, final)
                _write_atomically(self.folder / LATEST, final.name)
                for old in self.complete()[: -self.run.checkpoint.keep]:
                    # under its own name, what a kill leaves of it would pass for complete, or stay for good
                    shutil.rmtree(old.rename(self.folder / f".{old.name}.removed"))
        return final

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return complete_checkpoints(self.folder)

    def latest(self) -> Path | None:
        """The newest complete checkpoint of this run, if there is one.

        Raises CheckpointError when the one that `latest` names is not complete: going on from an older one, or anew,
        would quietly repeat what was trained already.
        """
        return latest_checkpoint(self.folder)

    def named(self) -> str | None:
        """The checkpoint that the file `latest` names, if it is there."""
        pointer = self.folder / LATEST
        return pointer.read_text(errors="replace").strip() if pointer.exists() else None

    def load(
        self,
        path: Path,
        model: DistributedDataParallel,
        optimizer: MegatronOptimizer,
        more: ShardedStateDict | None = None,
    ) -> RunState:
        """Load weights, optimizer, RNG and `more` (as in `save`); returns the run's state. All files are checked
        first."""
        files.verify(path)
        files.refuse_unsafe(path)
        tree = json.loads((path / "state.json").read_text())
        layout = tree.pop("layout")
        self._check_compatible(path)
        entries = weight_entries(model) | _optimizer_entries(model, optimizer, is_loading=True) | (more or {})
        loaded = _load(entries, path)
        for index, shards in loaded.pop("optimizer", {}).items():
            optimizer.chained_optimizers[index].load_parameter_state_from_fully_reshardable(shards)
        for part in _optimizer_parts(optimizer).values():
            for moments in part.optimizer.state.values():
                if moments:
                    moments["step"] = torch.tensor(float(tree["applied_steps"]))
        _copy_into(entries, loaded)
        _refuse_not_finite(path, model)
        if layout == self._layout():
            _set_rng_state(safetensors.torch.load_file(path / f"rng_{self.parallel.rank}.safetensors"))
        else:
            seed_generators(self.run.train.seed + tree["step"])
        return RunState.from_tree(tree)

    def written_by(self, path: Path) -> RunConfig:
        """The config of the run that wrote a checkpoint."""
        return run_config.load(path / "config.yaml")

    def changes_since(self, path: Path) -> list[str]:
        """What this run trains otherwise than the one that wrote `path`, "key old -> new" each.

        Only what training depends on: neither where nor how often something is written, nor the layout, nor `steps`
        itself; but the end of the learning rate's schedule, which may follow `steps`.
        """
        old, new = _training_keys(self.written_by(path)), _training_keys(self.run)
        changes = []
        for key, value in new.items():
            if value != old.get(key, value):
                change = key if key == "data.sources" else f"{key} {old[key]} -> {value}"
                follows = key == "train.schedule_steps" and self.run.train.schedule_steps is None
                changes.append(f"{change} (follows train.steps, which moves the learning rates)" if follows else change)
        return changes

    def _layout(self) -> dict[str, int]:
        p = self.parallel
        sizes = {"tensor": p.tp_size, "pipeline": p.pp_size, "expert": p.ep_size, "world": p.world_size}
        return sizes | ({"context": p.cp_size} if p.cp_size > 1 else {})

    def _check_compatible(self, path: Path) -> None:
        """A run goes on only with the adapters, precision and optimizer that it began with."""
        old = self.written_by(path)
        _check_same_keys(path, old, self.run, ("precision", "optimizer", "distributed_optimizer", "projector"))
        _check_same_tasks(path, old, self.run)
        ours, theirs = ([method["name"] for method in run.adapter.methods] for run in (self.run, old))
        if ours != theirs:
            raise files.CheckpointError(f"{path} was written with adapter.methods {theirs}, this run has {ours}")


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints below a `checkpoints` folder, oldest first."""
    found = [p for p in folder.glob("step_*") if _STEP.fullmatch(p.name) and (p / files.MANIFEST).exists()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint below a `checkpoints` folder. Raises as `CheckpointStore.latest` does."""
    found, pointer = complete_checkpoints(folder), folder / LATEST
    if pointer.exists():
        named = folder / pointer.read_text(errors="replace").strip()
        if named not in found:
            raise files.CheckpointError(
                f"{named} is not a complete checkpoint, yet {pointer} names it; restore it, or remove {pointer} to "
                f"{f'go on from {found[-1].name}' if found else 'start anew'}"
            )
    return found[-1] if found else None


def check_trained_with(path: Path, run: RunConfig, base_hash: str) -> None:
    """Check that a step's adapters are what a run's config says, on the same base. Raises CheckpointError with both
    values: where only the meaning of the tensors differs, loading them would not show it."""
    files.read_manifest(path)
    if not (path / "state.json").is_file():
        raise files.CheckpointError(f"{path} is no step of a run: it has no state.json")
    try:
        trained_on = json.loads((path / "state.json").read_text())["base_hash"]
    except (ValueError, KeyError) as error:
        raise files.CheckpointError(f"{path / 'state.json'} does not say what the run was trained on") from error
    if trained_on != base_hash:
        raise files.CheckpointError(
            f"{path} was trained on a base with hash {trained_on}; {run.model.base} has {base_hash}"
        )
    trained = run_config.load(path / "config.yaml")
    _check_same_keys(path, trained, run, ("projector",))
    _check_same_tasks(path, trained, run)


def computed_otherwise(path: Path, run: RunConfig) -> list[str]:
    """The keys by which `run` computes in other numbers than the one that wrote `path`, "key old -> new" each."""
    old, new = _training_keys(run_config.load(path / "config.yaml")), _training_keys(run)
    of_numbers = [key for key in new if key == "train.precision" or key.startswith("fp8.")]
    return [f"{key} {old[key]} -> {new[key]}" for key in of_numbers if old.get(key, new[key]) != new[key]]


def load_weights(model: DistributedDataParallel | Any, path: Path) -> None:
    """Load only adapters and projector from a checkpoint (evaluation): all that the model has."""
    files.verify(path)
    files.refuse_unsafe(path)
    entries = weight_entries(model)
    _copy_into(entries, _load(entries, path))
    _refuse_not_finite(path, model)


def warm_start(model: DistributedDataParallel | Any, path: Path, adapter: AdapterConfig) -> list[str]:
    """Start from a step of another run, or from converted adapters. Returns the tensors that these do not hold and that
    keep their initial values: routers and projector may. All ranks call it.

    Raises CheckpointError when the adapters are of another method, number of experts, rank or scale, when a tensor has
    no place in this run, and when one is missing.
    """
    files.verify(path)
    files.refuse_unsafe(path)
    _check_same_adapters(path, adapter)
    entries = weight_entries(model)
    gathered: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(gathered, {entry.key for entry in entries.values()})
    wanted, stored = set().union(*gathered), _stored_weights(path)
    if stored - wanted:
        raise files.CheckpointError(f"{path} holds {min(stored - wanted)}, which this run does not train")
    missing = sorted(wanted - stored)
    for name in missing:
        if not (name.startswith("vision_projection.") or ".router." in name) or missing == sorted(wanted):
            raise files.CheckpointError(f"{path} does not hold {name}, which this run trains")
    entries = {name: entry for name, entry in entries.items() if entry.key in stored}
    _copy_into(entries, _load(entries, path))
    _refuse_not_finite(path, model)
    return missing


def save_adapters(tensors: Mapping[str, torch.Tensor], adapter: AdapterConfig, folder: Path) -> None:
    """Write whole adapter tensors, by their checkpoint names, as something that `warm_start` reads."""
    pending = {
        name: LazyTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)  # type: ignore[misc]
        for name, tensor in tensors.items()
    }
    write_tensors(folder, pending)
    tree = dataclasses.asdict(adapter)
    del tree["methods"]  # what they were trained with, not what they compute
    tree["layers"] = adapter.layers if adapter.layers == "all" else list(adapter.layers)
    (folder / ADAPTER_FILE).write_text(yaml.safe_dump(tree, sort_keys=False))


def read_adapter(folder: Path) -> AdapterConfig:
    """What `save_adapters` was given. Raises CheckpointError when the file does not say it."""
    path = folder / ADAPTER_FILE
    try:
        tree = yaml.safe_load(path.read_text())
        layers = tree["layers"] if tree["layers"] == "all" else tuple(tree["layers"])
        return AdapterConfig(**{**tree, "layers": layers})
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise files.CheckpointError(f"{path} does not describe adapters: {files.reason(error)}") from error


def used_otherwise(path: Path, adapter: AdapterConfig) -> list[str]:
    """For people: how experts that `warm_start` reads were chosen and weighed there and will not be here. Raises
    CheckpointError where `path` does not say what its adapters are."""
    source = _adapter_of(path)
    keys = [key for key in _KEYS_OF_USE if key not in adapter.without_effect | source.without_effect]
    changes = {key: (getattr(source, key), getattr(adapter, key)) for key in keys}
    return [f"adapter.{key} ({theirs} -> {ours})" for key, (theirs, ours) in changes.items() if theirs != ours]


def _adapter_of(path: Path) -> AdapterConfig:
    if (path / ADAPTER_FILE).is_file():
        return read_adapter(path)
    if (path / "config.yaml").is_file():
        return run_config.load(path / "config.yaml").adapter
    raise files.CheckpointError(f"{path} holds no adapters: it has neither {ADAPTER_FILE} nor config.yaml")


def _check_same_adapters(path: Path, adapter: AdapterConfig) -> None:
    """What the tensors' names and shapes do not show, or show late: above all the scale."""
    source = _adapter_of(path)
    of_meaning = ("method", "num_experts", "rank", "share_A", "expert_form", "mix_temperature")
    keys = [key for key in of_meaning if key not in adapter.without_effect]
    if not math.isclose(adapter.scale, source.scale, rel_tol=1e-6):
        keys += ["alpha", "scaling"]
    for key in keys:
        ours, theirs = getattr(adapter, key), getattr(source, key)
        if ours != theirs:
            raise files.CheckpointError(f"{path} was made with adapter.{key} = {theirs}, this run has {ours}")


def _check_same_keys(path: Path, old: RunConfig, new: RunConfig, train_keys: tuple[str, ...]) -> None:
    for section, keys in (("adapter", _ADAPTER_KEYS), ("train", train_keys)):
        for key in keys:
            ours, theirs = getattr(getattr(new, section), key), getattr(getattr(old, section), key)
            if ours != theirs and f"{section}.{key}" not in run_config.idle_keys(new):
                raise files.CheckpointError(f"{path} was written with {section}.{key} = {theirs}, this run has {ours}")


def _check_same_tasks(path: Path, old: RunConfig, new: RunConfig) -> None:
    """Experts that serve a task each know it by the number of its source."""
    ours, theirs = ([source.name for source in run.data.sources] for run in (new, old))
    if new.adapter.method == "mole" and new.adapter.router_scope == "task" and ours != theirs:
        raise files.CheckpointError(
            f"{path} has experts for the sources {', '.join(theirs)}, in this order; this run has {', '.join(ours)}"
        )


def check_experts_of_tasks(path: Path, run: RunConfig) -> None:
    """Raise CheckpointError if a source that another run's step has an expert for would get another one's here."""
    if not (path / "config.yaml").is_file():
        return  # converted adapters do not say whose they are
    old = run_config.load(path / "config.yaml")
    ours, theirs = ({source.name: place for place, source in enumerate(of.data.sources)} for of in (run, old))
    moved = any(place != ours.get(name, place) for name, place in theirs.items())
    if moved and old.adapter.router_scope == run.adapter.router_scope == "task":
        _check_same_tasks(path, old, run)


def _training_keys(run: RunConfig) -> dict[str, Any]:
    """{"section.key": value} of what training depends on, the schedule's end resolved."""
    sections = {"adapter": run.adapter, "train": run.train, "data": run.data, "fp8": run.fp8}
    if run.monitor.alarms.reaction != "none":
        sections["monitor.alarms"] = run.monitor.alarms
    keys = {f"{name}.{key}": value for name, section in sections.items() for key, value in vars(section).items()}
    for key in run_config.idle_keys(run):
        del keys[key]
    keys["model.backend"] = run.model.backend
    keys["train.schedule_steps"] = run.train.schedule_steps or run.train.steps
    if run.train.schedule == "constant":
        del keys["train.schedule_steps"]
    del keys["train.steps"], keys["data.validation"]
    return keys


def _stored_weights(path: Path) -> set[str]:
    """The names of the model's tensors in a checkpoint, its optimizer's left out."""
    names = FileSystemReader(path).read_metadata().state_dict_metadata
    return {name for name in names if name.startswith(("language_model.", "vision_"))}


def trainable_entries(model: DistributedDataParallel | Any) -> ShardedStateDict:
    """Checkpoint entries of everything trainable on this rank, by local name."""
    llava = getattr(model, "module", model)
    trainable = {name for name, parameter in llava.named_parameters() if parameter.requires_grad}
    return {name: entry for name, entry in model_entries(llava).items() if name in trainable}


def weight_entries(model: DistributedDataParallel | Any) -> ShardedStateDict:
    """Checkpoint entries of everything on this rank that a run changes, by local name: what is trainable, and what
    moves by other rules (a router's score bias)."""
    llava = getattr(model, "module", model)
    return model_entries(llava, trainable=True) | trainable_entries(llava)


def not_finite(model: DistributedDataParallel | Any) -> list[str]:
    """The tensors among those that a run changes, by their names in the whole model, in which any rank holds a number
    that is not finite; all ranks call it."""
    entries = weight_entries(model)
    mine = [entry.key for entry in entries.values() if not entry.data.isfinite().all()]
    everyone: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return sorted({key for part in everyone for key in part})


def _refuse_not_finite(path: Path, model: DistributedDataParallel | Any) -> None:
    """Of what was just loaded; no checkpoint is written so, but others' files may be, and those of older versions."""
    if broken := not_finite(model):
        raise files.CheckpointError(f"{path} holds numbers that are not finite, in {_first_of(broken)}")


def _first_of(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")


def _optimizer_entries(
    model: DistributedDataParallel, optimizer: MegatronOptimizer, *, is_loading: bool
) -> ShardedStateDict:
    """Adam's moments (of SGD there are none) and the fp32 master weights, named and cut as their parameters are.

    Learning rates and the like are not state: they follow from the config and the step.
    """
    weights = trainable_entries(model)
    parts = _optimizer_parts(optimizer)
    if is_loading and optimizer.config.optimizer == "adam":
        for part in parts.values():
            part.init_state_fn(part.optimizer, part.config)
    if optimizer.config.use_distributed_optimizer:
        # the one format of the distributed optimizer that other layouts can read
        shards = {
            index: part.sharded_param_state_fully_reshardable(weights, is_loading, metadata={})
            for index, part in parts.items()
        }
        return {"optimizer": shards} if shards else {}
    entries: ShardedStateDict = {}
    for name, parameter, state in _adam_states(model, optimizer):
        tensors: dict[str, torch.Tensor] = {kind: state[kind] for kind in ("exp_avg", "exp_avg_sq") if kind in state}
        if getattr(parameter, "main_param", parameter) is not parameter:
            tensors["fp32_param"] = parameter.main_param  # type: ignore[attr-defined]
        for kind, tensor in tensors.items():
            entry: ShardedTensor = weights[name].without_data()
            entry.data, entry.dtype = tensor.detach(), tensor.dtype
            entry.key = f"optimizer.{kind}.{weights[name].key}"
            entries[f"optimizer.{kind}.{name}"] = entry
    return entries


def _optimizer_parts(optimizer: MegatronOptimizer) -> dict[int, Any]:
    """The optimizers of dense and of expert parameters by their place in the chain, without those that step nothing."""
    return {i: part for i, part in enumerate(optimizer.chained_optimizers) if part.optimizer is not None}


def _adam_states(
    model: DistributedDataParallel, optimizer: MegatronOptimizer
) -> Iterator[tuple[str, torch.nn.Parameter, dict[str, Any]]]:
    states: dict[Any, dict[str, Any]] = {}
    for part in _optimizer_parts(optimizer).values():
        states.update(part.optimizer.state)
    for name, parameter in model.module.named_parameters():
        if parameter.requires_grad:
            yield name, parameter, states.get(getattr(parameter, "main_param", parameter), {})


def _load(entries: ShardedStateDict, path: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(entries, str(path), strict="raise_unexpected")
    except (*files.LIBRARY_ERRORS, KeyError, ValueError) as error:
        raise files.CheckpointError(f"{path} does not fit this run: {files.reason(error)}") from error


def _copy_into(entries: ShardedStateDict, loaded: dict[str, Any]) -> None:
    with torch.no_grad():
        for name, tensor in loaded.items():
            if name in entries and tensor is not entries[name].data:
                entries[name].data.copy_(tensor)


def _rng_state() -> dict[str, torch.Tensor]:
    """This rank's generators as tensors: the default ones and Megatron-Core's tracker."""
    state = {f"tracker.{name}": value for name, value in tensor_parallel.get_cuda_rng_tracker().get_states().items()}
    state["default"] = torch.get_rng_state()
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return {name: value.clone() for name, value in state.items()}


def _set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["default"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    tracked = {name.removeprefix("tracker."): value for name, value in state.items() if name.startswith("tracker.")}
    tensor_parallel.get_cuda_rng_tracker().set_states(tracked)


def _write_atomically(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.new")
    with open(beside, "w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
