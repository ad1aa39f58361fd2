"""What a run trained, as PEFT adapters and back: the same model in both worlds, and nothing is ignored on the way."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_convert_import import SHAPES, build_hf, hf_logits, load_ours, make_inputs, our_logits, save_hf
from trained_llava import randomise, run_of, save_step, train

from mole_mega.checkpoint import base as bases
from mole_mega.checkpoint.files import CheckpointError, verify
from mole_mega.checkpoint.store import ADAPTER_FILE, trainable_entries, warm_start
from mole_mega.checkpoint.tensors import StoredTensors
from mole_mega.checkpoint.trained import find_trained
from mole_mega.config import AdapterConfig, ConfigError, ParallelConfig
from mole_mega.convert.hf_import import import_hf
from mole_mega.convert.peft import export_peft
from mole_mega.convert.peft_import import peft_to_megatron
from mole_mega.models.llava import LLaVA
from mole_mega.platform import parallel as platform

LORA = AdapterConfig(method="lora", rank=4, alpha=6.0, dropout=0.1)
ONE_EXPERT = AdapterConfig(num_experts=1, rank=3, alpha=6.5)
THREE_EXPERTS = AdapterConfig(num_experts=3, rank=4, alpha=8.0)
SHAPE = "grouped-query"


@pytest.fixture(scope="module")
def parallel():
    yield platform.initialize(ParallelConfig(), seed=0)
    platform.shutdown()


@pytest.fixture(scope="module")
def base(tmp_path_factory, parallel) -> Path:
    folder = tmp_path_factory.mktemp("base")
    import_hf(save_hf(folder / "hf", SHAPE), folder / "base")
    return folder / "base"


@pytest.fixture(scope="module")
def lora(tmp_path_factory, base, parallel):
    return train(base, tmp_path_factory.mktemp("lora") / "step_1", parallel, LORA)


@pytest.fixture(scope="module")
def experts(tmp_path_factory, base, parallel):
    return train(base, tmp_path_factory.mktemp("experts") / "step_1", parallel, THREE_EXPERTS)


@pytest.fixture(scope="module")
def lora_folder(tmp_path_factory, lora) -> Path:
    """One PEFT folder that tests copy before they change it."""
    folder = tmp_path_factory.mktemp("peft") / "lora"
    export_peft(lora[0], folder)
    return folder


@pytest.fixture(scope="module")
def experts_folder(tmp_path_factory, experts) -> Path:
    folder = tmp_path_factory.mktemp("peft") / "experts"
    export_peft(experts[0], folder)
    return folder


def load_peft(folder: Path) -> PeftModel:
    """PEFT's model; every factor and saved module has its tensor in the file, and every tensor its place."""
    model = PeftModel.from_pretrained(build_hf(*SHAPES[SHAPE]), folder).eval()
    state = {name.replace(".default", ""): tensor for name, tensor in model.state_dict().items()}
    state = {name.replace(".modules_to_save.", "."): tensor for name, tensor in state.items()}
    stored = load_file(folder / "adapter_model.safetensors")
    wanted = {name for name in state if ".lora_" in name}
    if model.peft_config["default"].modules_to_save:
        wanted |= {n for n in state if ".multi_modal_projector." in n and ".original_module." not in n}
    assert stored.keys() == wanted
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    loaded = model.load_adapter(folder, "again")
    assert not loaded.unexpected_keys and not [name for name in loaded.missing_keys if "again" in name]
    return model


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max()).item() < tolerance


def same_tensors(a: Path, b: Path) -> bool:
    """Whether the weights of two distributed checkpoints are identical, names, dtypes and bits."""
    first, second = StoredTensors(a), StoredTensors(b)
    return set(first) == set(second) and all(
        first.dtype(name) == second.dtype(name) and torch.equal(first.read(name), second.read(name)) for name in first
    )


