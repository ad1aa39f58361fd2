"""What a run trained as Hugging Face PEFT LoRA folders: one that says it all, or one for each expert and the router."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mole_mega.adapters.mixed_factors import mix_factors
from mole_mega.checkpoint.stream import LazyTensor
from mole_mega.checkpoint.tensors import StoredTensors
from mole_mega.checkpoint.trained import Trained
from mole_mega.config import AdapterConfig, ConfigError
from mole_mega.convert.adapter_names import AdapterRow, adapter_rows
from mole_mega.convert.hf_export import Exported, trained_projector
from mole_mega.convert.hf_writer import new_folder, write_tensors
from mole_mega.convert.provenance import origin, write_provenance

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Beside the folders of several experts.
MOLE_JSON = "mole.json"
ROUTER_WEIGHTS = "router.safetensors"
# PEFT's wrapping of a model, in front of the model's own names.
PREFIX = "base_model.model."
PROJECTOR_MODULE = "multi_modal_projector"
_FACTORS = ("lora_A", "lora_B")

_README = """# {num_experts} LoRA experts of a LLaVA, in PEFT's format

Each of `{first}` to `{last}` is a PEFT LoRA adapter for `LlavaForConditionalGeneration`.
It holds the MLP factors of one expert, and what all experts share: {shared}.

**This is not one adapter.** In training, a router in each adapted layer sent every token to one of the experts, or
weighed several. No PEFT loader does that:

- `PeftModel.from_pretrained(model, "{first}")` sends every token of every layer through expert 0. It runs, and it is
  another model than the one that was trained.
- Loading several of them and switching, averaging or adding them does not route tokens either.
- PEFT does not read the routers in `{router}` ({router_shapes}),
  nor `{mole}`, which says how the adapters were trained.

To run the model as it was trained, export the run with `--format mole`. To train on from this folder, convert it back
with `mole-mega convert peft-to-megatron`: nothing is lost on the way.
"""

_README_OF_TASKS = """# A LoRA expert for each task of a LLaVA, in PEFT's format

| adapter | what it was trained on |
|---|---|
{tasks}
Each is a PEFT LoRA adapter for `LlavaForConditionalGeneration`, whole by itself: in training every sample went through
the one of its source.
"""


def export_peft(trained: Trained, out: Path) -> Exported:
    """Write what a run trained as PEFT adapters; `out` must not exist.

    Method lora and one expert give one adapter folder. More experts give `expert_<i>/`, each an adapter of its own,
    the routers, and a README that says what loading one of them does. A trained projector goes along in each. Raises
    ConfigError when there are no LoRA factors.
    """
    if trained.adapter is None or trained.step is None:
        raise ConfigError(f"{trained.base} is a base: it has no adapters")
    if not any(row.kind in _FACTORS for row in adapter_rows(trained.adapter, trained.size, mixed=True)):
        raise ConfigError(f"{trained.step} trained no LoRA factors: a PEFT adapter would be empty")
    if trained.adapter.method == "mole" and trained.adapter.router_scope not in ("block", "task"):
        raise ConfigError(
            f"{trained.step} was trained with adapter.router_scope {trained.adapter.router_scope}, whose routers have "
            "no place in the exported folder"
        )
    if trained.adapter.method == "mole" and trained.adapter.router_score != "softmax":
        raise ConfigError(
            f"{trained.step} was trained with adapter.router_score {trained.adapter.router_score}, whose biases have "
            "no place in the exported folder; export it with --format mole"
        )
    step = StoredTensors(trained.step)
    with new_folder(out) as folder:
        if trained.adapter.method == "lora" or trained.adapter.num_experts == 1:
            _write_adapter(folder, trained, step)
        else:
            _write_experts(folder, trained, trained.adapter, step)
    return Exported()


def adapter_tensors(trained: Trained, expert: int = 0, step: StoredTensors | None = None) -> dict[str, LazyTensor]:
    """One adapter's tensors by PEFT's names: the factors that are not the experts', those of one expert, and the
    projector if it was trained. `step` saves opening the run's checkpoint once more."""
    step = step or _open(trained)
    adapter = trained.run.adapter
    mixes = adapter.method == "mole" and adapter.shared_B > 0
    tensors = {
        f"{PREFIX}{row.module}.{row.kind}.weight": _mixed(step, row.ours, expert, adapter.mix_temperature)
        if mixes and row.kind == "lora_B" and row.has_experts
        else _stored(step, row.ours, expert if row.has_experts else None)
        for row in adapter_rows(adapter, trained.size, mixed=True)
        if row.kind in _FACTORS
    }
    return tensors | {PREFIX + name: _stored(step, ours) for name, ours in trained_projector(step).items()}


