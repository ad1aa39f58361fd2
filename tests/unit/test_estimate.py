"""The estimate is held to what is built and kept: weights, buffers, optimizer state and autograd's saved tensors."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from mole_mega.adapters import cpu_kernels
from mole_mega.adapters.methods.lorasculpt import conflict_parts
from mole_mega.adapters.pairs import gram_matrices
from mole_mega.adapters.traffic import Traffic as ExpertTraffic
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
from mole_mega.data.collate import Batch
from mole_mega.estimate import memory
from mole_mega.estimate.command import main as estimate_command
from mole_mega.estimate.gpus import GPUS
from mole_mega.estimate.memory import gathered_bank, in_flight, micro_batch, saved_activations, stage_memory
from mole_mega.estimate.methods import method_bytes
from mole_mega.estimate.parameters import stage_parameters
from mole_mega.estimate.plan import Sample, estimate, misfit
from mole_mega.estimate.roofline import micro_batch_flops
from mole_mega.estimate.search import check, search
from mole_mega.estimate.traffic import stage_traffic
from mole_mega.models.expert_parallel import expert_parallel
from mole_mega.models.llava import LLaVA
from mole_mega.models.sizes import SIZES, LanguageSize, LlavaSize, VisionSize
from mole_mega.platform import fp8
from mole_mega.training.optimizer import build_optimizer, set_lr
from mole_mega.training.step import Stepper
from mole_mega.training.trainer import wrap

SIZE = LlavaSize(
    vision=VisionSize(num_layers=3, hidden_size=48, ffn_hidden_size=80, num_heads=4, image_size=32, patch_size=8),
    language=LanguageSize(
        num_layers=2, hidden_size=128, ffn_hidden_size=352, num_heads=8, num_kv_heads=4, vocab_size=512, max_length=128
    ),
    image_token_id=4,
)
UNGROUPED = replace(SIZE, language=replace(SIZE.language, num_kv_heads=8))


def run_of(layout=None, **sections):
    adapter = {"num_experts": 4, "rank": 8} | sections.pop("adapter", {})
    training = {"steps": 2, "global_batch_size": 2, "micro_batch_size": 2} | sections.pop("train", {})
    return RunConfig(
        run_dir="unused",
        model=ModelConfig(base="unused"),
        data=DataConfig(sources=(SourceConfig(name="none", path="none"),), max_length=112),
        parallel=layout or ParallelConfig(),
        adapter=AdapterConfig(**adapter),
        train=TrainConfig(**training),
        fp8=Fp8Config(**sections.pop("fp8", {})),
    )


def batch_of(size, shape):
    generator = torch.Generator().manual_seed(0)
    rows = (shape.samples, shape.length)
    tokens = torch.randint(5, size.language.vocab_size, rows, generator=generator)
    image_mask = torch.zeros(rows, dtype=torch.bool)
    image_mask[:, 2 : 2 + size.vision.num_places] = True
    return Batch(
        tokens=tokens.masked_fill(image_mask, size.image_token_id),
        labels=tokens.roll(-1, dims=1),
        padding_mask=torch.ones(rows, dtype=torch.bool),
        position_ids=torch.arange(shape.length).expand(rows),
        pixels=torch.randn(shape.images, 3, size.vision.image_size, size.vision.image_size, generator=generator),
        image_mask=image_mask,
        domains=torch.zeros(shape.samples, dtype=torch.long),
        sample_ids=("a", "b"),
    )


def build(run, size, parallel) -> tuple[DistributedDataParallel, Stepper]:
    model = LLaVA(run, size, parallel)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        kept = {id(linear.weight): linear for linear in fp8.kept_in_fp8(model).values()}
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator) / max(parameter.shape[-1], 1) ** 0.5
            if id(parameter) in kept:
                fp8.keep(kept[id(parameter)], drawn)
            else:
                parameter.copy_(drawn)
    ddp = wrap(model, run)
    return ddp, Stepper(run, ddp, build_optimizer(ddp, run.train), parallel, num_domains=1)


def storage_bytes(tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def kept_by_autograd(run, size, parallel):
    """Bytes of what one forward pass keeps for the backward pass, weights left out."""
    model, stepper = build(run, size, parallel)
    model.train()
    held = [*model.parameters(), *(linear.weight_scale for linear in fp8.kept_in_fp8(model).values())]
    weights = {tensor.untyped_storage().data_ptr() for tensor in held}
    batch, kept = batch_of(size, micro_batch(run)), []
    model.module.read_instructions([(batch.tokens, batch.instruction_mask)])

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        stepper._forward(iter([batch]), model)
    return storage_bytes(kept)


KINDS = {
    "fp32": {"train": {"precision": "fp32"}},
    "bf16": {},
    "selective": {"train": {"recompute": "selective"}},
    "selective, fp32": {"train": {"recompute": "selective", "precision": "fp32"}},
    "full": {"train": {"recompute": "full"}},
    "full, fp32": {"train": {"recompute": "full", "precision": "fp32"}},
    "lora": {"adapter": {"method": "lora"}},
    "lora, fp32": {"adapter": {"method": "lora"}, "train": {"precision": "fp32"}},
    "no attention": {"adapter": {"attention": False}},
    "one layer of two": {"adapter": {"layers": (1,)}},
}


STAY = {"expert_parallel": "weights"}
MIXED_B = STAY | {
    "router_scope": "task", "gate": "none", "balance_weight": 0.0, "num_experts": 2, "share_A": True, "shared_B": 3,
}  # fmt: skip
SIGMOID = STAY | {
    "num_experts": 16, "rank": 1, "top_k": 4, "renormalize": True, "router_score": "sigmoid", "router_bias": False,
    "balance_weight": 0.0,
}  # fmt: skip
MLPS = STAY | {"top_k": 2, "renormalize": True, "expert_form": "mlp"}
MIXTURES = {
    "weights travel": {"adapter": STAY},
    "top-2": {"adapter": STAY | {"top_k": 2}},
    "top-2, fp32": {"adapter": STAY | {"top_k": 2, "gate": "straight_through"}, "train": {"precision": "fp32"}},
    "top-2 of 66": {"adapter": STAY | {"top_k": 2, "num_experts": 66, "rank": 8}},
    "top-2 of 14, fp32": {"adapter": STAY | {"top_k": 2, "num_experts": 14}, "train": {"precision": "fp32"}},
    "top-2 of 66, rescaled": {"adapter": STAY | {"top_k": 2, "num_experts": 66, "rank": 8, "rescale_gate": True}},
    "dense": {"adapter": STAY | {"gate": "dense"}},
    "dense, full": {"adapter": STAY | {"gate": "dense"}, "train": {"recompute": "full"}},
    "dense, one layer of two": {"adapter": STAY | {"gate": "dense", "num_experts": 16, "layers": (1,)}},
    "shared A": {"adapter": STAY | {"share_A": True, "num_experts": 16}},
    "a router a linear": {"adapter": STAY | {"router_scope": "linear"}},
    "a router a linear, dense": {"adapter": STAY | {"router_scope": "linear", "gate": "dense"}},
    "a router a sample": {"adapter": {"router_scope": "sample", "balance_weight": 0.0}},
    "an expert a task": {"adapter": {"router_scope": "task", "gate": "none", "balance_weight": 0.0}},
    "mixed B": {"adapter": MIXED_B},
    "mixed B, fp32": {"adapter": MIXED_B, "train": {"precision": "fp32"}},
    "sigmoid": {"adapter": SIGMOID},
    "a sigmoid a linear, fp32": {"adapter": SIGMOID | {"router_scope": "linear"}, "train": {"precision": "fp32"}},
    "whole MLPs": {"adapter": MLPS},
    "whole MLPs, fp32": {"adapter": MLPS, "train": {"precision": "fp32"}},
    "fp8": {"fp8": {"store_base": True}},
    "fp8 by block, fp32": {"fp8": {"store_base": True, "scale": "block"}, "train": {"precision": "fp32"}},
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_activations_of_mixtures_are_what_autograd_keeps(alone, monkeypatch, kind):
    # as on a GPU
    monkeypatch.setattr(cpu_kernels, "library", lambda dtype: None)
    run = run_of(**MIXTURES[kind])
    expected = saved_activations(run, SIZE, 0, micro_batch(run))
    assert kept_by_autograd(run, SIZE, alone) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("size", [SIZE, UNGROUPED], ids=["grouped", "ungrouped"])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_what_autograd_keeps(alone, monkeypatch, kind, size):
    monkeypatch.setattr(cpu_kernels, "library", lambda dtype: None)
    run = run_of(**KINDS[kind])
    expected = saved_activations(run, size, 0, micro_batch(run))
    assert kept_by_autograd(run, size, alone) == pytest.approx(expected, rel=0.01)


def cuda_dropout(x, p, training=True, inplace=False):
    """F.dropout as it is on CUDA, where it keeps a byte a number."""
    return torch.native_dropout(x, p, training)[0] if p > 0 and training else x


@pytest.mark.parametrize("kind", KINDS | MIXTURES)
def test_what_dropout_keeps_is_what_autograd_keeps(alone, monkeypatch, kind):
    # as on a GPU
    monkeypatch.setattr(cpu_kernels, "library", lambda dtype: None)
    monkeypatch.setattr(F, "dropout", cuda_dropout)
    sections = (KINDS | MIXTURES)[kind]
    run = run_of(**sections | {"adapter": sections.get("adapter", {}) | {"dropout": 0.1}})
    expected = saved_activations(run, SIZE, 0, micro_batch(run))
    assert kept_by_autograd(run, SIZE, alone) == pytest.approx(expected, rel=0.01)


BUILT = KINDS | MIXTURES | {
    "sgd": {"train": {"optimizer": "sgd"}},
    "fp8, but for the ends": {"fp8": {"store_base": True, "first_last_layers_bf16": True}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "projector"),
    [
        *((kind, projector) for kind in ("fp32", "bf16", "lora", "one layer of two") for projector in (True, False)),
        *((kind, True) for kind in ("shared A", "a router a linear", "a router a sample", "an expert a task", "sgd")),
        *((kind, True) for kind in ("mixed B", "sigmoid")),
        *((kind, False) for kind in ("fp8", "fp8 by block, fp32", "fp8, but for the ends")),
    ],
)
def test_weights_gradients_and_optimizer_are_what_is_built(alone, kind, projector):
    sections = BUILT[kind] | {"train": BUILT[kind].get("train", {}) | {"projector": projector}}
    run = run_of(**sections)
    model, stepper = build(run, SIZE, alone)
    set_lr(stepper.optimizer, 1, run.train)
    stepper.train_step([batch_of(SIZE, micro_batch(run))])
    expected = stage_memory(run, SIZE, 1, 0, micro_batch(run))
    parameters = list(model.parameters())
    scales = [linear.weight_scale for linear in fp8.kept_in_fp8(model).values()]
    assert storage_bytes([*(p for p in parameters if not p.requires_grad), *scales]) == expected.frozen
    assert storage_bytes(p for p in parameters if p.requires_grad) == expected.trained
    buffers = [buffer.grad_data for buffer in (*model.buffers, *model.expert_parallel_buffers)]
    assert storage_bytes(buffers) == pytest.approx(expected.gradients, rel=0.01)  # padded
    own = {p.untyped_storage().data_ptr() for p in parameters}
    states = [
        tensor
        for part in stepper.optimizer.chained_optimizers
        if part.optimizer is not None
        for group in part.optimizer.param_groups
        for parameter in group["params"]
        for tensor in (parameter, *part.optimizer.state.get(parameter, {}).values())  # SGD has no state
        if isinstance(tensor, torch.Tensor) and tensor.numel() > 1 and tensor.untyped_storage().data_ptr() not in own
    ]
    assert storage_bytes(states) == expected.optimizer


RAMPED = {"name": "lorasculpt", "density": 0.5, "prune_step": 1}
METHODS = {
    "lorasculpt": {"methods": (RAMPED,)},
    "lorasculpt, all projections, no attention": {
        "methods": (RAMPED | {"regularise": ("gate", "up", "down")},), "attention": False,
    },
    "lorasculpt over lora": {"method": "lora", "methods": (RAMPED,)},
    "lorasculpt, shared A": STAY | {"share_A": True, "methods": (RAMPED,)},
    "bora": {"methods": ({"name": "bora", "tau": 0.1},)},
    "bora, shared A, one layer": STAY | {"share_A": True, "layers": (1,), "methods": ({"name": "bora", "tau": 0.1},)},
    "riemannian": {"methods": ({"name": "riemannian"},)},
    "bora and riemannian": {"methods": ({"name": "bora", "tau": 0.1}, {"name": "riemannian"})},
}  # fmt: skip


@pytest.mark.parametrize("kind", METHODS)
def test_what_methods_remember_and_need_is_what_they_hold(alone, kind):
    run = run_of(adapter=METHODS[kind])
    _, stepper = build(run, SIZE, alone)
    held, beside = [], []
    for method in stepper.methods.values():
        held += [one.tensor for name, one in method.state().items() if not name.startswith("density.")]
    set_lr(stepper.optimizer, 1, run.train)
    stepper.train_step([batch_of(SIZE, micro_batch(run))])
    for name, method in stepper.methods.items():
        if name == "bora":
            beside.append(storage_bytes(method._gaps()[0]))
        elif name == "riemannian":
            grams = [gram for both in gram_matrices(stepper.pairs) for gram in both]
            sizes = [sum(factor.parameter.numel() for factor in pair.factors) * 8 for pair in stepper.pairs]
            beside.append(storage_bytes(grams) + max(sizes))
        else:
            one = torch.ones(())
            parts = [
                conflict_parts(pair.A.values, pair.B.values, pair.frozen(), one, 1.0)[1:]
                for pair in method._regularised
            ]
            beside.append(storage_bytes(gradient for both in parts for gradient in both))
    assert method_bytes(run, SIZE, 0) == (storage_bytes(held), max(beside))
    assert stage_memory(run, SIZE, 1, 0, micro_batch(run)).methods == storage_bytes(held)


def test_a_step_of_methods_that_takes_more_than_the_passes_is_at_the_peak():
    run = run_of(adapter={"methods": ({"name": "bora", "tau": 0.1},), "num_experts": 256, "rank": 64})
    without = run_of(adapter={"num_experts": 256, "rank": 64})
    shape = micro_batch(run)
    with_methods, alone = (stage_memory(one, SIZE, 1, 0, shape) for one in (run, without))
    state, beside = method_bytes(run, SIZE, 0)
    kept = memory._kept_for_good(run, SIZE, 0, shape)
    assert beside > alone.total - alone.static - kept
    assert with_methods.total == alone.static + state + kept + beside


def test_what_does_not_fit_is_warned_of_with_the_numbers():
    run = replace(run_of(ParallelConfig(pipeline=2)), data=replace(run_of().data, max_length=2048))
    size = SIZES["llava15_7b"]
    assert misfit(run, size, 2, 80 * 2**30) is None
    text = misfit(run, size, 2, 24 * 2**30)
    needed = stage_memory(run, size, 2, 0, micro_batch(run))
    assert f"a rank of stage 0 needs {needed.total / 1e9:.1f} GB" in text
    assert "of its GPU's 25.8 are usable" in text


def test_micro_batches_in_flight_follow_1f1b():
    run = run_of(ParallelConfig(pipeline=2), train={"global_batch_size": 8, "micro_batch_size": 2})
    assert [in_flight(run, 2, stage) for stage in range(2)] == [2, 1]
    assert [in_flight(run, 8, stage) for stage in range(2)] == [1, 1]  # each data-parallel rank has one micro-batch


def test_the_distributed_optimizer_is_cut_over_the_ranks_that_hold_the_same():
    layout = ParallelConfig(expert=2)
    plain = run_of(layout, train={"global_batch_size": 8})
    cut = run_of(layout, train={"global_batch_size": 8, "distributed_optimizer": True})
    numbers = stage_parameters(plain, SIZE, 0)
    whole, part = (stage_memory(run, SIZE, 4, 0, micro_batch(run)).optimizer for run in (plain, cut))
    dense = numbers.dense_adapters + numbers.projector
    assert whole == 12 * (dense + numbers.experts) + 8 * numbers.routers
    assert part == (12 * dense + 8 * numbers.routers) // 4 + 12 * numbers.experts // 2


def test_traffic_of_a_ring():
    """Two ranks send half of a tensor to gather it, or to reduce and scatter it, and all of it to sum it."""
    run = run_of(
        ParallelConfig(tensor=2), adapter={"attention": False}, train={"projector": False, "precision": "fp32"}
    )
    shape = micro_batch(run)
    hidden = shape.tokens * SIZE.language.hidden_size * 4
    images = shape.images * 17 * SIZE.vision.hidden_size * 4
    numbers = stage_parameters(run, SIZE, 0)
    # the routers, and A of gate and up and B of down, of two layers and four experts
    partial = numbers.routers + 2 * 4 * 3 * 8 * SIZE.language.hidden_size
    layers, ends, tower = 2 * 2 * 4 * hidden // 2, 2 * hidden, 2 * 2 * images
    traffic = stage_traffic(run, SIZE, 2, 0, shape)
    assert traffic.tensor == layers + ends + tower + partial * 4
    assert (traffic.pipeline, traffic.expert, traffic.data) == (0, 0, 0)


def test_traffic_of_experts_and_data():
    run = run_of(ParallelConfig(expert=2), train={"global_batch_size": 4, "precision": "fp32"})
    shape, numbers = micro_batch(run), stage_parameters(run, SIZE, 0)
    hidden = shape.tokens * SIZE.language.hidden_size * 4
    traffic = stage_traffic(run, SIZE, 2, 0, shape)
    # there and back, forward and backward, two layers; half of the tokens stay
    assert traffic.expert == 2 * 2 * 2 * hidden // 2
    dense = numbers.dense_adapters + numbers.routers + numbers.projector
    assert traffic.data == 2 * (4 * dense // 2)  # each rank's experts are its own


@pytest.mark.parametrize("length", [8, 112])
@pytest.mark.parametrize(("num_experts", "form"), [(2, "weights"), (128, "tokens")])
@pytest.mark.parametrize("tensor", [1, 2])
def test_auto_and_the_estimate_count_the_same(length, num_experts, form, tensor):
    layout = ParallelConfig(tensor=tensor, expert=2)
    adapter = {"num_experts": num_experts, "expert_parallel": "auto"}
    run = run_of(layout, adapter=adapter, train={"global_batch_size": 8, "recompute": "full"})
    run = replace(run, data=replace(run.data, max_length=length))
    found = {}
    for asked in ("tokens", "weights", "auto"):
        one = replace(run, adapter=replace(run.adapter, expert_parallel=asked))
        found[asked] = stage_traffic(one, SIZE, 2 * tensor, 0, micro_batch(one)).expert
    # three passes of two layers and two micro-batches, in bf16
    counted = ExpertTraffic.of(run.adapter, layout, 128, 352, 2 * length)
    assert found["tokens"] == 3 * 2 * 2 * 2 * counted.tokens
    assert found["weights"] == 3 * 2 * 2 * 2 * counted.weights
    assert found["tokens"] != found["weights"] and expert_parallel(run, SIZE).form == form
    assert found["auto"] == found[form]


def test_the_gathered_bank_is_kept_and_nothing_is_dispatched():
    alone, spread = (
        run_of(ParallelConfig(expert=expert), adapter=STAY | {"top_k": 2}, train={"global_batch_size": 8})
        for expert in (1, 2)
    )
    shape, bank = micro_batch(alone), gathered_bank(spread, SIZE)
    assert gathered_bank(alone, SIZE) == 0
    assert 2 * bank == 2 * 2 * stage_parameters(spread, SIZE, 0).experts  # of both ranks, in bf16
    more = saved_activations(spread, SIZE, 0, shape) - saved_activations(alone, SIZE, 0, shape)
    assert more == 2 * bank
    assert stage_memory(spread, SIZE, 2, 0, shape).dispatch == 0
    tokens = replace(spread, adapter=replace(spread.adapter, top_k=1, expert_parallel="tokens"))
    assert gathered_bank(tokens, SIZE) == 0
    assert stage_memory(tokens, SIZE, 2, 0, shape).dispatch > 0


def test_a_shared_A_is_summed_over_tensor_parallel_ranks_once():  # noqa: N802
    layout = ParallelConfig(tensor=2)
    whole, shared = (run_of(layout, adapter=STAY | {"share_A": is_shared}) for is_shared in (False, True))
    before, after = (stage_traffic(run, SIZE, 2, 0, micro_batch(run)).tensor for run in (whole, shared))
    # of two layers, A of gate and up of three experts less, as an all-reduce in fp32
    assert before - after == 2 * 2 * 3 * 8 * 128 * 4


def test_traffic_of_mixed_factors():
    run = run_of(ParallelConfig(tensor=2), adapter=MIXED_B, train={"precision": "fp32"})
    plain = run_of(ParallelConfig(tensor=2), adapter=MIXED_B | {"shared_B": 0}, train={"precision": "fp32"})
    before, after = (stage_traffic(one, SIZE, 2, 0, micro_batch(one)).tensor for one in (plain, run))
    # of two layers, one B of down more, and each expert's weights and transform for three linears
    assert after - before == 2 * (8 * SIZE.language.hidden_size + 3 * 2 * (3 + 8 * 8)) * 4
    moved = stage_traffic(replace(run, parallel=ParallelConfig(expert=2)), SIZE, 2, 0, micro_batch(run))
    assert moved.expert == 0


def test_traffic_of_a_pipeline():
    run = run_of(ParallelConfig(pipeline=2), train={"global_batch_size": 8, "precision": "fp32"})
    shape = micro_batch(run)
    hidden = shape.tokens * SIZE.language.hidden_size * 4
    assert [stage_traffic(run, SIZE, 2, stage, shape).pipeline for stage in range(2)] == [4 * hidden, 4 * hidden]


def flops_of_addmm(_, left, right, **__):
    """torch counts it, but not where it is in place."""
    return 2 * left[0] * left[1] * right[1]


def flops_of_grouped_mm(left, right, *_, **__):
    """Rows by their group's matrix, or the products of groups of columns and rows."""
    return 2 * left[0] * left[1] * right[-1]


