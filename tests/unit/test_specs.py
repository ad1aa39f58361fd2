"""Which module each layer is built of, and how it is named, initialised and set up."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer

from mole_mega.adapters import cpu_kernels
from mole_mega.adapters.linear import LoRAColumnParallelLinear, LoRARowParallelLinear
from mole_mega.adapters.mixture import MixtureLayer
from mole_mega.adapters.mole import MoLEExperts, MoLELayer
from mole_mega.adapters.routers import MoLERouter
from mole_mega.config import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from mole_mega.models.backend import TorchNorm
from mole_mega.models.llava import LLaVA
from mole_mega.models.mcore_config import build_configs
from mole_mega.models.sizes import SIZES

SIZE = SIZES["tiny"]
LAYERS = range(SIZE.language.num_layers)
SMALL = AdapterConfig(num_experts=3, rank=4)


def make_run(adapter: AdapterConfig = SMALL, *, precision: str = "fp32", **parallel: int) -> RunConfig:
    return RunConfig(
        run_dir="", model=ModelConfig(base=""), adapter=adapter, train=TrainConfig(steps=1, precision=precision),
        data=DataConfig(sources=(SourceConfig(name="a", path=""),), max_length=SIZE.language.max_length),
        parallel=ParallelConfig(**parallel),
    )  # fmt: skip


def decoder_layers(alone, adapter: AdapterConfig | None = SMALL, **options: Any) -> Any:
    run = make_run(adapter or SMALL, **options)
    return LLaVA(run, SIZE, alone, adapters=adapter is not None).language_model.decoder.layers


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Relative to the tensor's norm."""
    assert expected.norm() > 0 and (actual - expected).norm() <= 1e-5 * expected.norm()


CHOICES = ["all", (0,), (1, 3), (3, 2), (0, 1, 2, 3)]


@pytest.mark.parametrize("layers", CHOICES, ids=str)
def test_only_the_mlps_that_were_asked_for_carry_experts(alone, layers):
    for index, layer in enumerate(decoder_layers(alone, replace(SMALL, layers=layers))):
        if layers == "all" or index in layers:
            assert isinstance(layer.mlp, MoELayer) and isinstance(layer.mlp.experts, MoLEExperts)
            assert type(layer.mlp.router) is MoLERouter and layer.mlp.router.layer_number == index + 1
        else:
            assert type(layer.mlp) is MLP
            assert not [m for m in layer.mlp.modules() if isinstance(m, LoRAColumnParallelLinear)]


def test_alone_on_a_cpu_no_token_is_put_in_order(alone, kernels, monkeypatch):
    """With kernels that take a token's row from where it lies; E = 1 has no order, and the outputs are equal."""

    def layer_of(adapter: AdapterConfig) -> Any:
        return decoder_layers(alone, adapter)[0].mlp

    kernels(torch.float32)
    in_place = layer_of(SMALL)
    assert type(in_place) is MixtureLayer and type(layer_of(replace(SMALL, num_experts=1))) is MoLELayer
    monkeypatch.setattr(cpu_kernels, "library", lambda dtype: None)
    in_order = layer_of(SMALL)
    assert type(in_order) is MoLELayer and type(in_order.experts) is MoLEExperts
    for parameter in in_place.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    in_order.load_state_dict(in_place.state_dict())
    monkeypatch.undo()
    x = torch.randn(9, 2, SIZE.language.hidden_size, generator=torch.Generator().manual_seed(1))
    (found, _), (expected, _) = in_place(x), in_order(x)
    assert_close(found, expected)
    for output in (found, expected):
        output.square().sum().backward()
    for got, wanted in zip(in_place.parameters(), in_order.parameters(), strict=True):
        assert (got.grad is None) == (wanted.grad is None)
        if got.grad is not None:
            assert_close(got.grad, wanted.grad)


