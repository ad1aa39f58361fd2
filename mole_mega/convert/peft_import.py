"""PEFT LoRA adapters as the adapters that a new run starts from (`checkpoint.init_from`): one LoRA, or experts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mole_mega.adapters.sharding import kaiming_uniform
from mole_mega.checkpoint import files
from mole_mega.checkpoint.base import read_size
from mole_mega.checkpoint.store import save_adapters
from mole_mega.config import AdapterConfig, ConfigError
from mole_mega.convert import llava_hf
from mole_mega.convert.adapter_names import AdapterRow, adapter_rows
from mole_mega.convert.hf_files import SafetensorsShard, read_json
from mole_mega.convert.hf_writer import new_folder
from mole_mega.convert.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MOLE_JSON, PREFIX, ROUTER_WEIGHTS
from mole_mega.models.sizes import LlavaSize

_OLD_PROJECTOR = "non_lora_trainables.bin"  # where the first LLaVA code put what is not LoRA
_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")

# Keys of PEFT's LoraConfig that change nothing about what saved factors compute, or are read below.
_PASSED_OVER = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout",
    "lora_ga_config", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r",
    "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# Keys that may have these values only.
_ONLY: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    # the others take the initial factors out of the base's weights: the adapter belongs to another base
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True)
class Imported:
    """What a new run must say to start from the folder, and what the adapters did not hold.

    `filled`: modules whose factors start as a fresh run's do (B = 0), because our adapters come in groups.
    """

    adapter: AdapterConfig
    has_router: bool
    has_projector: bool
    filled: tuple[str, ...]


def peft_to_megatron(
    peft_dirs: Sequence[Path],
    base: Path,
    out: Path,
    *,
    num_experts: int | None = None,
    noise: float = 0.0,
    seed: int = 0,
    attention_from: int | None = None,
) -> Imported:
    """Write adapters that a run on `base` starts from by `checkpoint.init_from`; `out` must not exist.

    One adapter is method lora, or with `num_experts` the same expert so many times, each factor with Gaussian noise of
    `noise` times its own standard deviation. Several adapters are one expert each; their attention factors and their
    projectors, which experts share, must be equal, unless `attention_from` says whose are taken. A folder that
    `export_peft` wrote for several experts comes back whole, routers included.

    Raises ConfigError, one line that names file and key or tensor, for anything that our adapters cannot compute
    exactly.
    """
    if not noise >= 0 or math.isinf(noise):
        raise ConfigError(f"noise must be a number of at least 0, got {noise}")
    size = read_size(base)
    trained, routers, peft_dirs = _unpack(peft_dirs)
    loras = [PeftLora.read(folder, size) for folder in peft_dirs]
    _check_alike(loras)
    shared = _shared(loras, attention_from)
    if len(loras) > 1 and num_experts not in (None, len(loras)):
        raise ConfigError(f"{len(loras)} adapters make {len(loras)} experts, not {num_experts}")
    if noise and (len(loras) > 1 or num_experts is None):
        raise ConfigError("noise tells copies of one adapter apart; there are none here")
    adapter = trained or _adapter(loras, num_experts, size)
    if trained and (trained.rank, trained.num_experts) != (shared.rank, len(loras)):
        raise ConfigError(
            f"{peft_dirs[0].parent / MOLE_JSON} says {trained.num_experts} experts of rank {trained.rank}, the folders "
            f"hold {len(loras)} of rank {shared.rank}"
        )
    if len(loras) == 1 and adapter.method == "mole":
        loras = [loras[0].with_noise(noise, _generator(seed, index)) for index in range(adapter.num_experts)]
    rows = list(adapter_rows(adapter, size))
    tensors = _factors(rows, loras, shared, size, seed) | _routers(rows, routers) | shared.projector
    with new_folder(out, finish=files.publish) as folder:
        save_adapters(tensors, adapter, folder)
    wanted = {row.module for row in rows if row.kind == "lora_A"}
    filled = wanted - set(shared.factors).union(*(lora.factors for lora in loras))
    return Imported(adapter, bool(routers), bool(shared.projector), tuple(sorted(filled)))


@dataclass(frozen=True)
class PeftLora:
    """One adapter folder. `factors` {module of the table: (A [R, in], B [out, R])}; `projector` by our names."""

    folder: Path
    rank: int
    alpha: float
    dropout: float
    factors: dict[str, tuple[Tensor, Tensor]]
    projector: dict[str, Tensor]

    @staticmethod
    def read(folder: Path, size: LlavaSize) -> PeftLora:
        """Raises ConfigError naming file and key or tensor when it is more, or less, than LoRA on a language model."""
        config, path = folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS
        rank, alpha, dropout = _read_config(config)
        if (folder / _OLD_PROJECTOR).is_file():
            raise ConfigError(f"{folder / _OLD_PROJECTOR} holds what is not LoRA, and is not read; move it away")
        halves: dict[str, dict[str, Tensor]] = {}
        projector: dict[str, Tensor] = {}
        places = {row.hf[0]: row.ours for row in llava_hf.PROJECTOR}
        shapes = _linear_shapes(size)
        for stored, tensor in _read_tensors(path):
            name = table_name(stored)
            module, dot, kind = name.removesuffix(".weight").rpartition(".lora_")
            if name in places:
                projector[places[name]] = tensor
            elif dot and kind in ("A", "B") and module in shapes:
                expected = (rank, shapes[module][1]) if kind == "A" else (shapes[module][0], rank)
                if tuple(tensor.shape) != expected:
                    raise ConfigError(
                        f"{path}: {stored} has shape {list(tensor.shape)}, rank and model make it {list(expected)}"
                    )
                halves.setdefault(module, {})[kind] = tensor
            else:
                raise ConfigError(
                    f"{path}: {stored} has no place here: LoRA on {', '.join((*_ATTENTION, *_MLP))} of the language "
                    "model, and a whole projector, are what can be trained"
                )
        for module, pair in halves.items():
            if len(pair) == 1:
                raise ConfigError(f"{path} has only lora_{next(iter(pair))} of {module}")
        _check_projector(path, projector, size)
        if not halves:
            raise ConfigError(f"{path} has no LoRA factors")
        factors = {module: (pair["A"], pair["B"]) for module, pair in halves.items()}
        return PeftLora(folder, rank, alpha, dropout, factors, projector)

    def with_noise(self, noise: float, generator: torch.Generator) -> PeftLora:
        """This adapter with Gaussian noise on every factor, of `noise` times that factor's standard deviation."""
        if not noise:
            return self

        def noisy(factor: Tensor) -> Tensor:
            spread = noise * factor.float().std(correction=0)
            return (factor.float() + spread * torch.randn(factor.shape, generator=generator)).to(factor.dtype)

        factors = {module: (noisy(A), noisy(B)) for module, (A, B) in self.factors.items()}
        return dataclasses.replace(self, factors=factors)


