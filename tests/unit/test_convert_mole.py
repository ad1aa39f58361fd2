"""A run exported as a folder for transformers is the same model: logits, experts and gradients, without mole_mega."""

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import transformers.dynamic_module_utils
from PIL import Image
from safetensors.torch import load_file
from trained_llava import save_step
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from mole_mega.checkpoint import files
from mole_mega.checkpoint.base import load_base, read_size
from mole_mega.checkpoint.trained import Trained, build_trained, find_trained
from mole_mega.config import (
    AdapterConfig,
    ConfigError,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from mole_mega.convert import llava_hf
from mole_mega.convert.adapter_names import adapter_rows
from mole_mega.convert.hf_import import import_hf
from mole_mega.convert.mole_folder import MODELING_FILE, export_mole
from mole_mega.convert.peft import export_peft
from mole_mega.models.llava import LLaVA

HERE = Path(__file__).parent
PROCESSOR = HERE.parents[1] / "examples" / "tiny_cpu" / "base_hf"
IMAGE_TOKEN, PAD, PLACES, VOCABULARY = 4, 3, 36, 416  # the tokenizer's and the image processor's of PROCESSOR
VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 48,
    "patch_size": 8, "hidden_act": "quick_gelu",
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "pad_token_id": PAD,
}  # fmt: skip

MOLE = AdapterConfig(num_experts=3, rank=4, alpha=6.0, gate="prob")
SIGMOID = replace(
    MOLE, num_experts=8, rank=1, top_k=3, renormalize=True, router_score="sigmoid", router_bias=False,
    balance_weight=0.0, expert_parallel="weights",
)  # fmt: skip
ADAPTERS = {
    "prob": MOLE,
    "none": replace(MOLE, gate="none"),
    "straight_through": replace(MOLE, gate="straight_through"),
    "one layer, no attention": replace(MOLE, layers=(1,), attention=False),
    "no router bias, rsLoRA": replace(MOLE, num_experts=2, router_bias=False, alpha=3.0, scaling="rslora"),
    "one expert": replace(MOLE, num_experts=1),
    "top 2": replace(MOLE, top_k=2, expert_parallel="weights"),
    "top 2, renormalized": replace(MOLE, top_k=2, renormalize=True, expert_parallel="weights"),
    "top 2 of many": replace(MOLE, num_experts=9, top_k=2, gate="straight_through", expert_parallel="auto"),
    "dense": replace(MOLE, gate="dense", expert_parallel="weights"),
    "whole MLPs": replace(MOLE, top_k=2, renormalize=True, expert_form="mlp", expert_parallel="weights"),
    "two of five MLPs, shared A": replace(
        MOLE, num_experts=5, top_k=2, renormalize=True, expert_form="mlp", share_A=True, expert_parallel="weights"
    ),
    "ranks by sigmoid": SIGMOID,
    "a router a linear": replace(MOLE, router_scope="linear", gate="dense", expert_parallel="weights"),
    "a router a linear, top 2": replace(
        MOLE, router_scope="linear", top_k=2, renormalize=True, share_A=True, expert_parallel="weights"
    ),
    "ranks by sigmoid, a router a linear": replace(SIGMOID, router_scope="linear"),
    "shared A": replace(MOLE, share_A=True, expert_parallel="weights"),
    "lora": replace(MOLE, method="lora"),
    "lora, one layer": replace(MOLE, method="lora", layers=(0,)),
}
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def modules_cache(tmp_path_factory, monkeypatch):
    """transformers copies a folder's code into a cache of its own before it runs it."""
    folder = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
    monkeypatch.setattr(sys, "path", sys.path.copy())


def save_hf(folder: Path, top: dict | None = None, text: dict | None = None) -> Path:
    """A random LLaVA, every bias and norm weight included, with a tokenizer and an image processor."""
    llava = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**{**TEXT, **(text or {})}),
        **{"image_token_index": IMAGE_TOKEN, **(top or {})},
    )  # fmt: skip
    model = LlavaForConditionalGeneration(llava).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * values)
            else:
                parameter.copy_(values / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 0.2 * values)
    model.save_pretrained(folder)
    for path in PROCESSOR.iterdir():
        if path.name not in ("config.json", "generation_config.json", "model.safetensors"):
            shutil.copyfile(path, folder / path.name)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_hf(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="module")
