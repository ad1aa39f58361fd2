"""MixLoRA (arXiv 2404.15159): experts that are whole MLPs, each with an activation of its own.

Shape suffixes: T tokens, H hidden, E experts.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_mixture import MIX, weights_of
from test_models import SIZE, assert_close, build, gradients_of, logits_of, make_inputs

from mole_mega.adapters.mixing import paired

MLPS = replace(MIX, expert_form="mlp", top_k=2, renormalize=True)
KINDS = {"two of three": MLPS, "two of many": replace(MLPS, num_experts=13), "all": replace(MLPS, top_k=3)}
HIDDEN = SIZE.language.hidden_size


def naive(experts, x_TH, weight_TE):
    """Every expert's MLP by itself, base products included, for every token."""
    adapter = experts.adapter
    scale = adapter.alpha / adapter.rank
    gate_base, up_base = experts.linear_fc1.weight.chunk(2)

    def linear(name, base, z, e):
        A, B = (getattr(experts, f"lora_{name}_{factor}")[e] for factor in "AB")
        return z @ base.T + scale * (z @ A.T) @ B.T

    total = 0
    for e in range(adapter.num_experts):
        h = F.silu(linear("gate", gate_base, x_TH, e)) * linear("up", up_base, x_TH, e)
        total = total + weight_TE[:, e : e + 1] * linear("down", experts.linear_fc2.weight, h, e)
    return total


@pytest.mark.parametrize("name", KINDS)
def test_whole_mlps_equal_a_loop_over_experts_in_float64(alone, name):
    """Value and every gradient: of x, of all factors, and of the probabilities that the weights come from."""
    adapter = KINDS[name]
    experts = build(alone, adapter).language_model.decoder.layers[1].mlp.experts.double()
    generator = torch.Generator().manual_seed(3)
    x_TH, pull_TH = (torch.randn(11, HIDDEN, generator=generator, dtype=torch.float64) for _ in range(2))
    probs_TE = torch.rand(11, adapter.num_experts, generator=generator, dtype=torch.float64).softmax(-1)
    chosen_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter(1, probs_TE.topk(adapter.top_k).indices, True)
    leaves = [x_TH.requires_grad_(), probs_TE.requires_grad_(), *experts.parameters(recurse=False)]
    weight_TE = chosen_TE * probs_TE / (chosen_TE * probs_TE).sum(-1, keepdim=True)
    found = experts(x_TH, paired(weight_TE, chosen_TE, adapter.top_k))
    expected = naive(experts, x_TH, weight_TE)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found, leaves, pull_TH, retain_graph=True)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, leaves, pull_TH), strict=True):
        assert reference.any()
        torch.testing.assert_close(gradient, reference)


def test_a_block_mixes_the_experts_that_its_router_chose(alone):
    block = build(alone, MLPS).language_model.decoder.layers[1].mlp
    x = torch.randn(7, 2, HIDDEN, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output, _ = block(x)
        probs_TE = torch.softmax(x.reshape(-1, HIDDEN) @ block.router.weight.T + block.router.bias, -1)
        weight_TE = torch.stack([weights_of(MLPS, p_E) for p_E in probs_TE])
        expected = naive(block.experts, x.reshape(-1, HIDDEN), weight_TE)
    assert_close(output.reshape(-1, HIDDEN), expected)


def test_it_is_not_the_mixture_of_linears(alone):
    inputs = make_inputs()
    linears = logits_of(build(alone, replace(MLPS, expert_form="linear")), inputs)
    assert (logits_of(build(alone, MLPS), inputs) - linears).norm() > 1e-3 * linears.norm()


@pytest.mark.parametrize("name", KINDS)
def test_b_zero_is_the_frozen_model_bit_for_bit(alone, name):
    inputs = make_inputs()
    frozen = logits_of(build(alone, None), inputs)
    assert torch.equal(logits_of(build(alone, replace(KINDS[name], attention=False), zero_B=True), inputs), frozen)


def test_equal_experts_are_one_lora(alone):
    """Whatever their weights: they sum to 1."""
    inputs, model = make_inputs(), build(alone, MLPS)
    lora = build(alone, replace(MIX, num_experts=1, gate="none"))
    with torch.no_grad():
        one = dict(lora.named_parameters())
        for name, parameter in model.named_parameters():
            if ".experts.lora" in name:
                parameter.copy_(one[name].expand_as(parameter))
    assert_close(logits_of(model, inputs), logits_of(lora, inputs))


def test_the_language_loss_trains_the_routers(alone):
    gradients = gradients_of(build(alone, MLPS), make_inputs())
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
