"""MixLoRA (arXiv 2404.15159): experts that are whole MLPs, each with an activation of its own.

Shape suffixes: T tokens, H hidden, E experts.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_mixture import MIX, weights_of
from test_models import SIZE, assert_close, build, gradients_of, logits_of, make_inputs

from mole_mega.adapters import bank, whole_mlps
from mole_mega.adapters.mixing import paired

MLPS = replace(MIX, expert_form="mlp", top_k=2, renormalize=True)
KINDS = {
    "two of three": MLPS,
    "two of many": replace(MLPS, num_experts=13),
    "all": replace(MLPS, top_k=3),
    "shared A": replace(MLPS, share_A=True),
}
HIDDEN = SIZE.language.hidden_size


def naive(experts, x_TH, weight_TE):
    """Every expert's MLP by itself, base products included, for every token."""
    adapter = experts.adapter
    scale = adapter.alpha / adapter.rank
    gate_base, up_base = experts.linear_fc1.weight.chunk(2)

    def linear(name, base, z, e):
        A, B = (getattr(experts, f"lora_{name}_{factor}") for factor in "AB")
        A, B = A if adapter.share_A else A[e], B[e]
        return z @ base.T + scale * (z @ A.T) @ B.T

    total = 0
    for e in range(adapter.num_experts):
        h = F.silu(linear("gate", gate_base, x_TH, e)) * linear("up", up_base, x_TH, e)
        total = total + weight_TE[:, e : e + 1] * linear("down", experts.linear_fc2.weight, h, e)
    return total


# (dtype, rtol of each tensor's norm); the kernels know no float64
FORMS = {
    "torch": (torch.float64, 1e-12),
    "kernels": (torch.float32, 1e-6),
    "kernels, bf16": (torch.bfloat16, 2e-2),
}


