"""LLaVA-MoLE (arXiv 2401.16160) as a transformers model. This file lies in the model's folder and needs torch and
transformers alone.

    model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)

is a `LlavaForConditionalGeneration` whose decoder carries LoRA. In an adapted layer a router sends each token x to one
expert k of E, and gate, up and down of the frozen MLP take that expert's LoRA:

    p = softmax(R x + b);  k = argmax p;  D_k(z) = alpha / rank B_k A_k z
    h = silu(Wg x + w Dg_k(x)) * (Wu x + w Du_k(x));  out = Wd h + w Dd_k(h)

`gate` says what w is: `none` 1; `prob` p_k; `straight_through` 1 with the gradient of p_k. The router computes in fp32
whatever the model's dtype is. Padding is routed like any token. `method: lora` is plain LoRA instead: a pair a linear.

After a forward pass `model.expert_choices()` says which expert each token went to.

Shape suffixes: T tokens, H hidden, E experts, R rank, I in, O out.
"""

import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel, PreTrainedModel

# Modules that stay in fp32 when the model is loaded in half precision, by name.
FP32_MODULES = ["mlp.router"]


class LlavaMoleConfig(LlavaConfig):
    """A LLaVA's config with the section `mole`: method, num_experts, rank, alpha, gate, top_k, layers ("all" or a list
    of decoder layers, from 0, whose MLP is adapted), attention (LoRA on q, k, v and o of every layer), router_bias."""

    model_type = "llava_mole"

    mole: dict | None = None
    # The model that a folder of adapters alone was trained on; None where the folder holds all weights.
    base_model_name_or_path: str | None = None
    # mole_mega's hash of the base that the model was trained on
    base_hash: str | None = None


class Routing:
    """One expert for each of T tokens. `weight_T` is the gate's w, None where it is 1."""

    def __init__(self, choice_T: torch.Tensor, weight_T: torch.Tensor | None) -> None:
        self.weight_T = weight_T
        self.order_T = choice_T.argsort(stable=True)
        self.counts_E = choice_T.bincount().tolist()

    def expert_lora(self, x_TI: torch.Tensor, A_ERI: torch.Tensor, B_EOR: torch.Tensor) -> torch.Tensor:
        """w B_k A_k x of each token's own expert k: [T, O]. An expert without tokens costs nothing."""
        parts = x_TI[self.order_T].split(self.counts_E)
        sorted_TO = torch.cat([F.linear(F.linear(x, A_ERI[k]), B_EOR[k]) for k, x in enumerate(parts) if len(x)])
        delta_TO = torch.empty_like(sorted_TO).index_copy(0, self.order_T, sorted_TO)
        return delta_TO if self.weight_T is None else delta_TO * self.weight_T[:, None].to(delta_TO.dtype)


class LoraLinear(nn.Module):
    """A frozen linear that carries LoRA, y = W x + alpha / rank B A x: one pair, A [R, I] and B [O, R], or a bank of
    experts, A [E, R, I] and B [E, O, R], of which `routing` picks one a token."""

    def __init__(self, base: nn.Linear, mole: dict[str, Any], num_experts: int | None = None) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.scale = mole["alpha"] / mole["rank"]
        (out_features, in_features), rank = base.weight.shape, mole["rank"]
        bank = () if num_experts is None else (num_experts,)
        bound = 1 / math.sqrt(in_features)
        self.lora_A = nn.Parameter(torch.empty(*bank, rank, in_features).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(*bank, out_features, rank))

    def forward(self, x: torch.Tensor, routing: Routing | None = None) -> torch.Tensor:
        """x [..., I] -> [..., O]; with `routing`, x is [T, I]."""
        if routing is None:
            delta = F.linear(F.linear(x, self.lora_A), self.lora_B)
        else:
            delta = routing.expert_lora(x, self.lora_A, self.lora_B)
        return F.linear(x, self.weight, self.bias) + self.scale * delta


class MoleRouter(nn.Linear):
    """p = softmax(R x + b) in fp32: [T, H] -> [T, E]."""

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(x_TH.device.type, enabled=False):
            return F.linear(x_TH.float(), self.weight.float(), bias).softmax(dim=-1)


