"""The Hugging Face folder beside a base or a run: what it should hold, what it holds, and how to load it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch

from mole_mega.checkpoint import files as checkpoint_files
from mole_mega.checkpoint.store import ADAPTER_FILE
from mole_mega.checkpoint.stream import LazyTensor
from mole_mega.checkpoint.trained import Trained, find_trained
from mole_mega.config import ConfigError
from mole_mega.convert import llava_hf, peft
from mole_mega.convert.hf_export import BaseTensors, llava_tensors, merged_tensors
from mole_mega.convert.hf_files import CONFIG, HfTensors, extra_files, open_shard, open_shards, open_tensors, read_json
from mole_mega.convert.hf_sources import open_source
from mole_mega.convert.llava_config import llava_config
from mole_mega.convert.mole_folder import MODELING_FILE, mole_tensors
from mole_mega.convert.peft_import import table_name
from mole_mega.convert.provenance import BASE_JSON, base_hash
from mole_mega.convert.serving import write_serving_files

Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True)
class Counterpart:
    """`tensors`: {part: (expected, found)}; `models`: {name: (the one expert that it runs, or None; its loader)}. Names
    are empty where there is one. `files`: {name: (expected, found)} beside the weights. `cast`: what the base was asked
    to hold in another dtype, as it came. `rounded`: the model of that name has sums for weights, rounded to a dtype of
    so large an epsilon. `base_hashes`: {part: (the base's hash, the one that the part names)}, where it names one."""

    tensors: dict[str, tuple[Tensors, Tensors]]
    models: Mapping[str, tuple[int | None, Callable[[], Any]]]
    files: Mapping[str, tuple[bytes | None, bytes | None]] = field(default_factory=dict)
    cast: Mapping[str, LazyTensor] = field(default_factory=dict)
    rounded: Mapping[str, float] = field(default_factory=dict)
    base_hashes: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def find_counterpart(
    trained: Trained, folder: Path, vision_tower: Path | None = None, projector: Path | None = None
) -> Counterpart:
    """What `folder` is to a base or a run, by its content: for a base, what it was made of or was written back to; for
    a run, an export of one of the three formats. Raises ConfigError when it is none of them."""
    if trained.step is None:
        return _of_base(trained, folder, vision_tower, projector)
    if vision_tower is not None or projector is not None:
        raise ConfigError(f"{folder} is compared with a run: a vision tower or projector of its own cannot be given")
    if (folder / peft.MOLE_JSON).is_file() or (folder / peft.ADAPTER_CONFIG).is_file():
        return replace(_of_peft(trained, folder), base_hashes=_base_hashes(trained, folder))
    model_type = read_json(folder / CONFIG).get("model_type")
    if model_type == "llava_mole":
        return replace(_of_mole(trained, folder), base_hashes=_base_hashes(trained, folder))
    if model_type == "llava":
        return replace(_of_merged(trained, folder), base_hashes=_base_hashes(trained, folder))
    raise ConfigError(f"{folder / CONFIG} describes {model_type!r}: no export of a run")


def _of_base(trained: Trained, folder: Path, vision_tower: Path | None, projector: Path | None) -> Counterpart:
    base = BaseTensors(trained.base, trained.size)
    folder, vision_tower, projector = _parts_of(base, folder, vision_tower, projector)
    opened = open_source(folder, vision_tower, projector)
    is_whole = opened.kind == "llava_hf"
    if is_whole and base.source is not None and base.source.kind != "llava_hf":
        expected = llava_tensors(trained)  # its parts, written as one model
    else:
        expected = {name: base.as_stored(name) for name in base.placed()}
    left_out = set(llava_hf.computed_names(trained.size))
    if opened.fresh_projector:
        left_out |= {name for name in opened.tensors if name not in expected}
    # an import may have been asked for another dtype: what is compared is what came of it
    found = {
        name: _of_folder(opened.tensors, name, expected[name].dtype if name in expected else None)
        for name in opened.tensors
        if name not in left_out
    }
    if is_whole:
        load = partial(_load_whole, folder, _widest(expected.values()))
    else:
        # transformers needs more rows than the source has, where the image token is behind its vocabulary
        theirs = {name: tensor for name, tensor in found.items() if name not in (llava_hf.EMBEDDING, llava_hf.OUTPUT)}
        load = partial(_assemble, trained, llava_tensors(trained) | theirs)
    cast = {
        name: _of_folder(opened.tensors, name)
        for name, tensor in found.items()
        if tensor.dtype != opened.tensors.dtype(name)
    }
    files: Mapping[str, tuple[bytes | None, bytes | None]] = {}
    if is_whole and base.source is not None:
        came_whole = base.source.kind == "llava_hf"
        files = _compare_files(base.base if came_whole else _serving_files(trained), folder)
    return Counterpart({"": (expected, found)}, {"": (None, load)}, files, cast)


def _parts_of(
    base: BaseTensors, folder: Path, vision_tower: Path | None, projector: Path | None
) -> tuple[Path, Path | None, Path | None]:
    """The folders of a source whose parts came apart, where it was written back to a folder each inside `folder`."""
    files = {stored.folder: stored.file for stored in base.source.tensors.values()} if base.source else {}
    if "vision" in files and (folder / "vision").is_dir():
        vision_tower = vision_tower or folder / "vision"
    if "projector" in files and (folder / "projector").is_dir():
        projector = projector or folder / "projector" / files["projector"]
    if not (folder / CONFIG).is_file() and (folder / "language").is_dir():
        folder = folder / "language"
    return folder, vision_tower, projector


def _of_merged(trained: Trained, folder: Path) -> Counterpart:
    if trained.adapter is not None and trained.adapter.method == "mole" and trained.adapter.num_experts > 1:
        raise ConfigError(
            f"{folder} is a plain LLaVA: {trained.step} has {trained.adapter.num_experts} experts a layer, which no "
            "one weight holds"
        )
    expected, opened = merged_tensors(trained), open_tensors(folder)
    found = {name: _of_folder(opened, name) for name in opened}
    models: dict[str, tuple[int | None, Callable[[], Any]]] = {
        "": (None, partial(_load_whole, folder, _widest(expected.values())))
    }
    # sums in fp32 are no more rounded than what our model adds up
    epsilons = [torch.finfo(tensor.dtype).eps for tensor in expected.values() if tensor.dtype != torch.float32]
    if epsilons:  # the sums must be right before they are rounded: rounded ones would hide a small mistake
        models["not rounded"] = None, partial(_assemble, trained, merged_tensors(trained, torch.float32))
    files = _compare_files(_serving_files(trained), folder)
    return Counterpart({"": (expected, found)}, models, files, rounded={"": max(epsilons, default=0.0)})


def _of_mole(trained: Trained, folder: Path) -> Counterpart:
    if not is_our_code(folder):
        raise ConfigError(f"{folder} does not hold the {MODELING_FILE} that an export writes: its code is not run")
    reference = read_json(folder / CONFIG).get("base_model_name_or_path")
    expected = mole_tensors(trained, with_base=reference is None)
    # its config may have the base rounded to the run's precision; routers are in fp32 in any case
    dtype = _widest(tensor for name, tensor in mole_tensors(trained).items() if ".router." not in name)
    files = _compare_files(_serving_files(trained), folder)
    return Counterpart({"": (expected, _raw(folder))}, {"": (None, partial(_load_mole, folder, dtype))}, files)


def _of_peft(trained: Trained, folder: Path) -> Counterpart:
    if not (folder / peft.MOLE_JSON).is_file():
        return adapters_counterpart(trained, [folder])
    assert trained.adapter is not None
    parts: dict[str, tuple[Tensors, Tensors]] = {}
    models: dict[str, tuple[int | None, Callable[[], Any]]] = {}
    for expert in range(trained.adapter.num_experts):
        name = peft.expert_folder(expert)
        parts[name] = peft.adapter_tensors(trained, expert), _raw_file(folder / name / peft.ADAPTER_WEIGHTS)
        models[name] = expert, partial(_load_peft, trained, folder / name)
    routers = peft.router_tensors(trained)
    if routers:
        parts["router"] = routers, _raw_file(folder / peft.ROUTER_WEIGHTS)
    return Counterpart(parts, models)


def adapters_counterpart(trained: Trained, folders: Sequence[Path], filled: Collection[str] = ()) -> Counterpart:
    """The PEFT adapters that `trained` was converted from, an expert each, or one for all; `filled` are modules that
    they do not have."""
    assert trained.adapter is not None
    num_experts = trained.adapter.num_experts if trained.adapter.method == "mole" else 1
    if len(folders) == 1 and (folders[0] / peft.MOLE_JSON).is_file():
        return _of_peft(trained, folders[0])
    parts: dict[str, tuple[Tensors, Tensors]] = {}
    models: dict[str, tuple[int | None, Callable[[], Any]]] = {}
    for expert in range(num_experts):
        folder = folders[expert % len(folders)]
        name = "" if num_experts == 1 else f"expert {expert}"
        stored = _raw_file(folder / peft.ADAPTER_WEIGHTS)
        found = {peft.PREFIX + table_name(key): tensor for key, tensor in stored.items()}
        expected = {
            key: tensor
            for key, tensor in peft.adapter_tensors(trained, expert).items()
            if key.removeprefix(peft.PREFIX).rpartition(".lora_")[0] not in filled
        }
        parts[name] = expected, found
        if found.keys() == stored.keys():  # an adapter of a decoder alone does not load on a LLaVA
            models[name] = None if num_experts == 1 else expert, partial(_load_peft, trained, folder)
    return Counterpart(parts, models)


def _base_hashes(trained: Trained, folder: Path) -> dict[str, tuple[str, str]]:
    """The hash of the base that each part of an export names beside that of the run's. Adapters that were converted
    have no base of their own: any that they fit will do."""
    if trained.step is None or (trained.step / ADAPTER_FILE).is_file():
        return {}
    parts = [path.parent for path in (*folder.glob(BASE_JSON), *folder.glob(f"*/{BASE_JSON}"))]
    named = {path.name: base_hash(path) for path in parts}
    if (folder / CONFIG).is_file():
        named[CONFIG] = read_json(folder / CONFIG).get("base_hash")
    own = checkpoint_files.folder_hash(trained.base)
    return {part: (own, str(found)) for part, found in named.items() if found is not None}


def _serving_files(trained: Trained) -> dict[str, bytes]:
    """What an export of a model trained on this base carries beside weights and config."""
    with tempfile.TemporaryDirectory() as scratch:
        write_serving_files(trained.base, trained.size, Path(scratch))
        return {path.name: path.read_bytes() for path in Path(scratch).iterdir()}


def _compare_files(expected: Path | dict[str, bytes], folder: Path) -> dict[str, tuple[bytes | None, bytes | None]]:
    """(expected, found) of every file that a base or an export carries along."""
    if isinstance(expected, Path):
        expected = {path.name: path.read_bytes() for path in extra_files(expected)}
    found = {path.name: path.read_bytes() for path in extra_files(folder)}
    names = (expected.keys() | found.keys()) - ({CONFIG} - expected.keys())  # an export's own config is in its proof
    return {name: (expected.get(name), found.get(name)) for name in sorted(names)}


def is_our_code(folder: Path) -> bool:
    """Whether the Python in a folder is, byte for byte, the file that an export writes."""
    ours, theirs = Path(__file__).with_name(MODELING_FILE), list(folder.glob("*.py"))
    return [path.name for path in theirs] == [ours.name] and theirs[0].read_bytes() == ours.read_bytes()


def _of_folder(tensors: HfTensors, name: str, dtype: torch.dtype | None = None) -> LazyTensor:
    """A tensor of a folder, in a dtype or as it is stored."""
    as_read = dtype or tensors.dtype(name)
    return LazyTensor(tensors.shape(name), as_read, lambda: tensors.read(name).to(as_read))


def _raw(folder: Path) -> Tensors:
    """Every tensor of a folder's files, under the names in them."""
    return {name: tensor for shard in open_shards(folder) for name, tensor in _raw_file(shard.path).items()}


def _raw_file(path: Path) -> Tensors:
    shard = open_shard(path)
    return {
        name: LazyTensor(info.shape, info.dtype or torch.uint8, partial(shard.read, name))
        for name, info in shard.tensors.items()
    }


def _widest(tensors: Iterable[LazyTensor]) -> torch.dtype:
    """The dtype that rounds none of them."""
    return reduce(torch.promote_types, {tensor.dtype for tensor in tensors})


def _load_whole(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import LlavaForConditionalGeneration

    return _load(LlavaForConditionalGeneration, folder, dtype=dtype)


def _load_mole(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForImageTextToText

    return _load(AutoModelForImageTextToText, folder, dtype=dtype, trust_remote_code=True)


def _load(kind: Any, folder: Path | None, **options: Any) -> Any:
    """By transformers, everything in its place. Raises ConfigError, one line, for whatever is not."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    where = folder or "the folder"
    try:
        loaded = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
    except ConfigError:
        raise
    except Exception as error:  # what a broken folder makes the libraries raise is anything
        raise ConfigError(f"transformers cannot load {where}: {' '.join(str(error).split())[:300]}") from error
    model, info = loaded
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise ConfigError(f"transformers' model and {where} differ in {wrong[0]}")
    return model.eval()


def load_exported(folder: Path, dtype: torch.dtype | str = "auto", *, trust_remote_code: bool = False) -> Any:
    """A LLaVA's folder, ours or any other. Code in it runs if it is our own, or trusted. Raises ConfigError."""
    from transformers import AutoModelForImageTextToText

    trust = trust_remote_code or is_our_code(folder)
    if not trust and "auto_map" in read_json(folder / CONFIG):
        raise ConfigError(f"{folder} brings code that is not ours; it runs with --trust-remote-code only")
    return _load(AutoModelForImageTextToText, folder, dtype=dtype, trust_remote_code=trust)


def load_adapter(model: Any, folder: Path) -> Any:
    """A PEFT adapter onto its model. Raises ConfigError when a tensor of either side has no partner."""
    from peft import PeftModel, get_peft_model_state_dict

    stored = _raw_file(folder / peft.ADAPTER_WEIGHTS).keys()
    try:
        adapted = PeftModel.from_pretrained(model, folder)
    except Exception as error:  # as above
        raise ConfigError(f"PEFT cannot load {folder}: {' '.join(str(error).split())[:300]}") from error
    different = sorted(stored ^ get_peft_model_state_dict(adapted).keys())
    if different:
        raise ConfigError(f"PEFT's model and {folder} differ in {different[0]}")
    return adapted.eval()


def load_base(base: Path) -> Any:
    """Our base as transformers' LLaVA."""
    trained = find_trained(base)
    return _assemble(trained, llava_tensors(trained))


def _load_peft(trained: Trained, folder: Path) -> Any:
    model = _assemble(trained, llava_tensors(trained))
    model.model.multi_modal_projector.float()  # the adapter's own would be rounded to the dtype of the base's
    return load_adapter(model, folder)


def _assemble(trained: Trained, tensors: Tensors) -> Any:
    """A transformers LLaVA of tensors by the table's names."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = llava_config(trained.base, trained.size)
    config["text_config"]["vocab_size"] = tensors[llava_hf.EMBEDDING].shape[0]
    return _load(
        LlavaForConditionalGeneration,
        None,
        config=LlavaConfig(**config),
        state_dict={name: tensor.read() for name, tensor in tensors.items()},
        dtype=_widest(tensors.values()),
    )