@pytest.mark.parametrize(
    "kind",
    ["lora", "one expert", "full", "selective", "top-2", "dense", "shared A", "mixed B", "sigmoid", "whole MLPs"],
)
def test_flops_are_what_torch_counts(alone, monkeypatch, kind):
    monkeypatch.setattr(cpu_kernels, "library", lambda dtype: None)  # torch does not see into kernels
    sections = BUILT.get(kind, {"adapter": {"num_experts": 1}})
    if kind in ("full", "selective"):
        sections = sections | {"adapter": {"method": "lora"}}
    if kind in MIXTURES:  # the balance loss has products of its own
        sections = {"adapter": sections["adapter"] | {"balance_weight": 0.0}}
    run = run_of(**sections)
    _, stepper = build(run, UNGROUPED, alone)
    batch = batch_of(UNGROUPED, micro_batch(run))
    not_counted = {torch.ops.aten.addmm_: flops_of_addmm, torch.ops.aten._grouped_mm: flops_of_grouped_mm}
    with FlopCounterMode(display=False, custom_mapping=not_counted) as counter:
        stepper.backward([batch])
    assert counter.get_total_flops() == pytest.approx(micro_batch_flops(run, UNGROUPED, 0, micro_batch(run)), rel=0.02)


def test_the_search_ranks_what_fits_and_leaves_out_what_does_not():
    run = run_of(train={"global_batch_size": 64}, adapter={"num_experts": 3, "rank": 32})
    run = replace(run, data=replace(run.data, max_length=2048))
    size, sample = SIZES["llava15_7b"], Sample()
    found, looked_at = search(run, size, 8, GPUS["a100_40"], sample)
    assert 0 < len(found) < looked_at
    assert all(one.fits for one in found)
    assert [one.time.total for one in found] == sorted(one.time.total for one in found)
    assert len({(one.run.parallel, one.run.train.micro_batch_size, one.run.train.recompute) for one in found}) == len(
        found
    )
    with pytest.raises(ConfigError, match="is not a multiple of"):
        check(run, size, 3)