def router_tensors(trained: Trained, step: StoredTensors | None = None) -> dict[str, LazyTensor]:
    """The routers by the table's names: weight [experts, hidden], bias [experts]."""
    step = step or _open(trained)
    return {
        f"{row.module}.{row.kind.removeprefix('router_')}": _stored(step, row.ours)
        for row in adapter_rows(trained.run.adapter, trained.size, mixed=True)
        if row.kind not in _FACTORS
    }


def expert_folder(index: int) -> str:
    """The name of one expert's folder."""
    return f"expert_{index}"


def _open(trained: Trained) -> StoredTensors:
    assert trained.step is not None
    return StoredTensors(trained.step)


def _write_experts(folder: Path, trained: Trained, adapter: AdapterConfig, step: StoredTensors) -> None:
    names = [expert_folder(index) for index in range(adapter.num_experts)]
    for index, name in enumerate(names):
        _write_adapter(folder / name, trained, step, index)
    routers = router_tensors(trained, step)
    if routers:
        write_tensors(folder, routers, dict.fromkeys(routers, ROUTER_WEIGHTS))
    shared = ["the attention's LoRA"] * adapter.attention + ["the trained projector"] * bool(trained_projector(step))
    # what the adapters compute, not the methods that they were trained with
    computed = {key: value for key, value in dataclasses.asdict(adapter).items() if key != "methods"}
    computed["shared_B"] = 0  # each adapter here has its own
    tree = {"experts": names, "adapter": computed, "base": origin(trained.base)}
    (folder / MOLE_JSON).write_text(json.dumps(tree, indent=2) + "\n")
    if adapter.router_scope == "task":
        sources = trained.run.data.sources
        tasks = "".join(f"| `{name}` | {source.name} |\n" for name, source in zip(names, sources, strict=True))
        (folder / "README.md").write_text(_README_OF_TASKS.format(tasks=tasks))
        return
    (folder / "README.md").write_text(
        _README.format(
            num_experts=adapter.num_experts,
            first=names[0],
            last=names[-1],
            shared=" and ".join(shared) or "nothing",
            router=ROUTER_WEIGHTS,
            router_shapes="weight [experts, hidden]" + (", bias [experts]" if adapter.router_bias else ""),
            mole=MOLE_JSON,
        )
    )


def _write_adapter(folder: Path, trained: Trained, step: StoredTensors, expert: int = 0) -> None:
    """One PEFT folder."""
    tensors = adapter_tensors(trained, expert, step)
    write_tensors(folder, tensors, dict.fromkeys(tensors, ADAPTER_WEIGHTS))
    tree = _adapter_config(trained, has_projector=bool(trained_projector(step)))
    (folder / ADAPTER_CONFIG).write_text(json.dumps(tree, indent=2) + "\n")
    write_provenance(trained, folder)


def _adapter_config(trained: Trained, *, has_projector: bool) -> dict[str, Any]:
    """What PEFT's `LoraConfig` reads; keys left out have its defaults."""
    adapter = trained.run.adapter
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": origin(trained.base),
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.scaling == "rslora",
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": _target_modules(adapter_rows(adapter, trained.size, mixed=True)),
        "modules_to_save": [PROJECTOR_MODULE] if has_projector else None,
    }


def _target_modules(rows: Iterable[AdapterRow]) -> str:
    """A regular expression of just the adapted modules: a list of last names would hit the tower's attention too."""
    layers: dict[str, dict[str, None]] = {}  # a dict for its order
    stem = ""
    for row in rows:
        if row.kind in _FACTORS:
            stem, layer, target = re.fullmatch(r"(.*\.layers)\.(\d+)\.(.*)", row.module).groups()  # type: ignore[union-attr]
            layers.setdefault(target, {})[layer] = None
    by_layers: dict[str, list[str]] = {}
    for target, numbers in layers.items():
        by_layers.setdefault("|".join(numbers), []).append(target)
    options = [rf"(?:{numbers})\.(?:{'|'.join(map(re.escape, targets))})" for numbers, targets in by_layers.items()]
    return rf"{re.escape(stem)}\.(?:{'|'.join(options)})"


def _stored(step: StoredTensors, ours: str, expert: int | None = None) -> LazyTensor:
    """A tensor of a step, or the part of it that is one expert's."""
    shape = step.shape(ours)
    if expert is None:
        return LazyTensor(shape, step.dtype(ours), partial(step.read, ours))
    return LazyTensor(shape[1:], step.dtype(ours), lambda: step.read(ours)[expert])


def _mixed(step: StoredTensors, common_B: str, expert: int, temperature: float) -> LazyTensor:
    """The B that one expert makes of the common ones."""
    stem = common_B.removesuffix("_B")

    def put_together() -> torch.Tensor:
        B_NOR, weight_EN, transform_ERR = map(step.read, (common_B, f"{stem}_mix", f"{stem}_transform"))
        return mix_factors(B_NOR, weight_EN, transform_ERR, temperature)[expert].contiguous()

    return LazyTensor(step.shape(common_B)[1:], step.dtype(common_B), put_together)
