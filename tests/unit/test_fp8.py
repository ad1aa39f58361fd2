"""The frozen base kept in FP8: what is rounded, what is computed with it, and that nothing wide stays behind."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import trained_llava
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from mole_mega.checkpoint import base
from mole_mega.checkpoint.files import CheckpointError
from mole_mega.config import AdapterConfig, ConfigError, Fp8Config, ParallelConfig
from mole_mega.convert.hf_export import MergeReport
from mole_mega.convert.hf_import import import_hf
from mole_mega.models.llava import LLaVA
from mole_mega.models.sizes import LanguageSize, LlavaSize, VisionSize
from mole_mega.platform import fp8
from mole_mega.platform import parallel as platform
from mole_mega.training.parity import batches, make_base

SIZE = LlavaSize(
    vision=VisionSize(num_layers=3, hidden_size=32, ffn_hidden_size=64, num_heads=4, image_size=16, patch_size=8),
    language=LanguageSize(
        num_layers=4, hidden_size=64, ffn_hidden_size=160, num_heads=4, num_kv_heads=2, vocab_size=131, max_length=256
    ),
    image_token_id=4,
)


@pytest.fixture(scope="module")
def alone():
    yield platform.initialize(ParallelConfig(), seed=0)
    platform.shutdown()


@pytest.fixture(scope="module")
def run(alone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8") / "base"
    made = trained_llava.run_of(folder, AdapterConfig(num_experts=2, rank=4))
    make_base(made, SIZE, alone, folder)
    return made


def build(run, alone, **fp8_config) -> LLaVA:
    model = LLaVA(replace(run, fp8=Fp8Config(**fp8_config)), SIZE, alone)
    base.load_base(model, Path(run.model.base))
    return model.eval()


def wide(rows: int = 300, columns: int = 200) -> torch.Tensor:
    """A matrix whose channels differ in size, one of them all 0."""
    generator = torch.Generator().manual_seed(3)
    weight_OI = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 1, rows)[:, None]
    weight_OI[7] = 0
    return weight_OI


def test_every_code_is_decoded_as_torch_casts_it():
    codes = torch.arange(256, dtype=torch.uint8).view(fp8.FP8)
    finite = ~codes.float().isnan()
    assert finite.sum() == 254
    assert torch.equal(fp8._decode(codes[None])[0][finite], codes.float()[finite])


@pytest.mark.parametrize("scale_of", ["channel", "block"])
def test_a_weight_is_rounded_by_a_sixteenth_at_most(scale_of):
    weight_OI = wide()
    q_OI, scale = fp8.quantise(weight_OI, scale_of)
    assert q_OI.dtype == torch.float8_e4m3fn and tuple(scale.shape) == ((300, 1) if scale_of == "channel" else (3, 2))
    found_OI = fp8.dequantise(q_OI, scale, torch.float32)
    # by half a step: 2^-4 of a normal number, and half the smallest subnormal, 2^-10, below them
    spread = (
        scale if scale_of == "channel" else scale.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :200]
    )
    assert ((found_OI - weight_OI).abs() <= weight_OI.abs() / 16 + spread * 2**-10).all()
    assert torch.equal(found_OI[7], torch.zeros(200))
    if scale_of == "channel":  # by block, small channels beside large ones are lost
        assert 0.02 < (found_OI - weight_OI).norm() / weight_OI.norm() < 0.03


def test_the_product_and_its_gradient_are_those_of_the_decoded_weight_and_keep_nothing_wide():
    weight_OI = wide()
    q_OI, scale = fp8.quantise(weight_OI, "channel")
    x_TI = torch.randn(5, 200, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y_TO = fp8._FrozenProduct.apply(x_TI, q_OI, scale, None)
    expected_OI = fp8.dequantise(q_OI, scale, torch.float32)
    assert torch.equal(y_TO, x_TI @ expected_OI.t())
    gradient_TO = torch.randn(5, 300)
    (found_TI,) = torch.autograd.grad(y_TO, x_TI, gradient_TO)
    assert torch.equal(found_TI, gradient_TO @ expected_OI)
    assert sorted(tensor.nbytes for tensor in kept) == [300 * 4, 300 * 200]


def test_bf16_is_rounded_once():
    weight_OI = wide()
    q_OI, scale = fp8.quantise(weight_OI, "channel")
    assert torch.equal(
        fp8.dequantise(q_OI, scale, torch.bfloat16), fp8.dequantise(q_OI, scale, torch.float32).bfloat16()
    )


@pytest.mark.parametrize("scale_of", ["channel", "block"])
def test_a_model_keeps_its_frozen_linears_in_fp8_and_computes_with_them(run, alone, scale_of):
    plain, kept = build(run, alone), build(run, alone, store_base=True, scale=scale_of)
    linears = fp8.kept_in_fp8(kept)
    # 4 decoder layers, 2 of the tower (the last is not used): qkv, proj, fc1, fc2
    assert len(linears) == (4 + 2) * 4
    for name, parameter in plain.named_parameters():
        now = kept.get_parameter(name)
        if name in linears:
            q_OI, scale = fp8.quantise(parameter.detach(), scale_of)
            assert torch.equal(now.view(torch.uint8), q_OI.view(torch.uint8)), name
            assert torch.equal(linears[name].weight_scale, scale), name
        else:
            assert torch.equal(now, parameter), name
    batch = batches(SIZE, 0, 0, 1)[1]
    arguments = (batch.tokens, batch.position_ids, batch.padding_mask, batch.image_mask, batch.pixels)
    # the same model with the decoded weights in place of its own computes the same
    found = kept(*arguments)
    with torch.no_grad():
        for name, linear in linears.items():
            plain.get_parameter(name).copy_(fp8.frozen_weight(linear))
    torch.testing.assert_close(found, plain(*arguments), rtol=1e-5, atol=1e-5)
    assert (found - build(run, alone)(*arguments)).norm() > 0


def test_bytes_kept(run, alone):
    kept, instead_of = fp8.bytes_kept(build(run, alone, store_base=True))
    assert 0.25 < kept / instead_of < 0.27  # fp32: a byte of four, and 4 bytes a channel
    assert fp8.bytes_kept(build(run, alone)) == (0, 0)


def test_portions_load_what_one_load_does(run, alone, monkeypatch):
    whole = build(run, alone, store_base=True)
    monkeypatch.setattr(base, "_PORTION_BYTES", 1)  # a tensor a time
    portioned = build(run, alone, store_base=True)
    for name, linear in fp8.kept_in_fp8(portioned).items():
        assert torch.equal(linear.weight.view(torch.uint8), whole.get_parameter(name).view(torch.uint8)), name


@pytest.mark.parametrize("store_base", [False, True])
def test_a_base_of_another_model_is_refused(run, alone, store_base):
    config = replace(run, fp8=Fp8Config(store_base=store_base))
    more = replace(SIZE, language=replace(SIZE.language, num_layers=5))
    fewer = replace(SIZE, language=replace(SIZE.language, num_layers=3))
    with pytest.raises(CheckpointError, match=r"does not fit the model: .*layers\.4\."):
        base.load_base(LLaVA(config, more, alone), Path(run.model.base))
    with pytest.raises(CheckpointError, match=r"does not fit the model.*layers\.3\."):
        base.load_base(LLaVA(config, fewer, alone), Path(run.model.base))


class _Two:
    def size(self) -> int:
        return 2


def test_logits_of_a_trained_base_move_by_less_than_5_percent(alone, tmp_path):
    """The demo's base, which has learnt to read. (Random weights magnify rounding from layer to layer.)"""
    folder = tmp_path / "base"
    import_hf(Path(__file__).parents[2] / "examples" / "tiny_cpu" / "base_hf", folder)
    run, size = trained_llava.run_of(folder, AdapterConfig(rank=4)), base.read_size(folder)
    batch = batches(size, 0, 0, 1)[1]
    arguments = (batch.tokens, batch.position_ids, batch.padding_mask, batch.image_mask, batch.pixels)
    logits = []
    for store_base in (False, True):
        model = LLaVA(replace(run, fp8=Fp8Config(store_base=store_base)), size, alone).eval()
        base.load_base(model, folder)
        with torch.no_grad():
            logits.append(model(*arguments)[batch.padding_mask][:, : size.language.vocab_size])
    moved = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert 0 < moved < 0.05, moved


