"""The forms of a mixture equal a loop over tokens and experts in float64, with every gradient.

Shape suffixes: T tokens, I in, O out, E experts, R rank, P projections.
"""

import pytest
import torch
import torch.nn.functional as F

from mole_mega.adapters import bank, cpu_kernels, forms
from mole_mega.adapters.mixing import MaskedGate, make_gate, paired

SCALE = 1.7
T, IN, OUTS = 13, 8, (8, 16)


def make_tensors(num_experts, top_k, *, shared_A=False, rank=4, projections=2, dtype=torch.float64, seed=0):
    """Leaves that want gradients, by name; weights are 0 where an expert is not chosen. A few experts serve nobody."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    scores_TE = torch.rand(T, num_experts, generator=generator)
    if num_experts > top_k:
        scores_TE[:, 0] = -1  # nobody's expert
    chosen_TE = torch.zeros(T, num_experts, dtype=torch.bool).scatter(1, scores_TE.topk(top_k).indices, True)
    weight_TE = torch.rand(T, num_experts, generator=generator, dtype=dtype).requires_grad_()
    A_P = [leaf(rank, IN) if shared_A else leaf(num_experts, rank, IN) for _ in range(projections)]
    B_P = [leaf(num_experts, out, rank) for out in OUTS[:projections]]
    base_TO = leaf(T, sum(OUTS[:projections]))
    return base_TO, leaf(T, IN), weight_TE, chosen_TE, A_P, B_P


def loop(base_TO, x_TI, weight_TE, chosen_TE, A_P, B_P):
    rows = []
    for t in range(len(x_TI)):
        deltas = []
        for A, B in zip(A_P, B_P, strict=True):
            delta = torch.zeros(B.shape[1], dtype=base_TO.dtype)
            for e in range(len(B)):
                if chosen_TE[t, e]:
                    A_e = A if A.dim() == 2 else A[e]
                    delta = delta + weight_TE[t, e] * SCALE * (B[e] @ (A_e @ x_TI[t]))
            deltas.append(delta)
        rows.append(base_TO[t] + torch.cat(deltas))
    return torch.stack(rows)


# The kernels know no float64.
FORMS = {
    "masked": (torch.float64, {"rtol": 1e-11, "atol": 1e-11}),
    "paired": (torch.float64, {"rtol": 1e-11, "atol": 1e-11}),
    "in place": (torch.float32, {"rtol": 1e-4, "atol": 1e-4}),
    "few": (torch.float32, {"rtol": 1e-4, "atol": 1e-4}),
}


@pytest.fixture
def form(monkeypatch, kernels):
    """form(name, ...): a gate of that form; "in place" where kernels take the rows of pairs from where they lie, "few"
    masked with kernels that pass over what is 0."""

    def make(name, weight_TE, chosen_TE, top_k, rescaled=False):
        used_TE = weight_TE * chosen_TE
        if name in ("masked", "paired"):
            monkeypatch.setattr(cpu_kernels, "library", lambda dtype: None)
        else:
            kernels(torch.float32)
        if name in ("masked", "few"):
            return MaskedGate(used_TE, rescaled, few=name == "few")
        return paired(used_TE, chosen_TE, top_k, rescaled=rescaled)

    return make


def gradients(output, leaves):
    generator = torch.Generator().manual_seed(9)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    return torch.autograd.grad(output, leaves, grad)


@pytest.mark.parametrize("shared_A", [False, True], ids=["A each", "A shared"])
@pytest.mark.parametrize("projections", [1, 2])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (3, 1), (3, 2), (5, 2), (5, 5), (9, 3)])
@pytest.mark.parametrize("name", FORMS)
def test_a_form_equals_the_loop(form, name, num_experts, top_k, projections, shared_A):
    dtype, tolerance = FORMS[name]
    base_TO, x_TI, weight_TE, chosen_TE, A_P, B_P = make_tensors(
        num_experts, top_k, shared_A=shared_A, projections=projections, dtype=dtype
    )
    leaves = [base_TO, x_TI, weight_TE, *A_P, *B_P]
    expected = loop(base_TO, x_TI, weight_TE, chosen_TE, A_P, B_P)
    gate = form(name, weight_TE, chosen_TE, top_k)
    found = gate.add_lora(base_TO * 1, x_TI, A_P, B_P, SCALE)
    torch.testing.assert_close(found, expected, **tolerance)
    pairs = zip(gradients(found, leaves), gradients(expected, leaves), strict=True)
    for leaf, (got, wanted) in zip(leaves, pairs, strict=True):
        if leaf is weight_TE:  # no gradient where an expert is not used
            wanted = wanted * chosen_TE
        torch.testing.assert_close(got, wanted, **tolerance)
        assert wanted.any()


@pytest.mark.parametrize("name", ["masked", "few"])
def test_each_projection_may_have_a_gate_of_its_own(kernels, name):
    dtype, tolerance = FORMS[name]
    kernels(torch.float32)
    base_TO, x_TI, _, _, A_P, B_P = make_tensors(3, 3, dtype=dtype)
    weight_TPE = torch.rand(T, 2, 3, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = MaskedGate(weight_TPE, few=name == "few").add_lora(base_TO * 1, x_TI, A_P, B_P, SCALE)
    parts = []
    for p, columns in enumerate(base_TO.split(OUTS, dim=1)):
        parts.append(MaskedGate(weight_TPE[:, p]).add_lora(columns * 1, x_TI, A_P[p : p + 1], B_P[p : p + 1], SCALE))
    expected = torch.cat(parts, dim=1)
    torch.testing.assert_close(found, expected, **tolerance)
    leaves = [base_TO, x_TI, weight_TPE, *A_P, *B_P]
    for got, wanted in zip(gradients(found, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, wanted, **tolerance)


@pytest.mark.parametrize("name", FORMS)
def test_a_mixture_is_one_lora_with_a_block_diagonal_gate(form, name):
    """METHODS (SMoRA): stack the ranks, and each expert's weight stands in its ranks' columns."""
    dtype, tolerance = FORMS[name]
    base_TO, x_TI, weight_TE, chosen_TE, (A, _), (B, _) = make_tensors(4, 2, dtype=dtype)
    used_TE = (weight_TE * chosen_TE).detach()
    columns = used_TE.repeat_interleave(A.shape[1], dim=1)
    one = base_TO[:, :8] + SCALE * (columns * (x_TI @ A.flatten(0, 1).T)) @ B.transpose(1, 2).flatten(0, 1)
    found = form(name, weight_TE, chosen_TE, 2).add_lora(base_TO[:, :8] * 1, x_TI, [A], [B], SCALE)
    torch.testing.assert_close(found, one, **tolerance)


@pytest.mark.parametrize("name", FORMS)
def test_the_order_of_the_experts_means_nothing(form, name):
    dtype, tolerance = FORMS[name]
    base_TO, x_TI, weight_TE, chosen_TE, A_P, B_P = make_tensors(5, 2, dtype=dtype)
    order = torch.tensor([3, 0, 4, 2, 1])
    found = [
        form(name, weight_TE[:, o], chosen_TE[:, o], 2).add_lora(
            base_TO * 1, x_TI, [A[o] for A in A_P], [B[o] for B in B_P], SCALE
        )
        for o in (torch.arange(5), order)
    ]
    torch.testing.assert_close(*found, **tolerance)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_b_of_zeros_leaves_the_base_bit_for_bit(form, name, dtype):
    base_TO, x_TI, weight_TE, chosen_TE, A_P, B_P = make_tensors(9, 2, dtype=dtype)
    gate = form(name, weight_TE.float(), chosen_TE, 2)
    found = gate.add_lora(base_TO * 1, x_TI, A_P, [torch.zeros_like(B) for B in B_P], SCALE)
    assert torch.equal(found, base_TO)


@pytest.mark.parametrize("name", FORMS)
def test_top_1_equals_the_bank_of_sorted_tokens(form, name):
    base_TO, x_TI, weight_TE, chosen_TE, A_P, B_P = make_tensors(3, 1)
    order = chosen_TE.int().argmax(1).argsort(stable=True)
    weight_T = (weight_TE * chosen_TE).sum(1)[order]
    expected = bank.add_gated_expert_lora(
        base_TO[order], x_TI[order], A_P[0], B_P[0], A_P[1], B_P[1], chosen_TE.sum(0), SCALE, weight_T
    )
    # both projections as wide as the first
    found = form(name, weight_TE, chosen_TE, 1).add_lora(base_TO * 1, x_TI, A_P, B_P, SCALE)
    torch.testing.assert_close(found[order], expected)


@pytest.mark.parametrize("name", FORMS)
def test_bf16_is_as_near_as_its_rounding(form, name):
    exact = make_tensors(9, 2, rank=8)
    base_TO, x_TI, weight_TE, chosen_TE, A_P, B_P = exact
    expected = loop(*exact)

    def half(tensor):
        return tensor.detach().bfloat16()

    gate = form(name, weight_TE.float(), chosen_TE, 2)
    found = gate.add_lora(half(base_TO), half(x_TI), [half(A) for A in A_P], [half(B) for B in B_P], SCALE)
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("top_k", [2, 4, 8])
@pytest.mark.parametrize("name", FORMS)
def test_what_a_tokens_experts_add_is_rounded_once(form, name, top_k):
    """In bf16, to the output and to the frozen product's gradient of x, of which one expert adds some 0.3 %: less than
    the last place."""
    _, x_TI, weight_TE, chosen_TE, A_P, B_P = make_tensors(9, top_k, rank=8)
    generator = torch.Generator().manual_seed(3)
    frozen_OI = torch.randn(sum(OUTS), IN, generator=generator).bfloat16()
    pull_TO = torch.randn(T, sum(OUTS), generator=generator).bfloat16()
    A_P = [(A.detach() * 1e-3).bfloat16() for A in A_P]
    B_P = [B.detach().bfloat16() for B in B_P]
    weight_TE, x_TI = weight_TE.detach().float(), x_TI.detach().bfloat16().requires_grad_()

    def pull(output, pull_TO):
        return output.detach(), torch.autograd.grad(output, x_TI, pull_TO)[0]

    seen_TI, gradient = bank.share_input(x_TI)
    gate = form(name, weight_TE, chosen_TE, top_k)
    found = pull(gate.add_lora(F.linear(seen_TI, frozen_OI) * 1, seen_TI, A_P, B_P, SCALE, gradient), pull_TO)
    base = pull(F.linear(x_TI, frozen_OI), pull_TO)
    factors = ([factor.double() for factor in P] for P in (A_P, B_P))
    zero_TO = torch.zeros(T, sum(OUTS), dtype=torch.float64)
    added = pull(loop(zero_TO, x_TI.double(), weight_TE.double(), chosen_TE, *factors), pull_TO.double())
    for one, base_TW, added_TW in zip(found, base, added, strict=True):
        expected = base_TW.double() + added_TW
        half_a_place = 2**-8 * expected.abs()
        assert added_TW.norm() > 2e-3 * expected.norm()
        assert ((one.double() - expected).abs() <= half_a_place + 2**-6 * added_TW.abs().mean()).all()


@pytest.mark.parametrize("name", FORMS)
def test_an_expert_that_nobody_uses_gets_a_gradient_of_zeros(form, name):
    base_TO, x_TI, weight_TE, chosen_TE, A_P, B_P = make_tensors(5, 2)
    found = form(name, weight_TE, chosen_TE, 2).add_lora(base_TO * 1, x_TI, A_P, B_P, SCALE)
    for gradient in gradients(found, [*A_P, *B_P]):
        assert not gradient[0].any() and gradient[1:].any()


def test_the_form_follows_the_number_of_experts_for_each_that_is_used(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "library", lambda dtype: None)
    cases = [(12, 2, torch.float32, "Masked"), (13, 2, torch.float32, "Paired"), (64, 64, torch.float32, "Masked"),
             (32, 2, torch.bfloat16, "Masked"), (33, 2, torch.bfloat16, "Paired")]  # fmt: skip
    for num_experts, top_k, dtype, expected in cases:
        _, _, weight_TE, chosen_TE, *_ = make_tensors(num_experts, top_k)
        assert type(make_gate(weight_TE, chosen_TE, top_k, 32, dtype)).__name__ == f"{expected}Gate"
    assert forms._MASKED_UP_TO == {4: 6, 2: 16}
    assert [forms.computes_all(n, 2, 32, 4, in_place=True) for n in (2, 3, 4)] == [True, True, False]
    assert [forms.uses_few(n, 2, itemsize) for n, itemsize in ((7, 4), (8, 4), (15, 2), (16, 2))] == [False, True] * 2
    assert make_gate(*make_tensors(8, 1)[2:4], 1, 1, torch.bfloat16).few
    assert not make_gate(*make_tensors(7, 1)[2:4], 1, 1, torch.bfloat16).few
    assert forms.computes_all(64, 8, 1, 4, in_place=True)  # all of them are as wide as two of rank 32


@pytest.mark.parametrize("shared_A", [False, True], ids=["A each", "A shared"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_token_at_all_is_no_error(shared_A, dtype):
    base_TO, x_TI, weight_TE, chosen_TE, A_P, B_P = make_tensors(13, 2, shared_A=shared_A, dtype=dtype)
    gate = make_gate(weight_TE[:0], chosen_TE[:0], 2, 32, dtype)
    found = gate.add_lora(base_TO[:0] * 1, x_TI[:0], A_P, B_P, SCALE)
    assert found.shape == (0, base_TO.shape[1])
    leaves = [*A_P, *B_P]
    for grads in (
        gradients(found, leaves),
        torch.autograd.grad(gate.add_lora(base_TO[:0] * 1, x_TI[:0], A_P, B_P, SCALE).sum(), leaves),
    ):
        assert not any(gradient.any() for gradient in grads)


def test_a_base_that_lies_in_columns_is_no_error(kernels):
    kernels(torch.float32)
    base_TO, x_TI, weight_TE, chosen_TE, A_P, B_P = make_tensors(9, 2, dtype=torch.float32)
    gate, as_columns = MaskedGate((weight_TE * chosen_TE).t().contiguous().t(), few=True), base_TO.t().contiguous().t()
    found = gate.add_lora(as_columns, x_TI, A_P, B_P, SCALE)
    torch.testing.assert_close(found, loop(base_TO, x_TI, weight_TE, chosen_TE, A_P, B_P), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared_A", [False, True], ids=["A each", "A shared"])
@pytest.mark.parametrize("name", FORMS)
def test_a_rescaled_gate_leaves_the_value_and_gives_experts_the_root(form, name, shared_A):
    """METHODS B.5 item 4: sg(sqrt g) e + (g - sg(sqrt g)) sg(e)."""
    dtype, tolerance = FORMS[name]
    base_TO, x_TI, weight_TE, chosen_TE, A_P, B_P = make_tensors(5, 2, shared_A=shared_A, dtype=dtype)
    leaves = [base_TO, x_TI, weight_TE, *A_P, *B_P]
    found = form(name, weight_TE, chosen_TE, 2, rescaled=True).add_lora(base_TO * 1, x_TI, A_P, B_P, SCALE)
    value = loop(base_TO, x_TI, weight_TE, chosen_TE, A_P, B_P)
    root_TE = weight_TE.detach().sqrt()
    fixed = [x_TI.detach(), weight_TE - root_TE, chosen_TE, [A.detach() for A in A_P], [B.detach() for B in B_P]]
    expected = loop(base_TO, x_TI, root_TE, chosen_TE, A_P, B_P) + loop(torch.zeros_like(base_TO), *fixed)
    torch.testing.assert_close(found, value)
    torch.testing.assert_close(expected, value)
    plain = gradients(value, leaves)
    for leaf, got, wanted, unscaled in zip(
        leaves, gradients(found, leaves), gradients(expected, leaves), plain, strict=True
    ):
        if leaf is weight_TE:
            wanted = wanted * chosen_TE
        torch.testing.assert_close(got, wanted, **tolerance)
        assert torch.allclose(got, unscaled, **tolerance) == (leaf is weight_TE or leaf is base_TO)