@pytest.fixture
def form(request, monkeypatch, kernels):
    """(dtype, tolerance) of a form, which is the one that runs."""
    dtype, tolerance = FORMS[request.param]
    ran, apply = [], whole_mlps._Activate.apply
    monkeypatch.setattr(whole_mlps._Activate, "apply", lambda *values: ran.append(1) or apply(*values))
    if request.param != "torch":
        kernels(dtype)
    yield dtype, tolerance
    assert bool(ran) == (request.param != "torch")


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize("name", KINDS)
def test_whole_mlps_equal_a_loop_over_experts(alone, name, form):
    """Value and every gradient: of x, of all factors, and of the probabilities that the weights come from."""
    adapter, (dtype, tolerance) = KINDS[name], form
    experts = build(alone, adapter).language_model.decoder.layers[1].mlp.experts.to(dtype)
    generator = torch.Generator().manual_seed(3)
    x_TH, pull_TH = (torch.randn(11, HIDDEN, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    probs_TE = torch.rand(11, adapter.num_experts, generator=generator, dtype=torch.float64).softmax(-1)
    probs_TE = probs_TE if dtype == torch.float64 else probs_TE.float()
    chosen_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter(1, probs_TE.topk(adapter.top_k).indices, True)

    def pull(run, experts, x_TH, probs_TE, pull_TH):
        leaves = [x_TH.requires_grad_(), probs_TE.requires_grad_(), *experts.parameters(recurse=False)]
        weight_TE = chosen_TE * probs_TE / (chosen_TE * probs_TE).sum(-1, keepdim=True)
        output_TH = run(x_TH * 1, weight_TE)
        return output_TH, *torch.autograd.grad(output_TH, leaves, pull_TH)

    def ours(x_TH, weight_TE):
        return experts(x_TH, paired(weight_TE, chosen_TE, adapter.top_k))

    found = pull(ours, experts, x_TH, probs_TE, pull_TH)
    exact = experts.double()
    values = (tensor.detach().double() for tensor in (x_TH, probs_TE, pull_TH))
    expected = pull(lambda x_TH, weight_TE: naive(exact, x_TH, weight_TE), exact, *values)
    for one, reference in zip(found, expected, strict=True):
        assert reference.any()
        assert (one.double() - reference).norm() <= tolerance * reference.norm()


def test_little_that_many_experts_add_is_kept_in_bf16(alone, kernels):
    """Of what adapters change, of some 0.5 % of the output: rounded with every expert, a fifth would be lost."""
    kernels(torch.bfloat16)
    adapter = replace(MLPS, num_experts=13, top_k=8)
    experts = build(alone, adapter).language_model.decoder.layers[1].mlp.experts.bfloat16()
    generator = torch.Generator().manual_seed(3)
    x_TH = torch.randn(200, HIDDEN, generator=generator).bfloat16()
    chosen_TK = torch.rand(200, 13, generator=generator).topk(8).indices
    chosen_TE = torch.zeros(200, 13, dtype=torch.bool).scatter(1, chosen_TK, True)
    weight_TE = chosen_TE / 8.0

    with torch.no_grad():
        experts.lora_gate_B.zero_(), experts.lora_up_B.zero_()
        experts.lora_down_B *= 0.01
        found_TH = experts(x_TH, paired(weight_TE, chosen_TE, 8)).double()
        exact = experts.double()
        expected_TH = naive(exact, x_TH.double(), weight_TE.double())
        exact.lora_down_B.zero_()
        frozen_TH = naive(exact, x_TH.double(), weight_TE.double())
    change_TH = expected_TH - frozen_TH
    assert 1e-3 < change_TH.norm() / frozen_TH.norm() < 1e-2
    kept = ((found_TH - frozen_TH) * change_TH).sum() / change_TH.square().sum()
    assert kept == pytest.approx(1, abs=0.1)


class Middle:
    """`activate` of 9 tokens, two of three experts each, and the gradients that come back."""

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        tokens, hidden, ffn, experts, rank = 9, 16, 24, 3, 2
        shapes = ((experts, rank, hidden), (experts, rank, hidden), (experts, ffn, rank), (experts, ffn, rank))
        self.x_TH, self.base_2FH, pull_NF, pull_TF, *self.factors = (
            torch.randn(shape, generator=generator)
            for shape in ((tokens, hidden), (2 * ffn, hidden), (2 * tokens, ffn), (tokens, ffn), *shapes)
        )
        self.pulls = (pull_NF, pull_TF)
        chosen_TK = torch.rand(tokens, experts, generator=generator).topk(2).indices
        chosen_TE = torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, chosen_TK, True)
        self.gate = paired(chosen_TE / 2.0, chosen_TE, 2)

    def run(self, shared, of_x=True, of_factors=True):
        """(outputs, leaves that want gradients). `shared`: x's goes into the frozen product's."""
        x_TH = self.x_TH.clone().requires_grad_(of_x)
        factors = [factor.clone().requires_grad_(of_factors) for factor in self.factors]
        seen_TH, gradient = bank.share_input(x_TH) if shared else (x_TH, None)
        fc1_T2F = F.linear(seen_TH, self.base_2FH)
        outputs = whole_mlps.activate(self.gate, fc1_T2F, seen_TH, factors[:2], factors[2:], 0.5, gradient)
        return outputs, [leaf for leaf in (x_TH, *factors) if leaf.requires_grad]

    def gradients(self, *args, **kwargs):
        return torch.autograd.grad(*self.run(*args, **kwargs), self.pulls)


def test_gradients_are_those_wherever_xs_goes(kernels):
    """Into the frozen product's, as without dropout; by itself, as with it; and where x or the factors have none."""
    kernels(torch.float32)
    middle = Middle()
    apart = middle.gradients(shared=False)
    for one, other in zip(middle.gradients(shared=True), apart, strict=True):
        assert_close(one, other)
    for shared in (False, True):
        assert_close(*middle.gradients(shared, of_factors=False), apart[0])
        for one, other in zip(middle.gradients(shared, of_x=False), apart[1:], strict=True):
            assert_close(one, other)


def test_a_second_backward_pass_is_refused(kernels):
    """The first one's gradients lie where it kept what it needs."""
    kernels(torch.float32)
    middle = Middle()
    outputs, leaves = middle.run(shared=False)
    torch.autograd.grad(outputs, leaves, middle.pulls, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(outputs, leaves, middle.pulls)


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


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_equal_experts_give_their_router_no_gradient(alone, form):
    """None at all: Adam makes a whole step of rounding."""
    experts = build(alone, MLPS, zero_B=True).language_model.decoder.layers[1].mlp.experts.to(form[0])
    generator = torch.Generator().manual_seed(3)
    x_TH, pull_TH = (torch.randn(300, HIDDEN, generator=generator).to(form[0]) for _ in range(2))
    chosen_TK = torch.rand(300, MLPS.num_experts, generator=generator).topk(2).indices
    chosen_TE = torch.zeros(300, MLPS.num_experts, dtype=torch.bool).scatter(1, chosen_TK, True)
    weight_TE = (chosen_TE * 0.5).to(torch.float64 if form[0] == torch.float64 else torch.float32).requires_grad_()
    experts(x_TH, paired(weight_TE, chosen_TE, 2)).backward(pull_TH)
    assert weight_TE.grad.shape == chosen_TE.shape and not weight_TE.grad.any()
    assert experts.lora_up_B.grad.any()


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
