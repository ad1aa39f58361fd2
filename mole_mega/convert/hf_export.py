"""A base back to the files that it came as, alone or with what a run trained on it added in."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mole_mega.checkpoint.stream import LazyTensor
from mole_mega.checkpoint.tensors import StoredTensors
from mole_mega.checkpoint.trained import Trained
from mole_mega.config import ConfigError, ScaleOf
from mole_mega.convert import llava_hf
from mole_mega.convert.adapter_names import adapter_rows
from mole_mega.convert.carried_files import SOURCE_CONFIG, SOURCE_VISION_CONFIG
from mole_mega.convert.hf_files import CONFIG, PROCESSOR_FILES, TOKENIZER_FILES, SafetensorsShard, extra_files
from mole_mega.convert.hf_import import UNUSED_FILE
from mole_mega.convert.hf_writer import copy_files, new_folder, write_tensors
from mole_mega.convert.llava_config import llava_config
from mole_mega.convert.provenance import write_provenance
from mole_mega.convert.serving import write_serving_files
from mole_mega.convert.source import SOURCE_FILE, Source, Stored
from mole_mega.models.sizes import LlavaSize
from mole_mega.platform import fp8

MERGE_REPORT = "merge_report.json"
# Without any of these there is no tokenizer, whatever else there is.
_TOKENIZER = ("tokenizer.json", "tokenizer.model")

# What a table name starts with -> what it starts with in the files that transformers 5 writes.
_SAVED_PREFIXES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
# One tensor of ours holds up to three neighbours of a Hugging Face file: kept, it is read once.
_KEPT_ROWS = 2


@dataclass(frozen=True)
class Exported:
    """What an export has to say: `warnings`, a line each; `merge`, the report of a merge (else None)."""

    warnings: tuple[str, ...] = ()
    merge: dict[str, Any] | None = None


def export_base(trained: Trained, out: Path) -> Exported:
    """Write a base as it came: names, files, dtypes and bytes of its source; `out` must not exist.

    A base that was not imported comes out as transformers 5 saves a `LlavaForConditionalGeneration`. Raises ConfigError
    for a run, which has more than a base.
    """
    _refuse_run(trained)
    base = BaseTensors(trained.base, trained.size)
    placed = base.placed()
    with new_folder(out) as folder:
        _write_tensors(base, placed, {name: base.lazy(name) for name in placed}, folder)
        if base.source is not None and base.source.kind != "llava_hf":
            _copy_apart(base, folder, {stored.folder for stored in placed.values()})
        else:
            _copy_whole(base, folder)
    return Exported(warnings=missing_files(trained.base))


def export_llava(trained: Trained, out: Path) -> Exported:
    """Write a base, whatever it came as, as one `LlavaForConditionalGeneration`; `out` must not exist.

    Raises ConfigError for a run.
    """
    _refuse_run(trained)
    base = BaseTensors(trained.base, trained.size)
    placed, tensors = _whole_model(base)
    with new_folder(out) as folder:
        _write_tensors(base, placed, tensors, folder)
        if base.source is None or base.source.kind == "llava_hf":
            copy_files([path for path in extra_files(base.base) if path.name != CONFIG], folder)
        else:  # a tower's processor knows of no text
            write_serving_files(base.base, base.size, folder)
        _write_json(folder / CONFIG, _config(base))
    return Exported((*missing_files(trained.base), *_more_rows(trained.size)))


def llava_tensors(trained: Trained) -> dict[str, LazyTensor]:
    """What `export_llava` writes, by the table's names."""
    return _whole_model(BaseTensors(trained.base, trained.size))[1]


def export_merged(trained: Trained, out: Path) -> Exported:
    """Write a base with its adapters added in and its trained projector: W' = cast(W + s B A).

    The sum is in fp32 and cast to the dtype that W is stored in; `merge_report.json` in `out` says how much of each
    change outlived the cast, and `base.json` which base it was. Only where every token meets the same factors: method
    lora, or one expert. Raises ConfigError, saying why, otherwise.
    """
    check_one_expert(trained)
    base = BaseTensors(trained.base, trained.size)
    report = MergeReport(in_fp8=trained.run.fp8.scale if trained.run.fp8.store_base else None)
    placed, tensors = _merged_model(base, trained, report)
    with new_folder(out) as folder:
        _write_tensors(base, placed, tensors, folder)
        write_serving_files(base.base, base.size, folder)
        _write_json(folder / CONFIG, _config(base))
        _write_json(folder / MERGE_REPORT, report.to_dict())
        write_provenance(trained, folder)
    return Exported((*missing_files(trained.base), *_more_rows(trained.size)), report.to_dict())


