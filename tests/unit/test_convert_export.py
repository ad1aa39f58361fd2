"""A base goes back to the files that it came as, and a merged model computes what the trained one does."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_convert_import import (
    IMAGE_TOKEN,
    SHAPES,
    build_hf,
    hf_logits,
    load_ours,
    make_inputs,
    our_logits,
    save_hf,
)
from test_convert_sources import as_torch_files, make_whole
from trained_llava import save_step, train
from transformers import LlavaForConditionalGeneration

from mole_mega.checkpoint import base as bases
from mole_mega.checkpoint import files
from mole_mega.checkpoint.stream import LazyTensor
from mole_mega.checkpoint.trained import find_trained
from mole_mega.config import AdapterConfig, ConfigError, ParallelConfig
from mole_mega.convert.hf_export import MERGE_REPORT, export_base, export_merged
from mole_mega.convert.hf_import import import_hf
from mole_mega.convert.hf_writer import new_folder, write_tensors
from mole_mega.platform import parallel as platform

LORA = AdapterConfig(method="lora", rank=4, alpha=6.0)
ONE_EXPERT = AdapterConfig(num_experts=1, rank=3, alpha=6.0, gate="prob")
THREE_EXPERTS = AdapterConfig(num_experts=3, rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def parallel():
    yield platform.initialize(ParallelConfig(), seed=0)
    platform.shutdown()


@pytest.fixture(scope="module")
def base(tmp_path_factory, parallel) -> Path:
    folder = tmp_path_factory.mktemp("base")
    import_hf(save_hf(folder / "hf"), folder / "base")
    return folder / "base"


@pytest.fixture(scope="module")
def lora(tmp_path_factory, base, parallel):
    return train(base, tmp_path_factory.mktemp("lora") / "step_1", parallel, LORA)


def everything_in(folder: Path) -> dict[str, object]:
    """{file: {tensor: (dtype, shape, bytes)}} of weights, the parsed index, and the bytes of all other files."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix in (".safetensors", ".bin"):
            tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
            found[name] = {
                key: (tensor.dtype, tensor.shape, tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
                for key, tensor in tensors.items()
            }
        elif path.name.endswith(".index.json"):
            found[name] = json.loads(path.read_text())
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def nothing_but(folder: Path, *names: str) -> bool:
    return {path.name for path in folder.iterdir()} == set(names)


# ---- as it came


def in_one_file(folder: Path) -> None:
    save_hf(folder)


def in_shards(folder: Path) -> None:
    build_hf(*SHAPES["grouped-query"]).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def by_older_names(folder: Path) -> None:
    save_hf(folder)
    path = folder / "model.safetensors"
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): t for name, t in load_file(path).items()}
    save_file(renamed, path)


def in_mixed_precision(folder: Path) -> None:
    save_hf(folder)
    path = folder / "model.safetensors"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    tensors = {
        name: tensor.to(dtypes[("proj" in name) + ("vision" in name)]) for name, tensor in load_file(path).items()
    }
    save_file(tensors, path)


def tied_with_a_copy(folder: Path) -> None:
    save_hf(folder, "tied")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].clone()
    save_file(tensors, path)


def pickled(folder: Path) -> None:
    save_hf(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    "make", [in_one_file, in_shards, by_older_names, in_mixed_precision, tied_with_a_copy, pickled]
)
def test_a_base_comes_back_as_it_came(make, parallel, tmp_path):
    make(tmp_path / "hf")
    for name in ("tokenizer.json", "processor_config.json", "chat_template.jinja"):
        (tmp_path / "hf" / name).write_text(name)
    import_hf(tmp_path / "hf", tmp_path / "base")
    exported = export_base(find_trained(tmp_path / "base"), tmp_path / "out")
    assert exported.warnings == ()
    assert everything_in(tmp_path / "out") == everything_in(tmp_path / "hf")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_base_of_any_shape_comes_back_as_it_came(shape, parallel, tmp_path):
    import_hf(save_hf(tmp_path / "hf", shape), tmp_path / "base")
    export_base(find_trained(tmp_path / "base"), tmp_path / "out")
    assert everything_in(tmp_path / "out") == everything_in(tmp_path / "hf")


def test_a_base_in_another_precision_goes_back_to_that_of_its_source(parallel, tmp_path):
    import_hf(save_hf(tmp_path / "hf", dtype=torch.bfloat16), tmp_path / "base", "fp32")
    export_base(find_trained(tmp_path / "base"), tmp_path / "out")
    assert everything_in(tmp_path / "out") == everything_in(tmp_path / "hf")