def same_files(back: Path, first: Path) -> bool:
    """Byte for byte, but for the number of trained steps, which adapters that came from elsewhere do not know."""

    def contents(folder: Path, steps: int | None) -> dict[Path, bytes]:
        found = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for path in found:
            if path.name == "base.json":
                tree = json.loads(found[path])
                assert tree.pop("trained_steps") == steps
                found[path] = json.dumps(tree).encode()
        return found

    return contents(back, None) == contents(first, 1)


# ---- the same model


@pytest.mark.parametrize("projector", [True, False], ids=["projector trained", "projector frozen"])
@pytest.mark.parametrize(
    "adapter",
    [
        LORA,
        ONE_EXPERT,
        AdapterConfig(method="lora", rank=2, alpha=5.0, layers=(1,)),
        AdapterConfig(method="lora", rank=2, alpha=5.0, attention=False, layers=(0,)),
        AdapterConfig(method="lora", rank=2, alpha=5.0, layers=()),
        AdapterConfig(num_experts=1, rank=2, alpha=5.0, gate="none", attention=False),
        AdapterConfig(method="lora", rank=9, alpha=5.0, scaling="rslora"),
    ],
    ids=[
        "lora",
        "one expert",
        "attention and one MLP",
        "one MLP",
        "attention alone",
        "one expert, MLP alone",
        "rsLoRA",
    ],
)
def test_peft_computes_what_the_trained_model_does(adapter, projector, base, parallel, tmp_path):
    trained, ours = train(base, tmp_path / "step_1", parallel, adapter, projector=projector)
    export_peft(trained, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "base.json",
    }  # fmt: skip
    inputs = make_inputs(ours.size.language.vocab_size, ours.size.vision.num_places)
    expected = our_logits(ours, inputs)
    assert close(hf_logits(load_peft(tmp_path / "out"), inputs), expected)
    assert not close(hf_logits(build_hf(*SHAPES[SHAPE]), inputs), expected, 0.02)


def test_the_adapter_hits_the_language_model_only(lora_folder):
    adapted = {n.removesuffix(".lora_A") for n, _ in load_peft(lora_folder).named_modules() if n.endswith(".lora_A")}
    assert len(adapted) == 2 * 7
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in adapted)


def test_the_config_is_one_that_peft_writes_itself(lora_folder):
    config = LoraConfig.from_pretrained(lora_folder)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (4, 6, 0.1, "none")
    written = json.loads((lora_folder / "adapter_config.json").read_text())
    assert written.keys() <= LoraConfig().to_dict().keys()
    config.peft_version = LoraConfig().peft_version
    expected = LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.1, target_modules=config.target_modules, inference_mode=True,
        modules_to_save=["multi_modal_projector"],
    )  # fmt: skip
    expected.peft_version = config.peft_version
    assert config.to_dict() == expected.to_dict()


def test_the_base_is_named_where_its_config_names_it(lora, base, parallel, tmp_path):
    shutil.copytree(base.parent / "hf", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"_name_or_path": "someone/llava"}))
    import_hf(tmp_path / "hf", tmp_path / "base")
    trained, _ = train(tmp_path / "base", tmp_path / "step_1", parallel, LORA)
    for name, run, expected in (("a", trained, "someone/llava"), ("b", lora[0], None)):
        export_peft(run, tmp_path / name)
        assert LoraConfig.from_pretrained(tmp_path / name).base_model_name_or_path == expected


@pytest.mark.parametrize("expert", range(3))
def test_each_experts_adapter_is_the_model_whose_router_knows_that_expert_only(
    expert, experts, experts_folder, base, parallel
):
    trained, _ = experts
    ours = LLaVA(trained.run, trained.size, parallel).eval()
    bases.load_base(ours, base)
    randomise(ours)
    with torch.no_grad():
        for router in ours.routers():
            router.bias.zero_()
            router.bias[expert] = 1e6
    inputs = make_inputs(ours.size.language.vocab_size, ours.size.vision.num_places)
    assert close(hf_logits(load_peft(experts_folder / f"expert_{expert}"), inputs), our_logits(ours, inputs))


def test_the_experts_differ_and_share_what_is_no_experts(experts_folder):
    first, *others = (load_file(experts_folder / f"expert_{i}" / "adapter_model.safetensors") for i in range(3))
    for other in others:
        same = {name for name in first if torch.equal(first[name], other[name])}
        assert same == {name for name in first if "self_attn" in name or "multi_modal_projector" in name}


