"""The router's losses have the gradient that autograd finds on the whole batch, however the batch was cut.

Shape suffixes: T tokens, H hidden, E experts, L layers.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.transformer_config import TransformerConfig

from mole_mega.adapters.routers import (
    MoLERouter,
    RouterPlan,
    RouterSums,
    gate_weights,
    router_loss_gradients,
    summarize,
)
from mole_mega.config import AdapterConfig

HIDDEN = 6
GATES = ("none", "prob", "straight_through")


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def make_router(alone, *, layer: int = 0, seed: int = 0, **adapter) -> MoLERouter:
    """The router of decoder layer `layer`, with gradient buffers as the trainer gives it."""
    router = MoLERouter(
        TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=1), alone.groups,
        adapter=AdapterConfig(**adapter), name=f"layers.{layer}.router", seed=seed, device=alone.device,
    )  # fmt: skip
    router.set_layer_number(layer + 1)
    for parameter in router.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
    return router


def randomise(router: MoLERouter, rng: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))


# --- the sums of one router ---


def route(x_TH: torch.Tensor, weight_EH: torch.Tensor, bias_E: torch.Tensor) -> tuple[torch.Tensor, ...]:
    logits_TE = x_TH @ weight_EH.T + bias_E
    probs_TE = torch.softmax(logits_TE, dim=-1)
    chosen_TE = torch.nn.functional.one_hot(probs_TE.argmax(-1), probs_TE.shape[-1]).bool()
    return logits_TE, probs_TE, chosen_TE


def route_to(*arguments) -> tuple[torch.Tensor, ...]:
    """`route` with each token's choice as a number."""
    logits_TE, probs_TE, chosen_TE = route(*arguments)
    return logits_TE, probs_TE, chosen_TE.int().argmax(-1)


def summed(x_TH, weight_EH, bias_E, valid_T, cuts: Sequence[int], group_T=None) -> RouterSums:
    """Sums over micro-batches of `cuts` tokens each, which count by 4 groups where groups are given."""
    num_experts, hidden = weight_EH.shape
    sums = RouterSums(num_experts, hidden, torch.device("cpu"), balance=True, z=True)
    if group_T is not None:
        sums.count_groups(4)
    groups = [None] * len(cuts) if group_T is None else group_T.split(list(cuts))
    for x, valid, group in zip(x_TH.split(list(cuts)), valid_T.split(list(cuts)), groups, strict=True):
        sums.add(x, *route_to(x, weight_EH, bias_E), valid, group)
    return sums


@pytest.fixture(params=[2, 3, 5, 7, 12], ids="E={}".format)
def tokens(request, rng):
    """40 tokens of which about a third is padding, and a router for them. With 7 experts some tokens are kept and not
    summed, with 12 all."""
    num_experts = request.param
    return SimpleNamespace(
        x_TH=torch.randn(40, HIDDEN, generator=rng),
        weight_EH=torch.randn(num_experts, HIDDEN, generator=rng),
        bias_E=torch.randn(num_experts, generator=rng) + 2 * torch.eye(num_experts)[0],  # not balanced: no zero slope
        valid_T=torch.rand(40, generator=rng) > 0.3,
    )