def _unpack(peft_dirs: Sequence[Path]) -> tuple[AdapterConfig | None, dict[str, Tensor], list[Path]]:
    """(adapters as trained, routers by the table's names, a folder an expert) where the one folder is an export of
    several experts; else (None, {}, the folders as given)."""
    if not peft_dirs:
        raise ConfigError("no PEFT adapter is given")
    path = peft_dirs[0] / MOLE_JSON
    if len(peft_dirs) > 1 or not path.is_file():
        return None, {}, list(peft_dirs)
    tree = read_json(path)
    try:
        adapter = AdapterConfig(**tree["adapter"])
        layers = adapter.layers if adapter.layers == "all" else tuple(int(layer) for layer in adapter.layers)
        folders = [path.parent / Path(name).name for name in tree["experts"]]
        adapter = dataclasses.replace(adapter, layers=layers, rank=int(adapter.rank), alpha=float(adapter.alpha))
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(f"{path} does not say how the experts were trained: {error}") from error
    if adapter.method != "mole" or not folders:
        raise ConfigError(f"{path} names no experts")
    by_router = adapter.router_scope != "task"
    return adapter, dict(_read_tensors(path.with_name(ROUTER_WEIGHTS))) if by_router else {}, folders


def _read_config(path: Path) -> tuple[int, float, float]:
    """(rank, alpha, dropout) of an `adapter_config.json`, where scale = alpha / rank. Raises ConfigError naming the
    key of whatever else the adapter would do."""
    tree = read_json(path)
    if tree.get("peft_type") != "LORA":
        raise ConfigError(f"{path}: peft_type is {tree.get('peft_type')!r}; only 'LORA' is supported")
    for key, value in tree.items():
        if key in _ONLY:
            if value not in _ONLY[key]:
                raise ConfigError(f"{path}: {key} is {value!r}, which plain LoRA on this base is not")
        elif key not in _PASSED_OVER and value:
            raise ConfigError(f"{path}: {key} is {value!r}, which our LoRA does not compute")
    rank, alpha, dropout = tree.get("r", 8), tree.get("lora_alpha", 8), tree.get("lora_dropout", 0.0)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ConfigError(f"{path}: r must be a positive integer, got {rank!r}")
    for key, value in (("lora_alpha", alpha), ("lora_dropout", dropout)):
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"{path}: {key} must be a number, got {value!r}")
    # rank-stabilised: alpha / sqrt(r) = (alpha * sqrt(r)) / r
    return rank, float(alpha * math.sqrt(rank) if tree.get("use_rslora") else alpha), float(dropout)


