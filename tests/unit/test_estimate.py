"""The estimate is held to what is built and kept: weights, buffers, optimizer state and autograd's saved tensors."""

from dataclasses import replace

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel

from mole_mega.config import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from mole_mega.data.collate import Batch
from mole_mega.estimate.memory import micro_batch, saved_activations, stage_memory
from mole_mega.models.llava import LLaVA
from mole_mega.models.sizes import LanguageSize, LlavaSize, VisionSize
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
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(parameter.shape[-1], 1) ** 0.5)
    ddp = wrap(model, run)
    return ddp, Stepper(run, ddp, build_optimizer(ddp, run.train), parallel, num_domains=1)


def storage_bytes(tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def kept_by_autograd(run, size, parallel):
    """Bytes of what one forward pass keeps for the backward pass, parameters left out."""
    model, stepper = build(run, size, parallel)
    model.train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = []

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        stepper._forward(iter([batch_of(size, micro_batch(run))]), model)
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


@pytest.mark.parametrize("size", [SIZE, UNGROUPED], ids=["grouped", "ungrouped"])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_what_autograd_keeps(alone, kind, size):
    run = run_of(**KINDS[kind])
    expected = saved_activations(run, size, 0, micro_batch(run))
    assert kept_by_autograd(run, size, alone) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "lora", "one layer of two"])
@pytest.mark.parametrize("projector", [True, False])
def test_weights_gradients_and_optimizer_are_what_is_built(alone, kind, projector):
    sections = KINDS[kind] | {"train": KINDS[kind].get("train", {}) | {"projector": projector}}
    run = run_of(**sections)
    model, stepper = build(run, SIZE, alone)
    set_lr(stepper.optimizer, 1, run.train)
    stepper.train_step([batch_of(SIZE, micro_batch(run))])
    expected = stage_memory(run, SIZE, 1, 0, micro_batch(run))
    parameters = list(model.parameters())
    assert storage_bytes(p for p in parameters if not p.requires_grad) == expected.frozen
    assert storage_bytes(p for p in parameters if p.requires_grad) == expected.trained
    buffers = [buffer.grad_data for buffer in (*model.buffers, *model.expert_parallel_buffers)]
    assert storage_bytes(buffers) == pytest.approx(expected.gradients, rel=0.01)  # padded
    own = {p.untyped_storage().data_ptr() for p in parameters}
    states = [
        tensor
        for part in stepper.optimizer.chained_optimizers
        if part.optimizer is not None
        for parameter, state in part.optimizer.state.items()
        for tensor in (parameter, *state.values())
        if isinstance(tensor, torch.Tensor) and tensor.numel() > 1 and tensor.untyped_storage().data_ptr() not in own
    ]
    assert storage_bytes(states) == expected.optimizer