class MoleMLP(nn.Module):
    """A Llama MLP whose gate, up and down carry a bank of LoRA experts behind one router.

    `last_choice`: the expert of each token of the last forward pass, in the input's shape without its last axis; empty
    before the first.
    """

    def __init__(self, mlp: Any, mole: dict[str, Any]) -> None:
        super().__init__()
        num_experts = mole["num_experts"]
        self.gate_proj = LoraLinear(mlp.gate_proj, mole, num_experts)
        self.up_proj = LoraLinear(mlp.up_proj, mole, num_experts)
        self.down_proj = LoraLinear(mlp.down_proj, mole, num_experts)
        self.act_fn = mlp.act_fn
        hidden_size = mlp.gate_proj.in_features
        self.router = MoleRouter(hidden_size, num_experts, bias=mole["router_bias"], dtype=torch.float32)
        self.gate = mole["gate"]
        self.last_choice = torch.empty(0, dtype=torch.long)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., H] -> [..., H]."""
        x_TH = hidden.flatten(0, -2)
        probs_TE = self.router(x_TH)
        choice_T = probs_TE.argmax(dim=-1)
        self.last_choice = choice_T.view(hidden.shape[:-1])
        routing = Routing(choice_T, self._gate_weight(probs_TE.gather(1, choice_T[:, None])[:, 0]))
        h_TF = self.act_fn(self.gate_proj(x_TH, routing)) * self.up_proj(x_TH, routing)
        return self.down_proj(h_TF, routing).view_as(hidden)

    def _gate_weight(self, prob_T: torch.Tensor) -> torch.Tensor | None:
        if self.gate == "none":
            return None
        return prob_T if self.gate == "prob" else 1 + (prob_T - prob_T.detach())


def add_adapters(decoder: Any, mole: dict[str, Any]) -> None:
    """Put LoRA, routers and experts around the weights of a Llama decoder; raises ValueError for what is not known."""
    for key, known in (("method", ("mole", "lora")), ("gate", ("none", "prob", "straight_through")), ("top_k", (1,))):
        if mole[key] not in known:
            raise ValueError(f"config.json: mole.{key} is {mole[key]!r}; known are {', '.join(map(repr, known))}")
    for index, layer in enumerate(decoder.layers):
        if mole["attention"]:
            _add_lora(layer.self_attn, ("q_proj", "k_proj", "v_proj", "o_proj"), mole)
        if mole["layers"] != "all" and index not in mole["layers"]:
            continue
        if mole["method"] == "mole":
            layer.mlp = MoleMLP(layer.mlp, mole)
        else:
            _add_lora(layer.mlp, ("gate_proj", "up_proj", "down_proj"), mole)


def _add_lora(module: nn.Module, names: tuple[str, ...], mole: dict[str, Any]) -> None:
    for name in names:
        setattr(module, name, LoraLinear(getattr(module, name), mole))


class BaseElsewhere(PreTrainedModel):
    """Loading of a folder that holds adapters, routers and projector alone: its config names the base's folder, or the
    base's name on the hub."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`; to the base's weights the folder adds its own, or replaces them."""
        folder = pretrained_model_name_or_path
        if folder is None:
            return super().from_pretrained(folder, *args, **kwargs)
        config = kwargs.get("config") or LlavaMoleConfig.from_pretrained(folder, **kwargs)
        if config.base_model_name_or_path is None:
            return super().from_pretrained(folder, *args, **kwargs)
        if not os.path.isdir(folder):
            folder = snapshot_download(folder, revision=kwargs.get("revision"))
        base = LlavaForConditionalGeneration.from_pretrained(config.base_model_name_or_path, dtype="auto")
        weights = base.state_dict()
        for shard in sorted(Path(folder).glob("*.safetensors")):
            weights |= load_file(shard)
        loaded = super().from_pretrained(None, *args, **{**kwargs, "config": config, "state_dict": weights})
        # from here on it is whole, and saved whole
        (loaded[0] if isinstance(loaded, tuple) else loaded).config.base_model_name_or_path = None
        return loaded


def _hide_image_places(image_token_id: int, embedding: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Where the image token has no row in the embedding: what its places embed is overwritten by the image."""
    return (args[0].masked_fill(args[0] == image_token_id, 0),)


class LlavaMoleModel(BaseElsewhere, LlavaModel):
    """The model without its output layer."""

    config_class = LlavaMoleConfig
    _keep_in_fp32_modules_strict = FP32_MODULES
    # how many tokens an expert gets is known only when the program runs
    _can_compile_fullgraph = False

    def __init__(self, config: LlavaMoleConfig) -> None:
        super().__init__(config)
        if config.mole is not None:
            add_adapters(self.language_model, config.mole)
        embedding: Any = self.get_input_embeddings()
        if config.image_token_id >= embedding.num_embeddings:
            embedding.register_forward_pre_hook(partial(_hide_image_places, config.image_token_id))
        self.post_init()

    def expert_choices(self) -> dict[int, torch.Tensor]:
        """{decoder layer: expert of each token [B, S]} of the last forward pass; layers without experts are left out.

        In `generate` with a cache that is the last token alone. Padded places have a choice too; it means nothing.
        """
        mlps = {index: layer.mlp for index, layer in enumerate(self.language_model.layers)}
        return {index: mlp.last_choice for index, mlp in mlps.items() if isinstance(mlp, MoleMLP)}


class LlavaMoleForConditionalGeneration(BaseElsewhere, LlavaForConditionalGeneration):
    """LLaVA with LoRA experts; used like `LlavaForConditionalGeneration`."""

    config_class = LlavaMoleConfig
    _keep_in_fp32_modules_strict = FP32_MODULES
    _can_compile_fullgraph = False

    def __init__(self, config: LlavaMoleConfig) -> None:
        super().__init__(config)
        self.model = LlavaMoleModel(config)
        self.post_init()

    def expert_choices(self) -> dict[int, torch.Tensor]:
        """See `LlavaMoleModel.expert_choices`."""
        return self.model.expert_choices()