def test_16384_gpus_are_estimated_at_once():
    run = run_of(ParallelConfig(tensor=8, pipeline=8), train={"global_batch_size": 16384, "micro_batch_size": 1})
    one = estimate(run, SIZES["llava15_13b"], 16384, GPUS["h100"], Sample())
    assert one.fits
    assert len(one.memory) == 8


IN_FP8 = ["model.backend=transformer_engine", "train.precision=fp8"]


def with_te(run, **fp8):
    """The run with Transformer Engine, in FP8 where its precision says so."""
    return replace(run, model=replace(run.model, backend="transformer_engine"), fp8=Fp8Config(**fp8))


@pytest.mark.parametrize(
    ("recipe", "gpu", "kept"),
    [
        ("tensorwise", "h100", 2), ("delayed", "h100", 2), ("blockwise", "h100", 2 * 1.000244140625),
        ("tensorwise", "b200", 1), ("delayed", "b200", 1), ("blockwise", "b200", 2 * 1.000244140625),
        ("mxfp8", "b200", 2.0625),
    ],
)  # fmt: skip
def test_what_transformer_engine_keeps_of_weights_in_fp8_is_counted(recipe, gpu, kept):
    """By hand: 32 layers of q, k, v, o and gate, up, down. All copies, of the decoder alone."""
    size, train = SIZES["llava15_7b"], {"global_batch_size": 64, "micro_batch_size": 1}
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)

    def frozen(precision, **fp8):
        run = with_te(run_of(train=train | {"precision": precision}), **fp8)
        return estimate(run, size, 8, GPUS[gpu], Sample()).memory[0].frozen

    bf16 = frozen("bf16")
    assert frozen("fp8", recipe=recipe) - bf16 == pytest.approx(kept * weights, abs=1)
    if recipe != "delayed":
        assert frozen("fp8", recipe=recipe, store_base=True) - bf16 == pytest.approx((kept - 2) * weights, abs=1)
        spared = frozen("fp8", recipe=recipe, first_last_layers_bf16=True)
        assert spared - bf16 == pytest.approx(kept * weights * 30 / 32, abs=1)