def base(source, alone, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    import_hf(source, folder)
    return folder


def train(
    base: Path, folder: Path, alone, adapter: AdapterConfig, *, precision="fp32", projector=True, zero_B=False
) -> Trained:
    """A step as a run leaves it, every trainable tensor moved away from where it starts."""
    run = RunConfig(
        run_dir=str(folder), model=ModelConfig(base=str(base)), adapter=adapter,
        train=TrainConfig(steps=1, precision=precision, projector=projector),
        data=DataConfig(sources=(SourceConfig(name="a", path="a.json"),), max_length=128),
    )  # fmt: skip
    model = LLaVA(run, read_size(base), alone)
    load_base(model, base)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or name.endswith("score_bias"):
                values = torch.randn(parameter.shape, generator=generator)
                spread = 0.3 if name.endswith("_B") else 1.0 if "router" in name and "score" not in name else 0.1
                parameter.mul_(0) if zero_B and name.endswith("_B") else parameter.add_(spread * values)
    save_step(model, run, base, folder / "checkpoints" / "step_1")
    return find_trained(folder)


@pytest.fixture(scope="module")
def exported(base, alone, tmp_path_factory):
    """(the trained run, its exported folder) by the adapters' name; each made once."""
    made: dict[str, tuple[Trained, Path]] = {}

    def export(name: str) -> tuple[Trained, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp("run")
            trained = train(base, folder / "run", alone, ADAPTERS[name])
            export_mole(trained, folder / "exported")
            made[name] = trained, folder / "exported"
        return made[name]

    return export


def load(folder: Path, auto=AutoModelForImageTextToText, **options):
    """The model; every tensor of the file found its place and every place its tensor."""
    model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


# ---- one batch for both


@dataclass
class Inputs:
    """tokens, valid [B, S]: rows of unequal length, with 0, 1 and 3 images, padded on one side; pixels [N, 3, h, w]."""

    tokens: torch.Tensor
    valid: torch.Tensor
    pixels: torch.Tensor
    image_token: int = IMAGE_TOKEN

    @property
    def theirs(self) -> dict[str, torch.Tensor | None]:
        pixels = self.pixels if len(self.pixels) else None
        return {"input_ids": self.tokens, "attention_mask": self.valid.long(), "pixel_values": pixels}

    @property
    def labels(self) -> torch.Tensor:
        """Text after the first token of a row; -100 elsewhere, as transformers has it."""
        first = torch.arange(self.tokens.shape[1]) == self.valid.int().argmax(1, keepdim=True)
        return self.tokens.masked_fill(~self.valid | first | (self.tokens == self.image_token), -100)


def make_inputs(images: tuple[int, ...] = (0, 1, 3), side: str = "right") -> Inputs:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for index, count in enumerate(images):
        row = [1]
        for _ in range(count):
            row += [*torch.randint(8, VOCABULARY, (3,), generator=generator).tolist(), *[IMAGE_TOKEN] * PLACES]
        rows.append(row + torch.randint(8, VOCABULARY, (7 + index,), generator=generator).tolist())
    tokens = torch.full((len(rows), max(map(len, rows))), PAD)
    valid = torch.zeros_like(tokens, dtype=torch.bool)
    for index, row in enumerate(rows):
        at = slice(len(row)) if side == "right" else slice(-len(row), None)
        tokens[index, at], valid[index, at] = torch.tensor(row), True
    return Inputs(tokens, valid, torch.randn(sum(images), 3, 48, 48, generator=generator))


@dataclass
class Answer:
    """Of the valid tokens, row by row: logits [T, V] and the experts {layer: [T]}; loss [] and {name: gradient}."""

    logits: torch.Tensor
    choices: dict[int, torch.Tensor]
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


def ask_ours(trained: Trained, model: LLaVA, inputs: Inputs) -> Answer:
    """Gradients by their names in the exported folder."""
    heard: dict[tuple[int, int], torch.Tensor] = {}

    def keep(router, args, output):
        used_TE = output[0] == output[0].amax(-1, keepdim=True) if router.adapter.gate == "dense" else output[1]
        experts = used_TE.nonzero()[:, 1].view(*inputs.tokens.T.shape, -1).transpose(0, 1)[inputs.valid]
        heard[router.layer, router.site] = experts[:, 0] if experts.shape[1] == 1 else experts

    hooks = [router.register_forward_hook(keep) for router in model.routers()]
    positions = torch.arange(inputs.tokens.shape[1]).expand_as(inputs.tokens)
    arguments = inputs.tokens, positions, inputs.valid, inputs.tokens == inputs.image_token, inputs.pixels
    with torch.no_grad():
        logits = model(*arguments)[inputs.valid]
    targets = torch.nn.functional.pad(inputs.labels[:, 1:], (0, 1), value=-100)
    losses = model(*arguments, labels=targets)[targets >= 0]
    losses.mean().backward()
    for hook in hooks:
        hook.remove()
    sites = {layer: [heard[key] for key in sorted(heard) if key[0] == layer] for layer, _ in heard}
    choices = {layer: own[0] if len(own) == 1 else torch.stack(own, dim=1) for layer, own in sites.items()}
    kinds = {"router_weight": "weight", "router_bias": "bias"}
    names = {
        f"{row.module}.{kinds.get(row.kind, row.kind)}": row.ours
        for row in adapter_rows(adapter_of(trained), trained.size)
        if row.kind != "router_score_bias"  # which has no gradient
    }
    names |= {row.hf[0]: row.ours for row in llava_hf.PROJECTOR}
    parameters = dict(model.named_parameters())
    assert {name for name, p in parameters.items() if p.requires_grad} == set(names.values())
    return Answer(logits, choices, losses.mean().detach(), {name: gradient(parameters[p]) for name, p in names.items()})


def ask_theirs(model: LlavaForConditionalGeneration, inputs: Inputs, names: set[str] | None = None) -> Answer:
    model.zero_grad()
    output = model(**inputs.theirs, labels=inputs.labels)
    output.loss.backward()
    parameters = dict(model.named_parameters())
    return Answer(
        output.logits.detach()[inputs.valid],
        {layer: choice[inputs.valid] for layer, choice in model.expert_choices().items()},
        output.loss.detach(),
        {name: gradient(parameters[name]) for name in names or ()},
    )


def adapter_of(trained: Trained) -> AdapterConfig:
    assert trained.adapter is not None
    return trained.adapter


def gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


def assert_same(got: Answer, expected: Answer) -> None:
    assert got.logits.shape == expected.logits.shape
    assert (got.logits - expected.logits).abs().max() <= TOLERANCE * expected.logits.abs().max()
    assert got.choices.keys() == expected.choices.keys()
    for layer, choice in expected.choices.items():
        assert torch.equal(got.choices[layer], choice), layer
    assert (got.loss - expected.loss).abs() <= TOLERANCE * expected.loss
    assert got.gradients.keys() == expected.gradients.keys()
    # Routers over the MLP's inner activations magnify rounding more than others: weights that are moved by 6e-8 of
    # themselves move such a model's gradients by up to 2.9e-5, and all others' by less than 1.1e-5.
    is_steep = any(".router.down." in name for name in expected.gradients)
    tolerance = 5 * TOLERANCE if is_steep else TOLERANCE
    for name, wanted in expected.gradients.items():
        assert (got.gradients[name] - wanted).norm() <= tolerance * wanted.norm(), name


# ---- the same model


@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_experts_and_gradients_are_those_of_the_trained_model(name, exported, alone):
    trained, folder = exported(name)
    ours, theirs = build_trained(trained, alone, ParallelConfig(), "fp32"), load(folder)
    inputs = make_inputs()
    expected = ask_ours(trained, ours, inputs)
    got = ask_theirs(theirs, inputs, set(expected.gradients))
    assert_same(got, expected)
    experts = trained.adapter.num_experts
    assert (
        len(expected.choices)
        == {"mole": 2 if trained.adapter.layers == "all" else 1, "lora": 0}[trained.adapter.method]
    )
    for choice in expected.choices.values():  # every expert serves, or equality would say little
        assert choice.unique().tolist() == list(range(experts))
    without_gradient = {n for n, g in expected.gradients.items() if not g.abs().max()}
    routers = {n for n in expected.gradients if ".router." in n}
    assert without_gradient == (routers if trained.adapter.gate == "none" or experts == 1 else set())


@pytest.mark.parametrize("images", [(0, 1, 3), (2, 0), (0, 0), (1,)], ids=str)
def test_padding_on_either_side_changes_nothing(images, exported, alone):
    trained, folder = exported("prob")
    ours, theirs = build_trained(trained, alone, ParallelConfig(), "fp32"), load(folder)
    expected = ask_ours(trained, ours, make_inputs(images))
    for side in ("right", "left"):
        assert_same(ask_theirs(theirs, make_inputs(images, side), set(expected.gradients)), expected)


FAULTS = {
    "gate and up exchanged": (
        "self.act_fn(self.gate_proj(x_TH, routing)) * self.up_proj",
        "self.act_fn(self.up_proj(x_TH, routing)) * self.gate_proj",
    ),
    "no scale": ("self.scale * delta", "delta"),
    "weight of another gate": ('self.gate == "none"', 'self.gate == "straight_through"'),
    "no gradient to the router": ("1 + (probs_TE - probs_TE.detach())", "torch.ones_like(probs_TE)"),
    "another expert": ("probs_TE.argmax", "probs_TE.argmin"),
    "tokens left sorted": (".index_add(0, self.token_N, sorted_NO)", " + sorted_NO"),
    "no bias of the router": ("self.weight.float(), bias)", "self.weight.float())"),
    "attention without LoRA": ('if mole["attention"]', "if False"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_sees_a_fault(fault, exported, alone, tmp_path):
    trained, folder = exported("straight_through")
    right, wrong = FAULTS[fault]
    shutil.copytree(folder, tmp_path / "faulty")
    code = (folder / MODELING_FILE).read_text()
    assert code.count(right) == 1
    (tmp_path / "faulty" / MODELING_FILE).write_text(code.replace(right, wrong))
    inputs = make_inputs()
    expected = ask_ours(trained, build_trained(trained, alone, ParallelConfig(), "fp32"), inputs)
    faulty = AutoModelForImageTextToText.from_pretrained(tmp_path / "faulty", trust_remote_code=True)
    with pytest.raises((AssertionError, KeyError)):
        assert_same(ask_theirs(faulty, inputs, set(expected.gradients)), expected)


@pytest.mark.parametrize("name", ["prob", "none", "lora"])
def test_with_B_zero_it_is_the_base_bit_for_bit(name, base, source, alone, tmp_path):  # noqa: N802
    trained = train(base, tmp_path / "run", alone, ADAPTERS[name], zero_B=True)
    export_mole(trained, tmp_path / "exported")
    mole, frozen = load(tmp_path / "exported"), load(source)
    frozen.model.multi_modal_projector.load_state_dict(mole.model.multi_modal_projector.state_dict())
    inputs = make_inputs()
    with torch.no_grad():
        assert torch.equal(mole(**inputs.theirs).logits, frozen(**inputs.theirs).logits)


@pytest.mark.parametrize("name", ["prob", "lora"])
def test_it_generates_token_for_token_what_the_trained_model_would(name, exported, alone):
    trained, folder = exported(name)
    ours, theirs = build_trained(trained, alone, ParallelConfig(), "fp32"), load(folder)
    inputs = make_inputs(side="left")
    # an image's id among the answers would ask for an image
    greedy = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN], "eos_token_id": None}
    start = inputs.tokens.shape[1]
    cached = theirs.generate(**inputs.theirs, **greedy)[:, start:]
    recomputed = theirs.generate(**inputs.theirs, **greedy, use_cache=False)[:, start:]
    assert cached.shape[1] == 8 and torch.equal(cached, recomputed)
    first_image = 0
    for row, valid, answer in zip(inputs.tokens, inputs.valid, cached, strict=True):
        tokens = row[valid][None]
        images = int((tokens == IMAGE_TOKEN).sum()) // PLACES
        pixels = inputs.pixels[first_image : first_image + images]
        first_image += images
        for _ in range(8):
            positions, places = torch.arange(tokens.shape[1])[None], tokens == IMAGE_TOKEN
            with torch.no_grad():
                logits = ours(tokens, positions, torch.ones_like(places), places, pixels)[:, -1]
            logits[:, IMAGE_TOKEN] = float("-inf")
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(tokens[0, -8:], answer)


# ---- precision


def test_a_bf16_run_is_loaded_as_bf16_with_routers_in_fp32(base, alone, tmp_path):
    trained = train(base, tmp_path / "run", alone, MOLE, precision="bf16")
    export_mole(trained, tmp_path / "exported")
    model, inputs = load(tmp_path / "exported"), make_inputs()
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {n for n in dtypes if ".router." in n}
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    ours = ask_ours(trained, build_trained(trained, alone, ParallelConfig()), inputs)
    theirs = ask_theirs(model, inputs)
    exact = ask_ours(trained, build_trained(trained, alone, ParallelConfig(), "fp32"), inputs)
    # where rounding changes a choice, both are off by an expert: as far from the exact answer as ours, no further
    assert distance(theirs, exact) < 1.5 * distance(ours, exact)
    for layer, choice in exact.choices.items():
        assert (choice == theirs.choices[layer]).float().mean() > 0.95
    wide = load(tmp_path / "exported", dtype=torch.float32)
    assert_same(ask_theirs(wide, inputs, set(exact.gradients)), exact)


def distance(answer: Answer, exact: Answer) -> float:
    return float((answer.logits.float() - exact.logits).norm() / exact.logits.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_asked_for_leaves_the_routers_in_fp32(dtype, exported):
    model, inputs = load(exported("prob")[1], dtype=dtype), make_inputs()
    assert all((p.dtype == torch.float32) == (".router." in name) for name, p in model.named_parameters())
    with torch.no_grad():
        assert model(**inputs.theirs).logits.isfinite().all()


def test_under_autocast_or_cast_by_hand_routers_compute_in_fp32(exported):
    _, folder = exported("prob")
    router, x = load(folder).model.language_model.layers[0].mlp.router, torch.randn(5, TEXT["hidden_size"])
    expected = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(x), expected)
    model, inputs = load(folder).to(torch.bfloat16), make_inputs()
    with torch.no_grad():
        assert model(**inputs.theirs).logits.isfinite().all()
    assert model.model.language_model.layers[0].mlp.router(x).dtype == torch.float32


# ---- as a folder


def test_the_folder_needs_no_mole_mega(exported, alone, tmp_path):
    trained, folder = exported("straight_through")
    inputs = make_inputs()
    torch.save(inputs.theirs, tmp_path / "inputs.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", HERE / "ask_mole_folder.py", folder, tmp_path / "inputs.pt", tmp_path / "out.pt"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = torch.load(tmp_path / "out.pt")
    expected = ask_ours(trained, build_trained(trained, alone, ParallelConfig(), "fp32"), inputs)
    assert (answer["logits"][inputs.valid] - expected.logits).abs().max() <= TOLERANCE * expected.logits.abs().max()
    assert {layer: choice[inputs.valid].tolist() for layer, choice in answer["choices"].items()} == {
        layer: choice.tolist() for layer, choice in expected.choices.items()
    }
    assert answer["wrong_keys"] == [] and answer["processor"] == "LlavaProcessor"
    assert (answer["tokens"] == IMAGE_TOKEN).sum() == PLACES


def test_processor_files_that_do_not_say_whose_they_are_load(exported, tmp_path):
    """As older folders have them: an image processor's own file, and no processor's."""
    folder = shutil.copytree(exported("prob")[1], tmp_path / "model")
    tree = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps(tree["image_processor"]))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer.pop("processor_class", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert type(AutoProcessor.from_pretrained(folder, trust_remote_code=True)).__name__ == "LlavaProcessor"


@pytest.mark.parametrize("name", ["one layer, no attention", "lora"])
def test_saved_by_transformers_it_is_the_same_folder(name, exported, tmp_path):
    _, folder = exported(name)
    model = load(folder)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / MODELING_FILE).read_text() == (folder / MODELING_FILE).read_text()
    again = load(tmp_path / "again")
    assert same_tensors(model.state_dict(), again.state_dict())
    stored, stored_again = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert same_tensors(stored, stored_again)
    inputs = make_inputs()
    with torch.no_grad():
        assert torch.equal(model(**inputs.theirs).logits, again(**inputs.theirs).logits)


def test_base_weights_are_the_bytes_of_the_source(exported, source):
    _, folder = exported("prob")
    theirs = {llava_hf.canonical_name(name): tensor for name, tensor in load_file(source / "model.safetensors").items()}
    stored = load_file(folder / "model.safetensors")
    assert theirs.keys() <= stored.keys()
    changed = {name for name, tensor in theirs.items() if not torch.equal(stored[name], tensor)}
    assert changed == {row.hf[0] for row in llava_hf.PROJECTOR}


def test_the_model_without_its_output_layer_loads_too(exported):
    _, folder = exported("prob")
    model, inputs = load(folder), make_inputs()
    inner, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and info["unexpected_keys"] == {"lm_head.weight"}
    assert same_tensors(inner.state_dict(), model.model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.lm_head(inner(**inputs.theirs).last_hidden_state), model(**inputs.theirs).logits)
    assert inner.expert_choices().keys() == {0, 1}


def test_an_image_token_behind_the_vocabulary_is_never_embedded(alone, tmp_path, monkeypatch):
    """As the first LLaVA code has it: the token is added to the tokenizer, the embedding has no row for it."""
    # a folder that transformers wrote must not say so; one of the first code's may
    monkeypatch.setattr("mole_mega.convert.hf_import._check_image_token", lambda *_: None)
    import_hf(save_hf(tmp_path / "hf", top={"image_token_index": VOCABULARY}), tmp_path / "base")
    trained = train(tmp_path / "base", tmp_path / "run", alone, MOLE)
    export_mole(trained, tmp_path / "exported")
    model, inputs = load(tmp_path / "exported"), make_inputs()
    inputs.image_token = VOCABULARY
    inputs.tokens[inputs.tokens == IMAGE_TOKEN] = VOCABULARY
    expected = ask_ours(trained, build_trained(trained, alone, ParallelConfig(), "fp32"), inputs)
    assert_same(ask_theirs(model, inputs, set(expected.gradients)), expected)
    assert model.generate(**inputs.theirs, max_new_tokens=3).shape == (3, inputs.tokens.shape[1] + 3)
    pickle.dumps(model.model.get_input_embeddings())


@pytest.mark.parametrize("with_config", [True, False])
def test_tied_embeddings(with_config, alone, tmp_path):
    """Also from a base that came with no config of a LLaVA: one is made of its size."""
    tied = {"tie_word_embeddings": True}
    source = save_hf(
        tmp_path / "hf", top=tied, text={**tied, "rope_parameters": {"rope_type": "default", "rope_theta": 5e3}}
    )
    import_hf(source, tmp_path / "base")
    if not with_config:
        (tmp_path / "base" / "config.json").unlink()
        manifest = json.loads((tmp_path / "base" / files.MANIFEST).read_text())
        del manifest["config.json"]
        (tmp_path / "base" / files.MANIFEST).write_text(json.dumps(manifest))
    trained = train(tmp_path / "base", tmp_path / "run", alone, MOLE)
    export_mole(trained, tmp_path / "exported")
    model, inputs = load(tmp_path / "exported"), make_inputs()
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    expected = ask_ours(trained, build_trained(trained, alone, ParallelConfig(), "fp32"), inputs)
    assert_same(ask_theirs(model, inputs, set(expected.gradients)), expected)


def test_a_projector_that_was_not_trained_is_the_bases(base, source, alone, tmp_path):
    export_mole(train(base, tmp_path / "run", alone, MOLE, projector=False), tmp_path / "exported")
    theirs, ours = load(source).state_dict(), load(tmp_path / "exported").state_dict()
    names = [row.hf[0] for row in llava_hf.PROJECTOR]
    assert all(torch.equal(ours[name], theirs[name]) for name in names)


@pytest.mark.parametrize("name", ["prob", "lora"])
@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModel])
def test_a_folder_without_the_base_takes_it_from_where_it_says(name, auto, exported, source, tmp_path):
    trained, whole = exported(name)
    export_mole(trained, tmp_path / "adapters", base_reference=str(source))
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "adapters", whole)]
    assert sizes[0] < sizes[1] / 2
    expected = load(whole).state_dict() if auto is AutoModelForImageTextToText else load(whole).model.state_dict()
    model = auto.from_pretrained(tmp_path / "adapters", trust_remote_code=True)
    assert same_tensors(model.state_dict(), expected)
    assert same_tensors(type(model).from_pretrained(tmp_path / "adapters").state_dict(), expected)
    half = auto.from_pretrained(tmp_path / "adapters", trust_remote_code=True, dtype=torch.bfloat16)
    assert all((p.dtype == torch.float32) == (".router." in n) for n, p in half.named_parameters())
    model.save_pretrained(tmp_path / "again")
    shutil.move(source, tmp_path / "elsewhere")
    try:
        assert same_tensors(auto.from_pretrained(tmp_path / "again", trust_remote_code=True).state_dict(), expected)
    finally:
        shutil.move(tmp_path / "elsewhere", source)