@pytest.mark.parametrize("scale_of", ["channel", "block"])
def test_pieces_of_any_size_give_the_same(monkeypatch, scale_of):
    found = []
    for piece in (1, 2**17, 2**24):
        monkeypatch.setitem(fp8._PIECE, "cpu", piece)
        q_OI, scale = fp8.quantise(wide(), scale_of)
        found.append((q_OI.view(torch.uint8), fp8.dequantise(q_OI, scale, torch.float32)))
    for codes, weight_OI in found[1:]:
        assert torch.equal(codes, found[0][0]) and torch.equal(weight_OI, found[0][1])


def test_the_ends_can_be_left_as_they_are(run, alone):
    model = build(run, alone, store_base=True, first_last_layers_bf16=True)
    kept = {name for name in fp8.kept_in_fp8(model) if name.startswith("language_model.")}
    layers = {name.split("layers.")[1][0] for name in kept}
    assert layers == {"1", "2"} and len(kept) == 2 * 4
    assert any(name.startswith("vision_model.") for name in fp8.kept_in_fp8(model))


def test_a_merge_says_what_fp8_would_have_kept():
    weight_OI = torch.randn(64, 256, generator=torch.Generator().manual_seed(5))
    found = {}
    for size in (1.0, 1e-4):
        report = MergeReport(in_fp8="channel")
        delta_OI = size * torch.randn(64, 256, generator=torch.Generator().manual_seed(6))
        report.add("w", delta_OI, delta_OI)
        report.add_in_fp8("w", weight_OI, delta_OI)
        found[size] = report.to_dict()["overall"]
    # as large as the weights: rounded as they are; below a step of the weights: nearly all of it is lost in rounding
    assert found[1.0]["survived_in_fp8"] == pytest.approx(1, abs=0.01) and found[1.0]["error_in_fp8"] < 0.06
    assert found[1e-4]["error_in_fp8"] > 1
    assert "survived_in_fp8" not in MergeReport().to_dict()["overall"]


def test_blocks_that_tensor_parallelism_would_cut_are_refused(run, alone):
    model = LLaVA(run, SIZE, alone)
    layer = model.language_model.decoder.layers[0]
    linears = [module for module in layer.modules() if isinstance(module, ColumnParallelLinear | RowParallelLinear)]
    for linear in linears:
        linear.tp_group = _Two()
    with pytest.raises(ConfigError, match=r"parts of a multiple of 128.*use fp8\.scale channel"):
        fp8.make_room(layer, "block")