def merged_tensors(trained: Trained, dtype: torch.dtype | None = None) -> dict[str, LazyTensor]:
    """What `export_merged` writes, by the table's names, or the same sums cast to `dtype`. Raises ConfigError as it
    does."""
    check_one_expert(trained)
    _, tensors = _merged_model(BaseTensors(trained.base, trained.size), trained, MergeReport(), dtype)
    return tensors


def _refuse_run(trained: Trained) -> None:
    if trained.step is not None:
        raise ConfigError(f"{trained.step} has adapters; say how they are to be written, by --format")


def check_one_expert(trained: Trained) -> None:
    """Raise ConfigError, with the reason, unless a run's adapters can be added into the base's weights."""
    adapter = trained.adapter
    if adapter is None:
        raise ConfigError(f"{trained.base} is a base: it has no adapters to merge")
    if adapter.method == "mole" and adapter.num_experts > 1:
        raise ConfigError(
            f"{trained.step} has {adapter.num_experts} experts a layer: which of them changes a token depends on the "
            "token, so no one weight holds them; export with --format mole or peft"
        )


def missing_files(base: Path) -> tuple[str, ...]:
    """A line for each kind of file that users of the model will look for and the base does not have."""
    return tuple(
        f"there is no {kind} ({' or '.join(names)}): nobody can train from, or ask, what is written without one"
        for kind, names in (("tokenizer", _TOKENIZER), ("image processor", PROCESSOR_FILES))
        if not any((base / name).is_file() for name in names)
    )


class BaseTensors:
    """The Hugging Face tensors of a base by the table's names (convert/llava_hf.py), each made when it is read."""

    def __init__(self, base: Path, size: LlavaSize) -> None:
        """Raises CheckpointError when a file of the base is missing or altered."""
        self.base, self.size = base, size
        self.source = Source.read(base)
        self._stored = StoredTensors(base)
        rules = llava_hf.rules_by_name(size)
        self._rows = {name: (row, place) for row in llava_hf.rows(size) for place, name in enumerate(row.hf)}
        self._unused = _read_unused(base / UNUSED_FILE)

        # not on the method: a cache that lives as long as this object
        @functools.lru_cache(maxsize=_KEPT_ROWS)
        def parts(row: llava_hf.Row) -> tuple[torch.Tensor, ...]:
            return rules[row.rule].to_hf(self._stored.read(row.ours))

        def empty_parts(row: llava_hf.Row) -> tuple[torch.Tensor, ...]:
            return rules[row.rule].to_hf(torch.empty(self._stored.shape(row.ours), device="meta"))

        self._parts, self._empty_parts = parts, empty_parts

    def lazy(self, name: str) -> LazyTensor:
        """In the dtype of the source. Raises ConfigError when the base has no such tensor."""
        tensor = self.as_stored(name)
        if self.source is None or name not in self.source.tensors:
            return tensor
        dtype = getattr(torch, self.source.tensors[name].dtype)
        return LazyTensor(tensor.shape, dtype, lambda: tensor.read().to(dtype))

    def as_stored(self, name: str) -> LazyTensor:
        """In the dtype of the base. Raises ConfigError when the base has no such tensor."""
        if name == llava_hf.OUTPUT and self.size.language.tied_embeddings:
            name = llava_hf.EMBEDDING
        if name in self._rows:
            row, place = self._rows[name]
            shape = tuple(self._empty_parts(row)[place].shape)
            return LazyTensor(shape, self._stored.dtype(row.ours), lambda: self._parts(row)[place])
        if name in self._unused:
            return self._unused[name]
        raise ConfigError(f"{self.base / SOURCE_FILE} names {name}, which the base does not hold")

    def placed(self, *, as_it_came: bool = True) -> dict[str, Stored]:
        """Where each tensor goes: where it came from, or (`as_it_came` False, or not known) where transformers 5 would
        put it; `file` and `dtype` are empty then."""
        if self.source is not None and as_it_came:
            return self.source.tensors
        return {name: Stored(saved_name(name), "", "model", "") for name in (*self._rows, *self._unused)}


def trained_projector(step: StoredTensors) -> dict[str, str]:
    """{table name: our name} of the projector, if the step has one."""
    return {row.hf[0]: row.ours for row in llava_hf.PROJECTOR if row.ours in step}


def saved_name(name: str) -> str:
    """A name of the table as transformers 5 writes it into files."""
    for ours, saved in _SAVED_PREFIXES:
        if name.startswith(ours):
            return saved + name.removeprefix(ours)
    return name