def _read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    if not path.is_file():
        raise ConfigError(f"{path} is missing; other formats are not read")
    shard = SafetensorsShard(path)
    for name, info in shard.tensors.items():
        if info.dtype is None:
            raise ConfigError(f"{path}: {name} is stored as {info.stored_as}")
        yield name, shard.read(name).clone()


def table_name(stored: str) -> str:
    """The table's name of a tensor in a PEFT file; an adapter of a decoder alone names it without the rest."""
    name = llava_hf.canonical_name(stored.removeprefix(PREFIX))
    return (
        name.replace("model.layers.", "model.language_model.layers.", 1) if name.startswith("model.layers.") else name
    )


def _linear_shapes(size: LlavaSize) -> dict[str, tuple[int, int]]:
    """{module: (out, in)} of every linear of the decoder that can carry LoRA."""
    weights = llava_hf.hf_shapes(size)
    modules = dict.fromkeys(row.module for row in adapter_rows(AdapterConfig(method="lora"), size))
    return {module: (weights[f"{module}.weight"][0], weights[f"{module}.weight"][1]) for module in modules}


def _check_projector(path: Path, projector: dict[str, Tensor], size: LlavaSize) -> None:
    weights = llava_hf.hf_shapes(size)
    shapes = {row.ours: weights[row.hf[0]] for row in llava_hf.PROJECTOR}
    for name, tensor in projector.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ConfigError(
                f"{path}: the projector's {name} has shape {list(tensor.shape)}, the base's has {list(shapes[name])}"
            )
    if projector and projector.keys() != shapes.keys():
        raise ConfigError(
            f"{path} holds a part of the projector only: {min(shapes.keys() - projector.keys())} is missing"
        )


def _check_alike(loras: list[PeftLora]) -> None:
    """Experts of one run have one rank, one alpha and the same targets."""
    first = loras[0]
    for lora in loras[1:]:
        for key in ("rank", "alpha"):
            if getattr(lora, key) != getattr(first, key):
                raise ConfigError(
                    f"{lora.folder} has {key} {getattr(lora, key)}, {first.folder} has {getattr(first, key)}; experts "
                    "must be alike"
                )
        different = lora.factors.keys() ^ first.factors.keys()
        if different:
            raise ConfigError(f"{lora.folder} and {first.folder} do not both adapt {min(different)}")


