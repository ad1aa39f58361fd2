"""SMoRA (arXiv 2501.15103): each rank an expert, scored by a sigmoid and a bias that loads move and no gradient.

Shape suffixes: T tokens, H hidden, E experts, K chosen.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_mixture import MIX
from test_models import SIZE, assert_close, build, gradients_of, logits_of, make_inputs, noise

from mole_mega.adapters import cpu_kernels, forms
from mole_mega.adapters.mixing import MaskedGate, make_gate
from mole_mega.adapters.routers import move_score_biases, plan_routers, router_loss_gradients, summarize

SMORA = replace(
    MIX, num_experts=16, rank=1, alpha=16.0, top_k=4, renormalize=True, router_score="sigmoid", router_bias=False,
    balance_weight=0.0, z_loss_weight=0.0, router_scope="linear",
)  # fmt: skip
BLOCK = replace(SMORA, router_scope="block")
HIDDEN = SIZE.language.hidden_size


def with_biases(alone, adapter):
    """A model whose score biases are not 0."""
    model = build(alone, adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("score_bias"):
                parameter.copy_(0.2 * noise(name, parameter.shape))
    return model


def released(router, z_T, adapter):
    """[T, E]: the weights of METHODS, which sum to k, times its scale alpha / k."""
    score_TE = torch.sigmoid(z_T @ router.weight.T) + router.score_bias
    top_TK = score_TE.topk(adapter.top_k).indices
    used_TE = torch.zeros_like(score_TE).scatter(1, top_TK, score_TE.gather(1, top_TK))
    gate_TE = adapter.top_k * used_TE / used_TE.sum(-1, keepdim=True)
    return adapter.alpha / adapter.top_k * gate_TE


@pytest.mark.parametrize("adapter", [SMORA, BLOCK], ids=["linear", "block"])
def test_a_block_computes_the_released_equation(alone, adapter):
    """y = W x + s B (G * A x), one column of G a rank: each rank is an expert."""
    block = with_biases(alone, adapter).language_model.decoder.layers[1].mlp
    experts = block.experts
    x = torch.randn(7, 2, HIDDEN, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output, _ = block(x)
        x_TH = x.reshape(-1, HIDDEN)

        def linear(name, base, z_T, weight_TE):
            A, B = (getattr(experts, f"lora_{name}_{factor}") for factor in "AB")
            return z_T @ base.T + (weight_TE * (z_T @ A[:, 0].T)) @ B[:, :, 0]

        def weight(name, z_T):
            if adapter.router_scope == "block":
                return released(block.router, x_TH, adapter)
            return released(getattr(block.router, name), z_T, adapter)

        gate_base, up_base = experts.linear_fc1.weight.chunk(2)
        h = F.silu(linear("gate", gate_base, x_TH, weight("gate", x_TH)))
        h = h * linear("up", up_base, x_TH, weight("up", x_TH))
        expected = linear("down", experts.linear_fc2.weight, h, weight("down", h))
    assert_close(output.reshape(-1, HIDDEN), expected)


def test_the_bias_is_in_choice_and_value(alone):
    inputs, model = make_inputs(), build(alone, BLOCK)
    with torch.no_grad():
        for router in model.routers():
            router.score_bias.zero_()
    before = logits_of(model, inputs)
    with torch.no_grad():
        for router in model.routers():
            router.score_bias += 0.5  # the same for all: nobody else is chosen
    after = logits_of(model, inputs)
    assert (after - before).norm() > 1e-5 * before.norm()


def test_no_gradient_moves_the_bias_and_the_loss_moves_the_routers(alone):
    model = with_biases(alone, SMORA)
    gradients = gradients_of(model, make_inputs())
    assert not any("score_bias" in name for name in gradients)
    assert all(gradient.any() for gradient in gradients.values())
    assert all("score_bias" not in name for name, p in model.named_parameters() if p.requires_grad)


def test_ranks_that_are_all_chosen_alike_are_one_lora(alone):
    inputs = make_inputs()
    adapter = replace(BLOCK, top_k=16, attention=False)
    model = build(alone, adapter)
    lora = build(alone, replace(MIX, num_experts=1, rank=16, alpha=16.0, gate="none", attention=False))
    with torch.no_grad():
        for router in model.routers():
            router.weight.zero_()
            router.score_bias.zero_()
        own = dict(model.named_parameters())
        for name, parameter in lora.named_parameters():
            if ".experts.lora" in name:  # [16, 1, I] -> [1, 16, I], [16, O, 1] -> [1, O, 16]
                parameter.copy_(own[name].transpose(0, 1) if name.endswith("_A") else own[name].permute(2, 1, 0))
    # each rank's weight is 1 / 16, and alpha / rank 16 of it, of the other 1
    assert_close(logits_of(model, inputs), logits_of(lora, inputs))


@pytest.mark.parametrize("adapter", [SMORA, BLOCK], ids=["linear", "block"])
def test_a_step_moves_each_bias_towards_the_mean_load(alone, adapter):
    adapter = replace(adapter, score_bias_rate=0.01)
    model, inputs = with_biases(alone, adapter).train(), make_inputs()
    routers = model.routers()
    plan = plan_routers(routers, 1)
    model(**inputs.arguments(), domains=torch.zeros(len(inputs.tokens), dtype=torch.int64))
    counts = [router.sums.counts_E.clone() for router in routers]
    before = [router.score_bias.clone() for router in routers]
    table = router_loss_gradients(routers, plan, adapter, torch.tensor(1.0))
    move_score_biases(routers, plan, adapter, table)
    for router, count_E, bias_E in zip(routers, counts, before, strict=True):
        assert count_E.sum() == adapter.top_k * inputs.valid.sum()
        assert torch.equal(router.score_bias, bias_E + 0.01 * (count_E.mean() - count_E).sign())
    summary = summarize(table, plan, adapter)
    assert (summary.entropy_L > 0).all() and (summary.entropy_L <= torch.log(torch.tensor(16.0)) + 1e-6).all()
    assert summary.z_loss > 0 and (summary.margin_L >= 0).all()


@pytest.mark.parametrize("adapter", [SMORA, BLOCK, replace(SMORA, router_scope="linear", gate="dense", top_k=1)],
                         ids=["linear", "block", "dense"])  # fmt: skip
def test_passing_over_what_nobody_uses_leaves_the_model_as_it_is(alone, kernels, monkeypatch, adapter):
    kernels(torch.float32)
    inputs, add_few_, calls, found = make_inputs(), cpu_kernels.add_few_, [], []
    monkeypatch.setattr(cpu_kernels, "add_few_", lambda *args: calls.append(args) or add_few_(*args))
    for few_in in (forms._FEW_IN[4], 17):
        monkeypatch.setattr(forms, "_FEW_IN", {4: few_in})
        model = with_biases(alone, adapter)
        found.append((logits_of(model, inputs), gradients_of(model, inputs), len(calls)))
        calls.clear()
    (logits, gradients, few), (all_logits, all_gradients, none) = found
    # of 3 blocks: gate, up and down, the gradient of x and of h; and the logits' own pass
    assert (few, none) == (0 if adapter.gate == "dense" else 3 * (3 + 3 + 2), 0)
    assert_close(logits, all_logits)
    for name, gradient in gradients.items():
        # products round otherwise, and queries and keys multiply it (seen: 1.4e-4; of all else up to 4e-5)
        assert (all_gradients[name] - gradient).norm() <= 5e-4 * gradient.norm(), name


def test_many_thin_experts_are_all_computed():
    weight_TE = torch.rand(5, 64)
    chosen_TE = torch.zeros(5, 64, dtype=torch.bool).scatter(1, weight_TE.topk(8).indices, True)
    for dtype in (torch.float32, torch.bfloat16):
        assert isinstance(make_gate(weight_TE * chosen_TE, chosen_TE, 8, 1, dtype), MaskedGate)
