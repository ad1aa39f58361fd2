"""A run as a folder that transformers loads without mole_mega: base, adapters, routers, and the code that runs them."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mole_mega.checkpoint import files
from mole_mega.checkpoint.stream import LazyTensor
from mole_mega.checkpoint.tensors import StoredTensors
from mole_mega.checkpoint.trained import Trained
from mole_mega.config import AdapterConfig, ConfigError
from mole_mega.convert.adapter_names import adapter_rows
from mole_mega.convert.hf_export import BaseTensors, Exported, missing_files, trained_projector
from mole_mega.convert.hf_files import CONFIG
from mole_mega.convert.hf_writer import copy_files, new_folder, write_tensors
from mole_mega.convert.llava_config import llava_config
from mole_mega.convert.serving import write_serving_files

MODELING_FILE = "modeling_llava_mole.py"
MODEL_CARD = "README.md"

_SUFFIXES = {"lora_A": "lora_A", "lora_B": "lora_B", "router_weight": "weight", "router_bias": "bias",
             "router_score_bias": "score_bias"}  # fmt: skip
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def export_mole(trained: Trained, out: Path, base_reference: str | None = None) -> Exported:
    """Write a run's model for `AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)`.

    Base weights are as the base stores them, adapters, routers and projector as the run does. With `base_reference`, a
    folder or a hub's name of the same base in Hugging Face's format, the base is left out, and loading the folder loads
    it from there. `out` must not exist; it is whole or not there. Raises ConfigError for a base alone.
    """
    if trained.adapter is None:
        raise ConfigError(f"{trained.base} is a base: it has no adapters to export")
    if trained.adapter.method == "mole" and trained.adapter.router_scope in ("sample", "task"):
        raise ConfigError(
            f"{trained.step} was trained with adapter.router_scope {trained.adapter.router_scope}: the exported "
            "model's code knows routers of a block and of a linear, and neither a sample's instruction nor its task"
        )
    tensors = mole_tensors(trained, with_base=base_reference is None)
    if base_reference is not None and Path(base_reference).is_dir():
        base_reference = str(Path(base_reference).resolve())  # it is loaded from any folder
    config = _config(trained, trained.adapter, base_reference)
    with new_folder(out) as folder:
        write_tensors(folder, tensors)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (folder / MODEL_CARD).write_text(_model_card(trained.adapter, base_reference))
        write_serving_files(trained.base, trained.size, folder)
        copy_files([Path(__file__).with_name(MODELING_FILE)], folder)
    return Exported(warnings=missing_files(trained.base))


def mole_tensors(trained: Trained, *, with_base: bool = True) -> dict[str, LazyTensor]:
    """The tensors of a run's folder by the names in its files: the base's, the projector, adapters and routers."""
    assert trained.adapter is not None and trained.step is not None
    tensors = {}
    if with_base:
        base = BaseTensors(trained.base, trained.size)
        # as the base stores them, whatever its source did: that is what the run was trained on
        tensors = {name: base.as_stored(name) for name in base.placed(as_it_came=False)}
    step = StoredTensors(trained.step)
    names = trained_projector(step)
    for row in adapter_rows(trained.adapter, trained.size):
        if row.ours not in step:
            raise ConfigError(f"{trained.step} does not hold {row.ours}: train a run from it first")
        names[f"{row.module}.{_SUFFIXES[row.kind]}"] = row.ours
    return tensors | {name: _lazy(step, ours) for name, ours in names.items()}


def _lazy(stored: StoredTensors, name: str) -> LazyTensor:
    return LazyTensor(stored.shape(name), stored.dtype(name), lambda: stored.read(name))


def _config(trained: Trained, adapter: AdapterConfig, base_reference: str | None) -> dict[str, Any]:
    config = llava_config(trained.base, trained.size)
    # an older name of `dtype`, and the dtype of parts: the run's holds for the whole
    for section in (config, config["text_config"], config["vision_config"]):
        section.pop("torch_dtype", None)
        section.pop("dtype", None)
    # the config of a model whose vocabulary was enlarged may lag behind
    config["text_config"]["vocab_size"] = trained.size.language.vocab_size
    module = Path(MODELING_FILE).stem
    return config | {
        "model_type": "llava_mole",
        "architectures": ["LlavaMoleForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": f"{module}.LlavaMoleConfig",
            "AutoModel": f"{module}.LlavaMoleModel",
            "AutoModelForImageTextToText": f"{module}.LlavaMoleForConditionalGeneration",
        },
        # for the files of a processor that do not say whose they are
        "processor_class": "LlavaProcessor",
        "dtype": _DTYPES[trained.run.train.dtype],
        # of the checkpoint that the run was trained on
        "base_hash": files.folder_hash(trained.base),
        "trained_steps": trained.trained_steps,
        "mole": _section(adapter),
    } | ({} if base_reference is None else {"base_model_name_or_path": base_reference})  # fmt: skip


def _section(adapter: AdapterConfig) -> dict[str, Any]:
    """What the exported model's code hears of a run's adapters; keys that they do not hear are as by default."""
    idle: dict[str, Any] = {f.name: f.default for f in fields(adapter) if f.name in adapter.without_effect}
    adapter = replace(adapter, **idle)
    return {
        "method": adapter.method,
        "num_experts": adapter.num_experts,
        "rank": adapter.rank,
        # of the scale alpha / rank
        "alpha": adapter.alpha if adapter.scaling == "lora" else adapter.scale * adapter.rank,
        "gate": adapter.gate,
        "top_k": adapter.top_k,
        "router_scope": adapter.router_scope,
        "renormalize": adapter.renormalize,
        "share_A": adapter.share_A,
        "expert_form": adapter.expert_form,
        "router_score": adapter.router_score,
        "layers": adapter.layers,
        "attention": adapter.attention,
        "router_bias": adapter.router_bias,
    }


def _model_card(adapter: AdapterConfig, base_reference: str | None) -> str:
    if adapter.method == "lora":
        what = f"LLaVA with LoRA of rank {adapter.rank}."
    else:
        router = "a router a linear" if adapter.router_scope == "linear" else "a router"
        used = "all of them" if adapter.gate == "dense" else f"{adapter.top_k} of them"
        what = (
            f"LLaVA with {adapter.num_experts} LoRA experts of rank {adapter.rank} behind {router} in the MLPs of its "
            f"decoder, {used} for a token (LLaVA-MoLE, arXiv 2401.16160, and its kin), gate `{adapter.gate}`."
        )
    base = "" if base_reference is None else f"\nThe weights of its base are loaded from `{base_reference}`.\n"
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
---

{what} `{MODELING_FILE}`, beside this file, holds the model's code; it needs transformers 5 and nothing of
what trained the model.
{base}
```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained(".", trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(".", trust_remote_code=True)
chat = [{{"role": "user", "content": "<image>\\nWhat is it?"}}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(images=Image.open("picture.png"), text=prompt, return_tensors="pt")
print(processor.decode(model.generate(**inputs.to(model.dtype), max_new_tokens=20)[0], skip_special_tokens=True))
```
"""