@pytest.mark.parametrize("layers", [*CHOICES, ()], ids=str)
def test_only_the_mlps_that_were_asked_for_carry_plain_lora(alone, layers):
    for index, layer in enumerate(decoder_layers(alone, replace(SMALL, method="lora", layers=layers))):
        assert type(layer.mlp) is MLP
        asked = layers == "all" or index in layers
        assert type(layer.mlp.linear_fc1) is (LoRAColumnParallelLinear if asked else ColumnParallelLinear)
        assert type(layer.mlp.linear_fc2) is (LoRARowParallelLinear if asked else RowParallelLinear)


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("method", ["mole", "lora"])
def test_attention_carries_lora_in_every_layer_or_in_none(alone, method, attention):
    """Whatever `layers` says: it is about the MLPs."""
    adapter = replace(SMALL, method=method, attention=attention, layers=(1,))
    for layer in decoder_layers(alone, adapter):
        assert type(layer.self_attention.linear_qkv) is (
            LoRAColumnParallelLinear if attention else ColumnParallelLinear
        )
        assert type(layer.self_attention.linear_proj) is (LoRARowParallelLinear if attention else RowParallelLinear)


def test_the_base_alone_is_built_of_plain_parts(alone):
    model = LLaVA(make_run(), SIZE, alone, adapters=False)
    ours = (LoRAColumnParallelLinear, LoRARowParallelLinear, MoELayer, MoLEExperts, MoLERouter)
    assert not [module for module in model.modules() if isinstance(module, ours)]


def test_tower_and_projector_carry_no_adapters(alone):
    model = LLaVA(make_run(), SIZE, alone)
    for part in (model.vision_model, model.vision_projection):
        assert not [name for name, parameter in part.named_parameters() if hasattr(parameter, "placement")]


def test_factors_have_the_shapes_of_the_placement_table(alone):
    language, rank = SIZE.language, SMALL.rank
    hidden, ffn, width, groups = (
        language.hidden_size,
        language.ffn_hidden_size,
        language.kv_channels,
        language.num_kv_heads,
    )
    layer = decoder_layers(alone)[0]
    qkv, experts = layer.self_attention.linear_qkv, layer.mlp.experts
    assert qkv.lora_q_A.shape == qkv.lora_k_A.shape == qkv.lora_v_A.shape == (rank, hidden)
    assert qkv.lora_q_B.shape == (language.num_heads * width, rank)
    assert qkv.lora_k_B.shape == qkv.lora_v_B.shape == (groups * width, rank)
    assert layer.self_attention.linear_proj.lora_o_A.shape == (rank, language.num_heads * width)
    for name in ("gate", "up"):
        assert getattr(experts, f"lora_{name}_A").shape == (3, rank, hidden)
        assert getattr(experts, f"lora_{name}_B").shape == (3, ffn, rank)
    assert experts.lora_down_A.shape == (3, rank, ffn) and experts.lora_down_B.shape == (3, hidden, rank)
    assert layer.mlp.router.weight.shape == (3, hidden) and layer.mlp.router.bias.shape == (3,)


def test_every_adapter_tensor_of_the_model_is_drawn_on_its_own(alone):
    """Two of one name would be equal numbers: experts, layers and projections must all differ."""
    model = LLaVA(make_run(), SIZE, alone)
    drawn: dict[bytes, str] = {}
    for name, parameter in model.named_parameters():
        if not hasattr(parameter, "placement") or name.endswith(("_B", "bias")):
            continue
        for index, part in enumerate(parameter if parameter.dim() == 3 else [parameter]):
            key = part.flatten()[:8].detach().numpy().tobytes()
            assert key not in drawn, f"{name}[{index}] starts as {drawn.get(key)}"
            drawn[key] = f"{name}[{index}]"
    assert len(drawn) == len(LAYERS) * (4 + 1 + 3 * 3)  # q k v o, router, 3 experts of 3 projections


def test_a_layers_adapters_do_not_depend_on_which_others_there_are(alone):
    """So that a run on some layers, or a stage of a pipeline, starts from the same numbers."""
    some, every = (decoder_layers(alone, replace(SMALL, layers=layers)) for layers in ((2,), "all"))
    assert torch.equal(some[2].mlp.experts.lora_gate_A, every[2].mlp.experts.lora_gate_A)
    assert torch.equal(some[2].mlp.router.weight, every[2].mlp.router.weight)


