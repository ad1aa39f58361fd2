"""The model built of Transformer Engine's modules: its tensors are those of the local backend, by name in a checkpoint,
shape, placement and whether they are trained."""

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.extensions import transformer_engine as extension
from megatron.core.transformer.identity_op import IdentityOp

from mole_mega.adapters.mole import MoLELayer
from mole_mega.adapters.transformer_engine import TELoRAColumnParallelLinear, TELoRARowParallelLinear
from mole_mega.checkpoint.base import load_base, model_entries, save_base
from mole_mega.config import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from mole_mega.models.llava import LLaVA
from mole_mega.models.sizes import SIZES
from mole_mega.platform import parallel as groups
from mole_mega.platform.pretend import rank_of

SIZE = SIZES["tiny"]
ADAPTERS = {
    "mole": AdapterConfig(num_experts=2, rank=4),
    "mole in one layer, plain attention": AdapterConfig(num_experts=2, rank=4, layers=(1,), attention=False),
    "lora": AdapterConfig(method="lora", rank=4, layers=(1, 2)),
    "weights travel": AdapterConfig(num_experts=2, rank=4, top_k=2, expert_parallel="weights"),
    "none": None,
}
LOCAL, TE = "local", "transformer_engine"


def make_run(backend: str, adapter: AdapterConfig | None, **parallel: int) -> RunConfig:
    return RunConfig(
        run_dir="", model=ModelConfig(base="", backend=backend), adapter=adapter or AdapterConfig(),
        train=TrainConfig(steps=1, precision="fp32"), parallel=ParallelConfig(**parallel),
        data=DataConfig(sources=(SourceConfig(name="a", path=""),), max_length=SIZE.language.max_length),
    )  # fmt: skip


def build(backend, adapter, parallel, **layout) -> LLaVA:
    return LLaVA(make_run(backend, adapter, **layout), SIZE, parallel, adapters=adapter is not None)


def described(model: LLaVA) -> dict:
    """{(tensor of a checkpoint, where this part lies in it): what there is to say of it}."""
    parameters, found = dict(model.named_parameters()), {}
    for name, entry in model_entries(model).items():
        parameter, state = parameters[name], {name: entry}
        apply_factories(state)
        for part in nested_values(state):
            found[part.key, tuple(part.global_offset)] = (
                tuple(part.global_shape), tuple(part.local_shape), part.replica_id, part.dtype,
                parameter.requires_grad, getattr(parameter, "placement", None),
            )  # fmt: skip
    return found


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_a_model_holds_the_tensors_of_the_local_backend(alone, adapter):
    assert described(build(TE, adapter, alone)) == described(build(LOCAL, adapter, alone))


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_every_parameter_is_in_the_checkpoint(alone, adapter):
    model = build(TE, adapter, alone)
    assert model_entries(model).keys() == dict(model.named_parameters()).keys()


def test_the_linears_norms_and_attention_are_transformer_engines(alone):
    model = build(TE, ADAPTERS["mole"], alone)
    for layer in model.language_model.decoder.layers:
        attention, experts = layer.self_attention, layer.mlp.experts
        assert type(attention.core_attention) is extension.TEDotProductAttention
        assert type(attention.linear_qkv) is TELoRAColumnParallelLinear
        assert type(attention.linear_proj) is TELoRARowParallelLinear
        assert type(experts.linear_fc1) is extension.TEColumnParallelLinear
        assert type(experts.linear_fc2) is extension.TERowParallelLinear
        for norm in (layer.input_layernorm, layer.pre_mlp_layernorm):
            assert type(norm) is extension.te.pytorch.RMSNorm
    assert type(model.language_model.decoder.final_layernorm) is extension.te.pytorch.RMSNorm
    assert type(model.vision_model.ln_pre) is extension.te.pytorch.LayerNorm


def test_a_linear_holds_the_norm_where_nothing_else_reads_it(alone):
    """The tower, and what carries no adapters; a router and LoRA's A read what the norm puts out."""
    model = build(TE, ADAPTERS["mole in one layer, plain attention"], alone)
    fused = extension.TELayerNormColumnParallelLinear
    for layer in (*model.vision_model.decoder.layers, *model.language_model.decoder.layers):
        assert type(layer.input_layernorm) is IdentityOp and type(layer.self_attention.linear_qkv) is fused
        if isinstance(layer.mlp, MoLELayer):
            assert type(layer.pre_mlp_layernorm) is not IdentityOp
        else:
            assert type(layer.pre_mlp_layernorm) is IdentityOp and type(layer.mlp.linear_fc1) is fused


def fill(model: LLaVA) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, generator=generator)


def weights(model: LLaVA, **which) -> dict[str, torch.Tensor]:
    return {entry.key: entry.data for entry in model_entries(model, **which).values()}


@pytest.mark.parametrize(("writer", "reader"), [(LOCAL, TE), (TE, LOCAL)])
def test_a_base_of_one_backend_loads_under_the_other(alone, tmp_path, writer, reader):
    written = build(writer, None, alone)
    fill(written)
    save_base(written, tmp_path / "base")
    read = build(reader, ADAPTERS["mole in one layer, plain attention"], alone)
    load_base(read, tmp_path / "base")
    expected, found = weights(written), weights(read, trainable=False)
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize(("writer", "reader"), [(LOCAL, TE), (TE, LOCAL)])
@pytest.mark.parametrize("adapter", ["mole", "lora"])
def test_adapters_of_one_backend_load_under_the_other(alone, tmp_path, writer, reader, adapter):
    written, read = (build(backend, ADAPTERS[adapter], alone) for backend in (writer, reader))
    fill(written)
    dist_checkpointing.save(model_entries(written, trainable=True), str(tmp_path), async_sharded_save=False)
    loaded = dist_checkpointing.load(model_entries(read, trainable=True), str(tmp_path), strict="raise_all")
    expected = dict(written.named_parameters())
    assert loaded
    for name, weight in loaded.items():
        assert torch.equal(weight, expected[name]), name


LAYOUTS = [{"tensor": 2, "expert": 2}, {"pipeline": 2, "tensor": 2}]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_every_rank_holds_the_parts_of_the_local_backend(adapter, layout, monkeypatch):
    # a norm that finds itself on the meta device without having been told would move
    monkeypatch.setattr(
        extension, "_get_extra_te_kwargs", lambda config: {"params_dtype": config.params_dtype, "device": "meta"}
    )
    if adapter is None or (adapter.method == "lora" and "expert" in layout):
        layout = {key: size for key, size in layout.items() if key != "expert"}
    groups.shutdown()  # those of the tests before
    for rank in range(4):
        with rank_of(ParallelConfig(**layout), rank, 4) as parallel:
            expected = described(build(LOCAL, adapter, parallel, **layout))
            assert described(build(TE, adapter, parallel, **layout)) == expected