def _shared(loras: list[PeftLora], attention_from: int | None) -> PeftLora:
    """The adapter whose attention and projector the experts share."""
    if attention_from is not None:
        if not 0 <= attention_from < len(loras):
            raise ConfigError(f"attention_from is {attention_from}; there are {len(loras)} adapters, counted from 0")
        return loras[attention_from]
    first = loras[0]
    for lora in loras[1:]:
        for module in first.factors:
            if _is_attention(module) and not all(map(torch.equal, first.factors[module], lora.factors[module])):
                raise ConfigError(
                    f"{lora.folder} and {first.folder} differ in {module}: experts share the attention; say whose is "
                    "taken"
                )
        same_projector = lora.projector.keys() == first.projector.keys() and all(
            torch.equal(tensor, lora.projector[name]) for name, tensor in first.projector.items()
        )
        if not same_projector:
            raise ConfigError(
                f"{lora.folder} and {first.folder} have different projectors: experts share it; say whose is taken"
            )
    return first


def _adapter(loras: list[PeftLora], num_experts: int | None, size: LlavaSize) -> AdapterConfig:
    """The smallest adapters of ours that the given ones fit into."""
    first = loras[0]
    is_mole = len(loras) > 1 or num_experts is not None
    if num_experts is not None and num_experts < 1:
        raise ConfigError(f"num_experts must be at least 1, got {num_experts}")
    mlp_layers = sorted({int(m.split(".")[3]) for m in first.factors if not _is_attention(m)})
    every_layer = list(range(size.language.num_layers))
    # experts stand in MLPs: where none is adapted they start from nothing, as in a fresh run
    everywhere = mlp_layers == every_layer or (is_mole and not mlp_layers)
    return AdapterConfig(
        method="mole" if is_mole else "lora",
        num_experts=num_experts or len(loras),
        rank=first.rank,
        alpha=first.alpha,
        dropout=first.dropout,
        attention=any(map(_is_attention, first.factors)),
        layers="all" if everywhere else tuple(mlp_layers),
    )


def _factors(
    rows: list[AdapterRow], loras: list[PeftLora], shared: PeftLora, size: LlavaSize, seed: int
) -> dict[str, Tensor]:
    """Our factors by our names: those of the attention from `shared`, of the MLP from each expert's adapter."""
    shapes = _linear_shapes(size)
    generator = _generator(seed, -1)
    tensors = {}
    for row in rows:
        if row.kind not in ("lora_A", "lora_B"):
            continue
        out_features, in_features = shapes[row.module]
        index, shape = (0, (shared.rank, in_features)) if row.kind == "lora_A" else (1, (out_features, shared.rank))
        parts = []
        for lora in loras if row.has_experts else [shared]:
            if row.module in lora.factors:
                parts.append(lora.factors[row.module][index])
            else:
                fresh = torch.zeros(shape)
                if row.kind == "lora_A":
                    kaiming_uniform(fresh, generator)
                parts.append(fresh)
        tensors[row.ours] = torch.stack(parts) if row.has_experts else parts[0]
    return tensors


def _routers(rows: list[AdapterRow], routers: dict[str, Tensor]) -> dict[str, Tensor]:
    if not routers:
        return {}
    wanted = {row.ours: f"{row.module}.{row.kind.removeprefix('router_')}" for row in rows if "router" in row.kind}
    different = set(wanted.values()) ^ routers.keys()
    if different:
        raise ConfigError(f"{ROUTER_WEIGHTS} and {MOLE_JSON} do not agree on {min(different)}")
    return {ours: routers[name] for ours, name in wanted.items()}


def _is_attention(module: str) -> bool:
    return module.rpartition(".")[2] in _ATTENTION


def _generator(seed: int, stream: int) -> torch.Generator:
    """One for each expert's noise, and one (-1) for what is filled in."""
    return torch.Generator().manual_seed((seed << 16) + stream + 1)
