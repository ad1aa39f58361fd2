"""A base made of the first LLaVA code's folder, or of a Llama and a CLIP, is the LLaVA that they make up."""

import dataclasses
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert_import import (
    LLAMA3,
    SHAPES,
    VISION,
    build_hf,
    copy,
    edit_config,
    hf_logits,
    load_ours,
    make_inputs,
    our_logits,
)
from test_data_conversation import byte_tokenizer, llama_tokenizer
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, LlamaForCausalLM, LlavaForConditionalGeneration

from mole_mega.checkpoint import base
from mole_mega.config import ConfigError, DataConfig, ParallelConfig, SourceConfig
from mole_mega.convert import llava_hf
from mole_mega.convert.carried_files import SOURCE_CONFIG
from mole_mega.convert.hf_config import llava_config, size_from_config
from mole_mega.convert.hf_import import UNUSED_FILE, import_hf
from mole_mega.convert.source import Source
from mole_mega.data.image import ImageSpec
from mole_mega.data.loader import build_loader
from mole_mega.models.sizes import SIZES
from mole_mega.platform import parallel as platform

ORIGINAL_CONFIG = {
    "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
    "mm_vision_tower": "some/clip", "mm_hidden_size": VISION["hidden_size"], "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False, "image_aspect_ratio": "pad", "use_mm_proj": True,
}  # fmt: skip
SEQUENTIAL = (("linear_1.", "0."), ("linear_2.", "2."))


@pytest.fixture(scope="module")
def parallel():
    yield platform.initialize(ParallelConfig(), seed=0)
    platform.shutdown()


@dataclasses.dataclass
class Whole:
    """A LLaVA of transformers, and ways to store its parts."""

    model: LlavaForConditionalGeneration

    @property
    def llama(self) -> LlamaForCausalLM:
        model = LlamaForCausalLM(self.model.config.text_config).to(self.model.dtype)
        model.model.load_state_dict(self.model.model.language_model.state_dict())
        model.lm_head.load_state_dict(self.model.lm_head.state_dict())
        return model

    def projector(self, prefix: str = "model.mm_projector.") -> dict[str, torch.Tensor]:
        tensors = {}
        for name, tensor in self.model.model.multi_modal_projector.state_dict().items():
            theirs, ours = next(pair for pair in SEQUENTIAL if name.startswith(pair[0]))
            tensors[prefix + ours + name.removeprefix(theirs)] = tensor.clone()
        return tensors

    def tower(self, prefix: str) -> dict[str, torch.Tensor]:
        state = self.model.model.vision_tower.state_dict()
        return {prefix + name.removeprefix("vision_model."): tensor.clone() for name, tensor in state.items()}

    def save_clip(self, folder: Path, form: str = "CLIPVisionModel") -> Path:
        """`CLIPVisionModel` as transformers 5 saves it; "older names"; `CLIPModel` with a side that reads text."""
        if form == "CLIPModel":
            text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
            clip = CLIPModel(CLIPConfig(vision_config=self.model.config.vision_config.to_dict(), text_config=text))
            clip.vision_model.load_state_dict(self.tower(""))
            clip.to(self.model.dtype).save_pretrained(folder)
        else:
            self.model.model.vision_tower.save_pretrained(folder)
            if form == "older names":
                save_file(self.tower("vision_model."), folder / "model.safetensors")
        spec = {"size": 16, "crop_size": 16, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
        (folder / "preprocessor_config.json").write_text(json.dumps(spec))
        return folder

    def save_llama(self, folder: Path, **options) -> Path:
        self.llama.save_pretrained(folder, **options)
        return folder

    def save_original(self, folder: Path, *, holds_tower: bool = False, model_type: str = "llava") -> Path:
        self.save_llama(folder)
        tensors = load_file(folder / "model.safetensors") | self.projector()
        if holds_tower:
            tensors |= self.tower("model.vision_tower.vision_tower.vision_model.")
        save_file(tensors, folder / "model.safetensors")
        names = {"architectures": ["LlavaLlamaForCausalLM"], "model_type": model_type}
        edit_config(folder, lambda config: config.update(ORIGINAL_CONFIG | names))
        return folder


def make_whole(shape: str = "grouped-query", **vision) -> Whole:
    text, tower, top = SHAPES[shape]
    return Whole(build_hf(text, {**tower, **vision}, top))


@pytest.fixture(scope="module")
def whole() -> Whole:
    return make_whole()


@pytest.fixture(scope="module")
def stored(whole, tmp_path_factory) -> Path:
    """The parts of `whole`, for tests to read or to copy: original, llama, clip, mm_projector.safetensors."""
    folder = tmp_path_factory.mktemp("stored")
    whole.save_original(folder / "original")
    whole.save_llama(folder / "llama")
    whole.save_clip(folder / "clip")
    save_file(whole.projector(), folder / "mm_projector.safetensors")
    return folder


def check_logits(whole: Whole, folder: Path, parallel) -> None:
    ours = load_ours(folder, parallel)
    inputs = make_inputs(ours.size.language.vocab_size, ours.size.vision.num_places)
    expected, got = hf_logits(whole.model, inputs), our_logits(ours, inputs)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() / expected.abs().max() < 1e-5


def as_torch_files(folder: Path, num_files: int = 1) -> Path:
    """A folder's safetensors as the files of `torch.save` that older folders have, with an index if there are more."""
    everything = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if num_files == 1:
        torch.save(everything, folder / "pytorch_model.bin")
        return folder
    weight_map = {}
    for index in range(num_files):
        part, name = dict(list(everything.items())[index::num_files]), f"pytorch_model-0000{index + 1}.bin"
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1234}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


