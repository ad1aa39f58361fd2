"""Norms and similarities of the experts' deltas are those of the matrices, which the code never builds."""

from dataclasses import replace

import pytest
import torch

from mole_mega.adapters.mole import MoLELayer
from mole_mega.adapters.routing import RouterMemory
from mole_mega.config import AdapterConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from mole_mega.models import specs
from mole_mega.models.backend import backend_called
from mole_mega.models.mcore_config import build_configs
from mole_mega.models.sizes import LanguageSize, LlavaSize, VisionSize
from mole_mega.monitor.experts import ExpertStatistics, expert_row, measure_experts

EXPERTS, FFN = 3, 20
ADAPTER = AdapterConfig(num_experts=EXPERTS, rank=4, alpha=6.0)
SIZE = LlavaSize(
    vision=VisionSize(num_layers=2, hidden_size=8, ffn_hidden_size=8, num_heads=1, image_size=8, patch_size=8),
    language=LanguageSize(
        num_layers=1, hidden_size=12, ffn_hidden_size=FFN, num_heads=1, num_kv_heads=1, vocab_size=8, max_length=8
    ),
    image_token_id=0,
)


@pytest.fixture
def block(alone) -> MoLELayer:
    """The MoLE block of layer 2 with random weights."""
    run = RunConfig(
        run_dir="", model=ModelConfig(base=""), train=TrainConfig(steps=1, precision="fp32"), adapter=ADAPTER,
        data=DataConfig(sources=(), max_length=8),
    )  # fmt: skip
    config = build_configs(run, SIZE).language
    plan = specs.AdapterPlan(ADAPTER, 0, alone, backend_called("local"))
    (spec,) = specs.decoder_block(config, range(1), plan).layer_specs
    layer = spec.submodules.mlp(config=config, pg_collection=alone.groups, is_mtp_layer=False)
    layer.set_layer_number(3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def deltas(experts) -> torch.Tensor:
    """[E, all numbers of gate, up and down], built."""
    scale = ADAPTER.alpha / ADAPTER.rank
    parts = []
    for projection in ("gate", "up", "down"):
        A, B = (getattr(experts, f"lora_{projection}_{factor}").detach().double() for factor in "AB")
        parts.append(scale * (B @ A).flatten(1))
    return torch.cat(parts, dim=1)


def measure(block, alone):
    return measure_experts([block], (2,), EXPERTS, alone.groups, alone.device)


def test_norms_and_similarities_are_those_of_the_matrices(block, alone):
    found, delta = measure(block, alone), deltas(block.experts)
    base = [linear.weight.detach().double().norm() for linear in (block.experts.linear_fc1, block.experts.linear_fc2)]
    torch.testing.assert_close(found.delta_norm_LE[0], delta.norm(dim=1) / torch.stack(base).norm(), rtol=1e-5, atol=0)
    unit = delta / delta.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.similarity_LEE[0], unit @ unit.T, rtol=1e-5, atol=1e-6)


def test_a_copy_is_like_its_original_an_opposite_is_not_and_nothing_is_like_zero(block, alone):
    with torch.no_grad():
        for projection in ("gate", "up", "down"):
            A, B = (getattr(block.experts, f"lora_{projection}_{factor}") for factor in "AB")
            A[1], B[1] = A[0], -B[0]
            B[2] = 0
    row = expert_row(measure(block, alone), RouterMemory.empty(1, EXPERTS))
    assert row["expert/similarity/layer_2/expert_0_1"] == pytest.approx(-1, abs=1e-6)
    assert row["expert/similarity/layer_2/expert_0_2"] == 0 and row["expert/delta_norm/layer_2/expert_2"] == 0
    assert row["expert/delta_norm/layer_2/expert_0"] == pytest.approx(row["expert/delta_norm/layer_2/expert_1"]) != 0


def test_of_many_experts_each_ones_most_similar_is_shown():
    similarity_EE = torch.zeros(20, 20).fill_diagonal_(1.0)
    similarity_EE[3, 7] = similarity_EE[7, 3] = 0.9
    similarity_EE[5, 7] = similarity_EE[7, 5] = 0.8
    memory = replace(RouterMemory.empty(1, 20), tokens_LE=torch.arange(20)[None])
    row = expert_row(ExpertStatistics((4,), torch.ones(1, 20), similarity_EE[None]), memory)
    shown = {key.rpartition("expert_")[2]: value for key, value in row.items() if "similarity" in key}
    assert shown["3_7"] == pytest.approx(0.9) and shown["5_7"] == pytest.approx(0.8)
    assert all(any(str(expert) in pair.split("_") for pair in shown) for expert in range(20)) and len(shown) <= 20
    assert row["expert/tokens/layer_4/expert_19"] == 19
