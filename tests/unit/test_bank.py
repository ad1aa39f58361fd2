"""The bank of LoRA experts equals a naive loop over experts, in values and in gradients."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mole_mega.adapters import cpu_kernels
from mole_mega.adapters.bank import add_expert_lora, add_gated_expert_lora

SCALE = 1.7
COUNTS = [
    pytest.param([5, 2, 4], id="all-busy"),
    pytest.param([0, 3, 5], id="first-empty"),
    pytest.param([3, 5, 0], id="last-empty"),
    pytest.param([4, 0, 0, 3], id="middle-empty"),
    pytest.param([0, 0, 7, 0], id="all-but-one-empty"),
    pytest.param([6], id="one-expert"),
    pytest.param([0, 0, 0], id="no-token"),
    pytest.param([0], id="one-expert-no-token"),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small gain nothing from a second thread and lose seconds to it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def lora_delta_reference(x, A, B, tokens_per_expert, scale, weight=None):
    """weight_t * scale * B_e A_e x_t, one expert after the other."""
    deltas, start = [], 0
    for expert, count in enumerate(tokens_per_expert.tolist()):
        rows = x[start : start + count]
        deltas.append(scale * (rows @ A[expert].t()) @ B[expert].t())
        start += count
    delta = torch.cat(deltas)
    return delta if weight is None else delta * weight[:, None]


def expert_reference(base, x, A, B, weight, *, counts):
    return base + lora_delta_reference(x, A, B, counts, SCALE, weight)


def gated_reference(base, x, gate_A, gate_B, up_A, up_B, weight, *, counts):
    gate = lora_delta_reference(x, gate_A, gate_B, counts, SCALE, weight)
    up = lora_delta_reference(x, up_A, up_B, counts, SCALE, weight)
    return base + torch.cat([gate, up], dim=1)


def expert_bank(base, x, A, B, weight, *, counts):
    return add_expert_lora(base, x, A, B, counts, SCALE, weight)


def gated_bank(base, x, gate_A, gate_B, up_A, up_B, weight, *, counts):
    return add_gated_expert_lora(base, x, gate_A, gate_B, up_A, up_B, counts, SCALE, weight)


FORMS = {"expert": (expert_bank, expert_reference), "gated": (gated_bank, gated_reference)}
both_forms = pytest.mark.parametrize("form", FORMS)


def make_inputs(
    form: str, counts: list[int], rank: int, *, wide: tuple[int, int] = (16, 24), seed: int = 0
) -> list[Tensor]:
    """base, x, factors, weight in float64, all leaves without gradient; the weight comes last."""
    rng = torch.Generator().manual_seed(seed)
    num_tokens, num_experts, (num_in, num_out) = sum(counts), len(counts), wide

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    pairs = 2 if form == "gated" else 1
    factors = [f for _ in range(pairs) for f in (normal(num_experts, rank, num_in), normal(num_experts, num_out, rank))]
    return [normal(num_tokens, pairs * num_out), normal(num_tokens, num_in), *factors, normal(num_tokens)]


def make_probe(shape: torch.Size) -> Tensor:
    """An incoming gradient that every dtype holds exactly."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16().double()


def values_and_gradients(function, inputs, counts, dtype, *, through=lambda base: base * 1):
    """Output and the gradient of every input. `through` makes the base an inner node, as a frozen linear would."""
    leaves = [None if t is None else t.to(dtype, copy=True).requires_grad_() for t in inputs]
    out = function(through(leaves[0]), *leaves[1:], counts=torch.tensor(counts))
    out.backward(make_probe(out.shape).to(dtype))
    return [out.detach()] + [None if leaf is None else leaf.grad for leaf in leaves]


def assert_all_close(found, expected, tolerance):
    """Each within `tolerance` of its own norm."""
    assert len(found) == len(expected)
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        if b is None:
            assert a is None
            continue
        assert a is not None, f"tensor {index} got no gradient"
        assert a.shape == b.shape
        error = (a.double() - b.double()).norm()
        assert error <= tolerance * b.double().norm(), f"tensor {index}: error {error} of norm {b.norm()}"