@pytest.mark.parametrize(("recompute", "passes"), [("none", 2), ("selective", 2), ("full", 3)])
def test_a_frozen_product_in_fp8_takes_the_time_of_fp8s_peak(recompute, passes):
    size, h100 = SIZES["llava15_7b"], GPUS["h100"]

    def compute(precision):
        train = {"global_batch_size": 16, "micro_batch_size": 1, "precision": precision, "recompute": recompute}
        run = with_te(run_of(train=train))
        run = replace(run, data=replace(run.data, max_length=2048))
        return estimate(run, size, 8, h100, Sample()).time.compute

    flops = 2 * passes * 2048 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    saved = 2 * flops / 0.5 * (1 / 989e12 - 1 / 1979e12)  # two micro-batches a rank
    assert compute("bf16") - compute("fp8") == pytest.approx(saved, rel=1e-6)


def test_traffic_of_a_sequence_over_ranks():
    """By hand: keys and values of 512 places past 3 others, twice forward with recomputed attention, and twice back."""
    train = {"global_batch_size": 4, "micro_batch_size": 1, "recompute": "selective"}
    run = with_te(run_of(ParallelConfig(tensor=2, context=4), train=train))
    run = replace(run, data=replace(run.data, max_length=2048))
    sent = stage_traffic(run, SIZES["llava15_7b"], 8, 0, micro_batch(run))
    assert sent.context == 4 * 3 * (2 * 512 * 2048 * 2) * 32 * 4
    alone = replace(run, parallel=ParallelConfig(tensor=2))
    assert stage_traffic(alone, SIZES["llava15_7b"], 8, 0, micro_batch(alone)).context == 0


