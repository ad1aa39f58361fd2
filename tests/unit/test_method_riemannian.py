"""Riemannian preconditioning (METHODS section B): the worked numbers, and what must hold of any."""

import numpy as np
import pytest
import torch
from made_pairs import Trainer, made_pair, made_run
from test_models import SIZE
from test_models import build as build_llava

from mole_mega.adapters.methods import build_methods, check_methods
from mole_mega.adapters.methods.base import Step
from mole_mega.adapters.methods.riemannian import solve
from mole_mega.adapters.mixing import MaskedGate
from mole_mega.config import ConfigError
from mole_mega.training import parity
from mole_mega.training.optimizer import build_optimizer, set_lr
from mole_mega.training.step import Stepper
from mole_mega.training.trainer import wrap


def grads(A, B, G):
    return B.mT @ G, G @ A.mT


def precondition(grad_A, grad_B, gram_A, gram_B, delta):
    return solve(gram_B, grad_A, delta), solve(gram_A, grad_B.mT, delta).mT


def preconditioned(A, B, G, delta=0.0):
    return precondition(*grads(A, B, G), A @ A.mT, B.mT @ B, delta)


def made(seed=0, r=2, m=7, n=6):
    generator = torch.Generator().manual_seed(seed)
    A, B, G = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((r, n), (m, r), (m, n)))
    return A, B, G


def projection(M):
    """Onto the columns of M."""
    return M @ torch.linalg.pinv(M)


def apply(method, pair):
    method.before_step([pair], Step(1, 0.1, lambda _: ()))
    return pair.A.gradient, pair.B.gradient


def build(parallel, pair, **options):
    run = made_run({"name": "riemannian", **options})
    return build_methods(run, [pair], parallel.groups, parallel.device)["riemannian"]


