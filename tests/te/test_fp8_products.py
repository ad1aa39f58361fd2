"""What is multiplied in FP8: the decoder's frozen base, in rows that a recipe takes. The context is a stand-in that
rounds nothing, so that filling rows up must change nothing either."""

from dataclasses import replace

import pytest
import te_cpu_stand_in
import torch
from test_wiring import RUN, SIZE

from mole_mega.config import Fp8Config
from mole_mega.models import specs
from mole_mega.models.llava import LLaVA
from mole_mega.training.parity import batches

LAST = SIZE.language.num_layers - 1


def build(alone, precision="fp8", adapter=None, **fp8) -> LLaVA:
    run = replace(
        RUN,
        train=replace(RUN.train, precision=precision),
        adapter=replace(RUN.adapter, **(adapter or {})),
        fp8=Fp8Config(**fp8),
    )
    model = LLaVA(run, SIZE, alone)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def loss_and_gradients(model: LLaVA) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    te_cpu_stand_in.in_fp8.clear()
    (batch, *_) = batches(SIZE, 0, 0, 1)
    losses = model(batch.tokens, batch.position_ids, batch.padding_mask, batch.image_mask, batch.pixels, batch.labels)
    loss = (losses * (batch.labels >= 0)).sum()
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def in_fp8(model: LLaVA) -> set[str]:
    multiplied = {id(module) for module, _ in te_cpu_stand_in.in_fp8}
    return {name for name, module in model.named_modules() if id(module) in multiplied}


def linears_of(layers) -> set[str]:
    parts = (
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "mlp.experts.linear_fc1",
        "mlp.experts.linear_fc2",
    )
    return {f"language_model.decoder.layers.{layer}.{part}" for layer in layers for part in parts}


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_every_frozen_linear_of_the_decoder_and_nothing_else_is_multiplied_in_fp8(alone, recipe):
    model = build(alone, recipe=recipe)
    loss_and_gradients(model)
    assert in_fp8(model) == linears_of(range(LAST + 1))


def test_the_first_and_the_last_layer_can_stay_in_bf16(alone):
    model = build(alone, first_last_layers_bf16=True)
    loss_and_gradients(model)
    assert in_fp8(model) == linears_of(range(1, LAST))


def test_a_step_without_rounding_is_that_in_bf16(alone):
    loss, gradients = loss_and_gradients(build(alone))
    expected_loss, expected = loss_and_gradients(build(alone, "bf16"))
    assert not te_cpu_stand_in.in_fp8
    assert torch.equal(loss, expected_loss) and gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient), name


@pytest.mark.parametrize("recipe", ["tensorwise", "mxfp8"])
@pytest.mark.parametrize("counts", [(5, 0, 7, 1), (0, 0, 0, 0), (16, 16, 0, 0)], ids=str)
def test_tokens_that_experts_got_are_filled_up_to_rows_that_the_recipe_takes(alone, monkeypatch, recipe, counts):
    """Tokens that came from other ranks come in any number."""
    monkeypatch.setattr(specs, "_leaves_rows_in_place", lambda *_: False)
    num, tokens_per_expert, outcome = sum(counts), torch.tensor(counts), {}
    x_TH = torch.randn(num, SIZE.language.hidden_size, generator=torch.Generator().manual_seed(2)).bfloat16()
    for precision in ("bf16", "fp8"):
        model = build(alone, precision, recipe=recipe)
        experts = model.mole_layers()[0].experts
        x, weight_T = x_TH.clone().requires_grad_(), torch.linspace(0.2, 1, num, dtype=torch.bfloat16)
        te_cpu_stand_in.in_fp8.clear()
        with te_cpu_stand_in.fp8_context(experts.config):
            output, _ = experts(x, tokens_per_expert, weight_T)
        (output.float() ** 2).sum().backward()
        factors = [getattr(experts, f"lora_{part}_{factor}").grad for part in ("gate", "down") for factor in "AB"]
        outcome[precision] = output, x.grad, *factors
    multiple = 32 if recipe == "mxfp8" else 16
    assert [rows for _, rows in te_cpu_stand_in.in_fp8] == [max(multiple, -(-num // multiple) * multiple)] * 2
    for ours, expected in zip(outcome["fp8"], outcome["bf16"], strict=True):
        assert ours.shape == expected.shape and torch.equal(ours, expected)