# ---- the same model


@pytest.mark.parametrize("shape", ["multi-head", "grouped-query", "tied", "odd vocabulary", "llama3 rope"])
@pytest.mark.parametrize("form", ["CLIPVisionModel", "older names", "CLIPModel"])
def test_an_original_llava_gives_the_logits_of_transformers(form, shape, parallel, tmp_path):
    whole = make_whole(shape)
    clip = whole.save_clip(tmp_path / "clip", form)
    import_hf(whole.save_original(tmp_path / "hf"), tmp_path / "base", vision_tower=clip)
    check_logits(whole, tmp_path / "base", parallel)


@pytest.mark.parametrize("model_type", ["llava", "llava_llama"])
def test_an_original_llava_that_holds_its_tower_needs_no_other(model_type, parallel, tmp_path):
    """Its shape is CLIP's, whose heads are 64 wide: no config says it."""
    whole = make_whole(hidden_size=128, num_attention_heads=2)
    folder = whole.save_original(tmp_path / "hf", holds_tower=True, model_type=model_type)
    edit_config(folder, lambda c: c.update(mm_hidden_size=128, unfreeze_mm_vision_tower=True))
    import_hf(folder, tmp_path / "base")
    check_logits(whole, tmp_path / "base", parallel)
    assert ImageSpec.from_processor_files(tmp_path / "base").size == VISION["image_size"]


def test_the_tower_inside_counts_and_the_folder_beside_it_describes_it(whole, stored, parallel, tmp_path):
    folder = whole.save_original(tmp_path / "hf", holds_tower=True)
    other = make_whole("tied").save_clip(tmp_path / "clip")
    save_file({k: v + 1 for k, v in load_file(other / "model.safetensors").items()}, other / "model.safetensors")
    import_hf(folder, tmp_path / "base", vision_tower=other)
    check_logits(whole, tmp_path / "base", parallel)
    assert {stored.folder for stored in Source.read(tmp_path / "base").tensors.values()} == {"model"}


@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_the_original_says_which_layer_of_the_tower(layer, parallel, tmp_path):
    text, tower, _ = SHAPES["grouped-query"]
    whole = Whole(build_hf(text, tower, {"vision_feature_layer": layer}))
    folder = whole.save_original(tmp_path / "hf")
    edit_config(folder, lambda config: config.update(mm_vision_select_layer=layer))
    import_hf(folder, tmp_path / "base", vision_tower=whole.save_clip(tmp_path / "clip"))
    check_logits(whole, tmp_path / "base", parallel)


