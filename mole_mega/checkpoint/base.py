"""The frozen base as a checkpoint of its own: layout-free weights, the model's size, tokenizer and processor files.

A base folder holds Megatron-Core's distributed format (any TP, PP, EP loads it), `tensors.json` (shape, dtype and hash
of each tensor), `model.json` (models/sizes.py) and whatever Hugging Face files came with the weights. A run names it by
path and hash and never copies it.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict, ShardedTensor, is_main_replica

from mole_mega.checkpoint import files
from mole_mega.checkpoint.stream import TENSORS_JSON, LazyTensor, describe_tensors, write_tensors
from mole_mega.models.llava import LLaVA
from mole_mega.models.sizes import MODEL_JSON, LlavaSize
from mole_mega.platform import fp8
from mole_mega.platform.parallel import Parallel

# Of weights read at a time to be kept in FP8.
_PORTION_BYTES = 2**28
# What torch writes around a tensor: names, shapes, padding.
_BYTES_AROUND = 1500


def model_entries(model: LLaVA, *, trainable: bool | None = None) -> ShardedStateDict:
    """The model's checkpoint entries by local name: all tensors (None), the adapters (True) or the base's (False).

    Layers carry their number in the whole decoder, so that any split over pipeline stages reads the same names.
    """
    metadata = {"non_homogeneous_layers": True, "dp_cp_group": model.parallel.groups.dp_cp}
    placed = {name for name, parameter in model.named_parameters() if hasattr(parameter, "placement")}
    return {
        name: entry
        for name, entry in model.sharded_state_dict(metadata=metadata).items()
        if not isinstance(entry, ShardedObject) and (trainable is None or (name in placed) == trainable)
    }


def bytes_to_write(entries: ShardedStateDict) -> int:
    """About how many bytes of entries this rank writes; others write what it only has a copy of."""
    mine = [e for e in nested_values(entries) if isinstance(e, ShardedTensor) and is_main_replica(e.replica_id)]
    return sum(entry.data.numel() * entry.data.element_size() + _BYTES_AROUND for entry in mine)


def write_base(size: LlavaSize, tensors: Mapping[str, LazyTensor], out: Path, extra_files: Iterable[Path] = ()) -> str:
    """Write a base checkpoint from tensors read one by one; returns its hash. `out` must not exist. For one process.

    Raises CheckpointError when the disk refuses, and whatever reading a tensor raises; nothing is left behind then.
    """
    _refuse_existing(out)
    folder = files.incomplete_name(out)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with files.shared_disk_errors("writing", out, sum(tensor.num_bytes for tensor in tensors.values())):
            folder.mkdir(parents=True)
            write_tensors(folder, tensors)
            _complete(folder, out, size, extra_files)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return files.folder_hash(out)


def save_base(model: LLaVA, out: Path, extra_files: Iterable[Path] = ()) -> str:
    """Write a base checkpoint from a model without adapters, of any layout; returns its hash. `out` must not exist."""
    assert not fp8.kept_in_fp8(model), "what is kept in FP8 is no longer the base"
    _refuse_existing(out)
    folder = files.incomplete_name(out)
    if model.parallel.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    model.parallel.barrier()
    entries = _without_padding(model_entries(model, trainable=False), model)
    with files.shared_disk_errors("writing", out, bytes_to_write(entries)):
        dist_checkpointing.save(entries, str(folder), async_sharded_save=False)
        if model.parallel.is_main:
            _drop_storage_metadata(folder)
            describe_tensors(folder)
            _complete(folder, out, model.size, extra_files)
    model.parallel.barrier()
    return files.folder_hash(out)


def _without_padding(entries: ShardedStateDict, model: LLaVA) -> ShardedStateDict:
    """Entries whose vocabulary ends where the model's does. Rows that only pad it to a multiple of TP are not of the
    model, and a grid of shards has room for none that is shorter: what has such rows is gathered, and saved whole."""
    tp, rows = model.parallel.groups.tp, model.size.language.vocab_size
    result = dict(entries)
    for name, entry in entries.items():
        if getattr(entry, "allow_shape_mismatch", False) and entry.global_shape[0] > rows:
            parts = [torch.empty_like(entry.data) for _ in range(tp.size())]
            dist.all_gather(parts, entry.data.contiguous(), group=tp)
            replica = entry.replica_id if isinstance(entry.replica_id, tuple) else (entry.replica_id,)
            result[name] = ShardedTensor.from_rank_offsets(
                entry.key, torch.cat(parts)[:rows].contiguous(), replica_id=(*replica, tp.rank())
            )
    return result


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise files.CheckpointError(f"{out} exists; choose another folder or remove it")


def _complete(folder: Path, out: Path, size: LlavaSize, extra_files: Iterable[Path]) -> None:
    """Add to the tensors in `folder` what makes it a base, and publish it as `out`."""
    (folder / MODEL_JSON).write_text(size.to_json())
    for path in extra_files:
        shutil.copyfile(path, folder / path.name)
    files.publish(folder, out)


def _drop_storage_metadata(folder: Path) -> None:
    """Without the random id and the folder's name that torch enters, equal bases have equal hashes."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())  # written a moment ago by this process
    metadata.storage_meta = None
    path.write_bytes(pickle.dumps(metadata))