def test_the_worked_example(alone):
    A, B = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0], [0.0]])
    grad_A, grad_B = grads(A, B, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert grad_A.tolist() == [[2, 4]] and grad_B.tolist() == [[3], [7]]
    pair = made_pair(alone, A, B, grad_A=grad_A, grad_B=grad_B)
    dA, dB = apply(build(alone, pair, delta=1e-12), pair)
    assert dA.tolist() == [[0.5, 1]] and dB.tolist() == [[1.5], [3.5]]
    assert (B @ dA + dB @ A).tolist() == [[2.5, 3.5], [3.5, 3.5]]


def test_the_step_of_the_product_is_the_projected_gradient():
    A, B, G = made()
    dA, dB = preconditioned(A, B, G)
    torch.testing.assert_close(B @ dA + dB @ A, projection(B) @ G + G @ projection(A.mT))


def test_the_basis_of_the_factors_does_not_matter():
    A, B, G = made()
    S = torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 3 * torch.eye(2)
    A2, B2 = S @ A, B @ S.inverse()
    dA, dB = preconditioned(A, B, G)
    dA2, dB2 = preconditioned(A2, B2, G)
    torch.testing.assert_close(dA2, S @ dA)
    torch.testing.assert_close(dB2, dB @ S.inverse())
    torch.testing.assert_close(B2 @ dA2 + dB2 @ A2, B @ dA + dB @ A)
    (gA, gB), (gA2, gB2) = grads(A, B, G), grads(A2, B2, G)
    assert not torch.allclose(B2 @ gA2 + gB2 @ A2, B @ gA + gB @ A)


def rescale_gate(gate_T1, expert_TO):
    """What a mixture makes of an expert's output and its weight: the expert is x, through identities as factors."""
    eye = torch.eye(expert_TO.shape[1], dtype=expert_TO.dtype)[None]
    return MaskedGate(gate_T1, rescaled=True).add_lora(torch.zeros_like(expert_TO), expert_TO, [eye], [eye], 1.0)


def test_rescaling_leaves_value_and_gate_gradient_and_roots_the_experts():
    generator = torch.Generator().manual_seed(0)
    gate, expert, pull = (torch.rand(5, w, generator=generator, dtype=torch.float64) for w in (1, 4, 4))
    gate.requires_grad_(), expert.requires_grad_()
    out = rescale_gate(gate, expert)
    torch.testing.assert_close(out, gate * expert)
    d_gate, d_expert = torch.autograd.grad((out * pull).sum(), (gate, expert))
    torch.testing.assert_close(d_gate, (pull * expert).sum(-1, keepdim=True))
    torch.testing.assert_close(d_expert, gate.sqrt() * pull)


def test_rescaling_a_gate_of_one_does_nothing():
    expert = torch.randn(3, 2, requires_grad=True)
    out = rescale_gate(torch.ones(3, 1), expert)
    assert torch.equal(out, expert)
    assert torch.equal(torch.autograd.grad(out.sum(), expert)[0], torch.ones(3, 2))


@pytest.mark.parametrize(("gate", "values"), [(0.04, (0.0016, 0.008, 0.04)), (0.25, (0.0625, 0.125, 0.25))])
def test_how_a_gate_attenuates_the_step_of_the_product(gate, values):
    """To the powers 2, 3/2 and 1 of the gate: without rescaling, with it, and with gradients over the gate."""
    A, B, G = made()
    whole = (projection(B) @ G + G @ projection(A.mT)).norm()
    g = torch.tensor([[gate]], dtype=torch.float64)
    factors = []
    for weight in (lambda e: g * e, lambda e: rescale_gate(g, e)):
        expert = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
        factors.append(torch.autograd.grad(weight(expert).sum(), expert)[0])
    for backward, expected in zip([*factors, 1.0], values, strict=True):
        dA, dB = preconditioned(A, B, backward * G)
        assert float(g * (B @ dA + dB @ A).norm() / whole) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_b_zero_the_first_step_of_a_is_zero_and_the_next_is_large_and_finite(alone, dtype):
    A, _, G = (x.float() for x in made())
    pair = made_pair(alone, A.to(dtype), torch.zeros(7, 2, dtype=dtype))
    method = build(alone, pair)
    lr = 3e-5
    for number in (1, 2):
        grad_A, grad_B = grads(pair.A.values, pair.B.values, G)
        pair.A.gradient.copy_(grad_A), pair.B.gradient.copy_(grad_B)
        dA, dB = apply(method, pair)
        assert dA.isfinite().all() and dB.isfinite().all()
        if number == 1:
            assert not dA.any() and dB.any()
        else:
            assert float(dA.norm() / grad_A.norm()) == pytest.approx(1e6, rel=0.02)
        with torch.no_grad():
            pair.A.parameter.sub_(lr * dA)
            pair.B.parameter.sub_(lr * dB)


def test_adam_is_fed_preconditioned_gradients_as_plain_formulas_say(alone):
    """From B = 0, against numpy in fp64: ||B A - W||^2 / 2, its gradients preconditioned and then Adam."""
    A0, _, W = made()
    lr, betas, eps, delta = 1e-2, (0.9, 0.999), 1e-8, 1e-6
    pair = made_pair(alone, A0.float(), torch.zeros(7, 2))
    method, factors = build(alone, pair), [pair.A.parameter, pair.B.parameter]
    adam = torch.optim.Adam(factors, lr=lr, betas=betas, eps=eps)
    a, b = A0.numpy(), np.zeros((7, 2))
    first, second = [0.0, 0.0], [0.0, 0.0]
    for step in range(1, 6):
        gap = b @ a - W.numpy()
        expected = (
            np.linalg.solve(b.T @ b + delta * np.eye(2), b.T @ gap),
            np.linalg.solve(a @ a.T + delta * np.eye(2), a @ gap.T).T,
        )
        for i, gradient in enumerate(expected):
            first[i] = betas[0] * first[i] + (1 - betas[0]) * gradient
            second[i] = betas[1] * second[i] + (1 - betas[1]) * gradient**2
        a, b = (
            x - lr * first[i] / (1 - betas[0] ** step) / (np.sqrt(second[i] / (1 - betas[1] ** step)) + eps)
            for i, x in enumerate((a, b))
        )
        grad_A, grad_B = grads(pair.A.values, pair.B.values, pair.B.values @ pair.A.values - W.float())
        pair.A.gradient.copy_(grad_A), pair.B.gradient.copy_(grad_B)
        for factor, gradient, wanted in zip(factors, apply(method, pair), expected, strict=True):
            torch.testing.assert_close(gradient.double(), torch.tensor(wanted), rtol=1e-3, atol=1e-4)
            factor.grad = gradient.clone()
        adam.step()
        for factor, wanted in zip(factors, (a, b), strict=True):
            torch.testing.assert_close(factor.detach().double(), torch.tensor(wanted), rtol=1e-4, atol=1e-6)


def after_a_step(parallel, *methods, rank, lr, **train):
    """What a model trains, after one step of the project's own; no factor begins as 0."""
    train = {"precision": "fp32", "clip_grad": 0.0, "projector_lr": 0.01, "router_lr": 0.01, "lr": lr} | train
    run = made_run(*methods, adapter={"num_experts": 2, "rank": rank, "alpha": 1.5 * rank}, train=train)
    model = wrap(build_llava(parallel, run.adapter), run)
    stepper = Stepper(run, model, build_optimizer(model, run.train), parallel, num_domains=2)
    set_lr(stepper.optimizer, 1, run.train)
    assert stepper.train_step(parity.batches(SIZE, 0, 0, 1)).applied
    return {name: p.detach() for name, p in model.module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("rank", [1, 2])
def test_of_rank_1_adams_first_step_knows_nothing_of_the_preconditioner(alone, rank):
    """There it is one positive number a factor and expert, which Adam divides away."""
    lr = 0.1
    plain, other = (
        after_a_step(alone, *methods, rank=rank, lr=lr, adam_eps=1e-12) for methods in ((), ({"name": "riemannian"},))
    )
    for name, weight in plain.items():
        gap = float((other[name] - weight).abs().max())
        if rank == 1:
            assert gap < 1e-4 * lr, name
        elif "lora_" not in name:
            assert gap == 0, name
        elif "experts" in name:
            assert gap == pytest.approx(2 * lr, rel=1e-2), name  # turned round


def test_a_damping_beside_which_the_factors_are_nothing_leaves_plain_gradient_descent_bit_for_bit(alone):
    """Its preconditioner is 1 / delta, a power of 2: times so large a learning rate, off."""
    delta, lr = 2.0**60, 0.01
    off = {"name": "riemannian", "delta": delta}
    plain = after_a_step(alone, rank=2, lr=lr, optimizer="sgd")
    damped = after_a_step(alone, off, rank=2, lr=lr * delta, optimizer="sgd")
    assert all(torch.equal(damped[name], weight) for name, weight in plain.items())
    begun = after_a_step(alone, rank=2, lr=1e-30, optimizer="sgd")
    assert not any(torch.equal(begun[name], weight) for name, weight in plain.items() if "lora_" in name)


def test_each_expert_has_a_preconditioner_of_its_own(alone):
    experts = [made(seed) for seed in range(3)]
    A, B, G = (torch.stack(parts).float() for parts in zip(*experts, strict=True))
    grad_A, grad_B = grads(A, B, G)
    pair = made_pair(alone, A, B, grad_A=grad_A, grad_B=grad_B)
    dA, dB = apply(build(alone, pair), pair)
    for e, (A_e, B_e, G_e) in enumerate(experts):
        expected = preconditioned(A_e, B_e, G_e, 1e-6)
        torch.testing.assert_close(dA[e].double(), expected[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(dB[e].double(), expected[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_experts", [1, 3])
def test_an_a_that_experts_share_is_refused(num_experts):
    run = made_run({"name": "riemannian"}, adapter={"share_A": True, "num_experts": num_experts})
    with pytest.raises(ConfigError, match=r"with adapter.share_A one A serves all experts: set it to false"):
        check_methods(run)


@pytest.mark.parametrize("size", [1e-3, 1.0, 4.0, 100.0])
def test_factors_that_are_not_of_full_rank_divide_by_delta_and_not_by_nothing(alone, size):
    """Two equal columns of B, and a gradient that is not in its range: beside size^2 fp32 does not know delta."""
    A, _, G = (x.float() for x in made())
    B = torch.full((7, 2), size)
    grad_A, grad_B = grads(A, B, G)
    pair = made_pair(alone, A, B, grad_A=grad_A, grad_B=grad_B)
    dA, dB = apply(build(alone, pair), pair)
    expected = preconditioned(*(x.double() for x in (A, B, G)), 1e-6)
    # grad_A is rounded to fp32 before: what of that is not in the range comes back 1 / delta times as large
    atol = 1e6 * 2e-7 * float(grad_A.abs().max())
    torch.testing.assert_close(dA.double(), expected[0], rtol=1e-5, atol=atol)
    torch.testing.assert_close(dB.double(), expected[1], rtol=1e-5, atol=1e-6)


RELEASED = {"name": "riemannian", "order": "released"}


@pytest.mark.parametrize("shape", [(), (3,)], ids=["plain LoRA", "a bank"])
def test_in_the_released_order_b_reads_a_after_its_own_step(alone, shape):
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(*shape, *s, generator=generator) for s in ((2, 6), (7, 2)))
    pair = made_pair(alone, A, B)
    run = made_run(RELEASED, train={"clip_grad": 0.0, "weight_decay": 0.0})
    method = build_methods(run, [pair], alone.groups, alone.device)["riemannian"]
    trainer = Trainer(method, [pair])
    for _ in range(3):
        gradients = [torch.randn(f.parameter.shape, generator=generator) for f in pair.factors]
        old_A, old_B = (f.values.double() for f in pair.factors)
        by_parameter = {f.name: gradient for f, gradient in zip(pair.factors, gradients, strict=True)}
        trainer.step(lambda factor, known=by_parameter: known[factor.name])
        new_A = pair.A.values.double()
        dA, dB = precondition(*gradients, new_A @ new_A.mT, old_B.mT @ old_B, 1e-6)
        torch.testing.assert_close(pair.A.gradient.double(), dA, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(pair.B.gradient.double(), dB, rtol=1e-6, atol=1e-6)
        of_old_A = precondition(*gradients, old_A @ old_A.mT, old_B.mT @ old_B, 1e-6)[1]
        assert not torch.allclose(of_old_A, dB, rtol=1e-3)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({}, "train.clip_grad must be 0, got 1.0"),
        (
            {"clip_grad": 0.0, "optimizer": "sgd"},
            "train.optimizer must be adam, got sgd; or set order to jacobi, which is the released SGD's",
        ),
        ({"clip_grad": 0.0, "distributed_optimizer": True}, "train.distributed_optimizer must be false, got true"),
    ],
)
def test_the_released_order_is_refused_where_the_step_of_a_is_not_known(train, message):
    with pytest.raises(ConfigError, match=message):
        check_methods(made_run(RELEASED, train=train))
    assert check_methods(made_run(RELEASED | {"order": "jacobi"}, train=train))
