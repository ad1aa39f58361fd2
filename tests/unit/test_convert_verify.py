"""A proof is worth what it refuses: verify calls the same models equal, and names what is not."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers.dynamic_module_utils
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_convert_import import SHAPES, build_hf, copy, edit_config, save_hf
from test_convert_sources import make_whole
from trained_llava import save_step, train

from mole_mega.checkpoint import files
from mole_mega.checkpoint.trained import Trained, build_trained, find_trained
from mole_mega.config import AdapterConfig, ConfigError, ParallelConfig
from mole_mega.convert import hf_export, probe, rules, verify
from mole_mega.convert.folders import adapters_counterpart, find_counterpart
from mole_mega.convert.hf_config import kind_of
from mole_mega.convert.hf_export import export_base, export_llava, export_merged
from mole_mega.convert.hf_import import import_hf
from mole_mega.convert.mole_folder import MODELING_FILE, export_mole
from mole_mega.convert.peft import export_peft
from mole_mega.convert.peft_import import peft_to_megatron

LORA = AdapterConfig(method="lora", rank=4, alpha=6.0)
ONE_EXPERT = AdapterConfig(num_experts=1, rank=3, alpha=6.0)
EXPERTS = AdapterConfig(num_experts=3, rank=4, alpha=8.0, gate="prob")
WEIGHTS, ADAPTERS = "model.safetensors", "adapter_model.safetensors"
EXPORTS = {"mole": export_mole, "merged": export_merged, "peft": export_peft, "llava": export_llava}


@pytest.fixture(autouse=True)
def modules_cache(tmp_path_factory, monkeypatch):
    """transformers copies a folder's code into a cache of its own before it runs it."""
    folder = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(folder))