def test_a_folder_of_experts_says_what_a_plain_loader_does(experts, experts_folder):
    names = {path.name for path in experts_folder.iterdir()}
    assert names == {"expert_0", "expert_1", "expert_2", "router.safetensors", "mole.json", "README.md"}
    readme = (experts_folder / "README.md").read_text()
    assert "{" not in readme and max(map(len, readme.splitlines())) <= 120
    for words in ("3 LoRA experts", "not one adapter", "every token of every layer through expert 0", "expert_2"):
        assert words in readme
    tree = json.loads((experts_folder / "mole.json").read_text())
    assert AdapterConfig(**tree["adapter"]) == experts[0].adapter
    routers = load_file(experts_folder / "router.safetensors")
    step = StoredTensors(experts[0].step)
    for layer in range(2):
        for kind in ("weight", "bias"):
            ours = step.read(f"language_model.decoder.layers.{layer}.mlp.router.{kind}")
            assert torch.equal(routers[f"model.language_model.layers.{layer}.mlp.router.{kind}"], ours)


# ---- there and back


def test_one_adapter_there_and_back(lora, lora_folder, base, tmp_path):
    imported = peft_to_megatron([lora_folder], base, tmp_path / "start")
    assert same_tensors(tmp_path / "start", lora[0].step)
    assert (imported.has_router, imported.has_projector, imported.filled) == (False, True, ())
    expected = dataclasses.replace(LORA, balance_weight=imported.adapter.balance_weight, num_experts=1)
    assert imported.adapter == expected
    run = dataclasses.replace(lora[0].run, adapter=imported.adapter)
    again = dataclasses.replace(lora[0], run=run, step=tmp_path / "start")
    export_peft(again, tmp_path / "back")
    assert same_files(tmp_path / "back", lora_folder)


@pytest.mark.parametrize(
    "adapter",
    [
        THREE_EXPERTS,
        AdapterConfig(num_experts=2, rank=2, alpha=3.0, layers=(1,), attention=False, router_bias=False, gate="none"),
    ],
    ids=["everywhere", "one layer"],
)
def test_experts_there_and_back(adapter, base, parallel, tmp_path):
    trained, _ = train(base, tmp_path / "step_1", parallel, adapter)
    export_peft(trained, tmp_path / "peft")
    imported = peft_to_megatron([tmp_path / "peft"], base, tmp_path / "start")
    assert imported.adapter == adapter
    assert imported.has_router and imported.filled == ()
    assert same_tensors(tmp_path / "start", trained.step)
    export_peft(dataclasses.replace(trained, step=tmp_path / "start"), tmp_path / "back")
    assert same_files(tmp_path / "back", tmp_path / "peft")


@pytest.mark.parametrize("target_modules", [["q_proj", "v_proj"], r".*language_model.*\.(gate_proj|down_proj)"])
@pytest.mark.parametrize("use_rslora", [True, False], ids=["rslora", "plain"])
def test_an_adapter_that_peft_itself_saved_computes_the_same(target_modules, use_rslora, base, parallel, tmp_path):
    config = LoraConfig(
        r=4, lora_alpha=8, use_rslora=use_rslora, target_modules=target_modules, exclude_modules=r".*vision_tower.*"
    )
    theirs = get_peft_model(build_hf(*SHAPES[SHAPE]), config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path / "peft")
    imported = peft_to_megatron([tmp_path / "peft"], base, tmp_path / "start")
    assert imported.adapter.alpha == pytest.approx(16 if use_rslora else 8)
    assert len(imported.filled) == (4 if "q_proj" in target_modules else 2)
    ours = LLaVA(run_of(base, imported.adapter, projector=False), bases.read_size(base), parallel).eval()
    bases.load_base(ours, base)
    assert warm_start(ours, tmp_path / "start", imported.adapter) == []
    inputs = make_inputs(ours.size.language.vocab_size, ours.size.vision.num_places)
    assert close(our_logits(ours, inputs), hf_logits(theirs, inputs))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model."], ids=["older transformers", "a Llama alone"])
