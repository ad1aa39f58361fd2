"""The proof that a conversion lost nothing: names, bytes, logits, and the expert of every token.

Bytes show that every tensor came over; that each stands where it belongs is shown by both models' answers to one batch,
theirs computed by transformers (and PEFT), ours by Megatron-Core under the layout of the processes that ask.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from torch import Tensor

from mole_mega.checkpoint.base import model_entries
from mole_mega.checkpoint.stream import LazyTensor
from mole_mega.checkpoint.tensors import StoredTensors
from mole_mega.checkpoint.trained import Trained, build_trained
from mole_mega.config import ConfigError, ParallelConfig
from mole_mega.convert import probe
from mole_mega.convert.folders import Counterpart
from mole_mega.errors import CheckFailedError
from mole_mega.models.llava import LLaVA
from mole_mega.platform.parallel import Parallel

# Largest difference of logits in fp32, as a share of the largest logit.
LOGITS_LIMIT = 1e-5
# Weights that were rounded after a sum make the logits of a deep model differ by so many roundings at most; their bytes
# are compared with the same sum.
_ROUNDINGS = 8
_PAD_TO = 8


@dataclass(frozen=True)
class Check:
    """One row of the table: what was compared, how much of it, what came out, and whether it is equal. `is_note` marks
    a row that says what was asked for and compares nothing."""

    what: str
    compared: str
    found: str
    equal: bool
    is_note: bool = False

    @property
    def verdict(self) -> str:
        return "noted" if self.is_note else "equal" if self.equal else "DIFFERS"


def verify(
    trained: Trained,
    find: Callable[[], Counterpart],
    parallel: Parallel,
    layout: ParallelConfig,
    *,
    limit: float = LOGITS_LIMIT,
) -> list[Check]:
    """Compare a base, or a run, with its counterpart (convert/folders.py): where it came from, or an export of it.

    All ranks call it and get the same rows; one of them calls `find`. What that raises as ConfigError, all ranks raise.
    """
    asked = probe.make_probe(trained.size, _PAD_TO * parallel.tp_size)
    theirs: _Theirs | str = ""
    if parallel.is_main:
        try:
            theirs = _ask_them(find(), asked)
        except (ConfigError, CheckFailedError) as error:
            theirs = str(error)
    box = [theirs]
    if parallel.world_size > 1:
        dist.broadcast_object_list(box)
    theirs = box[0]
    if isinstance(theirs, str):
        raise ConfigError(theirs)
    gc.collect()
    model = build_trained(trained, parallel, layout, "stored")
    checks = list(theirs.checks)
    if parallel.world_size > 1:
        checks.append(_check_layout(model, trained))
    for answer in theirs.answers:
        ours = probe.ask_megatron(model, asked, answer.expert)
        checks.append(_check_logits(answer, ours.logits, max(limit, _ROUNDINGS * theirs.rounded.get(answer.name, 0.0))))
        if answer.choices is not None:
            checks.append(_check_choices(answer.choices, ours.choices, asked.mask))
    return checks


def table(checks: list[Check]) -> str:
    """The rows for people."""
    head = ("check", "compared", "found", "")
    rows = [head, *((c.what, c.compared, c.found, c.verdict) for c in checks)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


@dataclass(frozen=True)
class _TheirAnswer:
    """Logits [B, S, V]; `choices` {layer: [B, S]} where their model routes; `expert` when it runs that one alone."""

    name: str
    logits: Tensor
    choices: dict[int, Tensor] | None = None
    expert: int | None = None


@dataclass(frozen=True)
class _Theirs:
    checks: list[Check]
    answers: list[_TheirAnswer]
    rounded: Mapping[str, float]


def _ask_them(counterpart: Counterpart, asked: probe.Probe) -> _Theirs:
    checks = []
    for name, (expected, found) in counterpart.tensors.items():
        checks += compare_tensors(name, expected, found)
    checks += _note_cast(counterpart)
    if counterpart.files:
        checks.append(_check_files(counterpart.files))
    if counterpart.base_hashes:
        checks.append(_check_base(counterpart.base_hashes))
    # a model of other names or shapes does not load: the rows so far say what is wrong
    is_whole = all(_shapes(expected) == _shapes(found) for expected, found in counterpart.tensors.values())
    answers = []
    for name, (expert, load) in counterpart.models.items() if is_whole else ():
        model = load()
        logits = probe.ask_transformers(model, asked)
        choices = None
        if hasattr(model, "expert_choices"):
            choices = {layer: choice.cpu() for layer, choice in model.expert_choices().items()}
        answers.append(_TheirAnswer(name, logits, choices or None, expert))
        del model
    return _Theirs(checks, answers, counterpart.rounded)


def compare_tensors(name: str, expected: Mapping[str, LazyTensor], found: Mapping[str, LazyTensor]) -> list[Check]:
    """Names both ways, then the bytes of every tensor that both have."""
    label = f"{name}: " if name else ""
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    said = [
        f"{len(names)} {what}, first {names[0]}"
        for names, what in ((missing, "missing"), (unknown, "unknown"))
        if names
    ]
    names = Check(f"{label}names", f"{len(expected):,} tensors", "; ".join(said) or "all matched", not said)
    both = [key for key in expected if key in found]
    different = [key for key in both if not _same(expected[key], found[key])]
    size = sum(found[key].num_bytes for key in both)
    said = [f"{len(different)} differ, first {different[0]}"] if different else ["identical bytes"]
    return [names, Check(f"{label}tensors", f"{len(both):,} tensors, {size / 1e9:.3g} GB", said[0], not different)]


def _note_cast(counterpart: Counterpart) -> list[Check]:
    """An import may be asked for another dtype. The rows compare what came of it; this one says what it cost."""
    found = {name: tensor for _, part in counterpart.tensors.values() for name, tensor in part.items()}
    rounded, total, dtypes = 0, 0, set()
    for name, source in counterpart.cast.items():
        before, dtype = source.read(), found[name].dtype
        rounded += int((before.to(dtype).to(before.dtype) != before).sum())
        total += before.numel()
        dtypes.add(f"{str(before.dtype).removeprefix('torch.')} to {str(dtype).removeprefix('torch.')}")
    compared = f"{len(counterpart.cast):,} tensors cast, {', '.join(sorted(dtypes))}"
    note = Check("cast", compared, f"{rounded:,} of {total:,} numbers rounded", equal=True, is_note=True)
    return [note] if rounded else []


def _check_files(files: Mapping[str, tuple[bytes | None, bytes | None]]) -> Check:
    different = [name for name, (expected, found) in files.items() if expected != found]
    found = f"{len(different)} differ, first {different[0]}" if different else "identical bytes"
    return Check("files", f"{len(files)} beside the weights", found, not different)


def _check_base(hashes: Mapping[str, tuple[str, str]]) -> Check:
    """The base that an export names must be the one that the run was trained on."""
    different = [found for expected, found in hashes.values() if expected != found]
    found = f"another hash, {different[0][:12]}..." if different else "the same hash"
    return Check("base", "what the export names", found, not different)


def _shapes(tensors: Mapping[str, LazyTensor]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _same(expected: LazyTensor, found: LazyTensor) -> bool:
    if (expected.shape, expected.dtype) != (found.shape, found.dtype):
        return False
    ours, theirs = (tensor.read().contiguous().reshape(-1).view(torch.uint8) for tensor in (expected, found))
    return torch.equal(ours, theirs)


def _check_logits(answer: _TheirAnswer, ours: Tensor, limit: float) -> Check:
    theirs = answer.logits[..., : ours.shape[-1]]  # theirs may have rows for the image token
    scale, worst = float(theirs.abs().max()), float((theirs - ours).abs().max())
    what = f"{answer.name}: logits" if answer.name else "logits"
    places = int((theirs != 0).any(-1).sum())
    # not `>`: a NaN is no equality
    equal = worst <= limit * scale
    share = worst / scale if scale else worst
    return Check(what, f"{places} places x {ours.shape[-1]:,}", f"{share:.1e} of the largest, limit {limit:.0e}", equal)


def _check_choices(theirs: dict[int, Tensor], ours: dict[int, Tensor], mask: Tensor) -> Check:
    if theirs.keys() != ours.keys():
        return Check("experts", "layers", f"theirs route in layers {sorted(theirs)}, ours in {sorted(ours)}", False)
    differs = [(theirs[layer] != ours[layer])[mask] for layer in theirs]
    # a token may have several choices
    different = sum(int(tokens.view(len(tokens), -1).any(1).sum()) for tokens in differs if len(tokens))
    total = int(mask.sum()) * len(theirs)
    found = "the same for every token" if not different else f"{different} tokens go elsewhere"
    return Check("experts", f"{int(mask.sum())} tokens x {len(theirs)} layers = {total:,}", found, not different)


def _check_layout(model: LLaVA, trained: Trained) -> Check:
    """Each rank's part of each tensor, as it is loaded, against that part of the stored one."""
    folders = [StoredTensors(path) for path in (trained.step, trained.base) if path is not None]
    entries = model_entries(model)
    apply_factories(entries)  # gate and up, which one tensor of the model holds, are cut apart from one another
    names, problems = set(), []
    for entry in nested_values(entries):
        stored = next((folder for folder in folders if entry.key in folder), None)
        names.add(entry.key)
        if stored is None:
            problems.append(f"{entry.key} is in no checkpoint")
            continue
        place = tuple(slice(o, o + n) for o, n in zip(entry.global_offset, entry.local_shape, strict=True))
        part = stored.read(entry.key)[place].to(entry.data.dtype)
        # rows that pad the vocabulary are in no checkpoint
        held = entry.data[tuple(slice(n) for n in part.shape)].cpu()
        if not torch.equal(held, part):
            problems.append(f"{entry.key} on rank {model.parallel.rank}")
    everyone: list[Any] = [None] * model.parallel.world_size
    dist.all_gather_object(everyone, (names, problems))
    count = len(set().union(*(names for names, _ in everyone)))
    problems = [problem for _, some in everyone for problem in some]
    said = "every part as stored" if not problems else f"{len(problems)} differ, first {problems[0]}"
    return Check("layout", f"{count:,} tensors on {model.parallel.world_size} ranks", said, not problems)