@pytest.mark.parametrize("shape", ["grouped-query", "wide heads", "tied", "linear rope"])
@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("mm_projector.safetensors", "model.mm_projector."),
        ("mm_projector.bin", "model.mm_projector."),
        ("mm_projector.bin", "mm_projector."),
    ],
)
def test_parts_give_the_logits_of_transformers(name, prefix, shape, parallel, tmp_path):
    whole = make_whole(shape)
    projector = whole.projector(prefix)
    save = save_file if name.endswith("safetensors") else torch.save
    save(projector, tmp_path / name)
    llama, clip = whole.save_llama(tmp_path / "llama"), whole.save_clip(tmp_path / "clip")
    import_hf(llama, tmp_path / "base", vision_tower=clip, projector=tmp_path / name)
    check_logits(whole, tmp_path / "base", parallel)


@pytest.mark.parametrize("num_files", [1, 3])
def test_torch_files_give_the_same_base(num_files, whole, stored, parallel, tmp_path):
    llama, clip = copy(stored / "llama", tmp_path / "llama"), copy(stored / "clip", tmp_path / "clip")
    options = {"projector": stored / "mm_projector.safetensors"}
    import_hf(llama, tmp_path / "a", vision_tower=clip, **options)
    import_hf(as_torch_files(llama, num_files), tmp_path / "b", vision_tower=as_torch_files(clip), **options)
    check_logits(whole, tmp_path / "b", parallel)
    for name in ("tensors.json", "model.json", "__0_0.distcp", "__0_1.distcp", ".metadata", UNUSED_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_torch_files_are_mapped_anew_now_and_then(stored, tmp_path, monkeypatch):
    from mole_mega.convert.hf_files import TorchShard

    folder, mapped = as_torch_files(copy(stored / "original", tmp_path / "hf")), []
    real = torch.load
    monkeypatch.setattr(torch, "load", lambda path, **more: mapped.append(more) or real(path, **more))
    monkeypatch.setattr(TorchShard, "LET_GO_AFTER", 10_000)
    import_hf(folder, tmp_path / "base", vision_tower=stored / "clip")
    assert len(mapped) > 5
    assert all(more["weights_only"] and more["mmap"] for more in mapped)


def test_a_fresh_projector_is_drawn_as_torch_draws_a_linear_layer(parallel, tmp_path):
    whole = make_whole(hidden_size=96, num_attention_heads=2)
    llama, clip = whole.save_llama(tmp_path / "llama"), whole.save_clip(tmp_path / "clip")
    hashes = {seed: import_hf(llama, tmp_path / str(seed), vision_tower=clip, seed=seed) for seed in (0, 1)}
    assert import_hf(llama, tmp_path / "again", vision_tower=clip, seed=1) == hashes[1] != hashes[0]
    state = load_ours(tmp_path / "0", parallel).vision_projection.encoder.state_dict()
    torch.manual_seed(0)
    for layer, (inputs, outputs) in (("linear_fc1", (96, 32)), ("linear_fc2", (32, 32))):
        theirs = torch.nn.Linear(inputs, outputs)
        assert torch.equal(state[f"{layer}.weight"], theirs.weight)
        assert torch.equal(state[f"{layer}.bias"], theirs.bias)
    # all but the projector is the source's
    whole.model.model.multi_modal_projector.load_state_dict(
        {f"linear_{i}.{kind}": state[f"linear_fc{i}.{kind}"] for i in (1, 2) for kind in ("weight", "bias")}
    )
    check_logits(whole, tmp_path / "0", parallel)


@pytest.mark.parametrize(
    ("kind", "model_type"), [("original", "llava"), ("original", "llava_llama"), ("llama", "llama")]
)
def test_a_config_without_architectures_is_told_by_its_keys(kind, model_type, stored, tmp_path):
    folder = copy(stored / kind, tmp_path / "hf")
    edit_config(folder, lambda config: config.update(model_type=model_type, architectures=None))
    import_hf(folder, tmp_path / "base", vision_tower=stored / "clip")
    assert Source.read(tmp_path / "base").kind == {"original": "llava_original", "llama": "parts"}[kind]


# ---- what goes along


def test_where_each_part_came_from_is_remembered(whole, stored, tmp_path):
    clip = whole.save_clip(tmp_path / "clip", "CLIPModel")
    as_torch_files(clip, 2)
    import_hf(stored / "llama", tmp_path / "base", vision_tower=clip, projector=stored / "mm_projector.safetensors")
    source = Source.read(tmp_path / "base")
    assert source.kind == "parts"
    assert source.index_metadata == {"vision": {"total_size": 1234}}
    folders = {"language": stored / "llama", "vision": clip, "projector": stored}
    for name, tensor in source.tensors.items():
        path = folders[tensor.folder] / tensor.file
        data = torch.load(path) if path.suffix == ".bin" else load_file(path)
        assert tensor.dtype == str(data[tensor.name].dtype).removeprefix("torch.") == "float32"
        part = next((part for part in ("vision", "projector") if part in name), "language")
        assert tensor.folder == part, name
    size = base.read_size(tmp_path / "base")
    assert source.tensors.keys() == llava_hf.hf_shapes(size).keys()


def test_a_fresh_projector_came_from_nowhere(stored, tmp_path):
    import_hf(stored / "llama", tmp_path / "base", vision_tower=stored / "clip")
    assert not [name for name in Source.read(tmp_path / "base").tensors if "projector" in name]


def test_text_tensors_of_clip_are_passed_over_aloud(whole, stored, tmp_path, capsys):
    clip = whole.save_clip(tmp_path / "clip", "CLIPModel")
    import_hf(stored / "original", tmp_path / "a", vision_tower=clip)
    assert re.fullmatch(r"passed over \d+ tensors of .*clip that read text", capsys.readouterr().err.splitlines()[-1])
    import_hf(stored / "original", tmp_path / "b", vision_tower=stored / "clip")
    assert "passed over" not in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["grouped-query", "wide heads", "linear rope", "llama3 rope", "tied"])