@pytest.fixture(scope="module")
def bases(tmp_path_factory, alone) -> dict[str, Path]:
    """{dtype: base}; beside each is `hf`, which it was made of."""
    folder, made = tmp_path_factory.mktemp("bases"), {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        import_hf(save_hf(folder / name / "hf", dtype=dtype), folder / name / "base")
        made[name] = folder / name / "base"
    return made


@pytest.fixture(scope="module")
def pairs(bases, tmp_path_factory, alone):
    """{name: (what was trained or imported, the folder beside it)}: equal, for tests to copy and spoil."""
    folder = tmp_path_factory.mktemp("pairs")
    base = find_trained(bases["fp32"])
    export_llava(base, folder / "llava")
    made = {"source": (base, bases["fp32"].parent / "hf"), "llava": (base, folder / "llava")}
    for name, adapter in (("mole", EXPERTS), ("merged", LORA), ("peft", LORA)):
        trained, _ = train(bases["fp32"], folder / name / "step_1", alone, adapter)
        EXPORTS[name](trained, folder / name / "out")
        made[name] = trained, folder / name / "out"
    return made


def train_so(base: Path, folder: Path, alone, adapter: AdapterConfig, change) -> Trained:
    """A step whose model was changed before it was saved."""
    trained, model = train(base, folder / "step_1", alone, adapter)
    with torch.no_grad():
        change(model)
    save_step(model, trained.run, base, folder / "step_2")
    return find_trained(folder / "step_2")


def compare(trained, folder: Path, alone, *parts: Path) -> list[verify.Check]:
    return prove(trained, partial(find_counterpart, trained, folder, *parts), alone)


def prove(trained, find, alone) -> list[verify.Check]:
    return verify.verify(trained, find, alone, ParallelConfig())


def unequal(checks: list[verify.Check]) -> dict[str, str]:
    return {check.what: check.found for check in checks if not check.equal}


def rows(checks: list[verify.Check]) -> list[str]:
    return [check.what for check in checks]


# ---- a base


def whole_of(shape: str = "grouped-query", dtype: torch.dtype = torch.float32):
    def make(folder: Path) -> list[Path]:
        return [save_hf(folder / "hf", shape, dtype)]

    return make


def mixed(folder: Path) -> list[Path]:
    """Some tensors wider than the dtype that config.json gives the whole."""
    save_hf(folder / "hf", dtype=torch.bfloat16)
    tensors = load_file(folder / "hf" / WEIGHTS)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if "vision" in name or "gate_proj" in name:
            tensors[name] = tensor.float() * (1 + 1e-3 * torch.rand(tensor.shape, generator=generator))
    save_file(tensors, folder / "hf" / WEIGHTS)
    return [folder / "hf"]


def original(folder: Path) -> list[Path]:
    """Its image token is behind the vocabulary."""
    whole = make_whole()
    return [whole.save_original(folder / "hf"), whole.save_clip(folder / "clip")]


def original_with_its_tower(folder: Path) -> list[Path]:
    whole = make_whole(hidden_size=128, num_attention_heads=2)
    hf = whole.save_original(folder / "hf", holds_tower=True)
    edit_config(hf, lambda config: config.update(mm_hidden_size=128, unfreeze_mm_vision_tower=True))
    return [hf]


def parts(folder: Path) -> list[Path]:
    whole = make_whole("odd vocabulary")
    return [whole.save_llama(folder / "hf"), whole.save_clip(folder / "clip")]


def parts_with_a_projector(folder: Path) -> list[Path]:
    save_file(make_whole("odd vocabulary").projector(), folder / "mm_projector.safetensors")
    return [*parts(folder), folder / "mm_projector.safetensors"]


BASES = {
    **{shape: whole_of(shape) for shape in ("grouped-query", "tied", "odd vocabulary")},
    "bf16": whole_of(dtype=torch.bfloat16),
    "fp16": whole_of(dtype=torch.float16),
    "mixed": mixed,
    "original": original,
    "original with its tower": original_with_its_tower,
    "parts, fresh projector": parts,
    "parts, given projector": parts_with_a_projector,
}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, None) for kind in BASES), ("bf16", "fp32"), ("grouped-query", "bf16")],
    ids=str,
)
def test_a_base_equals_what_it_was_made_of_and_what_it_is_written_to(kind, dtype, alone, tmp_path):
    hf, *others = BASES[kind](tmp_path)
    sources = dict(zip(("vision_tower", "projector"), others, strict=False))
    import_hf(hf, tmp_path / "base", dtype, **sources)
    base = find_trained(tmp_path / "base")
    export_base(base, tmp_path / "as it came")
    export_llava(base, tmp_path / "llava")
    for folders in ([hf, *others], [tmp_path / "as it came"], [tmp_path / "llava"]):
        checks = compare(base, folders[0], alone, *folders[1:])
        is_whole = (folders[0] / "config.json").is_file() and kind_of(folders[0] / "config.json") == "llava_hf"
        expected = ["names", "tensors", *(["files"] if is_whole else []), "logits"]
        assert [row for row in rows(checks) if row != "cast"] == expected
        assert not unequal(checks), folders


# ---- a run


RUNS = {
    **{f"mole, {gate}": ("mole", AdapterConfig(num_experts=3, rank=4, gate=gate)) for gate in ("prob", "none")},
    "mole, straight_through": ("mole", AdapterConfig(num_experts=3, rank=4, gate="straight_through")),
    "mole, one layer": ("mole", AdapterConfig(num_experts=2, rank=4, layers=(1,), attention=False, router_bias=False)),
    "mole, a router a linear": (
        "mole",
        AdapterConfig(num_experts=3, rank=4, router_scope="linear", top_k=2, expert_parallel="weights"),
    ),
    "mole, lora": ("mole", LORA),
    "mole, lora beside keys of mixtures": (
        "mole",
        AdapterConfig(method="lora", rank=4, num_experts=1, top_k=2, router_scope="task", gate="dense"),
    ),
    "merged, lora": ("merged", LORA),
    "merged, one expert": ("merged", ONE_EXPERT),
    "merged, one expert by instruction": (
        "merged",
        AdapterConfig(num_experts=1, rank=4, router_scope="sample", balance_weight=0.0),
    ),
    "peft, lora": ("peft", LORA),
    "peft, experts": ("peft", EXPERTS),
}
ROWS = {
    "mole": ["names", "tensors", "files", "base", "logits", "experts"],
    "merged": ["names", "tensors", "files", "base", "logits"],
    "peft": ["names", "tensors", "base", "logits"],
    "peft, experts": [
        *(f"expert_{i}: {row}" for i in range(3) for row in ("names", "tensors")),
        *("router: names", "router: tensors", "base"),
        *(f"expert_{i}: logits" for i in range(3)),
    ],
}