@dataclass
class MergeReport:
    """How much of each change outlived the cast to the dtype that the base is stored in.

    For a weight W and its change d: `delta_norm` ||d||, `survived` ||cast(W + d) - W|| / ||d||, and `unchanged`, the
    share of the entries of d other than 0 that changed nothing.

    With `in_fp8`, also what would be left had base and sum been kept in FP8 by that scale, over all matrices: with
    Q(W) the nearest to W that FP8 has and m = Q(W + d) - Q(W), `survived_in_fp8` <m, d> / ||d||^2 and `error_in_fp8`
    ||m - d|| / ||d||.
    """

    in_fp8: ScaleOf | None = None
    tensors: dict[str, dict[str, float]] = field(default_factory=dict)
    _sums: dict[str, tuple[float, float, int, int]] = field(default_factory=dict)
    _fp8_sums: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    def add(self, name: str, delta: torch.Tensor, moved: torch.Tensor) -> None:
        """d and cast(W + d) - W, both in fp32 and of one shape."""
        asked = delta != 0
        sums = (
            _norm(moved) ** 2,
            _norm(delta) ** 2,
            int(torch.count_nonzero(asked & (moved == 0))),
            int(torch.count_nonzero(asked)),
        )
        self._sums[name] = sums
        self.tensors[name] = _survival(*sums)

    def add_in_fp8(self, name: str, weight: torch.Tensor, delta: torch.Tensor) -> None:
        """W and d of a matrix, both in fp32."""
        assert self.in_fp8 is not None
        before, after = (
            fp8.dequantise(*fp8.quantise(matrix, self.in_fp8), torch.float32) for matrix in (weight, weight + delta)
        )
        moved = after - before
        self._fp8_sums[name] = (float((moved * delta).sum()), _norm(moved - delta) ** 2, _norm(delta) ** 2)

    def to_dict(self) -> dict[str, Any]:
        """{"overall": ..., "tensors": {stored name: ...}}."""
        overall = _survival(*([sum(column) for column in zip(*self._sums.values(), strict=True)] or [0, 0, 0, 0]))
        if self._fp8_sums:
            kept, error, asked = (sum(column) for column in zip(*self._fp8_sums.values(), strict=True))
            overall |= {
                "survived_in_fp8": kept / asked if asked else 1.0,
                "error_in_fp8": math.sqrt(error / asked) if asked else 0.0,
            }
        return {"overall": overall, "tensors": self.tensors}


def _norm(matrix: torch.Tensor) -> float:
    """Row by row: over millions of entries in one sum, fp32 is wrong in the fourth digit."""
    return float(matrix.norm(dim=-1).norm())


def _survival(moved: float, asked: float, unchanged: int, changed: int) -> dict[str, float]:
    return {
        "delta_norm": math.sqrt(asked),
        "survived": math.sqrt(moved / asked) if asked else 1.0,
        "unchanged": unchanged / changed if changed else 0.0,
    }


def _merged_model(
    base: BaseTensors, trained: Trained, report: MergeReport, dtype: torch.dtype | None = None
) -> tuple[dict[str, Stored], dict[str, LazyTensor]]:
    """`_whole_model` of a base with what a run trained on it."""
    placed, tensors = _whole_model(base)
    return placed, tensors | _with_all_rows(dict(_merged(base, trained, report, dtype)), trained.size)


def _whole_model(base: BaseTensors) -> tuple[dict[str, Stored], dict[str, LazyTensor]]:
    """({table name: where it goes}, {table name: tensor}): a decoder and a tower that came apart as one model."""
    placed = base.placed(as_it_came=base.source is not None and base.source.kind == "llava_hf")
    return placed, _with_all_rows({name: base.lazy(name) for name in placed}, base.size)


def _with_all_rows(tensors: dict[str, LazyTensor], size: LlavaSize) -> dict[str, LazyTensor]:
    both = (llava_hf.EMBEDDING, llava_hf.OUTPUT)
    return {name: _with_rows(t, _num_rows(size)) if name in both else t for name, t in tensors.items()}


def _config(base: BaseTensors) -> dict[str, Any]:
    """Of the whole model, as `_whole_model` writes it."""
    config = llava_config(base.base, base.size)
    config["text_config"]["vocab_size"] = _num_rows(base.size)
    return config


def _more_rows(size: LlavaSize) -> tuple[str, ...]:
    if _num_rows(size) == size.language.vocab_size:
        return ()
    return (
        f"the image token {size.image_token_id} is behind the vocabulary of {size.language.vocab_size}, where "
        "transformers' LLaVA would not find it: the embedding and the output layer end with copies of their first row",
    )


def _num_rows(size: LlavaSize) -> int:
    """Of a vocabulary that has the image token too: transformers' LLaVA embeds it before the image takes its place."""
    return max(size.language.vocab_size, size.image_token_id + 1)


