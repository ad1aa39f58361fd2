"""What products in FP8 ask of the machine and of sizes, and what is said where that is not there."""

from dataclasses import replace

import pytest
import torch

from mole_mega.config import (
    AdapterConfig,
    ConfigError,
    DataConfig,
    Fp8Config,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from mole_mega.estimate.search import check
from mole_mega.models.mcore_config import build_configs, check_layout
from mole_mega.models.sizes import SIZES
from mole_mega.platform import te
from mole_mega.platform.recipes import RECIPES, sequence_multiple
from mole_mega.training.dry_run import dry_run

SIZE = SIZES["tiny"]


def make_run(precision="fp8", fp8=None, **parallel) -> RunConfig:
    return RunConfig(
        run_dir="", model=ModelConfig(base="", backend="transformer_engine"), adapter=AdapterConfig(method="lora"),
        train=TrainConfig(steps=1, precision=precision), fp8=Fp8Config(**(fp8 or {})),
        data=DataConfig(sources=(SourceConfig(name="a", path=""),), max_length=SIZE.language.max_length),
        parallel=ParallelConfig(**parallel),
    )  # fmt: skip


@pytest.fixture
def gpu(monkeypatch):
    """A machine with Transformer Engine and a GPU of a compute capability, and what torch was built for."""

    def pretend(capability, cuda="13.0"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(te, "why_unusable", lambda: "")

    return pretend


def refusal(run: RunConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        te.check_machine(run)
    return str(caught.value)


def test_the_local_backend_asks_for_nothing():
    te.check_machine(replace(make_run("bf16"), model=ModelConfig(base="")))


@pytest.mark.parametrize(
    ("precision", "asked"), [("fp8", "train.precision fp8"), ("bf16", "model.backend transformer_engine")]
)
def test_without_a_gpu_what_was_asked_is_named_and_what_to_use_instead(precision, asked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refusal(make_run(precision))
    assert message.startswith(f"{asked} needs a CUDA GPU") and "model.backend local" in message
    assert "fp8.store_base true" in message


@pytest.mark.parametrize("reason", ["is not installed", "cannot be imported: undefined symbol: x"])
def test_without_transformer_engine_the_reason_is_given(gpu, monkeypatch, reason):
    gpu((9, 0))
    monkeypatch.setattr(te, "why_unusable", lambda: reason)
    message = refusal(make_run())
    assert f"needs Transformer Engine, which {reason}" in message and "model.backend local" in message


def test_a_broken_build_is_told_from_one_that_is_missing(monkeypatch):
    def broken(name):
        raise OSError("libcublas.so.13:\n cannot open")

    monkeypatch.setattr(te.importlib, "import_module", broken)
    assert te.why_unusable() == "cannot be imported: libcublas.so.13: cannot open"

    def missing(name):
        raise ModuleNotFoundError("No module", name="transformer_engine")

    monkeypatch.setattr(te.importlib, "import_module", missing)
    assert te.why_unusable() == "is not installed"


TAKEN = [("delayed", (8, 9)), ("tensorwise", (9, 0)), ("blockwise", (9, 0)), ("mxfp8", (10, 0)), ("blockwise", (12, 0))]


@pytest.mark.parametrize(("recipe", "capability"), TAKEN)
def test_a_gpu_takes_its_recipes(gpu, recipe, capability):
    gpu(capability)
    te.check_machine(make_run(fp8={"recipe": recipe}))


@pytest.mark.parametrize(
    ("capability", "copies"),
    [((8, 9), 2), ((9, 0), 2), ((10, 0), 1), ((10, 3), 1), ((11, 0), 1), ((12, 0), 2), ((13, 0), 1), (None, 2)],
)
def test_a_weight_is_kept_once_where_products_read_it_either_way_and_one_scale_is_all(capability, copies):
    assert {name: recipe.copies(capability) for name, recipe in RECIPES.items()} == {
        "delayed": copies, "tensorwise": copies, "blockwise": 2, "mxfp8": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda", "parts"),
    [
        ("tensorwise", (8, 0), "13.0", ["8.9", "Ada", "GPU of 8.0", "model.backend local"]),
        ("delayed", (8, 6), "13.0", ["8.9", "GPU of 8.6"]),
        ("blockwise", (8, 9), "13.0", ["9.0", "Hopper", "fp8.recipe delayed or tensorwise"]),
        ("blockwise", (9, 0), "12.8", ["CUDA 12.9", "this one is for 12.8", "delayed or tensorwise"]),
        ("mxfp8", (9, 0), "13.0", ["10.0", "Blackwell", "GPU of 9.0", "delayed or tensorwise or blockwise"]),
        ("mxfp8", (12, 0), "13.0", ["12.0 and more", "delayed or tensorwise or blockwise"]),
    ],
)
def test_a_recipe_that_a_gpu_lacks_is_refused_with_those_that_it_has(gpu, recipe, capability, cuda, parts):
    gpu(capability, cuda)
    message = refusal(make_run(fp8={"recipe": recipe}))
    assert message.startswith(f"fp8.recipe {recipe} ") and all(part in message for part in parts), message


def test_bf16_on_an_old_gpu_asks_for_no_recipe(gpu):
    gpu((7, 0))
    te.check_machine(make_run("bf16"))


def test_attention_over_ranks_in_fp32_is_refused(gpu):
    gpu((9, 0))
    assert refusal(make_run("fp32", context=2)).startswith("parallel.context 2")
    te.check_machine(make_run("bf16", context=2))


@pytest.mark.parametrize("context", [1, 2])
def test_a_layout_is_built_only_in_a_precision_that_is_computed(context):
    run = replace(make_run("fp32", context=context), run_dir="out")
    if context == 1:
        te.check_precision(run)
        return
    for look in (lambda: dry_run(run, SIZE, 2, None), lambda: check(run, SIZE, 2)):
        with pytest.raises(ConfigError, match=r"parallel.context 2: .* train.precision is fp32"):
            look()


WIDE = replace(
    SIZE,
    language=replace(SIZE.language, hidden_size=512, num_heads=16, num_kv_heads=4, ffn_hidden_size=1024),
)


@pytest.mark.parametrize(
    ("change", "parallel", "recipe", "parts"),
    [
        ({"hidden_size": 528}, {}, "mxfp8", ["multiple of 32", "hidden width is 528"]),
        ({"ffn_hidden_size": 1032}, {}, "tensorwise", ["multiple of 16", "feed-forward width is 1032"]),
        ({"ffn_hidden_size": 1056}, {"tensor": 2}, "mxfp8", ["parallel.tensor 2", "feed-forward width is 528"]),
        ({"hidden_size": 256}, {"tensor": 4}, "mxfp8", ["key-value heads' width is 16"]),
    ],
)
def test_a_width_that_the_recipe_cannot_take_is_named(change, parallel, recipe, parts):
    size = replace(WIDE, language=replace(WIDE.language, **change))
    with pytest.raises(ConfigError) as caught:
        check_layout(make_run(fp8={"recipe": recipe}, **parallel), size)
    assert all(part in str(caught.value) for part in [f"fp8.recipe {recipe}", *parts]), str(caught.value)


def test_a_7b_goes_with_every_recipe_under_tensor_parallelism_2():
    for recipe in RECIPES:
        check_layout(make_run(fp8={"recipe": recipe}, tensor=2), SIZES["llava15_7b"])


def test_no_width_is_asked_for_in_bf16():
    size = replace(WIDE, language=replace(WIDE.language, ffn_hidden_size=1032))
    check_layout(make_run("bf16"), size)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("store_base", [True, False])
def test_megatron_core_gets_the_recipe_for_the_decoder_alone(recipe, store_base):
    edges = recipe != "delayed"
    fp8 = {"recipe": recipe, "store_base": store_base, "first_last_layers_bf16": edges}
    configs = build_configs(make_run(fp8=fp8), WIDE)
    language = configs.language
    assert language.fp8 == ("hybrid" if recipe in ("delayed", "tensorwise") else "e4m3")
    assert language.fp8_recipe == recipe and language.fp8_param is store_base
    assert language.first_last_layers_bf16 is edges
    assert (language.num_layers_at_start_in_bf16, language.num_layers_at_end_in_bf16) == (1, 1)
    assert language.params_dtype == torch.bfloat16 and language.bf16
    assert configs.vision.fp8 is None and configs.projector.fp8 is None


@pytest.mark.parametrize(
    ("run", "multiple"),
    [
        (make_run("bf16"), 8),
        (make_run("bf16", tensor=3), 24),
        (make_run(), 16),
        (make_run(tensor=2), 32),
        (make_run(fp8={"recipe": "mxfp8"}, tensor=2), 64),
        (make_run("bf16", context=2), 16),
        (make_run(context=2, tensor=2), 64),
    ],
)
def test_sequences_are_padded_so_that_every_part_has_rows_that_fp8_takes(run, multiple):
    assert sequence_multiple(run) == multiple
