"""A dry run builds what real ranks would build, counts what the estimate counts, and finds what does not fit."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories

from mole_mega import train
from mole_mega.checkpoint.base import model_entries
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
from mole_mega.estimate.memory import micro_batch, stage_memory
from mole_mega.estimate.parameters import stage_parameters
from mole_mega.estimate.search import check
from mole_mega.models import mcore_config
from mole_mega.models.llava import LLaVA
from mole_mega.models.sizes import SIZES
from mole_mega.platform import fp8
from mole_mega.platform import parallel as platform
from mole_mega.platform.pretend import rank_of
from mole_mega.training.dry_run import dry_run

TINY = SIZES["tiny"]
ODD = replace(TINY, language=replace(TINY.language, vocab_size=131))  # its rows do not divide over ranks
TIED = replace(TINY, language=replace(TINY.language, tied_embeddings=True))
WIDE_HEADS = replace(TINY, language=replace(TINY.language, head_dim=32))


def run_of(layout=None, **sections):
    adapter = {"num_experts": 4, "rank": 4} | sections.pop("adapter", {})
    training = {"steps": 1, "global_batch_size": 64} | sections.pop("train", {})
    return RunConfig(
        run_dir="unused",
        model=ModelConfig(base="unused"),
        data=DataConfig(sources=(SourceConfig(name="none", path="none"),), max_length=64),
        parallel=layout or ParallelConfig(),
        adapter=AdapterConfig(**adapter),
        train=TrainConfig(**training),
    )


LAYOUTS = {
    "one process": (ParallelConfig(), 1),
    "TP 2": (ParallelConfig(tensor=2), 2),
    "PP 4": (ParallelConfig(pipeline=4), 4),
    "EP 2 of DP 4": (ParallelConfig(expert=2), 4),
    "TP 2, PP 2, EP 4, DP 4": (ParallelConfig(tensor=2, pipeline=2, expert=4), 16),
}
OTHERS = {
    "lora": {"adapter": {"method": "lora"}},
    "lora, MLP alone": {"adapter": {"method": "lora", "attention": False}},
    "no attention": {"adapter": {"attention": False}},
    "two layers": {"adapter": {"layers": (0, 3)}},
    "no router bias": {"adapter": {"router_bias": False}},
    "frozen projector": {"train": {"projector": False}},
    "bf16, distributed optimizer": {"train": {"distributed_optimizer": True}},
    "weights travel": {"adapter": {"expert_parallel": "weights"}},
    "top-2": {"adapter": {"top_k": 2, "expert_parallel": "auto"}},
    "dense": {"adapter": {"gate": "dense", "expert_parallel": "weights"}},
    "shared A": {"adapter": {"share_A": True, "expert_parallel": "weights"}},
    "a router a linear": {"adapter": {"router_scope": "linear", "expert_parallel": "weights", "layers": (0, 3)}},
    "routers a linear, without bias": {
        "adapter": {"router_scope": "linear", "expert_parallel": "weights", "router_bias": False}
    },
    "a router a sample": {"adapter": {"router_scope": "sample", "balance_weight": 0.0}},
    "an expert a task": {"adapter": {"router_scope": "task", "gate": "none", "balance_weight": 0.0}},
    "lora, what belongs to mixtures set": {"adapter": {"method": "lora", "share_A": True, "router_scope": "sample"}},
}


@pytest.mark.parametrize("size", [TINY, ODD, TIED, WIDE_HEADS], ids=["tiny", "odd vocabulary", "tied", "wide heads"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_estimate_counts_what_is_built(layout, size):
    parallel, world = LAYOUTS[layout]
    run = run_of(parallel)
    built = dry_run(run, size, world, base=None).stages
    assert built == tuple(stage_parameters(run, size, stage) for stage in range(parallel.pipeline))


@pytest.mark.parametrize("sections", OTHERS.values(), ids=OTHERS.keys())
def test_the_estimate_counts_every_kind_of_adapter(sections):
    expert = 1 if sections.get("adapter", {}).get("method") == "lora" else 2
    run = run_of(ParallelConfig(tensor=2, pipeline=2, expert=expert), **sections)
    built = dry_run(run, TINY, 8, base=None)
    assert built.stages == tuple(stage_parameters(run, TINY, stage) for stage in range(2))


@pytest.mark.parametrize(
    ("layout", "scale"),
    [(ParallelConfig(tensor=2, pipeline=2), "channel"), (ParallelConfig(pipeline=2, expert=2), "block")],
)
def test_the_estimate_counts_the_bytes_of_an_fp8_base(layout, scale):
    run = replace(run_of(layout, train={"projector": False}), fp8=Fp8Config(store_base=True, scale=scale))
    for stage in range(2):
        with rank_of(layout, 2 * stage, 4) as pretended:
            model = LLaVA(run, ODD, pretended)
            kept, _ = fp8.bytes_kept(model)
            others = sum(p.nbytes for p in model.parameters() if not p.requires_grad and p.dtype != fp8.FP8)
        assert kept + others == stage_memory(run, ODD, 4, stage, micro_batch(run)).frozen


WHOLE_BLOCKS = replace(
    TINY,
    language=replace(TINY.language, num_heads=8, num_kv_heads=8, head_dim=64, ffn_hidden_size=1024),
    vision=replace(TINY.vision, hidden_size=512, num_heads=8, ffn_hidden_size=1024),
)
CUT = {
    "none": WHOLE_BLOCKS,
    "decoder's feed-forward": replace(WHOLE_BLOCKS, language=replace(WHOLE_BLOCKS.language, ffn_hidden_size=1152)),
    "decoder's heads": replace(WHOLE_BLOCKS, language=replace(WHOLE_BLOCKS.language, head_dim=32)),
    "key-value heads": replace(WHOLE_BLOCKS, language=replace(WHOLE_BLOCKS.language, num_kv_heads=4, head_dim=72)),
    "tower's feed-forward": replace(WHOLE_BLOCKS, vision=replace(WHOLE_BLOCKS.vision, ffn_hidden_size=768)),
    "tower's heads": replace(WHOLE_BLOCKS, vision=replace(WHOLE_BLOCKS.vision, hidden_size=256)),
}


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("what", CUT)
def test_the_estimate_refuses_the_blocks_that_the_built_model_refuses(monkeypatch, what, tensor):
    run = replace(run_of(ParallelConfig(tensor=tensor)), fp8=Fp8Config(store_base=True, scale="block"))

    def refusal(look, *given):
        try:
            look(run, CUT[what], tensor, *given)
        except ConfigError as error:
            assert "fp8.scale block needs parts of a multiple of 128" in str(error)
            return True
        return False

    foreseen = refusal(check)
    monkeypatch.setattr(mcore_config, "_check_blocks", lambda *_: None)
    assert foreseen == refusal(dry_run, None)
    assert foreseen == (tensor > 1 and (what == "decoder's feed-forward" or (what != "none" and tensor == 4)
                                        or what == "key-value heads"))  # fmt: skip


def test_the_estimate_counts_a_7b_model_on_64_ranks():
    run = run_of(ParallelConfig(tensor=4, pipeline=8), adapter={"num_experts": 3, "rank": 32})
    size = SIZES["llava15_7b"]
    result = dry_run(run, size, 64, base=None)
    assert result.num_parts == 32
    assert result.stages == tuple(stage_parameters(run, size, stage) for stage in range(8))
    whole = stage_parameters(run_of(), size, 0)
    # llava-hf/llava-1.5-7b-hf has 7,063,427,072 parameters; the tower's last layer and the norm after it are not built
    last_layer = 12 * 1024**2 + 13 * 1024
    assert whole.total - whole.adapters == 7_063_427_072 - last_layer - 2 * 1024


def test_a_pretended_rank_is_built_like_the_real_one():
    run, size = run_of(train={"precision": "fp32"}), ODD

    def describe(parallel):
        model = LLaVA(run, size, parallel)
        tensors = {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()}
        return tensors, {key: entry.key for key, entry in model_entries(model).items()}

    with rank_of(run.parallel, 0, 1) as parallel:
        pretended = describe(parallel)
    real = platform.initialize(run.parallel, seed=0)
    try:
        assert describe(real) == pretended
    finally:
        platform.shutdown()


def test_ranks_stand_where_megatron_puts_them():
    layout, seen = ParallelConfig(tensor=2, pipeline=2, expert=2), set()
    for rank in range(16):
        with rank_of(layout, rank, 16) as parallel:
            seen.add((parallel.pp_rank, parallel.dp_rank, parallel.tp_rank))
            assert parallel.ep_rank == parallel.dp_rank % 2
            assert rank == (parallel.pp_rank * 4 + parallel.dp_rank) * 2 + parallel.tp_rank
            assert torch.zeros(2, device="cpu").is_meta
    assert len(seen) == 16


MISTAKES = {
    "heads": (ParallelConfig(tensor=8), 8, "parallel.tensor 8 does not divide the decoder's heads, 4"),
    "layers": (ParallelConfig(pipeline=3), 3, "parallel.pipeline 3 does not divide the decoder's 4 layers"),
    "world": (ParallelConfig(tensor=2, pipeline=2), 6, "6 processes do not divide into tensor 2 x pipeline 2"),
    "experts": (ParallelConfig(expert=4), 6, "parallel.expert 4 does not divide the 6 data-parallel ranks"),
    "batch": (ParallelConfig(), 5, "global_batch_size 64 is not a multiple of train.micro_batch_size 1 x 5"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_does_not_divide_is_said(mistake):
    layout, world, message = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=message):
        dry_run(run_of(layout), TINY, world, base=None)
    with rank_of(ParallelConfig(), 0, 1):  # a failure leaves no group behind
        pass


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"methods": ({"name": "bora", "tau": 1.0},) * 2}, "adapter.methods has 'bora' 2 times"),
        (
            {"methods": ({"name": "riemannian"},), "share_A": True, "expert_parallel": "weights"},
            "adapter.share_A one A serves all experts",
        ),
    ],
)
def test_methods_that_do_not_go_with_the_run_are_said(adapter, message):
    for look in (partial(dry_run, base=None), check):
        with pytest.raises(ConfigError, match=message):
            look(run_of(adapter=adapter), TINY, 1)


@pytest.fixture
def base(tmp_path):
    """A base as far as a dry run reads one: what tensors it has, and their shapes."""
    with rank_of(ParallelConfig(), 0, 1) as parallel:
        entries = model_entries(LLaVA(run_of(), ODD, parallel, adapters=False))
        apply_factories(entries)
    shapes = {entry.key: list(entry.global_shape) for entry in nested_values(entries)}
    (tmp_path / "model.json").write_text(ODD.to_json())

    def write(**changes):
        tree = {name: {"shape": shape} for name, shape in (shapes | changes).items() if shape}
        (tmp_path / "tensors.json").write_text(json.dumps(tree))
        return tmp_path

    return write


def test_the_base_is_compared_with_what_every_layout_asks_of_it(base):
    for layout, world in LAYOUTS.values():
        assert dry_run(run_of(layout), ODD, world, base()).compared_with_base


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("language_model.output_layer.weight", None, "lacks 1 tensor, first language_model.output_layer.weight"),
        ("vision_model.other", [3], "has 1 tensor, which the model does not ask for, first vision_model.other"),
        ("language_model.decoder.final_layernorm.weight", [32], r"as \[32\], the model asks for \[64\]"),
        ("language_model.output_layer.weight", [130, 64], r"as \[130, 64\], the model asks for \[132, 64\]"),
    ],
)
def test_a_base_with_other_tensors_is_refused(base, name, shape, message):
    folder = base(**{name: shape})
    with pytest.raises(ConfigError, match=message):
        dry_run(run_of(ParallelConfig(tensor=2, pipeline=2)), ODD, 4, folder)


def test_the_command_says_what_it_checked(tmp_path, capsys):
    run = tmp_path / "run.yaml"
    run.write_text(json.dumps({
        "run_dir": "/nowhere/out", "model": {"base": "nowhere"}, "train": {"steps": 1, "global_batch_size": 64},
        "data": {"sources": [{"name": "n", "path": "n.json"}], "max_length": 64},
    }))  # fmt: skip
    # --debug: what else a command silences stays silent for the tests that follow
    command = [str(run), "--debug", "--dry-run"]
    assert train.main([*command, "--world-size", "8", "--size", "tiny", "parallel.tensor=2"]) == 0
    text = capsys.readouterr().out
    assert "8 processes = tensor 2 x pipeline 1 x data 4, experts over 1" in text
    assert "NOT compared with a base" in text
    assert "built 2 parts, all there are" in text
    assert any("built 1 part, all there are" in line for line in dry_run(run_of(), TINY, 2, None).describe())
    for arguments, message in (
        (["--dry-run"], "--dry-run and --world-size N go together"),
        (["--dry-run", "--world-size", "2"], "nowhere is not a base checkpoint"),
        (["--dry-run", "--world-size", "2", "--size", "7b"], "--size 7b is not known: it is one of tiny"),
        (["--dry-run", "--world-size", "-2", "--size", "tiny"], "--world-size must be from 1 to 1,000,000,000, got -2"),
        (["--dry-run", "--world-size", "0"], "--world-size must be from 1 to 1,000,000,000, got 0"),
        (["--world-size", "0"], "--dry-run and --world-size N go together"),
        (["--dry-run", "--world-size", str(10**24)], f"--world-size must be from 1 to 1,000,000,000, got {10**24}"),
        (["--dry-run", "--world-size", "8", f"adapter.rank={10**24}"], "adapter.rank must be from 1 to 65,536, got 1"),
        (
            ["--rendezvous-timeout", "nan"],
            "--rendezvous-timeout must be above 0 and at most 1,000,000 seconds, got nan",
        ),
        (
            ["--rendezvous-timeout", "inf"],
            "--rendezvous-timeout must be above 0 and at most 1,000,000 seconds, got inf",
        ),
        (["--rendezvous-timeout", "-1"], "--rendezvous-timeout must be above 0 and at most 1,000,000 seconds, got -1"),
        (["--rendezvous-timeout", "1e30"], "1,000,000 seconds, got 1e+30"),
    ):
        assert train.main([str(run), "--debug", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_run_with_transformer_engine_is_built_without_it():
    """The local backend's model has the same tensors (tests/te); what the layout cannot hold is said all the same."""
    layout = ParallelConfig(tensor=2, context=2, expert=2)
    run = run_of(layout, train={"precision": "fp8"})
    run = replace(run, model=replace(run.model, backend="transformer_engine"))
    size = SIZES["tiny"]
    built = dry_run(run, size, 8, None)
    local = dry_run(run_of(replace(layout, context=1)), size, 8, None)
    assert (built.stages, built.num_tensors) == (local.stages, local.num_tensors)
    assert "context 2" in built.describe()[0]
    narrow = replace(size, language=replace(size.language, ffn_hidden_size=72))
    with pytest.raises(ConfigError, match=r"fp8.recipe tensorwise .* feed-forward width is 36"):
        dry_run(run, narrow, 8, None)