def load_transformers(folder: Path) -> LlavaForConditionalGeneration:
    """Every tensor of the model is in the folder, and every one in the folder is the model's."""
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("shape", ["grouped-query", "wide heads", "tied", "first tower layer"])
def test_a_base_that_was_not_imported_loads_into_transformers(shape, base, parallel, tmp_path):
    """Made from nothing but the weights that the model holds: the rest of the tower is not there."""
    import_hf(save_hf(tmp_path / "hf", shape), tmp_path / "base")
    ours = load_ours(tmp_path / "base", parallel)
    bases.save_base(ours, tmp_path / "made", [tmp_path / "base" / "unused_hf.safetensors"])
    exported = export_base(find_trained(tmp_path / "made"), tmp_path / "out")
    assert ["tokenizer" in exported.warnings[0], "processor" in exported.warnings[1]] == [True, True]
    inputs = make_inputs(ours.size.language.vocab_size, ours.size.vision.num_places)
    assert close(hf_logits(load_transformers(tmp_path / "out"), inputs), our_logits(ours, inputs))


def test_missing_tokenizer_and_processor_are_said_and_stop_nothing(base, tmp_path):
    exported = export_base(find_trained(base), tmp_path / "out")
    assert len(exported.warnings) == 2
    assert all("there is no" in line and "\n" not in line for line in exported.warnings)
    assert (tmp_path / "out" / "model.safetensors").exists()


def weights_in(folder: Path) -> dict[str, object]:
    return {
        n: found for n, found in everything_in(folder).items() if n.endswith((".safetensors", ".bin", "index.json"))
    }


@pytest.fixture(scope="module")
def whole():
    return make_whole()


@pytest.mark.parametrize("num_files", [None, 1, 3], ids=["safetensors", "one torch file", "torch files"])
@pytest.mark.parametrize("kind", ["llama", "original", "original that holds its tower"])
def test_parts_come_back_apart(kind, num_files, whole, tmp_path):
    """Folders of their own, where they came so; what comes back is the same base again."""
    hf, clip, projector = tmp_path / "hf", whole.save_clip(tmp_path / "clip"), tmp_path / "projector" / "mine.bin"
    if kind == "llama":
        whole.save_llama(hf)
        projector.parent.mkdir()
        torch.save(whole.projector("model.mm_projector."), projector)
    else:
        whole.save_original(hf, holds_tower="tower" in kind)
    if num_files is not None:
        as_torch_files(hf, num_files)
    (hf / "generation_config.json").write_text("{}")
    options = {"vision_tower": clip} | ({"projector": projector} if kind == "llama" else {})
    import_hf(hf, tmp_path / "base", **options)
    out = tmp_path / "out"
    export_base(find_trained(tmp_path / "base"), out)
    language = out / "language" if kind == "llama" else out
    back = weights_in(out)
    expected = {str((language / name).relative_to(out)): found for name, found in weights_in(hf).items()}
    if "tower" not in kind:
        expected |= {f"vision/{name}": found for name, found in weights_in(clip).items()}
    if kind == "llama":
        expected |= {f"projector/{name}": found for name, found in weights_in(projector.parent).items()}
    assert back == expected
    assert (language / "config.json").read_bytes() == (hf / "config.json").read_bytes()
    assert (language / "generation_config.json").read_text() == "{}"
    if "tower" not in kind:
        assert (out / "vision" / "config.json").read_bytes() == (clip / "config.json").read_bytes()
    options = {key: out / key.removesuffix("_tower") for key in options}
    if kind == "llama":
        options["projector"] /= "mine.bin"
    if "tower" in kind:
        options = {"vision_tower": clip}
    import_hf(language, tmp_path / "again", **options)
    assert (tmp_path / "again" / "tensors.json").read_text() == (tmp_path / "base" / "tensors.json").read_text()
    assert (tmp_path / "again" / "model.json").read_text() == (tmp_path / "base" / "model.json").read_text()


# ---- merged


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max()).item() < tolerance


@pytest.mark.parametrize(
    "adapter",
    [
        LORA,
        ONE_EXPERT,
        AdapterConfig(method="lora", rank=2, alpha=5.0, attention=False, layers=(1,)),
        AdapterConfig(num_experts=1, rank=3, alpha=6.0, gate="none", router_bias=False),
        AdapterConfig(num_experts=1, rank=3, alpha=6.0, gate="straight_through"),
    ],
    ids=["lora", "one expert", "one layer's MLP", "gate none", "straight_through"],
)
def test_the_merged_model_computes_what_the_trained_one_does(adapter, base, parallel, tmp_path):
    trained, ours = train(base, tmp_path / "step_1", parallel, adapter)
    export_merged(trained, tmp_path / "out")
    inputs = make_inputs(ours.size.language.vocab_size, ours.size.vision.num_places)
    expected = our_logits(ours, inputs)
    assert close(hf_logits(load_transformers(tmp_path / "out"), inputs), expected)
    export_base(find_trained(base), tmp_path / "plain")
    assert not close(hf_logits(load_transformers(tmp_path / "plain"), inputs), expected, 0.05)


