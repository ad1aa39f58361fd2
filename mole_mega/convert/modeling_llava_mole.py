"""LLaVA-MoLE (arXiv 2401.16160) as a transformers model. This file lies in the model's folder and needs torch and
transformers alone.

    model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)

is a `LlavaForConditionalGeneration` whose decoder carries LoRA. In an adapted layer a router sends each token x to its
`top_k` likeliest experts of E, and gate, up and down of the frozen MLP take those experts' LoRA:

    p = softmax(R x + b);  D(z) = alpha / rank sum_k w_k B_k A_k z, k over the chosen ones
    h = silu(Wg x + Dg(x)) * (Wu x + Du(x));  out = Wd h + Dd(h)

`gate` says what w is: `none` 1; `prob` p_k, divided by its sum over the chosen ones if `renormalize`;
`straight_through` 1 with the gradient of `prob`; `dense` p_k, of all experts. With `router_score` sigmoid p is
sigmoid(R x) + a bias that no gradient trained. With `router_scope` linear gate, up and down have a router each, of
their own input. With `expert_form` mlp each expert is an MLP with an activation of its own, and out their sum, each
times w. The router computes in fp32 whatever the model's dtype is. Padding is routed like any token.
`method: lora` is plain LoRA instead: a pair a linear.

After a forward pass `model.expert_choices()` says which experts each token went to.

Shape suffixes: T tokens, H hidden, E experts, K experts a token uses, R rank, I in, O out.
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
    """A LLaVA's config with the section `mole`: method, num_experts, rank, alpha, gate, top_k, router_scope (block: one
    router for gate, up and down; linear: one for each), renormalize, router_score, expert_form, share_A (one A for all
    experts of a linear), layers ("all" or a list of decoder layers, from 0, whose MLP is adapted), attention (LoRA on
    q, k, v and o of every layer), router_bias."""

    model_type = "llava_mole"

    mole: dict | None = None
    # The model that a folder of adapters alone was trained on; None where the folder holds all weights.
    base_model_name_or_path: str | None = None
    # mole_mega's hash of the base that the model was trained on
    base_hash: str | None = None
    trained_steps: int | None = None


class Routing:
    """The experts that each of T tokens uses, `chosen_TE` (bool, as many a token). `weight_TE` holds the gate's w, None
    where it is 1."""

    def __init__(self, chosen_TE: torch.Tensor, weight_TE: torch.Tensor | None) -> None:
        # pairs of a token and an expert that it uses, sorted by expert
        expert_N, self.token_N = chosen_TE.T.nonzero(as_tuple=True)
        self.counts_E = chosen_TE.sum(0).tolist()
        self.weight_N = None if weight_TE is None else weight_TE[self.token_N, expert_N]
        self.num_tokens = len(chosen_TE)

    def expert_lora(self, x_TI: torch.Tensor, A: torch.Tensor, B_EOR: torch.Tensor) -> torch.Tensor:
        """The sum of w B_k A_k x over each token's own experts k: [T, O]. One without tokens costs nothing. A is
        [E, R, I], or [R, I] where all experts share it."""
        A_ERI = A if A.dim() == 3 else A.expand(len(B_EOR), *A.shape)
        parts = x_TI[self.token_N].split(self.counts_E)
        sorted_NO = torch.cat([F.linear(F.linear(x, A_ERI[k]), B_EOR[k]) for k, x in enumerate(parts) if len(x)])
        if self.weight_N is not None:
            sorted_NO = sorted_NO * self.weight_N[:, None].to(sorted_NO.dtype)
        return sorted_NO.new_zeros(self.num_tokens, sorted_NO.shape[1]).index_add(0, self.token_N, sorted_NO)


class LoraLinear(nn.Module):
    """A frozen linear that carries LoRA, y = W x + alpha / rank B A x: one pair, A [R, I] and B [O, R], or a bank of
    experts, A [E, R, I] (or a shared [R, I]) and B [E, O, R], of which `routing` picks some for each token."""

    def __init__(self, base: nn.Linear, mole: dict[str, Any], num_experts: int | None = None) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.scale = mole["alpha"] / mole["rank"]
        (out_features, in_features), rank = base.weight.shape, mole["rank"]
        bank = () if num_experts is None else (num_experts,)
        bound = 1 / math.sqrt(in_features)
        bank_A = () if mole["share_A"] else bank
        self.lora_A = nn.Parameter(torch.empty(*bank_A, rank, in_features).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(*bank, out_features, rank))

    def forward(self, x: torch.Tensor, routing: Routing | None = None, expert: int | None = None) -> torch.Tensor:
        """x [..., I] -> [..., O]; with `routing`, x is [T, I]; with `expert` by the LoRA of that one."""
        if expert is not None:
            A = self.lora_A[expert] if self.lora_A.dim() == 3 else self.lora_A
            delta = F.linear(F.linear(x, A), self.lora_B[expert])
        elif routing is None:
            delta = F.linear(F.linear(x, self.lora_A), self.lora_B)
        else:
            delta = routing.expert_lora(x, self.lora_A, self.lora_B)
        return F.linear(x, self.weight, self.bias) + self.scale * delta


class MoleRouter(nn.Linear):
    """p = softmax(R x + b), or sigmoid(R x) + score_bias, in fp32: [T, I] -> [T, E]."""

    def __init__(self, in_features: int, mole: dict[str, Any]) -> None:
        super().__init__(in_features, mole["num_experts"], bias=mole["router_bias"], dtype=torch.float32)
        self.score_bias = None
        if mole["router_score"] == "sigmoid":
            zeros = torch.zeros(mole["num_experts"], dtype=torch.float32)
            self.score_bias = nn.Parameter(zeros, requires_grad=False)

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(x_TH.device.type, enabled=False):
            logits_TE = F.linear(x_TH.float(), self.weight.float(), bias)
            return logits_TE.softmax(-1) if self.score_bias is None else logits_TE.sigmoid() + self.score_bias.float()


class MoleMLP(nn.Module):
    """A Llama MLP whose gate, up and down carry a bank of LoRA experts behind one router, or behind one each.

    `last_choice`: the expert of each token of the last forward pass, in the input's shape without its last axis; with a
    router a linear, an axis more for gate, up and down; with several experts a token, a last axis more for them, in the
    order of their numbers; where all serve, the likeliest. Empty before the first pass.
    """

    def __init__(self, mlp: Any, mole: dict[str, Any]) -> None:
        super().__init__()
        num_experts = mole["num_experts"]
        self.gate_proj = LoraLinear(mlp.gate_proj, mole, num_experts)
        self.up_proj = LoraLinear(mlp.up_proj, mole, num_experts)
        self.down_proj = LoraLinear(mlp.down_proj, mole, num_experts)
        self.act_fn = mlp.act_fn
        hidden_size, ffn_size = mlp.gate_proj.in_features, mlp.down_proj.in_features
        self.router: MoleRouter | nn.ModuleDict
        if mole["router_scope"] == "linear":
            widths = {"gate": hidden_size, "up": hidden_size, "down": ffn_size}
            self.router = nn.ModuleDict({name: MoleRouter(width, mole) for name, width in widths.items()})
        else:
            self.router = MoleRouter(hidden_size, mole)
        self.expert_form = mole["expert_form"]
        self.gate, self.top_k, self.renormalize = mole["gate"], mole["top_k"], mole["renormalize"]
        self.last_choice = torch.empty(0, dtype=torch.long)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., H] -> [..., H]."""
        x_TH = hidden.flatten(0, -2)
        if isinstance(self.router, nn.ModuleDict):
            return self._by_linear(x_TH, self.router, hidden.shape[:-1]).view_as(hidden)
        routing, choice_TK = self._route(x_TH, self.router)
        self._keep([choice_TK], hidden.shape[:-1])
        if self.expert_form == "mlp":
            return self._whole_mlps(x_TH, routing).view_as(hidden)
        h_TF = self.act_fn(self.gate_proj(x_TH, routing)) * self.up_proj(x_TH, routing)
        return self.down_proj(h_TF, routing).view_as(hidden)

    def _by_linear(self, x_TH: torch.Tensor, routers: nn.ModuleDict, shape: torch.Size) -> torch.Tensor:
        """The MLP whose linears each follow a router of their own."""
        of_gate, gate_TK = self._route(x_TH, routers["gate"])
        of_up, up_TK = self._route(x_TH, routers["up"])
        h_TF = self.act_fn(self.gate_proj(x_TH, of_gate)) * self.up_proj(x_TH, of_up)
        of_down, down_TK = self._route(h_TF, routers["down"])
        self._keep([gate_TK, up_TK, down_TK], shape)
        return self.down_proj(h_TF, of_down)

    def _route(self, x_TI: torch.Tensor, router: nn.Module) -> tuple[Routing, torch.Tensor]:
        """(who serves each token, the experts [T, K] that `last_choice` has)."""
        probs_TE = router(x_TI)
        choice_TK = probs_TE.topk(self.top_k, dim=-1).indices if self.top_k > 1 else probs_TE.argmax(-1, keepdim=True)
        chosen_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter(1, choice_TK, True)
        if self.gate == "dense":
            chosen_TE = torch.ones_like(chosen_TE)
        return Routing(chosen_TE, self._gate_weight(probs_TE, chosen_TE)), choice_TK.sort(-1).values

    def _keep(self, choices: list[torch.Tensor], shape: torch.Size) -> None:
        """As `last_choice`: [T, K] of each router, for tokens of this shape."""
        kept = torch.stack(choices, dim=1).view(*shape, len(choices), self.top_k)
        kept = kept[..., 0] if self.top_k == 1 else kept
        self.last_choice = kept if len(choices) > 1 else kept.squeeze(len(shape))

    def _whole_mlps(self, x_TH: torch.Tensor, routing: Routing) -> torch.Tensor:
        """The sum of w_k MLP_k(x) over each token's own experts k, each computed by itself, the frozen part too."""
        output_TH = torch.zeros_like(x_TH)
        assert routing.weight_N is not None  # of a gate by probabilities
        weights = routing.weight_N.split(routing.counts_E)
        for k, token_N in enumerate(routing.token_N.split(routing.counts_E)):
            if len(token_N):
                x_NH = x_TH[token_N]
                h_NF = self.act_fn(self.gate_proj(x_NH, expert=k)) * self.up_proj(x_NH, expert=k)
                weight_N = weights[k].to(x_NH.dtype)
                output_NH = weight_N[:, None] * self.down_proj(h_NF, expert=k)
                output_TH = output_TH.index_add(0, token_N, output_NH)
        return output_TH

    def _gate_weight(self, probs_TE: torch.Tensor, chosen_TE: torch.Tensor) -> torch.Tensor | None:
        if self.gate == "none":
            return None
        if self.renormalize:
            probs_TE = probs_TE / (probs_TE * chosen_TE).sum(-1, keepdim=True)
        return 1 + (probs_TE - probs_TE.detach()) if self.gate == "straight_through" else probs_TE


def add_adapters(decoder: Any, mole: dict[str, Any]) -> None:
    """Put LoRA, routers and experts around the weights of a Llama decoder; raises ValueError for what is not known."""
    # folders that were written before there was a choice do not name these
    added: dict[str, Any] = {
        "router_scope": "block", "renormalize": False, "share_A": False, "expert_form": "linear",
        "router_score": "softmax",
    }  # fmt: skip
    mole = added | mole
    for key, known in (
        ("method", ("mole", "lora")),
        ("gate", ("none", "prob", "straight_through", "dense")),
        ("top_k", tuple(range(1, mole["num_experts"] + 1))),
        ("router_scope", ("block", "linear")),
        ("renormalize", (False, True)),
        ("share_A", (False, True)),
        ("expert_form", ("linear", "mlp")),
        ("router_score", ("softmax", "sigmoid")),
    ):
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
        With a router a linear [B, S, 3], of gate, up and down; with `top_k` above 1 a last axis more, in the order of
        their numbers; in gate mode `dense` the likeliest.

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