def test_the_base_is_described_as_transformers_llava(shape, tmp_path):
    whole = make_whole(shape)
    folder, clip = whole.save_original(tmp_path / "hf"), whole.save_clip(tmp_path / "clip")
    edit_config(folder, lambda config: config.update(bos_token_id=7))
    import_hf(folder, tmp_path / "base", vision_tower=clip)
    size = base.read_size(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert config["text_config"]["bos_token_id"] == 7
    assert size_from_config(tmp_path / "base" / "config.json", size.language.vocab_size) == size
    assert (tmp_path / "base" / SOURCE_CONFIG).read_bytes() == (folder / "config.json").read_bytes()
    theirs = LlavaForConditionalGeneration.config_class.from_pretrained(tmp_path / "base")
    assert theirs.vision_config.hidden_size == VISION["hidden_size"]
    assert theirs.text_config.rope_parameters["rope_type"] == (size.language.rope_scaling or "default")
    assert theirs.image_token_id == size.image_token_id


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_size_is_described_and_read_back(size, tmp_path):
    scaled = dataclasses.replace(
        size, language=dataclasses.replace(size.language, rope_scaling="llama3", rope_factor=8.0, rope_theta=5e5)
    )
    for each in (size, scaled):
        (tmp_path / "config.json").write_text(json.dumps(llava_config(each)))
        assert size_from_config(tmp_path / "config.json", each.language.vocab_size) == each


def test_a_size_written_before_rope_scaling_is_read(tmp_path):
    tree = json.loads(SIZES["tiny"].to_json())
    del tree["language"]["rope_scaling"], tree["language"]["rope_factor"]
    (tmp_path / "model.json").write_text(json.dumps(tree))
    assert SIZES["tiny"].from_json(tmp_path / "model.json") == SIZES["tiny"]


def make_source(stored: Path, folder: Path, kind: str, tokenizer) -> tuple[Path, dict]:
    """A copy of a stored folder with a tokenizer; and the options of its import."""
    source = copy(stored / kind, folder)
    tokenizer.save_pretrained(source)
    return source, {"vision_tower": stored / "clip"}


def no_image_mark(**more):
    return byte_tokenizer(specials=("<unk>", "<s>", "</s>", "<pad>"), **more)


@pytest.mark.parametrize("kind", ["original", "llama"])
@pytest.mark.parametrize("make", [byte_tokenizer, no_image_mark, llama_tokenizer])
def test_the_image_token_is_the_tokenizers(make, kind, stored, tmp_path):
    tokenizer = make()
    source, options = make_source(stored, tmp_path / "hf", kind, tokenizer)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    import_hf(source, tmp_path / "base", **options)
    carried, size = AutoTokenizer.from_pretrained(tmp_path / "base"), base.read_size(tmp_path / "base")
    assert carried.convert_tokens_to_ids("<image>") == size.image_token_id
    assert carried.convert_ids_to_tokens(size.image_token_id) == "<image>"
    if "<image>" in tokenizer.get_vocab():
        assert (tmp_path / "base" / "tokenizer.json").read_bytes() == before["tokenizer.json"]
    else:
        assert size.image_token_id == len(tokenizer)
    text = "what is it ?"
    assert carried(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert before == {path.name: path.read_bytes() for path in source.iterdir()}


def test_another_name_of_the_image_token(stored, tmp_path):
    tokenizer = byte_tokenizer(specials=("<unk>", "<s>", "</s>", "<pad>", "<picture>"))
    source, options = make_source(stored, tmp_path / "hf", "llama", tokenizer)
    import_hf(source, tmp_path / "base", image_token="<picture>", **options)
    assert base.read_size(tmp_path / "base").image_token_id == 4


def test_without_a_tokenizer_the_image_token_is_behind_the_vocabulary(stored, tmp_path, capsys):
    import_hf(stored / "llama", tmp_path / "base", vision_tower=stored / "clip")
    size = base.read_size(tmp_path / "base")
    assert size.image_token_id == size.language.vocab_size
    assert "has no tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["original", "llama"])
@pytest.mark.parametrize("make", [byte_tokenizer, no_image_mark])
def test_a_base_of_parts_can_be_trained_on_pictures(make, kind, parallel, tmp_path):
    """The loader finds tokenizer and image settings in the base, and its batches go through the model."""
    from PIL import Image

    tokenizer = make()
    whole = Whole(build_hf({"vocab_size": len(tokenizer), "max_position_embeddings": 512}, {}, {}))
    source = getattr(whole, f"save_{kind}")(tmp_path / "hf")
    tokenizer.save_pretrained(source)
    import_hf(source, tmp_path / "base", vision_tower=whole.save_clip(tmp_path / "clip"))
    Image.new("RGB", (20, 10), (200, 10, 10)).save(tmp_path / "red.png")
    row = {
        "image": "red.png",
        "conversations": [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "red"}],
    }
    (tmp_path / "data.json").write_text(json.dumps([row] * 4))
    model = load_ours(tmp_path / "base", parallel)
    data = DataConfig(
        sources=(SourceConfig(name="a", path=str(tmp_path / "data.json"), image_folder=str(tmp_path)),), max_length=400
    )
    loader = build_loader(
        data, tmp_path / "base", seed=0, places_per_image=model.size.vision.num_places,
        image_token_id=model.size.image_token_id, pad_token_id=model.size.pad_token_id, pad_to_multiple=1,
    )  # fmt: skip
    assert ImageSpec.from_processor_files(tmp_path / "base").mean == (0.1, 0.2, 0.3)  # the tower's
    (batch,) = loader.micro_batches(0, 2, 2, 0, 1)
    assert batch.image_mask.sum() == len(batch.tokens) * model.size.vision.num_places
    with torch.no_grad():
        logits = model(batch.tokens, batch.position_ids, batch.padding_mask, batch.image_mask, batch.pixels)
    assert logits.isfinite().all()


# ---- refusals


def setting(**keys):
    return lambda folder: edit_config(folder, lambda config: config.update(keys))


def drop(key):
    return lambda folder: edit_config(folder, lambda config: config.pop(key))


def change_tensors(change):
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


BAD_ORIGINAL = {
    "linear projector": (setting(mm_projector_type="linear"), "mm_projector_type is 'linear'; only 'mlp2x_gelu'"),
    "unsaid projector": (drop("mm_projector_type"), "mm_projector_type is 'linear'"),
    "class token kept": (setting(mm_vision_select_feature="cls_patch"), "mm_vision_select_feature is 'cls_patch'"),
    "no such layer": (setting(mm_vision_select_layer=-9), "mm_vision_select_layer is -9; the tower has 3"),
    "marks around images": (setting(mm_use_im_start_end=True), "mm_use_im_start_end is True"),
    "tiles": (setting(image_aspect_ratio="anyres"), "image_aspect_ratio is 'anyres'"),
    "merged patches": (setting(mm_patch_merge_type="spatial"), "mm_patch_merge_type is 'spatial'"),
    "many scales": (setting(s2=True), "s2 is True"),
    "another tower's width": (setting(mm_hidden_size=99), "mm_hidden_size is 99, but the tower's width is 24"),
    "a tower that was trained": (setting(unfreeze_mm_vision_tower=True), "does not hold the tower"),
    "another architecture": (setting(architectures=["LlavaMistralForCausalLM"]), "LlavaMistralForCausalLM"),
    "rope scaling": (setting(rope_parameters=LLAMA3 | {"rope_type": "yarn"}), "rope_parameters is of type 'yarn'"),
    "quantized": (setting(quantization_config={"bits": 4}), "quantization_config"),
    "no projector": (change_tensors(lambda t: t.pop("model.mm_projector.2.bias")), "no tensor .*linear_2.bias"),
    "a tensor too many": (
        change_tensors(lambda t: t.update({"model.image_newline": torch.ones(2)})),
        "model.safetensors: model.image_newline is not a tensor of this model",
    ),
    "projector of another width": (
        change_tensors(lambda t: t.update({"model.mm_projector.0.weight": torch.ones(32, 25)})),
        r"model.mm_projector.0.weight has shape \[32, 25\], config.json makes it \[32, 24\]",
    ),
    "not a tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "hf holds no usable tokenizer"),
}


def check_refused(message: str, folder: Path, tmp_path: Path, **options) -> None:
    there = set(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=message) as caught:
        import_hf(folder, tmp_path / "base", **options)
    assert "\n" not in str(caught.value)
    assert set(tmp_path.iterdir()) == there


@pytest.mark.parametrize("kind", BAD_ORIGINAL)
def test_a_bad_original_is_refused_in_one_line(kind, stored, tmp_path):
    spoil, message = BAD_ORIGINAL[kind]
    folder = copy(stored / "original", tmp_path / "hf")
    spoil(folder)
    check_refused(message, folder, tmp_path, vision_tower=stored / "clip")


def test_a_part_that_is_missing_or_too_many_is_named(whole, stored, tmp_path):
    check_refused(
        "does not hold the vision tower, which its config.json calls 'some/clip'", stored / "original", tmp_path
    )
    check_refused("llama is a Llama without a vision tower", stored / "llama", tmp_path)
    projector, clip = stored / "mm_projector.safetensors", stored / "clip"
    check_refused("holds a projector itself", stored / "original", tmp_path, vision_tower=clip, projector=projector)
    check_refused("seed 1 is of no use", stored / "original", tmp_path, vision_tower=clip, seed=1)
    check_refused("seed 1 is of no use", stored / "llama", tmp_path, vision_tower=clip, projector=projector, seed=1)
    check_refused("cannot read .*config.json", stored / "llama", tmp_path, vision_tower=tmp_path / "nowhere")
    check_refused(
        "nothing.bin is not a file", stored / "llama", tmp_path, vision_tower=clip, projector=Path("nothing.bin")
    )
    check_refused(
        "model_type is 'llama'; supported are clip", stored / "llama", tmp_path, vision_tower=stored / "llama"
    )
    check_refused("describes 'clip_vision_model'", clip, tmp_path, vision_tower=clip)
    narrow = whole.save_original(tmp_path / "narrow", holds_tower=True)
    check_refused("width 24, no multiple of 64 as CLIP's", narrow, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.mm_projector.0.bias"), "no tensor model.multi_modal_projector.linear_1.bias"),
        (lambda t: t.update({"model.mm_projector.4.bias": torch.ones(2)}), "mm_projector.4.bias is not a tensor of"),
        (
            lambda t: t.update({"model.mm_projector.2.bias": torch.ones(2)}),
            r"2.bias has shape \[2\], .* makes it \[32\]",
        ),
        (lambda t: t.update({"mm_projector.2.bias": torch.ones(32)}), "is the same tensor as"),
        (lambda t: t.update({"model.mm_projector.2.bias": torch.ones(32).int()}), "is stored as I32; supported are"),
    ],
)
def test_a_bad_projector_is_refused(change, message, whole, stored, tmp_path):
    tensors = whole.projector()
    change(tensors)
    save_file(tensors, tmp_path / "p.safetensors")
    options = {"vision_tower": stored / "clip", "projector": tmp_path / "p.safetensors"}
    check_refused(message, stored / "llama", tmp_path, **options)