def _with_rows(table: LazyTensor, num_rows: int) -> LazyTensor:
    """A vocabulary [V, H] up to `num_rows` rows: copies of the first (in a Llama's, what is unknown), whose logits are
    then no higher than a token's that is never chosen."""
    missing = num_rows - table.shape[0]
    if not missing:
        return table

    def read() -> torch.Tensor:
        rows = table.read()
        return torch.cat([rows, rows[:1].expand(missing, -1)])

    return LazyTensor((num_rows, *table.shape[1:]), table.dtype, read)


def _merged(
    base: BaseTensors, trained: Trained, report: MergeReport, dtype: torch.dtype | None
) -> Iterator[tuple[str, LazyTensor]]:
    """(table name, the tensor with what was trained) for every tensor that training changes."""
    assert trained.step is not None
    adapter, step = trained.run.adapter, StoredTensors(trained.step)
    factors: dict[str, dict[str, str]] = {}
    for row in adapter_rows(adapter, trained.size):
        if row.kind in ("lora_A", "lora_B"):
            factors.setdefault(row.module, {})[row.kind] = row.ours
    scale = adapter.scale

    def lora_delta(module: str) -> torch.Tensor:
        A, B = (step.read(factors[module][kind]).float() for kind in ("lora_A", "lora_B"))
        # of the one expert
        A, B = A if A.dim() == 2 else A[0], B if B.dim() == 2 else B[0]
        return (B @ A).mul_(scale)

    def projector_delta(name: str, ours: str) -> torch.Tensor:
        return step.read(ours).float() - base.lazy(name).read().float()

    for module in factors:
        name = f"{module}.weight"
        yield name, _changed(name, base.lazy(name), functools.partial(lora_delta, module), report, dtype)
    for name, ours in trained_projector(step).items():
        yield name, _changed(name, base.lazy(name), functools.partial(projector_delta, name, ours), report, dtype)


def _changed(
    name: str, weight: LazyTensor, delta: Callable[[], torch.Tensor], report: MergeReport, dtype: torch.dtype | None
) -> LazyTensor:
    dtype = dtype or weight.dtype

    def read() -> torch.Tensor:
        before, change = weight.read().float(), delta()
        after = (before + change).to(dtype)
        moved = after.float() - before
        if not math.isfinite(_norm(moved)):  # one pass that sees every entry
            raise ConfigError(f"{name} with its adapters is not finite in {dtype}")
        report.add(name, change, moved)
        if report.in_fp8 is not None and before.dim() == 2:
            report.add_in_fp8(name, before, change)
        return after

    return LazyTensor(weight.shape, dtype, read)


def _write_tensors(
    base: BaseTensors, placed: Mapping[str, Stored], tensors: Mapping[str, LazyTensor], out: Path
) -> None:
    """Every tensor to its folder and file, with the indexes that the source had."""
    parts: dict[str, dict[str, Stored]] = {}
    for name, stored in placed.items():
        parts.setdefault(stored.folder, {})[name] = stored
    for part, names in parts.items():
        is_known = all(stored.file for stored in names.values())
        write_tensors(
            _folder_of(out, part),
            {stored.name: tensors[name] for name, stored in names.items()},
            {stored.name: stored.file for stored in names.values()} if is_known else None,
            index_metadata=base.source.index_metadata.get(part) if base.source and is_known else None,
        )


def _copy_whole(base: BaseTensors, out: Path) -> None:
    """The files that go with one whole model."""
    copy_files(extra_files(base.base), out)
    if not (out / CONFIG).exists():
        _write_json(out / CONFIG, llava_config(base.base, base.size))


def _copy_apart(base: BaseTensors, out: Path, parts: Collection[str]) -> None:
    """The files that belong to a decoder and a tower that came apart, each to its own."""
    language = _folder_of(out, "language" if "language" in parts else "model")
    copy_files(extra_files(base.base, ("generation_config.json", *TOKENIZER_FILES)), language)
    shutil.copyfile(base.base / SOURCE_CONFIG, language / CONFIG)
    vision = _folder_of(out, "vision") if "vision" in parts else language
    copy_files(extra_files(base.base, PROCESSOR_FILES), vision)
    if vision != language:
        shutil.copyfile(base.base / SOURCE_VISION_CONFIG, vision / CONFIG)


def _folder_of(out: Path, part: str) -> Path:
    return out if part == "model" else out / part


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n")


def _read_unused(path: Path) -> dict[str, LazyTensor]:
    """The weights that the model has no place for, by the table's names."""
    if not path.is_file():
        return {}
    shard = SafetensorsShard(path)
    return {
        name: LazyTensor(info.shape, info.dtype, functools.partial(shard.read, name))
        for name, info in shard.tensors.items()
        if info.dtype is not None
    }