@pytest.mark.parametrize(
    ("kind", "stored", "precision"),
    [
        *((kind, "bf16", "fp32") for kind in RUNS),
        *((kind, "fp32", "fp32") for kind in ("merged, lora", "merged, one expert")),
        *((kind, "bf16", "bf16") for kind in ("mole, prob", "merged, lora", "peft, lora")),
        ("mole, prob", "fp32", "bf16"),
    ],
)
def test_a_run_equals_its_export(kind, stored, precision, bases, alone, tmp_path):
    """The trained projector keeps its own precision beside a base in bf16."""
    format, adapter = RUNS[kind]
    trained, _ = train(bases[stored], tmp_path / "step_1", alone, adapter, precision=precision)
    EXPORTS[format](trained, tmp_path / "out")
    checks = compare(trained, tmp_path / "out", alone)
    expected = ROWS.get(kind, ROWS[format])
    if format == "merged" and stored == "bf16":  # the sums are proved before they are rounded too
        expected = [*expected, "not rounded: logits"]
    assert rows(checks) == [row for row in expected if row != "experts" or adapter.method == "mole"]
    assert not unequal(checks)


def test_a_folder_that_takes_its_base_from_elsewhere_is_compared_in_what_it_holds(bases, alone, tmp_path):
    trained, _ = train(bases["fp32"], tmp_path / "step_1", alone, EXPERTS)
    export_mole(trained, tmp_path / "out", base_reference=str(bases["fp32"].parent / "hf"))
    assert not unequal(compare(trained, tmp_path / "out", alone))
    edit_tensors(bases["fp32"].parent / "hf", tmp_path / "hf", lambda t: t.update({HEAD: 2 * t[HEAD]}))
    edit_json(tmp_path / "out" / "config.json", base_model_name_or_path=str(tmp_path / "hf"))
    assert unequal(compare(trained, tmp_path / "out", alone)).keys() == {"logits"}


@pytest.mark.parametrize(("name", "file"), [("mole", "config.json"), ("peft", "base.json"), ("merged", "base.json")])
def test_an_export_of_a_run_on_another_base_is_told_by_the_hash_that_it_names(name, file, pairs, alone, tmp_path):
    trained, folder = pairs[name]
    path = copy(folder, tmp_path / "other") / file
    tree = json.loads(path.read_text())
    assert tree["base_hash"] == files.folder_hash(trained.base)
    assert tree["trained_steps"] == json.loads((trained.step / "state.json").read_text())["step"] > 0
    edit_json(path, base_hash="f00d" * 16)
    assert unequal(compare(trained, tmp_path / "other", alone)) == {"base": "another hash, f00df00df00d..."}


# ---- adapters