@pytest.mark.parametrize("num_heads", [4, 8])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_lora_on_the_fused_attention_adds_to_each_projections_own_outputs(alone, num_heads, num_kv_heads):
    """Megatron-Core lays q, k and v out group by group: n queries, a key, a value."""
    language = replace(SIZE.language, num_heads=num_heads, num_kv_heads=num_kv_heads)
    model = LLaVA(make_run(), replace(SIZE, language=language), alone)
    linear, width = model.language_model.decoder.layers[0].self_attention.linear_qkv, language.kv_channels
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in linear.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) if name != "weight" else 0)
        x = torch.randn(3, 2, language.hidden_size, generator=generator)
        output, _ = linear(x)
        per_group = num_heads // num_kv_heads
        blocks = output.unflatten(-1, (num_kv_heads, per_group + 2, width))
        parts = {"q": blocks[..., :per_group, :], "k": blocks[..., per_group, :], "v": blocks[..., per_group + 1, :]}
        scale = SMALL.alpha / SMALL.rank
        for name, part in parts.items():
            A, B = getattr(linear, f"lora_{name}_A"), getattr(linear, f"lora_{name}_B")
            expected = scale * F.linear(F.linear(x, A), B)
            assert_close(part.reshape(expected.shape), expected)


def test_lora_on_the_output_projection_and_a_plain_mlp_adds_s_B_A_x(alone):  # noqa: N802
    layer = decoder_layers(alone, replace(SMALL, method="lora", alpha=3))[0]
    generator = torch.Generator().manual_seed(0)
    cases = [(layer.self_attention.linear_proj, ("o",)), (layer.mlp.linear_fc1, ("gate", "up")),
             (layer.mlp.linear_fc2, ("down",))]  # fmt: skip
    for linear, names in cases:
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            x = torch.randn(3, 2, linear.weight.shape[1], generator=generator)
            output, _ = linear(x)
            deltas = [
                F.linear(F.linear(x, getattr(linear, f"lora_{n}_A")), getattr(linear, f"lora_{n}_B")) for n in names
            ]
        expected = F.linear(x, linear.weight) + 3 / SMALL.rank * torch.cat(deltas, -1)
        assert_close(output, expected)


# the norms


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norms_carry_the_mark_that_sums_their_gradient(sequence_parallel):
    configs = build_configs(make_run(tensor=2 if sequence_parallel else 1), SIZE)
    norm = TorchNorm(configs.language, 8, eps=0.25)
    assert isinstance(norm, torch.nn.RMSNorm) and norm.eps == 0.25
    assert all(parameter.sequence_parallel is sequence_parallel for parameter in norm.parameters())


def test_the_tower_has_layer_norms_and_the_decoder_rms_norms(alone):
    model = LLaVA(make_run(precision="bf16"), SIZE, alone)
    norms = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm | torch.nn.RMSNorm)}
    assert len(norms) == 1 + 2 * SIZE.vision.num_built_layers + 2 * len(LAYERS) + 1
    for name, norm in norms.items():
        assert isinstance(norm, torch.nn.LayerNorm if name.startswith("vision_model") else torch.nn.RMSNorm), name
        assert norm.weight.dtype == torch.bfloat16


# Megatron-Core's configs


def test_tensor_parallelism_means_sequence_parallelism_of_the_decoder_alone():
    for tensor in (1, 2):
        configs = build_configs(make_run(tensor=tensor), SIZE)
        assert configs.language.sequence_parallel is (tensor > 1)
        assert not configs.vision.sequence_parallel and not configs.projector.sequence_parallel
        assert configs.language.expert_tensor_parallel_size == tensor


def test_the_towers_last_layers_are_not_built(alone):
    model = LLaVA(make_run(), SIZE, alone)
    assert len(model.vision_model.decoder.layers) == SIZE.vision.num_layers - 1 == SIZE.vision.num_built_layers


@pytest.mark.parametrize(("recompute", "granularity"), [("none", None), ("selective", "selective"), ("full", "full")])
def test_recompute_is_of_the_decoder(recompute, granularity):
    run = make_run()
    configs = build_configs(replace(run, train=replace(run.train, recompute=recompute)), SIZE)
    assert configs.language.recompute_granularity == granularity and configs.vision.recompute_granularity is None


def test_the_loss_is_left_to_the_global_batch_and_the_balance_loss_to_us():
    language = build_configs(make_run(), SIZE).language
    assert language.calculate_per_token_loss and language.moe_router_load_balancing_type == "none"
    assert (language.num_moe_experts, language.moe_router_topk, language.moe_aux_loss_coeff) == (3, 1, 0)
    assert build_configs(make_run(replace(SMALL, method="lora")), SIZE).language.num_moe_experts is None