def read_size(base: Path) -> LlavaSize:
    """The size of the base in a folder. Raises ConfigError when it is not a base checkpoint."""
    files.read_manifest(base)
    return LlavaSize.from_json(base / MODEL_JSON)


def stored_shapes(base: Path) -> dict[str, tuple[int, ...]]:
    """{tensor: its whole shape} as a base says; no tensor is looked at. Raises CheckpointError when it does not say."""
    path = base / TENSORS_JSON
    try:
        return {name: tuple(record["shape"]) for name, record in json.loads(path.read_text()).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise files.CheckpointError(f"{path} does not say which tensors the base has") from error


def load_base(model: LLaVA, base: Path) -> None:
    """Load the frozen weights (and the projector) into this rank's part of a model, in the model's dtype. Weights that
    the model keeps in FP8 (platform/fp8.py) are read a few at a time. All ranks call it.

    Every file is checked first. Raises CheckpointError naming the tensor when one is missing or of another shape.
    """
    files.verify(base)
    files.refuse_unsafe(base)
    entries = model_entries(model, trainable=False)
    with torch.no_grad():
        # rows that only pad the vocabulary are in no checkpoint
        for name, parameter in model.named_parameters():
            if name in entries and getattr(entries[name], "allow_shape_mismatch", False):
                parameter.zero_()
    kept = fp8.kept_in_fp8(model)
    as_they_are = {name: entry for name, entry in entries.items() if name not in kept}
    state = _load(as_they_are, base, strict="raise_unexpected" if kept else "raise_all")
    missing, unexpected = model.load_state_dict(state, strict=False)
    wrong = [name for name in missing if name in as_they_are] + list(unexpected)
    assert not wrong, wrong
    if not kept:
        return
    _refuse_more(entries, base, model.parallel)
    for names in _portions(kept, model.parallel):
        portion = {name: _with_room(entries[name]) for name in names}
        for name, weight in _load(portion, base, strict="raise_unexpected").items():
            fp8.keep(kept[name], weight)


def _load(entries: ShardedStateDict, base: Path, strict: str) -> dict[str, torch.Tensor]:
    try:
        return dist_checkpointing.load(entries, str(base), strict=strict)
    except (*files.LIBRARY_ERRORS, KeyError, ValueError) as error:
        raise files.CheckpointError(f"{base} does not fit the model: {files.reason(error)}") from error


def _refuse_more(entries: ShardedStateDict, base: Path, parallel: Parallel) -> None:
    """Raise CheckpointError when the base holds a tensor that no rank's part of the model has a place for."""
    asked: list[set[str]] = [set()] * parallel.world_size
    dist.all_gather_object(asked, {entry.key for entry in entries.values()})
    if more := set(stored_shapes(base)) - set().union(*asked):
        raise files.CheckpointError(f"{base} does not fit the model: nothing asks for {min(more)}")


def _portions(kept: Mapping[str, fp8.Fp8Linear], parallel: Parallel) -> list[list[str]]:
    """The names in portions of not many bytes, on all ranks as many: loading is done together."""
    portions: list[list[str]] = []
    room = 0
    for name, linear in kept.items():
        size = linear.weight.numel() * torch.float32.itemsize
        if size > room:
            portions.append([])
            room = _PORTION_BYTES
        portions[-1].append(name)
        room -= size
    most = torch.tensor(len(portions), device=parallel.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return portions + [[]] * (int(most) - len(portions))


def _with_room(entry: Any) -> Any:
    """The entry of a tensor that is kept in FP8, with memory of its own to be read into."""
    data = torch.empty(entry.data.shape, dtype=torch.float32, device=entry.data.device)
    if isinstance(entry, ShardedTensor):
        return dataclasses.replace(entry, data=data, dtype=data.dtype)
    return dataclasses.replace(entry, data=data)