class Harmful:
    """Unpickling this makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return (open, (self.marker, "w"))


BIN = "pytorch_model.bin"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f, t: torch.save({**t, "x": Harmful(f / "marker")}, f / BIN), "pytorch_model.bin holds code, not only"),
        (
            lambda f, t: (f / BIN).write_bytes(pickle.dumps(Harmful(f / "marker"))),
            "bin is not a whole file of torch.save",
        ),
        (
            lambda f, t: (f / BIN).write_bytes((f / BIN).read_bytes()[:9000]),
            "bin is not a whole file of torch.save's zip",
        ),
        (
            lambda f, t: torch.save(t, f / BIN, _use_new_zipfile_serialization=False),
            "bin is not a whole file of .* zip",
        ),
        (lambda f, t: torch.save({**t, "epoch": 3}, f / BIN), "pytorch_model.bin: epoch is int, not a tensor"),
        (lambda f, t: torch.save(list(t.values()), f / BIN), "pytorch_model.bin holds list, not tensors by name"),
        (lambda f, t: (f / BIN).unlink(), "neither model.safetensors nor .*, pytorch_model.bin or"),
    ],
    ids=["code", "bare pickle", "cut short", "old format", "a number", "a list", "none"],
)
def test_a_bad_torch_file_is_refused_and_never_run(spoil, message, stored, tmp_path):
    folder = as_torch_files(copy(stored / "llama", tmp_path / "hf"))
    spoil(folder, torch.load(folder / BIN))
    check_refused(message, folder, tmp_path, vision_tower=stored / "clip")
    assert not (folder / "marker").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t, tower: t.pop(tower + "embeddings.position_embedding.weight"),
            "tower inside has no tensor .*position_em",
        ),
        (
            lambda t, tower: t.pop(tower + "encoder.layers.0.mlp.fc1.weight"),
            "tower inside has no tensor .*layers.0.mlp.fc1",
        ),
        (lambda t, tower: t.update({tower + "embeddings.patch_embedding.weight": torch.ones(3)}), r"not one of 4 axes"),
        (lambda t, tower: t.pop(tower + "encoder.layers.1.mlp.fc2.bias"), "no tensor .*layers.1.mlp.fc2.bias; "),
    ],
)
def test_a_bad_tower_inside_is_refused(change, message, tmp_path):
    whole = make_whole(hidden_size=128, num_attention_heads=2)
    folder = whole.save_original(tmp_path / "hf", holds_tower=True)
    edit_config(folder, lambda c: c.update(mm_hidden_size=128))
    change_tensors(lambda t: change(t, "model.vision_tower.vision_tower.vision_model."))(folder)
    check_refused(message, folder, tmp_path)


def test_a_missing_torch_shard_is_named(stored, tmp_path):
    folder = as_torch_files(copy(stored / "llama", tmp_path / "hf"), 3)
    (folder / "pytorch_model-00002.bin").unlink()
    message = "pytorch_model-00002.bin is missing; pytorch_model.bin.index.json names it"
    check_refused(message, folder, tmp_path, vision_tower=stored / "clip")


def test_a_source_file_that_is_spoilt_is_an_error(stored, tmp_path):
    import_hf(stored / "llama", tmp_path / "base", vision_tower=stored / "clip")
    path = tmp_path / "base" / "source.json"
    for text in ("{", "[]", '{"kind": "other", "tensors": {}}', '{"kind": "parts", "tensors": {"a": {"name": "b"}}}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"source\.json"):
            Source.read(tmp_path / "base")


def test_a_base_is_no_place_to_import_into(stored, tmp_path):
    (tmp_path / "base").mkdir()
    check_refused("base exists", stored / "llama", tmp_path, vision_tower=stored / "clip")
