"""A Hugging Face LLaVA imported as a base is the same model, whatever its shape, layout and precision."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mole_mega.checkpoint import base
from mole_mega.config import AdapterConfig, ConfigError, DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from mole_mega.convert import hf_config, llava_hf
from mole_mega.convert.hf_import import UNUSED_FILE, import_hf, read_size
from mole_mega.models.llava import LLaVA
from mole_mega.models.sizes import LlavaSize
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
SHAPES: dict[str, tuple[dict, dict, dict]] = {  # changes to the decoder, the tower and the whole
    "multi-head": ({}, {}, {}),
    "grouped-query": ({"num_attention_heads": 8, "num_key_value_heads": 2}, {}, {}),
    "multi-query": ({"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {}, {}),
    "wide heads": ({"num_key_value_heads": 2, "head_dim": 12}, {"patch_size": 4}, {}),
    "odd vocabulary": ({"vocab_size": 67}, {"num_attention_heads": 2}, {}),
    "tied": ({"tie_word_embeddings": True, "num_key_value_heads": 2}, {}, {"tie_word_embeddings": True}),
    "last tower layer": ({}, {}, {"vision_feature_layer": -1}),
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


@pytest.mark.parametrize("prefixes", [(), HUB, NESTED], ids=["built model's names", "hub's older names", "nested tower"])
def test_every_layout_of_names_gives_the_same_base(prefixes, source, parallel, tmp_path):
    renamed = rename(copy(source, tmp_path / "hf"), prefixes)
    assert load_file(renamed / "model.safetensors").keys() != load_file(source / "model.safetensors").keys()
    assert import_hf(renamed, tmp_path / "b") == import_hf(source, tmp_path / "a")


def test_shards_give_the_same_base(source, parallel, tmp_path):
    build_hf(*SHAPES["grouped-query"]).save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    assert import_hf(tmp_path / "hf", tmp_path / "b") == import_hf(source, tmp_path / "a")


def test_buffers_of_older_versions_are_passed_over(source, parallel, tmp_path):
    changed = copy(source, tmp_path / "hf")
    edit_tensors(changed, lambda t: t.update({
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(5)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
    }))  # fmt: skip
    assert import_hf(changed, tmp_path / "b") == import_hf(source, tmp_path / "a")


def test_a_stored_copy_of_tied_embeddings_changes_nothing(parallel, tmp_path):
    source = save_hf(tmp_path / "hf", "tied")
    plain = import_hf(source, tmp_path / "a")
    embedding = used_tensors(source)[llava_hf.EMBEDDING]
    edit_tensors(source, lambda t: t.update({"language_model.lm_head.weight": embedding.clone()}))
    assert import_hf(source, tmp_path / "b") == plain


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
    names = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "processor_config.json", "chat_template.jinja"]
    for name in [*names, "README.md"]:
        (changed / name).write_text(name)
    import_hf(changed, tmp_path / "base")
    assert all((tmp_path / "base" / name).read_text() == name for name in names)
    assert (tmp_path / "base" / "config.json").read_bytes() == (changed / "config.json").read_bytes()
    assert not (tmp_path / "base" / "README.md").exists()


def test_import_starts_and_leaves_its_own_process_group(source, tmp_path):
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


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.distcp"))


# ---- names and sizes


def test_the_table_names_every_tensor_of_transformers_model():
    model = build_hf(*SHAPES["multi-head"])
    names = {llava_hf.canonical_name(name) for name in model.state_dict()}
    size = hf_size_of(model)
    table = [name for row in llava_hf.rows(size) for name in row.hf]
    assert len(table) == len(set(table))
    assert {*table, *llava_hf.unused_names(size)} == names


def hf_size_of(model: LlavaForConditionalGeneration) -> LlavaSize:
    text, vision = model.config.text_config, model.config.vision_config
    from mole_mega.models.sizes import LanguageSize, VisionSize

    return LlavaSize(
        vision=VisionSize(
            num_layers=vision.num_hidden_layers, hidden_size=vision.hidden_size, ffn_hidden_size=40, num_heads=3,
            image_size=16, patch_size=8,
        ),
        language=LanguageSize(
            num_layers=text.num_hidden_layers, hidden_size=32, ffn_hidden_size=48, num_heads=4, num_kv_heads=4,
            vocab_size=64, max_length=128,
        ),
        image_token_id=IMAGE_TOKEN,
    )  # fmt: skip


def test_defaults_are_those_of_transformers():
    configs = {"": LlavaConfig(), "text_config": LlamaConfig(), "vision_config": CLIPVisionConfig()}
    for section, defaults in hf_config.DEFAULTS.items():
        for key, value in defaults.items():
            assert getattr(configs[section], key) == value, (section, key)
    assert configs["text_config"].rope_parameters["rope_theta"] == hf_config.DEFAULT_ROPE_THETA
