"""A Hugging Face LLaVA imported as a base is the same model, whatever its shape, layout and precision."""

import dataclasses
import hashlib
import json
import resource
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mole_mega.checkpoint import base, stream
from mole_mega.checkpoint.files import MANIFEST, CheckpointError, folder_hash
from mole_mega.checkpoint.stream import NUM_FILES, LazyTensor, write_tensors
from mole_mega.config import AdapterConfig, ConfigError, DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from mole_mega.convert import hf_config, llava_hf
from mole_mega.convert.hf_files import SafetensorsShard, open_tensors
from mole_mega.convert.hf_import import UNUSED_FILE, import_hf, pending_tensors, read_size
from mole_mega.convert.source import SOURCE_FILE, Source
from mole_mega.models.llava import LLaVA
from mole_mega.models.sizes import SIZES, LlavaSize
from mole_mega.platform import parallel as platform

IMAGE_TOKEN, PLACES = 5, 4
VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 16,
    "patch_size": 8, "hidden_act": "quick_gelu",
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 64, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "pad_token_id": 1,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 3e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
SHAPES: dict[str, tuple[dict, dict, dict]] = {  # changes to the decoder, the tower and the whole
    "multi-head": ({}, {}, {}),
    "grouped-query": ({"num_attention_heads": 8, "num_key_value_heads": 2}, {}, {}),
    "multi-query": ({"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {}, {}),
    "wide heads": ({"num_key_value_heads": 2, "head_dim": 12}, {"patch_size": 4}, {}),
    "odd vocabulary": ({"vocab_size": 67}, {"num_attention_heads": 2}, {}),
    "tied": ({"tie_word_embeddings": True, "num_key_value_heads": 2}, {}, {"tie_word_embeddings": True}),
    "last tower layer": ({}, {}, {"vision_feature_layer": -1}),
    "linear rope": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, {}, {}),
    "llama3 rope": ({"rope_parameters": LLAMA3, "num_key_value_heads": 2}, {}, {}),
    "first tower layer": ({}, {}, {"vision_feature_layer": 1}),
}


@pytest.fixture(scope="module")
def parallel():
    yield platform.initialize(ParallelConfig(), seed=0)
    platform.shutdown()


def build_hf(text: dict, vision: dict, top: dict) -> LlavaForConditionalGeneration:
    """A random model, every bias and norm weight included."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**{**VISION, **vision}), text_config=LlamaConfig(**{**TEXT, **text}),
        image_token_index=IMAGE_TOKEN, **top,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * values)
            else:
                parameter.copy_(values / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 0.2 * values)
    return model


def save_hf(folder: Path, shape: str = "grouped-query", dtype: torch.dtype = torch.float32) -> Path:
    build_hf(*SHAPES[shape]).to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """One Hugging Face folder that tests copy before they change it."""
    return save_hf(tmp_path_factory.mktemp("hf") / "model")


def build_ours(size: LlavaSize, parallel, *, precision="fp32", adapter: AdapterConfig | None = None) -> LLaVA:
    """Without adapters when `adapter` is None."""
    run = RunConfig(
        run_dir="", model=ModelConfig(base=""), data=DataConfig(sources=(), max_length=64),
        train=TrainConfig(steps=1, precision=precision), adapter=adapter or AdapterConfig(),
    )  # fmt: skip
    return LLaVA(run, size, parallel, adapters=adapter is not None).eval()


def load_ours(folder: Path, parallel, **options) -> LLaVA:
    model = build_ours(base.read_size(folder), parallel, **options)
    base.load_base(model, folder)
    return model


def used_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """A folder's tensors by the table's names."""
    return {llava_hf.canonical_name(k): v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


@dataclasses.dataclass
class Inputs:
    """A batch padded on the right. tokens, valid [B, S]; pixels [N, 3, h, w]."""

    tokens: torch.Tensor
    valid: torch.Tensor
    pixels: torch.Tensor


def make_inputs(vocab_size: int, places: int, images: tuple[int, ...] = (0, 1, 2)) -> Inputs:
    """One sample for each number of images, of unequal lengths."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for index, count in enumerate(images):
        row = [2]
        for _ in range(count):
            row += [*torch.randint(8, vocab_size, (3,), generator=generator).tolist(), *[IMAGE_TOKEN] * places]
        rows.append(row + torch.randint(8, vocab_size, (5 + index,), generator=generator).tolist())
    tokens = torch.full((len(rows), max(map(len, rows))), 1)
    valid = torch.zeros_like(tokens, dtype=torch.bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
        valid[index, : len(row)] = True
    return Inputs(tokens, valid, torch.randn(sum(images), 3, 16, 16, generator=generator))


@torch.no_grad()
def our_logits(model: LLaVA, inputs: Inputs) -> torch.Tensor:
    tokens = inputs.tokens
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return model(tokens, positions, inputs.valid, tokens == IMAGE_TOKEN, inputs.pixels)[inputs.valid]


@torch.no_grad()
def hf_logits(model: LlavaForConditionalGeneration, inputs: Inputs) -> torch.Tensor:
    pixels = inputs.pixels if len(inputs.pixels) else None
    return model(input_ids=inputs.tokens, attention_mask=inputs.valid.long(), pixel_values=pixels).logits[inputs.valid]


# ---- the same model


@pytest.mark.parametrize("images", [(0, 1, 2), (2, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape, images, parallel, tmp_path, record_property):
    theirs = build_hf(*SHAPES[shape])
    theirs.save_pretrained(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "base")
    ours = load_ours(tmp_path / "base", parallel)
    inputs = make_inputs(ours.size.language.vocab_size, ours.size.vision.num_places, images)
    expected, got = hf_logits(theirs, inputs), our_logits(ours, inputs)
    assert got.shape == expected.shape
    difference = ((got - expected).abs().max() / expected.abs().max()).item()
    record_property("relative_difference", difference)
    assert difference < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_back_conversion_gives_identical_bytes_of_every_used_tensor(shape, parallel, tmp_path):
    source = save_hf(tmp_path / "hf", shape)
    import_hf(source, tmp_path / "base")
    ours = load_ours(tmp_path / "base", parallel)
    rules, state = llava_hf.rules_by_name(ours.size), ours.state_dict()
    back = load_file(tmp_path / "base" / UNUSED_FILE)
    for row in llava_hf.rows(ours.size):
        back.update(zip(row.hf, rules[row.rule].to_hf(state[row.ours]), strict=True))
    stored = used_tensors(source)
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[name], stored[name]) for name in stored)


@pytest.mark.parametrize(
    "adapter",
    [
        AdapterConfig(num_experts=3, rank=4, gate="prob"),
        AdapterConfig(num_experts=2, rank=4, gate="none"),
        AdapterConfig(num_experts=3, rank=4, gate="straight_through", layers=(1,), attention=False),
        AdapterConfig(method="lora", rank=4),
    ],
    ids=["prob", "none", "straight_through", "lora"],
)
def test_fresh_adapters_change_no_bit(adapter, source, parallel, tmp_path):
    import_hf(source, tmp_path / "base")
    plain = load_ours(tmp_path / "base", parallel)
    adapted = load_ours(tmp_path / "base", parallel, adapter=adapter)
    inputs = make_inputs(plain.size.language.vocab_size, PLACES)
    assert torch.equal(our_logits(adapted, inputs), our_logits(plain, inputs))


# ---- the same base


def rename(folder: Path, prefixes: tuple[tuple[str, str], ...]) -> Path:
    """Store a folder's tensors under other names: from the table's to those of `prefixes`, the first that fits."""
    path = folder / "model.safetensors"
    tensors = {}
    for stored, tensor in load_file(path).items():
        name = llava_hf.canonical_name(stored)
        ours, theirs = next((pair for pair in prefixes if name.startswith(pair[0])), ("", ""))
        tensors[theirs + name.removeprefix(ours)] = tensor
    save_file(tensors, path)
    return folder


HUB = (
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
NESTED = (("model.vision_tower.", "model.vision_tower.vision_model."),)


@pytest.mark.parametrize(
    "prefixes", [(), HUB, NESTED], ids=["built model's names", "hub's older names", "nested tower"]
)
def test_every_layout_of_names_gives_the_same_base(prefixes, source, parallel, tmp_path):
    renamed = rename(copy(source, tmp_path / "hf"), prefixes)
    assert load_file(renamed / "model.safetensors").keys() != load_file(source / "model.safetensors").keys()
    import_hf(renamed, tmp_path / "b")
    import_hf(source, tmp_path / "a")
    assert contents(tmp_path / "b") == contents(tmp_path / "a")


def test_shards_give_the_same_base(source, parallel, tmp_path):
    build_hf(*SHAPES["grouped-query"]).save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    import_hf(tmp_path / "hf", tmp_path / "b")
    import_hf(source, tmp_path / "a")
    assert contents(tmp_path / "b") == contents(tmp_path / "a")


def test_buffers_of_older_versions_are_passed_over(source, parallel, tmp_path):
    changed = copy(source, tmp_path / "hf")
    edit_tensors(changed, lambda t: t.update({
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(5)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
    }))  # fmt: skip
    import_hf(changed, tmp_path / "b")
    import_hf(source, tmp_path / "a")
    assert contents(tmp_path / "b") == contents(tmp_path / "a")


def test_a_stored_copy_of_tied_embeddings_changes_nothing(parallel, tmp_path):
    source = save_hf(tmp_path / "hf", "tied")
    import_hf(source, tmp_path / "a")
    embedding = used_tensors(source)[llava_hf.EMBEDDING]
    edit_tensors(source, lambda t: t.update({"language_model.lm_head.weight": embedding.clone()}))
    import_hf(source, tmp_path / "b")
    assert contents(tmp_path / "b") == contents(tmp_path / "a")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [None, "fp32", "bf16"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_base_of_any_precision_loads_into_any_model(stored, dtype, precision, parallel, tmp_path):
    source = save_hf(tmp_path / "hf", dtype=stored)
    import_hf(source, tmp_path / "base", dtype)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, None: stored}
    theirs = used_tensors(source)
    assert {tensor.dtype for tensor in theirs.values()} == {stored}
    model = load_ours(tmp_path / "base", parallel, precision=precision)
    rules, state = llava_hf.rules_by_name(model.size), model.state_dict()
    for row in llava_hf.rows(model.size):
        expected = rules[row.rule].to_ours(*(theirs[name] for name in row.hf)).to(dtypes[dtype]).to(dtypes[precision])
        assert state[row.ours].dtype == dtypes[precision]
        assert torch.equal(state[row.ours], expected), row.ours
    assert {tensor.dtype for tensor in load_file(tmp_path / "base" / UNUSED_FILE).values()} == {dtypes[dtype]}


def test_a_base_takes_the_precision_of_its_source(source, parallel, tmp_path):
    half = save_hf(tmp_path / "half", dtype=torch.bfloat16)
    import_hf(half, tmp_path / "a")
    import_hf(source, tmp_path / "b")
    import_hf(source, tmp_path / "c", "bf16")
    sizes = {name: stored_bytes(tmp_path / name) for name in "abc"}
    assert sizes["a"] == sizes["c"] < 0.7 * sizes["b"]


def test_tokenizer_processor_and_generation_files_come_along(source, parallel, tmp_path):
    changed = copy(source, tmp_path / "hf")
    names = [
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "processor_config.json",
        "chat_template.jinja",
    ]
    for name in [*names, "README.md"]:
        (changed / name).write_text(name)
    import_hf(changed, tmp_path / "base")
    assert all((tmp_path / "base" / name).read_text() == name for name in names)
    assert (tmp_path / "base" / "config.json").read_bytes() == (changed / "config.json").read_bytes()
    assert not (tmp_path / "base" / "README.md").exists()


def test_import_needs_no_process_group(source, tmp_path):
    platform.shutdown()
    try:
        import_hf(source, tmp_path / "base")
        assert not torch.distributed.is_initialized()
    finally:
        platform.initialize(ParallelConfig(), seed=0)


def copy(source: Path, to: Path) -> Path:
    shutil.copytree(source, to)
    return to


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but those that say how the source was stored."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in (SOURCE_FILE, MANIFEST)}


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.distcp"))


# ---- names and sizes


def test_the_table_names_every_tensor_of_transformers_model(source):
    names = {llava_hf.canonical_name(name) for name in build_hf(*SHAPES["grouped-query"]).state_dict()}
    size = read_size(source)
    table = [name for row in llava_hf.rows(size) for name in row.hf]
    assert len(table) == len(set(table))
    assert {*table, *llava_hf.unused_names(size)} == names


def test_defaults_are_those_of_transformers():
    configs = {"": LlavaConfig(), "text_config": LlamaConfig(), "vision_config": CLIPVisionConfig()}
    assert configs.keys() == hf_config.DEFAULTS.keys() - {hf_config.ORIGINAL}
    for section in configs:
        defaults = hf_config.DEFAULTS[section]
        for key, value in defaults.items():
            assert getattr(configs[section], key) == value, (section, key)
    assert configs["text_config"].rope_parameters["rope_theta"] == hf_config.DEFAULT_ROPE_THETA


HUB_CONFIG = {  # as the hub has LLaVA-1.5 7B, written by an older transformers: most of the decoder's keys left out
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096, "model_type": "llama",
        "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064,
    },
    "vision_config": {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}  # fmt: skip


def test_the_hub_config_of_llava15_7b_is_the_size_known_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HUB_CONFIG))
    assert hf_config.size_from_config(tmp_path / "config.json", vocab_size=32064) == SIZES["llava15_7b"]


def test_size_is_read_from_older_and_newer_keys(source, tmp_path):
    older = copy(source, tmp_path / "older")

    def to_older(config: dict) -> None:
        config["text_config"]["rope_theta"] = config["text_config"].pop("rope_parameters")["rope_theta"]
        config["text_config"]["rope_scaling"] = None
        config["image_token_id"] = config.pop("image_token_index")
        del config["text_config"]["head_dim"]

    edit_config(older, to_older)
    assert read_size(older) == read_size(source)
    size = read_size(source)
    assert (size.image_token_id, size.pad_token_id, size.language.vocab_size) == (IMAGE_TOKEN, 1, TEXT["vocab_size"])


def test_vocabulary_is_the_embeddings_own(source, tmp_path):
    changed = copy(source, tmp_path / "hf")
    edit_config(changed, lambda c: c["text_config"].update(vocab_size=60))
    assert read_size(changed).language.vocab_size == TEXT["vocab_size"]


# ---- refusals: each is one line that names file and key, and leaves nothing behind


def edit_config(folder: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def top(**keys):
    return lambda folder: edit_config(folder, lambda config: config.update(keys))


def text(**keys):
    return lambda folder: edit_config(folder, lambda config: config["text_config"].update(keys))


def vision(**keys):
    return lambda folder: edit_config(folder, lambda config: config["vision_config"].update(keys))


def tensors(change):
    return lambda folder: edit_tensors(folder, change)


def shards(change):
    """A folder of three shards, then `change(folder)`."""

    def make(folder: Path) -> None:
        everything = sorted(load_file(folder / "model.safetensors").items())
        (folder / "model.safetensors").unlink()
        weight_map = {}
        for index in range(3):
            part = dict(everything[index::3])
            save_file(part, folder / f"part-{index}.safetensors")
            weight_map |= dict.fromkeys(part, f"part-{index}.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        change(folder)

    return make


def edit_index(change):
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return edit


def cut(name: str, keep: int):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


GATE, EMBED = "language_model.model.layers.1.mlp.gate_proj.weight", "language_model.model.embed_tokens.weight"
UNTIED = "language_model.lm_head.weight"
BAD = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "cannot read .*config.json"),
    "config cut short": (cut("config.json", 40), "config.json is not JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json must hold a mapping"),
    "another model": (top(model_type="llava_next"), "config.json describes 'llava_next'"),
    "the first LLaVA code's": (
        top(architectures=["LlavaLlamaForCausalLM"]),
        "no tensor .* under any name of a LlavaLlamaForCausalLM",
    ),
    "unknown architecture": (
        top(architectures=["LlavaNext"]),
        r"'llava' with architectures \['LlavaNext'\]; supported",
    ),
    "quantized": (top(quantization_config={"bits": 4}), "quantization_config"),
    "no decoder": (top(text_config=None), "text_config must be a mapping"),
    "class token kept": (top(vision_feature_select_strategy="full"), "vision_feature_select_strategy is 'full'"),
    "two feature layers": (top(vision_feature_layer=[-2, -1]), r"vision_feature_layer is \[-2, -1\]"),
    "no such feature layer": (top(vision_feature_layer=-9), "vision_feature_layer is -9; the tower has 3"),
    "feature layer is the embedding": (top(vision_feature_layer=0), "vision_feature_layer is 0"),
    "projector's activation": (top(projector_hidden_act="relu"), "projector_hidden_act is 'relu'; only 'gelu'"),
    "projector without biases": (top(multimodal_projector_bias=False), "multimodal_projector_bias"),
    "image token": (top(image_token_index="<image>"), "image_token_index must be a token id"),
    "tying said in words": (top(tie_word_embeddings="no"), "tie_word_embeddings must be true or false"),
    "another decoder": (text(model_type="mistral"), "text_config.model_type is 'mistral'; only 'llama'"),
    "decoder's activation": (text(hidden_act="gelu"), "text_config.hidden_act is 'gelu'; only 'silu'"),
    "attention biases": (text(attention_bias=True), "text_config.attention_bias"),
    "mlp biases": (text(mlp_bias=True), "text_config.mlp_bias"),
    "rope scaling": (
        text(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0}),
        "text_config.rope_parameters is of type 'yarn'",
    ),
    "older rope scaling": (text(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_scaling is of type 'dynamic'"),
    "rope scaling without factor": (text(rope_scaling={"type": "linear"}), "rope_scaling.factor must be a number"),
    "rope scaling that shrinks": (text(rope_scaling={"type": "linear", "factor": 0.5}), "factor must be .*got 0.5"),
    **{
        f"llama3 {key}": (
            text(rope_parameters=LLAMA3 | {key: 2}),
            f"text_config.rope_parameters.{key} is 2; only .* is supported",
        )
        for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    },
    "llama3 without its numbers": (
        text(rope_parameters={"rope_type": "llama3", "factor": 8.0}),
        "low_freq_factor is None; only 1.0",
    ),
    "two rope scalings": (
        text(rope_parameters=LLAMA3, rope_scaling={"type": "linear", "factor": 2.0}),
        "rope_scaling differ",
    ),
    "rope of many kinds": (text(rope_parameters={"full": {"rope_theta": 1e4}}), "rope_parameters must be one flat"),
    "partial rope": (text(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "rope base": (text(rope_parameters={"rope_theta": "big"}), "rope_theta must be a number above 0, got 'big'"),
    "no heads": (text(num_attention_heads=0), "num_attention_heads must be a positive integer, got 0"),
    "heads that do not divide": (text(num_attention_heads=5, head_dim=None), "num_attention_heads 5 does not divide"),
    "groups that do not divide": (text(num_key_value_heads=3), "num_key_value_heads 3 does not divide"),
    "half a width": (text(hidden_size=3.5), "hidden_size must be a positive int"),
    "another tower": (vision(model_type="siglip_vision_model"), "vision_config.model_type is 'siglip_vision_model'"),
    "tower's activation": (vision(hidden_act="gelu"), "vision_config.hidden_act is 'gelu'; only 'quick_gelu'"),
    "patches that do not divide": (vision(patch_size=7), "patch_size 7 does not divide image_size 16"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "weights cut short": (cut("model.safetensors", 9000), "model.safetensors is not a whole safetensors file"),
    "weights cut in the header": (cut("model.safetensors", 100), "model.safetensors is not a whole safetensors file"),
    "empty weights": (cut("model.safetensors", 0), "model.safetensors is not a whole safetensors file"),
    "missing shard": (shards(lambda f: (f / "part-1.safetensors").unlink()), "part-1.safetensors is missing"),
    "shard cut short": (shards(cut("part-2.safetensors", 5000)), "part-2.safetensors is not a whole"),
    "shard without its tensor": (
        shards(edit_index(lambda m: m.update({EMBED: "part-0.safetensors", GATE: "part-0.safetensors"}))),
        "part-0.safetensors does not hold language_model.model.*, which model.safetensors.index.json says",
    ),
    "shard elsewhere": (shards(edit_index(lambda m: m.update({EMBED: "../x"}))), "embed_tokens.weight is in '../x'"),
    "index without a map": (
        shards(lambda f: (f / "model.safetensors.index.json").write_text("{}")),
        "index.json has no weight_map",
    ),
    "unknown tensor": (tensors(lambda t: t.update({"lora.A": torch.ones(2)})), "model.safetensors: lora.A is not a"),
    "one layer too many": (text(num_hidden_layers=1), r"layers\.1\..* is not a tensor of this model"),
    "one layer too few": (text(num_hidden_layers=3), r"no tensor model.language_model.layers.2..*made of it"),
    "missing tensor": (tensors(lambda t: t.pop(GATE)), r"no tensor .*layers.1.mlp.gate_proj.weight; .*linear_fc1"),
    "missing embedding": (tensors(lambda t: t.pop(EMBED)), "no tensor model.language_model.embed_tokens.weight"),
    "missing output": (tensors(lambda t: t.pop(UNTIED)), "no tensor lm_head.weight"),
    "tensor of another shape": (
        tensors(lambda t: t.update({GATE: t[GATE][:-1].clone()})),
        r"gate_proj.weight has shape \[47, 32\], config.json makes it \[48, 32\]",
    ),
    "width other than the config's": (text(intermediate_size=96), r"gate_proj.weight has shape \[48, 32\]"),
    "embedding of no matrix": (tensors(lambda t: t.update({EMBED: torch.ones(3)})), r"embed_tokens.weight has shape"),
    "integers": (tensors(lambda t: t.update({GATE: t[GATE].to(torch.int8)})), "gate_proj.weight is stored as I8"),
    "two names for one tensor": (
        tensors(lambda t: t.update({"lm_head.weight": torch.ones(64, 32)})),
        "is the same tensor as",
    ),
    "untied weights said to be tied": (top(tie_word_embeddings=True), "lm_head.weight differs from the embedding"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused_in_one_line(kind, source, parallel, tmp_path):
    spoil, message = BAD[kind]
    folder = copy(source, tmp_path / "hf")
    spoil(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        import_hf(folder, tmp_path / "base")
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


def test_an_existing_folder_is_not_overwritten(source, parallel, tmp_path):
    (tmp_path / "base").mkdir()
    with pytest.raises(ConfigError, match="base exists"):
        import_hf(source, tmp_path / "base")
    assert not list((tmp_path / "base").iterdir())


# ---- the folder that comes of it


@pytest.mark.parametrize("shape", SHAPES)
def test_the_table_is_the_model(shape, parallel, tmp_path):
    """Names and shapes that the import writes, without building a model, are those of the model that loads them."""
    size = read_size(save_hf(tmp_path / "hf", shape))
    written = pending_tensors(open_tensors(tmp_path / "hf"), size)
    model = dict(build_ours(size, parallel).named_parameters())
    assert {name: tensor.shape for name, tensor in written.items()} == {n: tuple(p.shape) for n, p in model.items()}
    stored = {llava_hf.canonical_name(n): tuple(p.shape) for n, p in build_hf(*SHAPES[shape]).state_dict().items()}
    shapes = llava_hf.hf_shapes(size)
    assert shapes == {name: stored[name] for name in shapes}
    assert stored.keys() - shapes.keys() == ({llava_hf.OUTPUT} if size.language.tied_embeddings else set())


def test_every_tensor_is_recorded_with_the_hash_of_its_bytes(source, parallel, tmp_path):
    import_hf(source, tmp_path / "base", "bf16")
    state = load_ours(tmp_path / "base", parallel, precision="bf16").state_dict()
    records = json.loads((tmp_path / "base" / "tensors.json").read_text())
    assert records.keys() == {name for name in state if not name.endswith("_extra_state")}
    for name, record in records.items():
        raw = b"".join(bits.to_bytes(2, "little") for bits in state[name].flatten().view(torch.uint16).tolist())
        expected = {"shape": list(state[name].shape), "dtype": "bfloat16", "sha256": hashlib.sha256(raw).hexdigest()}
        assert record == expected, name


def test_a_model_saved_is_recorded_as_one_imported(source, parallel, tmp_path):
    import_hf(source, tmp_path / "a")
    base.save_base(load_ours(tmp_path / "a", parallel), tmp_path / "b")
    assert (tmp_path / "a" / "tensors.json").read_bytes() == (tmp_path / "b" / "tensors.json").read_bytes()


@pytest.mark.parametrize("max_shard_size", ["40KB", "1GB"])
def test_where_each_tensor_was_stored_is_remembered(max_shard_size, parallel, tmp_path):
    build_hf(*SHAPES["grouped-query"]).half().save_pretrained(tmp_path / "hf", max_shard_size=max_shard_size)
    import_hf(tmp_path / "hf", tmp_path / "base", "fp32")
    source = Source.read(tmp_path / "base")
    assert source is not None and source.kind == "llava_hf"
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert [stored.file for stored in source.tensors.values()] == [f.name for f in files for _ in load_file(f)]
    for name, stored in source.tensors.items():
        assert stored.name in load_file(tmp_path / "hf" / stored.file)
        assert llava_hf.canonical_name(stored.name) == name
        assert (stored.folder, stored.dtype) == ("model", "float16")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    assert source.index_metadata == ({"model": json.loads(index.read_text())["metadata"]} if len(files) > 1 else {})


def test_a_base_that_was_not_imported_has_no_source(parallel, tmp_path):
    base.save_base(build_ours(SIZES["tiny"], parallel), tmp_path / "base")
    assert Source.read(tmp_path / "base") is None


def test_one_source_gives_one_hash(source, tmp_path):
    copy(source, tmp_path / "elsewhere")
    hashes = {import_hf(source, tmp_path / "a"), import_hf(tmp_path / "elsewhere", tmp_path / "b")}
    assert hashes == {folder_hash(tmp_path / "a")}
    edit_tensors(tmp_path / "elsewhere", lambda t: t[GATE].mul_(2))
    assert import_hf(tmp_path / "elsewhere", tmp_path / "c") not in hashes


# ---- a tensor at a time


def test_few_tensors_are_held_at_a_time(tmp_path):
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def read() -> torch.Tensor:
        nonlocal most
        tensor = torch.zeros(1000)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    write_tensors(tmp_path, {f"t{i}": LazyTensor((1000,), torch.float32, read) for i in range(50)})
    assert 1 <= most <= 2 * NUM_FILES
    assert torch.serialization.get_crc32_options()  # as it was


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ConfigError("gone"), OSError(5, "Input/output error")])
def test_an_error_midway_leaves_nothing(error, source, tmp_path, monkeypatch):
    reads = 0
    read = SafetensorsShard.read

    def fail_late(self, name):
        nonlocal reads
        reads += 1
        if reads == 40:
            raise error
        return read(self, name)

    monkeypatch.setattr(SafetensorsShard, "read", fail_late)
    with pytest.raises(type(error) if not isinstance(error, OSError) else ConfigError):
        import_hf(source, tmp_path / "base")
    assert not list(tmp_path.iterdir())
    assert torch.serialization.get_crc32_options()
    monkeypatch.undo()
    import_hf(source, tmp_path / "base")


@pytest.mark.parametrize(
    ("is_terminal", "from_bytes", "shown"), [(True, 1, True), (False, 1, False), (True, None, False)]
)
def test_progress_is_shown_on_a_terminal_and_for_big_work(
    is_terminal, from_bytes, shown, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    if from_bytes:
        monkeypatch.setattr(stream, "SHOW_PROGRESS_FROM", from_bytes)
    write_tensors(tmp_path, {"t": LazyTensor((1000,), torch.float32, lambda: torch.ones(1000))})
    assert ("4.00k/4.00k" in capsys.readouterr().err) == shown


@pytest.fixture
def small_files():
    """No file may grow beyond 100 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_leaves_nothing(source, small_files, tmp_path):
    with pytest.raises(CheckpointError, match=r"^writing .*base failed: File too large \([0-9.]+ MiB free"):
        import_hf(source, tmp_path / "base")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("width", [10, 10_000])
def test_a_full_disk_is_told_in_the_disks_words(width, small_files, tmp_path):
    """Tensors that the file's buffer holds, and such that go past it."""
    tensors = {f"t{i}": LazyTensor((width,), torch.float32, lambda: torch.ones(width)) for i in range(300)}
    with pytest.raises(OSError, match="File too large"):
        write_tensors(tmp_path, tensors)


def test_conversion_runs_on_one_process(source, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="runs on one process, started on 2"):
        import_hf(source, tmp_path / "base")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision_tower": Path("clip")}, "holds a vision tower itself"),
        ({"projector": Path("mm_projector.bin")}, "holds a projector itself"),
        ({"image_token": "<picture>"}, "config.json says which token is the image's; '<picture>' cannot be given"),
        ({"seed": 3}, "seed 3 is of no use"),
    ],
    ids=str,
)
def test_options_of_no_use_are_refused(options, message, source, tmp_path):
    with pytest.raises(ConfigError, match=message):
        import_hf(source, tmp_path / "base", **options)


@pytest.mark.parametrize(("token", "says"), [(64, "is behind the vocabulary of 64"), (7, "has <image> as 5")])
def test_an_image_token_that_the_tokenizer_or_the_vocabulary_does_not_have_is_refused(source, tmp_path, token, says):
    folder = copy(source, tmp_path / "hf")
    tokenizer = Tokenizer(WordLevel({str(number): number for number in range(5)} | {"<image>": 5}, unk_token="0"))
    tokenizer.save(str(folder / "tokenizer.json"))
    edit_config(folder, lambda config: config.update(image_token_index=token))
    with pytest.raises(ConfigError, match=says):
        import_hf(folder, tmp_path / "base")
    assert not (tmp_path / "base").exists()