@both_forms
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("weighted", [True, False])
def test_float64_equals_the_naive_loop(form, counts, weighted):
    bank, reference = FORMS[form]
    inputs = make_inputs(form, counts, rank=3)
    inputs[-1] = inputs[-1] if weighted else None
    expected = values_and_gradients(reference, inputs, counts, torch.float64)
    assert_all_close(values_and_gradients(bank, inputs, counts, torch.float64), expected, 1e-13)


# Widths 16 and 24 suit grouped_mm in every dtype; with 15 and 21 it refuses, so these run masked.
@both_forms
@pytest.mark.parametrize(
    "dtype, tolerance, products",
    [
        (torch.float32, 1e-6, "kernels"),
        (torch.float32, 1e-6, "torch"),
        (torch.bfloat16, 1.5e-2, "kernels"),
        (torch.bfloat16, 1.5e-2, "torch"),
    ],
    ids=["fp32-compiled", "fp32", "bf16-compiled", "bf16-in-fp32"],
)
@pytest.mark.parametrize("wide", [(16, 24), (15, 21)], ids=["aligned", "odd-widths"])
@pytest.mark.parametrize("rank", [1, 2, 3, 5, 8])
def test_training_dtypes_are_close_to_float64(monkeypatch, kernels, form, rank, wide, dtype, tolerance, products):
    if products != "kernels":
        monkeypatch.setattr(cpu_kernels, "library", lambda dtype: None)
    else:
        kernels(dtype)
    bank, reference = FORMS[form]
    for counts in ([0, 5, 2, 0, 4, 0], [0, 0, 7], [6], [0, 0]):
        # rounded to the dtype first, so that only the bank's own rounding is measured
        inputs = [t.to(dtype).double() for t in make_inputs(form, counts, rank, wide=wide)]
        expected = values_and_gradients(reference, inputs, counts, torch.float64)
        assert_all_close(values_and_gradients(bank, inputs, counts, dtype), expected, tolerance)


@both_forms
def test_gradcheck(form):
    counts = [1, 0, 2]
    inputs = [t.requires_grad_() for t in make_inputs(form, counts, rank=2, wide=(2, 3))]
    assert torch.autograd.gradcheck(lambda *args: FORMS[form][0](*args, counts=torch.tensor(counts)), inputs)


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[7, 0, 9], [16]], ids=["experts", "plain"])
def test_zero_factors_b_return_the_base_bit_for_bit(form, dtype, counts):
    base, x, *factors, weight = [t.to(dtype) for t in make_inputs(form, counts, rank=8)]
    factors = [f if i % 2 == 0 else torch.zeros_like(f) for i, f in enumerate(factors)]
    out = FORMS[form][0](base.clone(), x, *factors, weight, counts=torch.tensor(counts))
    assert torch.equal(out, base)


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("counts", [[0, 6, 0, 2, 0], [0, 0, 0], [0]])
def test_an_expert_without_tokens_gets_a_gradient_of_exact_zeros(form, dtype, counts):
    grads = values_and_gradients(FORMS[form][0], make_inputs(form, counts, rank=8), counts, dtype)[3:-1]
    for expert, count in enumerate(counts):
        for grad in grads:
            assert torch.equal(grad[expert], torch.zeros_like(grad[expert])) == (count == 0)


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_token_and_the_gradient_that_a_sum_sends(form, dtype):
    """It is expanded, and of no numbers: its own copy too."""
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in make_inputs(form, [0, 0], rank=8)]
    base, *rest = inputs
    output = FORMS[form][0](base * 1, *rest, counts=torch.tensor([0, 0]))
    for gradient in torch.autograd.grad(output.sum(), inputs):
        assert not gradient.any()


@both_forms
def test_no_gradient_of_an_empty_expert_is_read_from_dirty_memory(form):
    counts, inputs = [0, 8, 0], make_inputs(form, [0, 8, 0], rank=8, wide=(512, 512))
    for _ in range(3):  # freed NaN blocks of the gradients' size, for the allocator to hand out again
        dirty = [torch.full_like(t, float("nan"), dtype=torch.float32) for t in inputs for _ in range(4)]
        del dirty
        for result in values_and_gradients(FORMS[form][0], inputs, counts, torch.float32):
            assert result.isfinite().all()


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_activations_give_the_same_gradients_bit_for_bit(form, dtype, use_reentrant):
    bank, counts = FORMS[form][0], [5, 0, 3]
    inputs = make_inputs(form, counts, rank=4)

    def recomputed(base, *rest, counts):
        return checkpoint(
            lambda base, *rest: bank(base * 2, *rest, counts=counts), base, *rest, use_reentrant=use_reentrant
        )

    def kept(base, *rest, counts):
        return bank(base * 2, *rest, counts=counts)

    expected = values_and_gradients(kept, inputs, counts, dtype)
    for a, b in zip(values_and_gradients(recomputed, inputs, counts, dtype), expected, strict=True):
        assert torch.equal(a, b)