@pytest.mark.parametrize("kind", ["llama", "original"])
def test_parts_are_one_model_once_merged(kind, whole, parallel, tmp_path):
    """The projector too, which was initialised at import and came from nowhere."""
    clip = whole.save_clip(tmp_path / "clip")
    hf = whole.save_llama(tmp_path / "hf") if kind == "llama" else whole.save_original(tmp_path / "hf")
    import_hf(hf, tmp_path / "base", vision_tower=clip)
    trained, ours = train(tmp_path / "base", tmp_path / "step_1", parallel, LORA)
    exported = export_merged(trained, tmp_path / "out")
    assert "the image token 64 is behind the vocabulary of 64" in exported.warnings[-1]
    inputs = make_inputs(ours.size.language.vocab_size, ours.size.vision.num_places)
    expected = our_logits(ours, inputs)
    inputs.tokens[inputs.tokens == IMAGE_TOKEN] = ours.size.image_token_id
    got = hf_logits(load_transformers(tmp_path / "out"), inputs)
    assert close(got[:, :64], expected)
    assert torch.equal(got[:, 64], got[:, 0])


def test_what_training_left_alone_is_merged_as_it_was(lora, base, tmp_path):
    export_merged(lora[0], tmp_path / "out")
    export_base(find_trained(base), tmp_path / "plain")
    merged, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert merged.keys() == plain.keys()
    same = {name for name in plain if torch.equal(merged[name], plain[name])}
    adapted = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "multi_modal_projector")
    assert {name for name in plain if not any(a in name for a in adapted) or "vision_tower" in name} == same