def test_the_search_shares_sequences_where_that_can_be_computed():
    run = run_of(train={"global_batch_size": 4, "micro_batch_size": 1}, adapter={"num_experts": 3})
    size = SIZES["llava15_7b"]

    def contexts(run):
        return {one.run.parallel.context for one in search(run, size, 8, GPUS["h200"], Sample())[0]}

    assert contexts(run) == {1}
    assert contexts(with_te(run)) == {1, 2, 4, 8}
    assert contexts(with_te(replace(run, train=replace(run.train, precision="fp32")))) == {1}


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({
        "run_dir": "out", "model": {"base": "nowhere"}, "train": {"steps": 1, "global_batch_size": 64},
        "data": {"sources": [{"name": "n", "path": "n.json"}], "max_length": 2048},
    }))  # fmt: skip
    return path


@pytest.mark.parametrize("arguments", [[], ["--search"]])
def test_the_command_prints_and_writes_the_same(run_file, tmp_path, capsys, arguments):
    figures = tmp_path / "figures.json"
    # --debug: what else a command silences stays silent for the tests that follow
    command = [str(run_file), "--gpus", "8", "--size", "llava15_7b", "--json", str(figures), "--debug"]
    assert estimate_command(command + arguments) == 0
    text, tree = capsys.readouterr().out, json.loads(figures.read_text())
    first = tree[0] if arguments else tree
    assert first["gpus"] == 8
    assert f"{first['seconds']['total']:.3g}" in text