def test_other_names_of_the_same_modules_are_understood(prefix, base, parallel, tmp_path):
    trained, _ = train(base, tmp_path / "step_1", parallel, LORA, projector=False)
    export_peft(trained, tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_model.safetensors"
    save_file(
        {n.replace("model.model.language_model.", "model." + prefix): t for n, t in load_file(path).items()}, path
    )
    assert all(name.startswith(f"base_model.model.{prefix}layers.") for name in load_file(path))
    peft_to_megatron([tmp_path / "peft"], base, tmp_path / "start")
    assert same_tensors(tmp_path / "start", trained.step)


# ---- experts out of adapters


def test_several_adapters_become_one_expert_each(experts, experts_folder, base, tmp_path):
    """Taken one by one, the folders of an export have no router."""
    folders = [experts_folder / f"expert_{index}" for index in (2, 0)]
    imported = peft_to_megatron(folders, base, tmp_path / "start")
    assert imported.adapter.num_experts == 2 and not imported.has_router and imported.has_projector
    start, step = StoredTensors(tmp_path / "start"), StoredTensors(experts[0].step)
    for name in start:
        expected = step.read(name)
        assert torch.equal(start.read(name), expected[[2, 0]] if ".experts." in name else expected)
    assert {name for name in step if name not in start} == {name for name in step if ".router." in name}


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_one_adapter_becomes_copies_with_noise(noise, lora, lora_folder, base, tmp_path):
    for name in ("a", "b"):
        imported = peft_to_megatron([lora_folder], base, tmp_path / name, num_experts=4, noise=noise, seed=3)
    assert (imported.adapter.method, imported.adapter.num_experts) == ("mole", 4)
    assert same_tensors(tmp_path / "a", tmp_path / "b")
    start, step = StoredTensors(tmp_path / "a"), StoredTensors(lora[0].step)
    for projection, holder in (("gate", "linear_fc1"), ("down", "linear_fc2")):
        for factor in "AB":
            copies = start.read(f"language_model.decoder.layers.1.mlp.experts.lora_{projection}_{factor}")
            single = step.read(f"language_model.decoder.layers.1.mlp.{holder}.lora_{projection}_{factor}")
            assert copies.shape == (4, *single.shape)
            spread = (copies - single).std() / single.std()
            assert spread == 0 if noise == 0 else 0.07 < spread < 0.13
            assert noise == 0 or not torch.equal(copies[0], copies[1])
    for name in step:
        if "self_attention" in name or "projection" in name:
            assert torch.equal(start.read(name), step.read(name))


def edit(folder: Path, to: Path, *, config: dict | None = None, tensors=None) -> Path:
    """A copy of a PEFT folder with some keys of its config, or its tensors, changed."""
    shutil.copytree(folder, to)
    path = to / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    if tensors is not None:
        loaded = load_file(to / "adapter_model.safetensors")
        tensors(loaded)
        save_file(loaded, to / "adapter_model.safetensors")
    return to


LANGUAGE = "base_model.model.model.language_model.layers."
PROJECTOR = "base_model.model.model.multi_modal_projector."


def test_experts_that_differ_in_what_they_share_need_a_choice(lora_folder, base, tmp_path):
    name = LANGUAGE + "0.self_attn.q_proj.lora_B.weight"
    other = edit(lora_folder, tmp_path / "other", tensors=lambda t: t[name].mul_(2))
    third = edit(lora_folder, tmp_path / "third", tensors=lambda t: t[PROJECTOR + "linear_1.bias"].mul_(2))
    with pytest.raises(ConfigError, match=r"differ in model\.language_model\.layers\.0\.self_attn\.q_proj"):
        peft_to_megatron([lora_folder, other], base, tmp_path / "out")
    with pytest.raises(ConfigError, match="different projectors"):
        peft_to_megatron([lora_folder, third], base, tmp_path / "out")
    peft_to_megatron([lora_folder, other], base, tmp_path / "out", attention_from=1)
    q_B = StoredTensors(tmp_path / "out").read("language_model.decoder.layers.0.self_attention.linear_qkv.lora_q_B")
    assert torch.equal(q_B, load_file(other / "adapter_model.safetensors")[name])


# ---- what a run makes of it


def fresh(base: Path, parallel, adapter: AdapterConfig, **options) -> LLaVA:
    model = LLaVA(run_of(base, adapter, **options), bases.read_size(base), parallel).eval()
    bases.load_base(model, base)
    return model


def trainable(model: LLaVA) -> dict[str, torch.Tensor]:
    return {entry.key: entry.data.clone() for entry in trainable_entries(model).values()}


def test_a_run_starts_from_converted_adapters_and_keeps_what_they_lack(lora_folder, base, parallel, tmp_path):
    peft_to_megatron([lora_folder], base, tmp_path / "start", num_experts=3)
    verify(tmp_path / "start")
    adapter = AdapterConfig(num_experts=3, rank=4, alpha=6.0)
    model = fresh(base, parallel, adapter)
    before = trainable(model)
    kept = warm_start(model, tmp_path / "start", adapter)
    after, start = trainable(model), StoredTensors(tmp_path / "start")
    assert kept == sorted(name for name in after if ".router." in name) and len(kept) == 4
    assert all(torch.equal(after[name], before[name] if name in kept else start.read(name)) for name in after)


def test_a_run_starts_from_a_step_without_a_projector(base, parallel, tmp_path):
    trained, ours = train(base, tmp_path / "step_1", parallel, THREE_EXPERTS, projector=False)
    model = fresh(base, parallel, THREE_EXPERTS)
    kept = warm_start(model, trained.step, THREE_EXPERTS)
    assert len(kept) == 4 and all(name.startswith("vision_projection.") for name in kept)
    inputs = make_inputs(ours.size.language.vocab_size, ours.size.vision.num_places)
    assert torch.equal(our_logits(model, inputs), our_logits(ours, inputs))


STARTS = {
    "another alpha": ({"alpha": 9.0}, {}, r"made with adapter\.alpha = 8\.0, this run has 9\.0"),
    "another rank": ({"rank": 2}, {}, r"made with adapter\.rank = 4, this run has 2"),
    "other experts": ({"num_experts": 2}, {}, r"made with adapter\.num_experts = 3, this run has 2"),
    "another method": ({"method": "lora"}, {}, r"made with adapter\.method = mole, this run has lora"),
    "no attention": ({"attention": False}, {}, "which this run does not train"),
    "fewer layers": ({"layers": (1,)}, {}, "which this run does not train"),
    "no router bias": ({"router_bias": False}, {}, r"router\.bias, which this run does not train"),
    "a frozen projector": ({}, {"projector": False}, "vision_projection.*, which this run does not train"),
}


@pytest.mark.parametrize("source", ["step", "converted"])
@pytest.mark.parametrize("kind", STARTS)
def test_a_run_with_other_adapters_is_refused(kind, source, experts, experts_folder, base, parallel, tmp_path):
    adapter_change, options, says = STARTS[kind]
    start = experts[0].step
    if source == "converted":
        start = tmp_path / "start"
        peft_to_megatron([experts_folder], base, start)
    adapter = dataclasses.replace(THREE_EXPERTS, **adapter_change)
    model = fresh(base, parallel, adapter, **options)
    before = trainable(model)
    with pytest.raises(CheckpointError, match=says) as caught:
        warm_start(model, start, adapter)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainable(model).items())