CUTS = {"one micro-batch": [40], "several": [7, 1, 20, 12], "one is empty": [40, 0], "one by one": [1] * 40}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_the_balance_gradient_is_autograds_with_the_choices_held_fixed(tokens, cuts):
    weight, bias = (t.double().requires_grad_() for t in (tokens.weight_EH, tokens.bias_E))
    _, probs_TE, chosen_TE = route(tokens.x_TH.double(), weight, bias)
    share_E = chosen_TE[tokens.valid_T].double().mean(0)  # no gradient: argmax has none
    (share_E * probs_TE[tokens.valid_T].sum(0)).sum().backward()

    sums = summed(tokens.x_TH, tokens.weight_EH, tokens.bias_E, tokens.valid_T, cuts)
    gradient = sums.balance_gradient(share_E.float()).double()
    torch.testing.assert_close(gradient[:, :-1], weight.grad, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(gradient[:, -1], bias.grad, rtol=2e-5, atol=2e-5)
    assert weight.grad.abs().max() > 0.1


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_the_z_gradient_is_autograds(tokens, cuts):
    weight, bias = (t.double().requires_grad_() for t in (tokens.weight_EH, tokens.bias_E))
    logits_TE, _, _ = route(tokens.x_TH.double(), weight, bias)
    loss = torch.logsumexp(logits_TE[tokens.valid_T], -1).square().sum()
    loss.backward()

    sums = summed(tokens.x_TH, tokens.weight_EH, tokens.bias_E, tokens.valid_T, cuts)
    torch.testing.assert_close(sums.z_sum.double(), loss.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(sums.z_grads_EX[:, :-1].double(), weight.grad, rtol=2e-5, atol=2e-4)
    torch.testing.assert_close(sums.z_grads_EX[:, -1].double(), bias.grad, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_the_statistics_are_those_of_the_valid_tokens(tokens, cuts):
    _, probs_TE, chosen_TE = route(tokens.x_TH, tokens.weight_EH, tokens.bias_E)
    sums = summed(tokens.x_TH, tokens.weight_EH, tokens.bias_E, tokens.valid_T, cuts)
    assert sums.tokens == tokens.valid_T.sum()
    assert torch.equal(sums.counts_E, chosen_TE[tokens.valid_T].sum(0).float())
    torch.testing.assert_close(sums.probs_E, probs_TE[tokens.valid_T].sum(0))
    p_TE = probs_TE[tokens.valid_T].double()
    torch.testing.assert_close(sums.entropy_sum.double(), -(p_TE * p_TE.log()).sum(), rtol=1e-5, atol=0)
    first_T, second_T = p_TE.sort(-1).values[:, -2:].flip(-1).T
    torch.testing.assert_close(sums.margin_sum.double(), (first_T - second_T).sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_tokens_are_counted_by_their_group(tokens, cuts, rng):
    group_T = torch.randint(3, (40,), generator=rng)  # of 4: one stays without a token
    group_T[~tokens.valid_T] = -1
    sums = summed(tokens.x_TH, tokens.weight_EH, tokens.bias_E, tokens.valid_T, cuts, group_T)
    _, _, chosen_TE = route(tokens.x_TH, tokens.weight_EH, tokens.bias_E)
    for group in range(4):
        assert torch.equal(sums.counts_GE[group], chosen_TE[group_T == group].sum(0).float())
    assert sums.counts_GE.sum() == sums.tokens == tokens.valid_T.sum() and not sums.counts_GE[3].any()


def test_one_expert_leaves_no_doubt(rng):
    x_TH, weight_EH = torch.randn(5, HIDDEN, generator=rng), torch.randn(1, HIDDEN, generator=rng)
    sums = summed(x_TH, weight_EH, torch.zeros(1), torch.ones(5).bool(), [5])
    assert sums.margin_sum == 5 and sums.entropy_sum.abs() < 1e-5


def test_what_padding_holds_changes_no_bit(tokens):
    other_TH = torch.where(tokens.valid_T[:, None], tokens.x_TH, 1e3 * tokens.x_TH.flip(0))
    share_E = torch.arange(len(tokens.bias_E)).float()
    sums = [summed(x, tokens.weight_EH, tokens.bias_E, tokens.valid_T, [40]) for x in (tokens.x_TH, other_TH)]
    one, other = ([*s.tensors(), s.balance_gradient(share_E)] for s in sums)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_clear_forgets_everything(tokens):
    sums = summed(tokens.x_TH, tokens.weight_EH, tokens.bias_E, tokens.valid_T, [40])
    share_E = torch.arange(len(tokens.bias_E)).float()
    assert all(tensor.abs().sum() > 0 for tensor in sums.tensors() if tensor is not sums.pairs_PX)
    assert sums.balance_gradient(share_E).abs().sum() > 0
    sums.clear()
    assert all(tensor.abs().sum() == 0 for tensor in sums.tensors())
    assert sums.balance_gradient(share_E).abs().sum() == 0


def test_bf16_inputs_are_summed_in_fp32(tokens):
    x_TH = tokens.x_TH.bfloat16()
    exact = summed(x_TH.float(), tokens.weight_EH, tokens.bias_E, tokens.valid_T, [40])
    sums = RouterSums(*tokens.weight_EH.shape, torch.device("cpu"), balance=True, z=True)
    sums.add(x_TH, *route_to(x_TH.float(), tokens.weight_EH, tokens.bias_E), tokens.valid_T)
    for found, expected in zip(sums.tensors(), exact.tensors(), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # sums in another order


# --- the losses of all routers of a batch ---


def run_routers(routers, x_LTH, valid_T, cuts, adapter, *, grad_scale=1.0):
    """Forward of all routers over micro-batches, then their losses' gradients; the summary."""
    for x_LtH, valid in zip(x_LTH.split(list(cuts), dim=1), valid_T.split(list(cuts)), strict=True):
        for router, x_tH in zip(routers, x_LtH, strict=True):
            router(x_tH[:, None], padding_mask=~valid[:, None])
    plan = RouterPlan(tuple(router.layer for router in routers), num_groups=1)
    return summarize(router_loss_gradients(routers, plan, adapter, torch.tensor(float(grad_scale))), plan, adapter)


def reference_loss(routers, x_LTH, valid_T, adapter):
    """METHODS A.1 over the whole batch in float64: (balance, z), unweighted, and the weighted sum's gradients."""
    parameters = [[p.detach().double().requires_grad_() for p in router.parameters()] for router in routers]
    shares, means, zs = [], [], []
    for (weight, *bias), x_TH in zip(parameters, x_LTH.double(), strict=True):
        logits_TE, probs_TE, chosen_TE = route(x_TH[valid_T], weight, bias[0] if bias else torch.zeros(()).double())
        shares.append(chosen_TE.double().mean(0))
        means.append(probs_TE.mean(0))
        zs.append(torch.logsumexp(logits_TE, -1).square().mean())
    share_LE, mean_LE = torch.stack(shares), torch.stack(means)
    if adapter.balance_scope == "model":
        balance = (share_LE.mean(0) * mean_LE.mean(0)).sum()
    else:
        balance = (share_LE * mean_LE).sum(1).mean()
    z = torch.stack(zs).mean()
    (adapter.balance_weight * balance + adapter.z_loss_weight * z).backward()
    return balance.detach(), z.detach(), [[p.grad for p in ps] for ps in parameters]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("weights", [(0.3, 0.0), (0.0, 0.7), (0.3, 0.7)], ids=["balance", "z", "both"])
@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("num_experts", [2, 3, 5])
def test_the_losses_of_a_batch_have_autograds_gradient(alone, rng, num_experts, scope, weights, bias):
    adapter = AdapterConfig(
        num_experts=num_experts, balance_scope=scope, balance_weight=weights[0], z_loss_weight=weights[1],
        router_bias=bias,
    )  # fmt: skip
    routers = [make_router(alone, layer=layer, **vars(adapter)) for layer in (0, 2, 3)]
    for router in routers:
        randomise(router, rng)
    x_LTH = torch.randn(3, 40, HIDDEN, generator=rng)
    valid_T = torch.rand(40, generator=rng) > 0.3

    summary = run_routers(routers, x_LTH, valid_T, [7, 1, 20, 12], adapter, grad_scale=17)
    balance, z, gradients = reference_loss(routers, x_LTH, valid_T, adapter)
    assert (summary.layers, summary.tokens) == ((0, 2, 3), float(valid_T.sum()))
    assert summary.balance_loss == pytest.approx(float(balance), rel=1e-5)
    assert summary.z_loss == pytest.approx(float(z), rel=1e-5)
    for router, expected in zip(routers, gradients, strict=True):
        for parameter, gradient in zip(router.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.main_grad.double(), 17 * gradient, rtol=3e-5, atol=3e-5)


def test_the_losses_are_added_to_what_the_backward_pass_left(alone, rng):
    adapter = AdapterConfig(num_experts=3, balance_weight=0.5)
    x_LTH, valid_T = torch.randn(1, 12, HIDDEN, generator=rng), torch.ones(12, dtype=torch.bool)
    gradients = []
    for start in (0.0, 2.5):
        router = make_router(alone, **vars(adapter))
        router.weight.main_grad.fill_(start)
        run_routers([router], x_LTH, valid_T, [12], adapter)
        gradients.append(router.weight.main_grad)
    torch.testing.assert_close(gradients[0] + 2.5, gradients[1])


def test_a_step_starts_from_empty_sums(alone, rng):
    adapter = AdapterConfig(num_experts=3, balance_weight=0.5, z_loss_weight=0.5)
    router = make_router(alone, **vars(adapter))
    x_LTH, valid_T = torch.randn(1, 12, HIDDEN, generator=rng), torch.ones(12, dtype=torch.bool)
    steps = []
    for _ in range(2):
        router.weight.main_grad.zero_()
        summary = run_routers([router], x_LTH, valid_T, [12], adapter)
        steps.append((summary.balance_loss, summary.tokens, router.weight.main_grad.clone()))
    assert steps[0][:2] == steps[1][:2] and torch.equal(steps[0][2], steps[1][2])


def test_a_batch_without_valid_tokens_has_zero_losses_and_gradients(alone, rng):
    adapter = AdapterConfig(num_experts=3, balance_weight=0.5, z_loss_weight=0.5)
    router = make_router(alone, **vars(adapter))
    summary = run_routers([router], torch.randn(1, 4, HIDDEN, generator=rng), torch.zeros(4).bool(), [4], adapter)
    assert (summary.balance_loss, summary.z_loss) == (0.0, 0.0)
    assert router.weight.main_grad.abs().max() == 0


# METHODS A.6 item 6


def collapsed(alone, experts: Sequence[int], scope: str):
    """One layer for each of `experts`, all of whose tokens go there with certainty."""
    adapter = AdapterConfig(num_experts=3, balance_scope=scope)
    routers = [make_router(alone, layer=layer, **vars(adapter)) for layer in range(len(experts))]
    for router, expert in zip(routers, experts, strict=True):
        with torch.no_grad():
            router.weight.zero_()
            router.bias.copy_(torch.nn.functional.one_hot(torch.tensor(expert), 3) * 100.0)
    x_LTH, valid_T = torch.ones(len(experts), 8, HIDDEN), torch.ones(8, dtype=torch.bool)
    return run_routers(routers, x_LTH, valid_T, [8], adapter)


def test_three_layers_collapsed_on_different_experts_cost_1_by_layer_and_a_third_pooled(alone):
    assert collapsed(alone, (0, 1, 2), "layer").balance_loss == pytest.approx(1.0)
    assert collapsed(alone, (0, 1, 2), "model").balance_loss == pytest.approx(1 / 3)


def test_three_layers_collapsed_on_one_expert_cost_1_in_either_scope(alone):
    for scope in ("layer", "model"):
        summary = collapsed(alone, (1, 1, 1), scope)
        assert summary.balance_loss == pytest.approx(1.0)
        assert summary.balance_L.tolist() == pytest.approx([1.0] * 3)
        assert summary.load_LE.tolist() == [[0.0, 1.0, 0.0]] * 3


@pytest.mark.parametrize("gate", ["prob", "straight_through"])
def test_an_expert_that_no_token_chose_has_no_gradient_of_renormalized_weights(alone, rng, gate):
    """None at all: what rounding leaves is enough for Adam to make whole steps of it."""
    router = make_router(alone, num_experts=6, top_k=2, gate=gate, renormalize=True, expert_parallel="weights")
    with torch.no_grad():
        router.bias.copy_(torch.tensor([1.0, 1.0, 1.0, -9.0, 1.0, -9.0]))
    weight_TE, chosen_TE = router(torch.randn(64, 1, HIDDEN, generator=rng))
    (weight_TE * torch.randn(64, 6, generator=rng)).sum().backward()
    idle_E = ~chosen_TE.any(0)
    assert idle_E.tolist() == [False, False, False, True, False, True]
    assert not router.weight.grad[idle_E].any() and router.weight.grad[~idle_E].any(1).all()
    assert not router.bias.grad[idle_E].any()


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("num_experts", [1, 2, 3, 5])
def test_uniform_routing_costs_one_over_the_number_of_experts(alone, num_experts, scope):
    adapter = AdapterConfig(num_experts=num_experts, balance_scope=scope)
    router = make_router(alone, **vars(adapter))
    with torch.no_grad():  # token e goes to expert e, hardly
        router.weight.copy_(1e-6 * torch.eye(num_experts, HIDDEN))
        router.bias.zero_()
    x_LTH = torch.eye(num_experts, HIDDEN)[None].repeat(1, 4, 1)
    valid_T = torch.ones(4 * num_experts, dtype=torch.bool)
    summary = run_routers([router], x_LTH, valid_T, [len(valid_T)], adapter)
    assert summary.load_LE.tolist() == [[pytest.approx(1 / num_experts)] * num_experts]
    assert summary.balance_loss == pytest.approx(1 / num_experts)


def test_the_balance_loss_may_lie_below_one_over_the_number_of_experts(alone):
    """Two tokens choose expert 0 hardly (p 0.51), one chooses expert 1 surely (p 0.99)."""
    adapter = AdapterConfig(num_experts=2)
    router = make_router(alone, **vars(adapter))
    p = torch.tensor([[0.51, 0.49], [0.51, 0.49], [0.01, 0.99]])
    with torch.no_grad():
        router.weight.copy_(torch.eye(2, HIDDEN))
        router.bias.zero_()
    x_TH = torch.zeros(3, HIDDEN)
    x_TH[:, :2] = p.log()
    summary = run_routers([router], x_TH[None], torch.ones(3).bool(), [3], adapter)
    assert summary.balance_loss == pytest.approx((2 * p[:, 0].mean() + p[:, 1].mean()).item() / 3, rel=1e-6)
    assert summary.balance_loss < 0.45


def test_the_published_scope_averages_shares_over_layers_before_the_product(alone, rng):
    adapter = AdapterConfig(num_experts=3, balance_scope="model")
    routers = [make_router(alone, layer=layer, **vars(adapter)) for layer in range(2)]
    summary = run_routers(routers, torch.randn(2, 20, HIDDEN, generator=rng), torch.ones(20).bool(), [20], adapter)
    assert summary.balance_loss != pytest.approx(float(summary.balance_L.mean()), abs=1e-5)


# --- what is counted ---


def counted(router: MoLERouter) -> float:
    return float(router.sums.tokens)


def test_a_recomputed_forward_counts_each_token_once(alone, rng):
    recomputed, plain = (make_router(alone, num_experts=3, gate="prob", z_loss_weight=1.0) for _ in range(2))
    x = torch.randn(5, 2, HIDDEN, generator=rng).requires_grad_()
    plain(x)[0].sum().backward()
    checkpoint(lambda x: recomputed(x)[0], False, x).sum().backward()
    assert counted(recomputed) == 10
    assert all(torch.equal(a, b) for a, b in zip(recomputed.sums.tensors(), plain.sums.tensors(), strict=True))


def test_a_forward_without_gradients_counts_nothing(alone):
    router = make_router(alone)
    with torch.no_grad():
        router(torch.ones(5, 2, HIDDEN))
    assert counted(router) == 0


def test_evaluation_counts_nothing_even_with_gradients_on(alone):
    router = make_router(alone).eval()
    router(torch.ones(5, 2, HIDDEN))
    assert counted(router) == 0


def test_padding_is_not_counted_and_no_mask_means_all_tokens(alone):
    router = make_router(alone)
    router(torch.ones(3, 2, HIDDEN), padding_mask=torch.tensor([[False, True]] * 3))
    assert counted(router) == 3
    router(torch.ones(3, 2, HIDDEN))
    assert counted(router) == 9


# --- the gate ---


@pytest.fixture
def routed(rng):
    logits_TE = torch.randn(9, 3, generator=rng, dtype=torch.float64).requires_grad_()
    probs_TE = torch.softmax(logits_TE, -1)
    chosen_TE = torch.nn.functional.one_hot(probs_TE.argmax(-1), 3).bool()
    probe_TE = torch.randn(9, 3, generator=rng, dtype=torch.float64)
    return SimpleNamespace(logits_TE=logits_TE, probs_TE=probs_TE, chosen_TE=chosen_TE, probe_TE=probe_TE)


@pytest.mark.parametrize("gate", GATES)
def test_experts_that_were_not_chosen_weigh_exactly_zero(routed, gate):
    weights = gate_weights(routed.probs_TE, routed.chosen_TE, gate)
    assert (weights[~routed.chosen_TE] == 0).all() and (weights[routed.chosen_TE] > 0).all()


def test_gate_none_weighs_one_and_has_no_gradient(routed):
    weights = gate_weights(routed.probs_TE, routed.chosen_TE, "none")
    assert torch.equal(weights, routed.chosen_TE.double()) and not weights.requires_grad


def test_gate_prob_weighs_the_probability_and_passes_its_gradient(routed):
    weights = gate_weights(routed.probs_TE, routed.chosen_TE, "prob")
    assert torch.equal(weights[routed.chosen_TE], routed.probs_TE[routed.chosen_TE])
    (expected,) = torch.autograd.grad(
        (routed.probs_TE * routed.chosen_TE * routed.probe_TE).sum(), routed.logits_TE, retain_graph=True
    )
    (gradient,) = torch.autograd.grad((weights * routed.probe_TE).sum(), routed.logits_TE)
    torch.testing.assert_close(gradient, expected)


def test_gate_straight_through_has_the_value_of_none_and_the_gradient_of_prob(routed):
    straight, prob, none = (
        gate_weights(routed.probs_TE, routed.chosen_TE, g) for g in ("straight_through", "prob", "none")
    )
    assert torch.equal(straight.detach(), none)
    gradients = [
        torch.autograd.grad((w * routed.probe_TE).sum(), routed.logits_TE, retain_graph=True)[0]
        for w in (straight, prob)
    ]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("gate", GATES)
def test_the_router_weighs_and_chooses_by_its_probabilities(alone, rng, gate):
    router = make_router(alone, num_experts=3, gate=gate)
    randomise(router, rng)
    x = torch.randn(4, 2, HIDDEN, generator=rng)
    weights, chosen = router(x)
    _, probs_TE, expected = route(x.reshape(-1, HIDDEN), router.weight, router.bias)
    assert torch.equal(chosen, expected) and (chosen.sum(1) == 1).all()
    torch.testing.assert_close(weights, probs_TE * chosen if gate == "prob" else chosen.float())


@pytest.mark.parametrize("gate", GATES)
def test_a_sharper_router_changes_the_weights_only_where_the_gate_is_the_probability(alone, rng, gate):
    """METHODS A.6 item 2: R and b times c > 0 leave the choice."""
    router = make_router(alone, num_experts=3, gate=gate)
    randomise(router, rng)
    x = torch.randn(4, 2, HIDDEN, generator=rng)
    weights, chosen = router(x)
    with torch.no_grad():
        router.weight.mul_(2.5)
        router.bias.mul_(2.5)
    sharper_weights, sharper_chosen = router(x)
    assert torch.equal(chosen, sharper_chosen)
    assert torch.equal(weights, sharper_weights) == (gate != "prob")


def test_the_router_starts_as_nn_linear_does_and_the_same_for_the_same_seed_and_name(alone):
    router = make_router(alone, num_experts=5)
    assert router.weight.abs().max() <= HIDDEN**-0.5 and router.weight.std() > 0.1 and (router.bias == 0).all()
    assert torch.equal(router.weight, make_router(alone, num_experts=5).weight)
    for other in (make_router(alone, num_experts=5, seed=1), make_router(alone, num_experts=5, layer=1)):
        assert not torch.equal(router.weight, other.weight)


def test_router_weights_and_probabilities_are_fp32_for_bf16_inputs(alone, rng):
    router = make_router(alone, num_experts=3, gate="prob")
    weights, _ = router(torch.randn(4, 2, HIDDEN, generator=rng).bfloat16())
    assert {router.weight.dtype, router.bias.dtype, weights.dtype} == {torch.float32}
    weights.sum().backward()
    assert router.weight.grad.dtype == torch.float32