def test_the_merge_report_says_what_outlived_the_cast(parallel, tmp_path):
    import_hf(save_hf(tmp_path / "hf", dtype=torch.bfloat16), tmp_path / "base")
    trained, ours = train(tmp_path / "base", tmp_path / "step_1", parallel, LORA)
    exported = export_merged(trained, tmp_path / "out")
    assert json.loads((tmp_path / "out" / MERGE_REPORT).read_text()) == exported.merge
    before = load_file(tmp_path / "hf" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    state = dict(ours.named_parameters())
    name = "model.language_model.layers.1.self_attn.o_proj.weight"
    stored = name.replace("model.language_model.", "language_model.model.")
    A, B = (state[f"language_model.decoder.layers.1.self_attention.linear_proj.lora_o_{f}"] for f in "AB")
    delta = 6.0 / 4 * B.detach() @ A.detach()
    assert torch.equal(after[stored], (before[stored].float() + delta).bfloat16())
    moved = after[stored].float() - before[stored].float()
    entry = exported.merge["tensors"][name]
    assert entry["delta_norm"] == pytest.approx(float(delta.norm()), rel=1e-5)
    assert entry["survived"] == pytest.approx(float(moved.norm() / delta.norm()), rel=1e-5)
    assert entry["unchanged"] == pytest.approx(float((moved == 0).float().mean()))
    assert 0 < entry["unchanged"] < 0.1
    assert len(exported.merge["tensors"]) == 2 * 7 + 4
    assert 0.9 < exported.merge["overall"]["survived"] < 1.1


def test_a_change_below_the_precision_is_reported_as_lost(parallel, tmp_path):
    import_hf(save_hf(tmp_path / "hf", dtype=torch.bfloat16), tmp_path / "base")
    trained, ours = train(tmp_path / "base", tmp_path / "a" / "step_1", parallel, LORA, projector=False)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora" in name:
                parameter.mul_(1e-3)
    shutil.rmtree(trained.step)
    save_step(ours, trained.run, tmp_path / "base", tmp_path / "a" / "step_1")
    overall = export_merged(find_trained(tmp_path / "a" / "step_1"), tmp_path / "out").merge["overall"]
    assert overall["unchanged"] > 0.95
    assert overall["survived"] < 1


# ---- refused, and nothing left


def test_what_cannot_be_merged_is_refused_with_the_reason(base, lora, parallel, tmp_path):
    experts, _ = train(base, tmp_path / "step_1", parallel, THREE_EXPERTS)
    for export, trained, says in (
        (export_merged, experts, "has 3 experts a layer: which of them changes a token depends on the token"),
        (export_merged, find_trained(base), "has no adapters"),
        (export_base, lora[0], "has adapters"),
    ):
        with pytest.raises(ConfigError, match=says) as caught:
            export(trained, tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert nothing_but(tmp_path, "step_1")


def test_a_sum_that_is_not_finite_is_refused(parallel, tmp_path):
    import_hf(save_hf(tmp_path / "hf", dtype=torch.float16), tmp_path / "base")
    adapter = AdapterConfig(method="lora", rank=4, alpha=1e8)
    trained, _ = train(tmp_path / "base", tmp_path / "step_1", parallel, adapter)
    with pytest.raises(ConfigError, match=r"_proj\.weight with its adapters is not finite in torch\.float16"):
        export_merged(trained, tmp_path / "out")
    assert nothing_but(tmp_path, "hf", "base", "step_1")


def test_an_existing_folder_is_refused_and_left_alone(base, lora, tmp_path):
    (tmp_path / "out").mkdir()
    for export, trained in ((export_base, find_trained(base)), (export_merged, lora[0])):
        with pytest.raises(ConfigError, match="out exists; choose another folder"):
            export(trained, tmp_path / "out")
    assert nothing_but(tmp_path, "out") and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("damage", ["base", "step"])
def test_an_altered_checkpoint_is_refused(damage, base, parallel, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    trained, _ = train(tmp_path / "base", tmp_path / "step_1", parallel, LORA)
    folder = tmp_path / "base" if damage == "base" else trained.step
    path = next(folder.glob("*.distcp"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"\.distcp was altered"):
        export_merged(trained, tmp_path / "out")
    assert nothing_but(tmp_path, "base", "step_1")


# ---- the writer


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    shapes = ((3, 5), (7,), (), (2, 3, 4), (0, 4))
    return {
        f"t{i}": torch.randn(shape, generator=generator).to(dtypes[i % 3])
        for i, shape in enumerate(shapes * 3)
    }  # fmt: skip


def lazy(tensor: torch.Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def starts_at_whole_elements(path: Path) -> bool:
    """Readers that map the file need tensors to start at a multiple of their elements' width."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]
    widths = {"F32": 4, "BF16": 2, "F16": 2}
    return length % 8 == 0 and all(t["data_offsets"][0] % widths[t["dtype"]] == 0 for t in header.values())


@pytest.mark.parametrize("limit", [10**9, 40], ids=["one file", "shards"])
def test_written_tensors_are_read_back(limit, tmp_path):
    tensors = some_tensors()
    write_tensors(tmp_path / "out", {name: lazy(tensor) for name, tensor in tensors.items()}, max_shard_bytes=limit)
    paths = sorted((tmp_path / "out").glob("*.safetensors"))
    back = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    assert back.keys() == tensors.keys()
    assert all(back[n].dtype == t.dtype and torch.equal(back[n], t) for n, t in tensors.items())
    for path in paths:
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
        assert starts_at_whole_elements(path)
    if limit == 40:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        assert all(name in load_file(tmp_path / "out" / file) for name, file in index["weight_map"].items())
        assert paths[0].name == f"model-00001-of-{len(paths):05d}.safetensors"
        assert all(sum(t.nbytes for t in load_file(p).values()) <= 40 or len(load_file(p)) == 1 for p in paths)
    else:
        assert nothing_but(tmp_path / "out", "model.safetensors")


def test_a_tensor_is_read_when_the_one_before_is_written(tmp_path):
    held: list[int] = []

    def read(number: int) -> torch.Tensor:
        held.append(number)
        size = (tmp_path / "out" / "model.safetensors").stat().st_size
        assert size >= (number - 2) * 4 * 10**6
        return torch.full((10**6,), float(number))

    write_tensors(
        tmp_path / "out", {str(i): LazyTensor((10**6,), torch.float32, lambda i=i: read(i)) for i in range(4)}
    )
    assert held == [0, 1, 2, 3]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space"), ConfigError("bad")], ids=repr)
def test_an_export_that_stops_midway_leaves_nothing(error, tmp_path):
    def read() -> torch.Tensor:
        raise error

    tensors = {"a": lazy(torch.ones(3)), "b": LazyTensor((3,), torch.float32, read)}
    with pytest.raises((KeyboardInterrupt, ConfigError)), new_folder(tmp_path / "out") as folder:
        write_tensors(folder, tensors)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_is_no_hindrance(tmp_path):
    left = files.incomplete_name(tmp_path / "out")
    left.mkdir()
    (left / "old").write_text("")
    with new_folder(tmp_path / "out") as folder:
        write_tensors(folder, {"a": lazy(torch.ones(3))})
    assert nothing_but(tmp_path, "out") and nothing_but(tmp_path / "out", "model.safetensors")