def test_a_source_that_lacks_factors_or_holds_none_is_refused(base, parallel, tmp_path):
    less = dataclasses.replace(THREE_EXPERTS, attention=False)
    trained, _ = train(base, tmp_path / "step_1", parallel, less)
    with pytest.raises(CheckpointError, match=r"does not hold .*lora_.*, which this run trains"):
        warm_start(fresh(base, parallel, THREE_EXPERTS), trained.step, THREE_EXPERTS)
    nothing = dataclasses.replace(LORA, attention=False, layers=())
    empty = fresh(base, parallel, nothing)
    save_step(empty, run_of(base, nothing), base, tmp_path / "step_2")
    only_projector = fresh(base, parallel, dataclasses.replace(LORA))
    with pytest.raises(CheckpointError, match="does not hold"):
        warm_start(only_projector, tmp_path / "step_2", LORA)
    with pytest.raises(CheckpointError, match="it has no manifest"):
        warm_start(empty, tmp_path, nothing)
    with pytest.raises(CheckpointError, match=r"holds no adapters: it has neither adapter\.yaml nor config\.yaml"):
        warm_start(empty, base, nothing)


# ---- refused, and nothing left


CONFIGS = {
    "dora": ({"use_dora": True}, "use_dora is True"),
    "bias": ({"bias": "lora_only"}, "bias is 'lora_only'"),
    "ranks": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    "alphas": ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
    "lora bias": ({"lora_bias": True}, "lora_bias is True"),
    "parameters": ({"target_parameters": ["x"]}, "target_parameters"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "a new key": ({"twist": 1}, "twist is 1"),
    "not LoRA": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "rank": ({"r": 8}, r"lora_A\.weight has shape \[4, .*, rank and model make it \[8, "),
    "rank as text": ({"r": "4"}, "r must be a positive integer"),
    "alpha as text": ({"lora_alpha": "4"}, "lora_alpha must be a number"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_that_is_more_than_lora_is_refused_by_key(kind, lora_folder, base, tmp_path):
    config, says = CONFIGS[kind]
    edited = edit(lora_folder, tmp_path / "edited", config=config)
    refused([edited], base, tmp_path, says)


def rename(name: str, new: str):
    return lambda tensors: tensors.update({new: tensors.pop(name)})


Q_A = LANGUAGE + "0.self_attn.q_proj.lora_A.weight"
TENSORS = {
    "the tower": (rename(Q_A, Q_A.replace("language_model", "vision_tower.encoder")), "vision_tower.*no place"),
    "the embedding": (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(64, 32)}), "lm_head.*no place"),
    "a layer too many": (rename(Q_A, Q_A.replace("layers.0", "layers.2")), r"layers\.2.*no place"),
    "a norm": (lambda t: t.update({LANGUAGE + "0.input_layernorm.weight": torch.ones(32)}), "layernorm.*no place"),
    "half a pair": (lambda t: t.pop(Q_A), r"has only lora_B of model\.language_model\.layers\.0\.self_attn\.q_proj"),
    "another shape": (lambda t: t.update({Q_A: torch.ones(4, 31)}), r"has shape \[4, 31\], .* make it \[4, 32\]"),
    "half a projector": (lambda t: t.pop(PROJECTOR + "linear_2.bias"), r"a part of the projector only"),
    "another projector": (lambda t: t.update({PROJECTOR + "linear_2.bias": torch.ones(3)}), r"the base's has \[32\]"),
    "LoRA on the projector": (rename(Q_A, PROJECTOR + "linear_1.lora_A.weight"), "no place"),
    "integers": (lambda t: t.update({Q_A: torch.ones(4, 32, dtype=torch.int64)}), "is stored as I64"),
    "nothing": (lambda t: t.clear(), "has no LoRA factors"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_have_no_place_are_refused_by_name(kind, lora_folder, base, tmp_path):
    change, says = TENSORS[kind]
    refused([edit(lora_folder, tmp_path / "edited", tensors=change)], base, tmp_path, says)


def refused(folders: list[Path], base: Path, tmp_path: Path, says: str, **options) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=says) as caught:
        peft_to_megatron(folders, base, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_adapters_that_do_not_go_together_are_refused(lora_folder, experts_folder, base, tmp_path):
    alpha = edit(lora_folder, tmp_path / "alpha", config={"lora_alpha": 7})
    fewer = edit(lora_folder, tmp_path / "fewer", tensors=lambda t: [t.pop(n) for n in list(t) if "0.mlp" in n])
    for folders, says, options in (
        ([lora_folder, alpha], r"has alpha 7\.0, .* has 6\.0; experts must be alike", {}),
        ([lora_folder, fewer], r"do not both adapt model\.language_model\.layers\.0\.mlp\.", {}),
        ([lora_folder, lora_folder], "2 adapters make 2 experts, not 3", {"num_experts": 3}),
        ([lora_folder, lora_folder], "noise tells copies of one adapter apart", {"noise": 0.1}),
        ([lora_folder], "noise tells copies of one adapter apart", {"noise": 0.1}),
        ([lora_folder], "noise must be a number of at least 0", {"noise": float("nan"), "num_experts": 2}),
        ([lora_folder], "num_experts must be at least 1", {"num_experts": 0}),
        ([lora_folder], "attention_from is 1; there are 1 adapters", {"attention_from": 1}),
        ([experts_folder], "3 adapters make 3 experts, not 2", {"num_experts": 2}),
        ([], "no PEFT adapter is given", {}),
        ([tmp_path / "gone"], r"cannot read .*adapter_config\.json", {}),
        ([experts_folder, lora_folder], r"cannot read .*adapter_config\.json", {}),
    ):
        refused(folders, base, tmp_path, says, **options)


def test_broken_folders_are_refused(lora_folder, experts_folder, base, tmp_path):
    cut = edit(lora_folder, tmp_path / "cut")
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    bare = edit(lora_folder, tmp_path / "bare")
    (bare / "adapter_model.safetensors").unlink()
    old = edit(lora_folder, tmp_path / "old")
    (old / "non_lora_trainables.bin").write_bytes(b"")
    lost = tmp_path / "lost"
    shutil.copytree(experts_folder, lost)
    shutil.rmtree(lost / "expert_1")
    said = tmp_path / "said"
    shutil.copytree(experts_folder, said)
    tree = json.loads((said / "mole.json").read_text())
    (said / "mole.json").write_text(json.dumps(tree | {"adapter": tree["adapter"] | {"rank": 8}}))
    routers = tmp_path / "routers"
    shutil.copytree(experts_folder, routers)
    save_file({"a": torch.ones(2)}, routers / "router.safetensors")
    for folder, says in (
        (cut, r"adapter_model\.safetensors is not a whole safetensors file"),
        (bare, r"adapter_model\.safetensors is missing"),
        (old, r"non_lora_trainables\.bin holds what is not LoRA"),
        (lost, r"cannot read .*expert_1.adapter_config\.json"),
        (said, r"mole\.json says 3 experts of rank 8, the folders hold 3 of rank 4"),
        (routers, r"router\.safetensors and mole\.json do not agree on a"),
    ):
        refused([folder], base, tmp_path, says)


def test_existing_folders_and_bases_alone_are_refused(lora, lora_folder, base, parallel, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists"):
        peft_to_megatron([lora_folder], base, tmp_path / "out")
    with pytest.raises(ConfigError, match="exists"):
        export_peft(lora[0], tmp_path / "out")
    with pytest.raises(ConfigError, match="is a base: it has no adapters"):
        export_peft(find_trained(base), tmp_path / "new")
    nothing, _ = train(base, tmp_path / "step_1", parallel, AdapterConfig(method="lora", attention=False, layers=()))
    with pytest.raises(ConfigError, match="trained no LoRA factors"):
        export_peft(nothing, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "step_1"]


def test_the_folder_says_what_a_run_needs(lora_folder, base, tmp_path):
    peft_to_megatron([lora_folder], base, tmp_path / "start")
    text = (tmp_path / "start" / ADAPTER_FILE).read_text()
    assert "method: lora\n" in text and "rank: 4\nalpha: 6.0\n" in text and "layers: all" in text


def test_plain_logits_are_those_of_the_base(base, parallel):
    """What the other tests compare with: the base alone, in both worlds."""
    ours = load_ours(base, parallel)
    inputs = make_inputs(ours.size.language.vocab_size, ours.size.vision.num_places)
    assert close(our_logits(ours, inputs), hf_logits(build_hf(*SHAPES[SHAPE]), inputs))