@both_forms
def test_permuting_experts_with_their_tokens_changes_nothing(form):
    counts, order = [4, 0, 1, 6], [2, 3, 0, 1]
    inputs = make_inputs(form, counts, rank=8)
    starts = torch.tensor([0, *counts]).cumsum(0)
    rows = torch.cat([torch.arange(starts[e], starts[e + 1]) for e in order])
    straight = values_and_gradients(FORMS[form][0], inputs, counts, torch.float64)

    base, x, *factors, weight = inputs
    moved_inputs = [base[rows], x[rows], *(f[order] for f in factors), weight[rows]]
    # the probe of values_and_gradients must travel with its token
    leaves = [t.clone().requires_grad_() for t in moved_inputs]
    out = FORMS[form][0](leaves[0] * 1, *leaves[1:], counts=torch.tensor([counts[e] for e in order]))
    out.backward(make_probe(out.shape)[rows])

    by_token, by_expert = rows, torch.tensor(order)
    indices = [by_token, by_token, by_token, *([by_expert] * len(factors)), by_token]
    moved = [out.detach(), *(leaf.grad for leaf in leaves)]
    assert_all_close(moved, [t[i] for t, i in zip(straight, indices, strict=True)], 1e-13)


@both_forms
@pytest.mark.parametrize("rank", [3, 8])
def test_fp32_factors_serve_a_bf16_layer(form, rank):
    """Gradients come back in each tensor's own dtype, the gate's stays fp32."""
    counts = [5, 0, 4]
    base, x, *factors, weight = make_inputs(form, counts, rank)
    leaves = [t.bfloat16().requires_grad_() for t in (base, x)] + [
        t.float().requires_grad_() for t in (*factors, weight)
    ]
    out = FORMS[form][0](leaves[0] * 1, *leaves[1:], counts=torch.tensor(counts))
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert [leaf.grad.dtype for leaf in leaves] == [leaf.dtype for leaf in leaves]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    FORMS[form][1](*exact, counts=torch.tensor(counts)).sum().backward()
    assert_all_close([leaf.grad for leaf in leaves], [leaf.grad for leaf in exact], 2e-2)


@both_forms
@pytest.mark.parametrize("counts", [[5, 0, 3], [8]], ids=["experts", "plain"])
def test_base_is_overwritten_only_where_autograd_allows(form, counts):
    bank, (base, *rest) = FORMS[form][0], [t.float() for t in make_inputs(form, counts, rank=8)]
    expected = FORMS[form][1](base, *rest, counts=torch.tensor(counts))

    inner = base.clone().requires_grad_() * 1
    assert bank(inner, *rest, counts=torch.tensor(counts)).data_ptr() == inner.data_ptr()

    leaf, owner = base.clone().requires_grad_(), base.clone()[None].requires_grad_() * 1
    for kept in (leaf, owner[0]):
        out = bank(kept, *rest, counts=torch.tensor(counts))
        assert torch.equal(kept, base)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("asked", range(5), ids=["base", "x", "A", "B", "weight"])
def test_only_what_is_asked_for_gets_a_gradient(asked):
    counts = [5, 0, 3]
    leaves = [t.float().requires_grad_(index == asked) for index, t in enumerate(make_inputs("expert", counts, rank=8))]
    expert_bank(leaves[0].clone(), *leaves[1:], counts=torch.tensor(counts)).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [index == asked for index in range(5)]


def test_counts_that_miss_tokens_are_refused():
    base, x, A, B, weight = make_inputs("expert", [5, 3], rank=8)
    with pytest.raises(ValueError, match="sums to 7 but there are 8 tokens"):
        expert_bank(base, x, A, B, weight, counts=torch.tensor([5, 2]))