def test_the_model_card_runs(exported, tmp_path, monkeypatch, capsys):
    _, folder = exported("prob")
    shutil.copytree(folder, tmp_path / "model")
    Image.new("RGB", (48, 48), (200, 30, 30)).save(tmp_path / "model" / "picture.png")
    monkeypatch.chdir(tmp_path / "model")
    card = (folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
    assert isinstance(AutoProcessor.from_pretrained(".", trust_remote_code=True).tokenizer.pad_token_id, int)


def test_files_of_the_source_come_along_and_missing_ones_are_said(exported, source, alone, tmp_path):
    _, folder = exported("prob")
    carried = {path.name for path in PROCESSOR.iterdir()} - {"config.json", "model.safetensors"}
    written = {"README.md", "config.json", "preprocessor_config.json", "model.safetensors", MODELING_FILE}
    assert carried | written == {path.name for path in folder.iterdir()}
    bare = tmp_path / "bare"
    shutil.copytree(source, bare)
    for path in PROCESSOR.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            (bare / path.name).unlink()
    import_hf(bare, tmp_path / "base")
    said = export_mole(train(tmp_path / "base", tmp_path / "run", alone, MOLE), tmp_path / "exported").warnings
    assert len(said) == 2 and "tokenizer" in said[0] and "image processor" in said[1]
    load(tmp_path / "exported")


def test_biases_of_scores_have_no_place_among_peft_adapters(exported, tmp_path):
    trained, _ = exported("ranks by sigmoid")
    with pytest.raises(ConfigError, match="router_score sigmoid, whose biases have no place"):
        export_peft(trained, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_an_export_that_fails(exported, base, tmp_path, monkeypatch):
    trained, folder = exported("prob")
    with pytest.raises(ConfigError, match="exists"):
        export_mole(trained, folder)
    with pytest.raises(ConfigError, match="is a base: it has no adapters"):
        export_mole(find_trained(base), tmp_path / "out")
    monkeypatch.setattr("mole_mega.convert.mole_folder._model_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_mole(trained, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_section_names_every_field_that_the_layer_depends_on(exported):
    """A field that AdapterConfig gains must be exported, or be one that matters in training alone."""
    _, folder = exported("prob")
    tree = json.loads((folder / "config.json").read_text())
    training = {
        "dropout", "balance_weight", "balance_scope", "z_loss_weight", "expert_parallel", "rescale_gate", "methods",
        "score_bias_rate",
    }  # fmt: skip
    refused = {"shared_B", "mix_temperature"}
    said_otherwise = {"scaling"}  # by alpha
    assert {*tree["mole"], *training, *said_otherwise, *refused} == {
        field.name for field in dataclasses.fields(AdapterConfig)
    }
    assert tree["model_type"] == "llava_mole" and tree["dtype"] == "float32"


@pytest.mark.parametrize("key, value", [("method", "moe"), ("gate", "sqrt"), ("top_k", 4)])
def test_what_the_code_does_not_know_is_refused(key, value, exported, tmp_path):
    _, folder = exported("prob")
    shutil.copytree(folder, tmp_path / "model")
    tree = json.loads((folder / "config.json").read_text())
    tree["mole"][key] = value
    (tmp_path / "model" / "config.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=f"mole.{key} is {value!r}"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "model", trust_remote_code=True)


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