def saved_by_peft(folder: Path) -> Path:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], exclude_modules=r".*vision_tower.*")
    model = get_peft_model(build_hf(*SHAPES["grouped-query"]), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def peft_folders(pairs, bases, alone, tmp_path_factory) -> dict[str, list[Path]]:
    folder = tmp_path_factory.mktemp("adapters")
    export_peft(pairs["mole"][0], folder / "experts")
    decoder = copy(pairs["peft"][1], folder / "decoder")
    tensors = load_file(decoder / ADAPTERS)
    without_projector = {
        name.replace("model.model.language_model.", "model.model."): tensor
        for name, tensor in tensors.items()
        if "projector" not in name
    }
    save_file(without_projector, decoder / ADAPTERS)
    return {
        "one": [pairs["peft"][1]],
        "several": [folder / "experts" / f"expert_{index}" for index in (2, 0)],
        "experts": [folder / "experts"],
        "of peft": [saved_by_peft(folder / "peft")],
        "of a decoder": [decoder],
    }


ADAPTER_ROWS = {
    ("one", None): ["names", "tensors", "logits"],
    ("one", 2): [
        *(f"expert {i}: {row}" for i in range(2) for row in ("names", "tensors")),
        *("expert 0: logits", "expert 1: logits"),
    ],
    ("several", None): [
        *(f"expert {i}: {row}" for i in range(2) for row in ("names", "tensors")),
        *("expert 0: logits", "expert 1: logits"),
    ],
    ("experts", None): [row for row in ROWS["peft, experts"] if row != "base"],  # an adapter of any base may come in
    ("of peft", None): ["names", "tensors", "logits"],
    ("of a decoder", None): ["names", "tensors"],  # PEFT does not load it on a LLaVA
}


@pytest.mark.parametrize(("kind", "num_experts"), ADAPTER_ROWS)
def test_converted_adapters_equal_those_that_they_were(kind, num_experts, peft_folders, bases, alone, tmp_path):
    folders = peft_folders[kind]
    imported = peft_to_megatron(folders, bases["fp32"], tmp_path / "start", num_experts=num_experts)
    trained = find_trained(tmp_path / "start", bases["fp32"])
    checks = prove(trained, lambda: adapters_counterpart(trained, folders, imported.filled), alone)
    assert rows(checks) == ADAPTER_ROWS[kind, num_experts]
    assert not unequal(checks)


def test_converted_adapters_differ_from_others(pairs, bases, alone, tmp_path):
    folder, start = pairs["peft"][1], tmp_path / "start"
    peft_to_megatron([folder], bases["fp32"], start)
    name = edit_tensors(folder, tmp_path / "other", flip_a_bit)
    trained = find_trained(start, bases["fp32"])
    differing = unequal(prove(trained, lambda: adapters_counterpart(trained, [tmp_path / "other"]), alone))
    assert differing.keys() == {"tensors"} and name in differing["tensors"]
    edit_json(copy(folder, tmp_path / "alpha") / "adapter_config.json", lora_alpha=7)
    differing = unequal(prove(trained, lambda: adapters_counterpart(trained, [tmp_path / "alpha"]), alone))
    assert differing.keys() == {"logits"}


# ---- what is seen


HEAD = "language_model.lm_head.weight"


def edit_json(path: Path, **keys) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def edit_tensors(folder: Path, to: Path, change):
    """`change` a copy of a folder's tensors; returns what it returns."""
    copy(folder, to)
    path = to / (ADAPTERS if (to / ADAPTERS).is_file() else WEIGHTS)
    tensors = load_file(path)
    result = change(tensors)
    save_file(tensors, path)
    return result


def a_name(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in tensors if "layers.1.self_attn.v_proj" in name and "vision" not in name)


def flip_a_bit(tensors: dict[str, torch.Tensor]) -> str:
    """The least of a number: no answer shows it."""
    name = a_name(tensors)
    tensors[name].view(torch.int32)[0, 0] ^= 1
    return name


def remove(tensors: dict[str, torch.Tensor]) -> str:
    name = a_name(tensors)
    del tensors[name]
    return name


def add(tensors: dict[str, torch.Tensor]) -> str:
    name = a_name(tensors).replace("layers.1", "layers.7")
    tensors[name] = tensors[a_name(tensors)].clone()
    return name


def change_dtype(tensors: dict[str, torch.Tensor]) -> str:
    name = a_name(tensors)
    tensors[name] = tensors[name].bfloat16()
    return name


def cut_a_row(tensors: dict[str, torch.Tensor]) -> str:
    name = a_name(tensors)
    tensors[name] = tensors[name][:-1].clone()
    return name


def table_name(name: str) -> str:
    """Of a base and a merged model, names are told in the table's form."""
    return name.removeprefix("language_model.model.")


@pytest.mark.parametrize("pair", ["source", "llava", "mole", "merged", "peft"])
def test_the_pairs_are_equal_before_they_are_spoiled(pair, pairs, alone):
    assert not unequal(compare(*pairs[pair], alone))


@pytest.mark.parametrize("change", [flip_a_bit, remove, add, change_dtype, cut_a_row])
@pytest.mark.parametrize("pair", ["source", "llava", "mole", "merged", "peft"])
def test_a_tensor_that_differs_is_named(pair, change, pairs, alone, tmp_path):
    trained, folder = pairs[pair]
    name = edit_tensors(folder, tmp_path / "spoiled", change)
    checks = compare(trained, tmp_path / "spoiled", alone)
    differing = unequal(checks)
    row = "names" if change in (remove, add) else "tensors"
    assert table_name(name) in differing[row]
    # a model of other names or shapes is not asked
    assert ("logits" in rows(checks)) == (change in (flip_a_bit, change_dtype))
    if change is flip_a_bit:
        assert differing.keys() == {"tensors"}


@pytest.mark.parametrize("part", ["expert_1", "router"])
def test_each_part_of_a_folder_of_experts_is_compared(part, pairs, alone, tmp_path):
    trained, _ = pairs["mole"]
    export_peft(trained, tmp_path / "out")
    path = tmp_path / "out" / ("router.safetensors" if part == "router" else f"{part}/{ADAPTERS}")
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    tensors[name].view(torch.int32)[-1] ^= 1
    save_file(tensors, path)
    differing = unequal(compare(trained, tmp_path / "out", alone))
    assert differing.keys() == {f"{part}: tensors"} and name in differing[f"{part}: tensors"]


def test_a_rule_that_is_wrong_both_ways_shows_in_the_logits(alone, monkeypatch, tmp_path):
    right = rules.gate_up()
    swapped = rules.Rule(lambda gate, up: right.to_ours(up, gate), lambda fused: right.to_hf(fused)[::-1])
    monkeypatch.setattr(rules, "gate_up", lambda: swapped)
    import_hf(save_hf(tmp_path / "hf"), tmp_path / "base")
    assert unequal(compare(find_trained(tmp_path / "base"), tmp_path / "hf", alone)).keys() == {"logits"}


@pytest.mark.parametrize(("key", "value"), [("alpha", 8.01), ("gate", "none")])
def test_a_config_that_says_other_adapters_shows_in_the_logits(key, value, pairs, alone, tmp_path):
    trained, folder = pairs["mole"]
    path = copy(folder, tmp_path / "spoiled") / "config.json"
    edit_json(path, mole=json.loads(path.read_text())["mole"] | {key: value})
    checks = compare(trained, tmp_path / "spoiled", alone)
    differing = unequal(checks)
    assert "logits" in differing and not {"names", "tensors"} & differing.keys()
    assert "DIFFERS" in verify.table(checks)


@pytest.fixture
def alter_ours(monkeypatch):
    """alter_ours(change) applies `change` to our model before it is asked."""

    def alter(change) -> None:
        def build(*args):
            model = build_trained(*args)
            with torch.no_grad():
                change(model)
            return model

        monkeypatch.setattr(verify, "build_trained", build)

    return alter


def test_tokens_that_go_to_other_experts_are_counted(pairs, alone, alter_ours):
    alter_ours(lambda model: model.routers()[0].bias.add_(torch.tensor([0.3, 0.0, 0.0])))
    differing = unequal(compare(*pairs["mole"], alone))
    assert differing.keys() == {"logits", "experts"}
    assert 0 < int(differing["experts"].split()[0]) < 60


def test_experts_are_compared_even_where_the_logits_do_not_depend_on_them(bases, alone, alter_ours, tmp_path):
    """Experts that are alike, gate none."""

    def make_experts_alike(model):
        for name, parameter in model.named_parameters():
            if ".experts.lora_" in name:
                parameter.copy_(parameter[:1].expand_as(parameter))

    adapter = AdapterConfig(num_experts=3, rank=4, gate="none")
    trained = train_so(bases["fp32"], tmp_path, alone, adapter, make_experts_alike)
    export_mole(trained, tmp_path / "out")
    assert not unequal(compare(trained, tmp_path / "out", alone))
    alter_ours(lambda model: model.routers()[0].bias.add_(torch.tensor([1e6, 0.0, 0.0])))
    assert unequal(compare(trained, tmp_path / "out", alone)).keys() == {"experts"}


def test_layers_that_route_on_one_side_alone_are_no_equality(pairs, alone, monkeypatch):
    ask = probe.ask_megatron

    def forget_a_layer(*args):
        answer = ask(*args)
        return probe.Answer(answer.logits, {0: answer.choices[0]})

    monkeypatch.setattr(probe, "ask_megatron", forget_a_layer)
    differing = unequal(compare(*pairs["mole"], alone))
    assert differing == {"experts": "theirs route in layers [0, 1], ours in [0]"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_no_equality_though_both_sides_have_it(value, alone, tmp_path):
    save_hf(tmp_path / "clean")
    edit_tensors(tmp_path / "clean", tmp_path / "hf", lambda tensors: tensors[HEAD][3].fill_(value))
    import_hf(tmp_path / "hf", tmp_path / "base")
    assert unequal(compare(find_trained(tmp_path / "base"), tmp_path / "hf", alone)).keys() == {"logits"}


def test_logits_of_nothing_but_zeros_are_equal(alone, tmp_path):
    save_hf(tmp_path / "clean")
    edit_tensors(tmp_path / "clean", tmp_path / "hf", lambda tensors: tensors[HEAD].zero_())
    import_hf(tmp_path / "hf", tmp_path / "base")
    assert not unequal(compare(find_trained(tmp_path / "base"), tmp_path / "hf", alone))


def test_what_is_no_export_of_a_run_is_refused(pairs, bases, alone, tmp_path):
    trained, mole = pairs["mole"]
    copy(mole, tmp_path / "foreign")
    with open(tmp_path / "foreign" / MODELING_FILE, "a") as file:
        file.write(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    copy(mole, tmp_path / "more code")
    (tmp_path / "more code" / "more.py").write_text("")
    edit_json(copy(mole, tmp_path / "other") / "config.json", model_type="llama")
    (tmp_path / "empty").mkdir()
    for folder, says in (
        ("foreign", "its code is not run"),
        ("more code", "its code is not run"),
        ("other", "describes 'llama': no export of a run"),
        ("empty", r"cannot read .*config\.json"),
    ):
        with pytest.raises(ConfigError, match=says):
            compare(trained, tmp_path / folder, alone)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ConfigError, match="cannot be given"):
        compare(trained, mole, alone, bases["fp32"])
    with pytest.raises(ConfigError, match="has 3 experts a layer"):
        compare(trained, pairs["merged"][1], alone)


def test_a_run_differs_from_the_export_of_another_step(pairs, bases, alone, tmp_path):
    def train_on(model):
        for parameter in model.parameters():
            parameter.mul_(1.01 if parameter.requires_grad else 1)

    other = train_so(bases["fp32"], tmp_path, alone, EXPERTS, train_on)
    differing = unequal(compare(other, pairs["mole"][1], alone))
    assert {"tensors", "logits"} <= differing.keys() and "names" not in differing


# ---- in fp32, whatever is stored


def narrow_models(bases, alone):
    theirs = build_hf(*SHAPES["tied"]).bfloat16().eval()
    ours = build_trained(find_trained(bases["bf16"]), alone, ParallelConfig(), "stored")
    return {"theirs": theirs, "ours": ours}


def ask(model, size) -> torch.Tensor:
    asked = probe.make_probe(size)
    answer = probe.ask_transformers(model, asked) if hasattr(model, "lm_head") else probe.ask_megatron(model, asked)
    return answer if isinstance(answer, torch.Tensor) else answer.logits


def num_hooks(model) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("side", ["theirs", "ours"])
def test_a_model_in_bf16_is_asked_in_fp32_and_left_as_it_was(side, bases, alone):
    model, size = narrow_models(bases, alone)[side], find_trained(bases["bf16"]).size
    before = {name: (p.dtype, p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    assert {dtype for dtype, *_ in before.values()} == {torch.bfloat16}
    ask(model, size)  # transformers' own hooks are put up by the first pass
    hooks = num_hooks(model)
    logits = ask(model, size)
    for name, parameter in model.named_parameters():
        dtype, address, values = before[name]
        assert (parameter.dtype, parameter.data_ptr()) == (dtype, address) and torch.equal(parameter, values)
    assert num_hooks(model) == hooks
    assert torch.equal(ask(model.float(), size), logits)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("side", ["theirs", "ours"])
def test_an_error_on_the_way_leaves_the_weights_as_they_were(side, bases, alone):
    model, size = narrow_models(bases, alone)[side], find_trained(bases["bf16"]).size
    before = {name: (parameter.data_ptr(), parameter.dtype) for name, parameter in model.named_parameters()}
    inside = [m for name, m in model.named_modules() if name.endswith("layers.1.mlp") and "vision" not in name]
    ask(model, size)
    inside[0].forward = lambda *_, **__: 1 / 0
    hooks = num_hooks(model)
    with pytest.raises(ZeroDivisionError):
        ask(model, size)
    assert {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()} == before
    assert num_hooks(model) == hooks


# ---- beside the weights


def test_a_cast_that_was_asked_for_is_said_with_what_it_cost(bases, alone, tmp_path):
    import_hf(bases["fp32"].parent / "hf", tmp_path / "base", "bf16")
    (note,) = (
        check
        for check in compare(find_trained(tmp_path / "base"), bases["fp32"].parent / "hf", alone)
        if check.what == "cast"
    )
    rounded, total = (int(word.replace(",", "")) for word in note.found.split() if word[0].isdigit())
    assert "float32 to bfloat16" in note.compared and 0.9 * total < rounded <= total
    assert note.verdict == "noted"


@pytest.mark.parametrize("what", ["mole", "merged", "llava", "source"])
@pytest.mark.parametrize("change", ["altered", "removed", "added"])
def test_a_file_beside_the_weights_that_is_not_the_one_of_training_is_named(pairs, what, change, alone, tmp_path):
    trained, folder = pairs[what]
    spoiled = shutil.copytree(folder, tmp_path / "spoiled")
    name = "generation_config.json"
    path = spoiled / name
    if change == "altered":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 7}))
    elif change == "removed":
        path.unlink()
    else:
        name = "chat_template.jinja"
        (spoiled / name).write_text("{{ messages }}")
    assert unequal(compare(trained, spoiled, alone)) == {"files": f"1 differ, first {name}"}


@pytest.mark.parametrize("stored", ["fp32", "bf16"])
def test_a_merge_at_a_wrong_scale_differs_though_rounding_could_hide_it(bases, stored, alone, tmp_path, monkeypatch):
    """The exporter's own sums are what the bytes are compared with: the logits before rounding are not."""
    trained, _ = train(bases[stored], tmp_path / "step_1", alone, LORA)
    changed = hf_export._changed
    monkeypatch.setattr(
        hf_export, "_changed", lambda name, weight, delta, *rest: changed(name, weight, lambda: 1.001 * delta(), *rest)
    )
    export_merged(trained, tmp_path / "out")
    differing = unequal(compare(trained, tmp_path / "out", alone))
    assert ("not rounded: logits" if stored == "bf16" else "logits") in differing
    assert "tensors" not in differing


def test_experts_against_a_plain_llava_is_a_question_that_is_refused(bases, pairs, alone):
    with pytest.raises(ConfigError, match=r"is a plain LLaVA: .* has 3 experts a layer"):
        compare(pairs["mole"][0], bases["fp32"].parent / "hf", alone)