@pytest.mark.parametrize(("gpu", "kept"), [("h100", "kept twice, as it is and turned"), ("b200", "kept once")])
def test_the_command_says_how_often_a_weight_is_kept(run_file, capsys, gpu, kept):
    command = [str(run_file), "--gpus", "8", "--gpu", gpu, "--size", "llava15_7b", "--debug", *IN_FP8]
    assert estimate_command(command) == 0
    assert f"each weight is {kept}" in capsys.readouterr().out


@pytest.mark.parametrize(("images", "words"), [("1", "with 1 image\n"), ("0", "with 0 images\n"), ("2", "2 images\n")])
def test_the_command_counts_images(run_file, capsys, images, words):
    assert estimate_command([str(run_file), "--gpus", "8", "--size", "llava15_7b", "--debug", "--images", images]) == 0
    assert words in capsys.readouterr().out


def test_the_command_says_what_travels(run_file, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    command = [str(run_file), "--gpus", "6", "--size", "llava15_7b", "--json", str(figures), "--debug"]
    overrides = ["parallel.expert=3", "train.global_batch_size=6", "adapter.expert_parallel=auto"]
    assert estimate_command(command + overrides) == 0
    form = json.loads(figures.read_text())["expert_parallel"]
    assert f"between expert-parallel ranks {form} travel: a rank sends" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus must be from 1 to 1,000,000,000, got 0"),
        (["--gpus", str(10**400)], "--gpus must be from 1 to 1,000,000,000, got 1"),
        (["--gpus", "8", f"train.global_batch_size={10**400}"], "train.global_batch_size must be from 1 to"),
        (
            ["--gpus", "7", "--search"],
            "no layout divides over 7 GPUs; data parallelism alone: train.global_batch_size 64",
        ),
        (["--gpus", "8", "--images", "1e308"], "--images must be at most 3.556, got 1e+308: an image takes 576 places"),
        (["--gpus", "8", "--images", "4"], "got 4: an image takes 576 places, a sample has 2,048 at most (data.max_le"),
        (["--gpus", "8", "--images", "2", "--length", "600"], "a sample has 600 at most (--length)"),
        (["--gpus", "3"], "train.global_batch_size 64 is not a multiple of train.micro_batch_size 1 x 3"),
        (["--gpus", "8", "--length", "4096"], "--length must be in [1, data.max_length 2048], got 4096"),
        (["--gpus", "8", "--images", "-1"], "--images must be a number of at least 0, got -1"),
        (["--gpus", "8", "--images", "nan"], "--images must be a number of at least 0, got nan"),
        (["--gpus", "8", "--gpu", "a100", *IN_FP8], "fp8.recipe tensorwise needs a GPU of compute capability 8.9"),
        (["--gpus", "8", "--gpu", "h200", *IN_FP8, "fp8.recipe=mxfp8"], "H200 SXM 141 GB is of 9.0"),
        (["--gpus", "8", IN_FP8[0], "parallel.context=2", "train.precision=fp32"], "train.precision is fp32"),
        (["--gpus", "6", "parallel.pipeline=3"], "parallel.pipeline 3 does not divide the decoder's 32 layers"),
    ],
)
def test_the_command_refuses_with_the_numbers(run_file, capsys, arguments, message):
    assert estimate_command([str(run_file), "--size", "llava15_7b", "--debug", *arguments]) == 2
    assert message in capsys.readouterr().err
