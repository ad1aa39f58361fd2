"""BoRA's prior (METHODS section D): its gradients, its closed form, and where it begins."""

import pytest
import torch
from made_pairs import Trainer, made_pair, made_run

from mole_mega.adapters.methods import build_methods
from mole_mega.adapters.methods.bora import prior

ADAPTER = {"num_experts": 3, "method": "mole"}


def build(parallel, pairs, train=None, **options):
    run = made_run({"name": "bora", **options}, adapter=ADAPTER, train={"weight_decay": 0.0} | (train or {}))
    return build_methods(run, pairs, parallel.groups, parallel.device)["bora"]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pulls(gap, tau, form):
    """(the prior, its gradient to the experts)"""
    energy_E, weight_E = prior(gap.square().sum((1, 2)), tau, form)
    return energy_E.sum(), weight_E[:, None, None] * gap


def test_the_squared_prior_is_still_at_the_mean_and_the_released_one_is_not():
    theta = randn(5, 2, 4)
    gap = theta - theta.mean(0)
    assert float(pulls(gap, 3.0, "squared")[1].sum(0).abs().max()) < 1e-12
    assert float(pulls(gap, 3.0, "released")[1].sum(0).abs().max()) > 1e-3


@pytest.mark.parametrize("form", ["squared", "released"])
def test_the_gradients_are_autograds_and_linear_in_tau(form):
    theta, center = randn(5, 2, 4).requires_grad_(), randn(2, 4, seed=1).requires_grad_()
    norms = (theta - center).flatten(1).norm(dim=1)
    loss = 1.5 * norms.square().sum() if form == "squared" else 3 * norms.sum()
    expected = torch.autograd.grad(loss, (theta, center))
    gap = (theta - center).detach()
    energy, pull = pulls(gap, 3.0, form)
    torch.testing.assert_close(energy, loss.detach())
    torch.testing.assert_close(pull, expected[0])
    torch.testing.assert_close(-pull.sum(0), expected[1])
    torch.testing.assert_close(2 * pull, pulls(gap, 6.0, form)[1])
    if form == "squared":  # tau (D Theta - sum theta)
        torch.testing.assert_close(-pull.sum(0), 3 * (5 * center - theta.sum(0)).detach())


def test_the_released_prior_has_no_gradient_at_its_kink():
    assert not pulls(torch.zeros(2, 3, 4), 3.0, "released")[1].any()


# experts of a quadratic loss h/2 (theta - m)^2 each
H, M = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in ((4.0, 1.0, 0.5), (1.0, -2.0, 5.0)))
CLOSED_FORM = {
    0.0: ((1.0, -2.0, 5.0), None),
    1.0: ((0.9796, -0.5510, 2.2653), 0.8980),
    1e6: ((0.8182, 0.8182, 0.8182), 0.8182),
}


def closed_form(tau):
    stiffness = H * tau / (H + tau)
    center = (stiffness * M).sum() / stiffness.sum()
    return (H * M + tau * center) / (H + tau), center


@pytest.mark.parametrize("tau", [1.0, 1e6])
def test_the_objective_is_still_at_the_closed_form(tau):
    theta, center = closed_form(tau)
    assert theta.flatten().tolist() == pytest.approx(CLOSED_FORM[tau][0], abs=1e-4)
    assert float(center) == pytest.approx(CLOSED_FORM[tau][1], abs=1e-4)
    _, pull = pulls(theta - center, tau, "squared")
    torch.testing.assert_close(pull, H * (M - theta))
    assert float(pull.sum().abs()) < 1e-8 * tau


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_training_ends_where_the_closed_form_says(alone, tau):
    pair = made_pair(alone, torch.tensor([1.0, 2.0, 3.0])[:, None, None], torch.zeros(3, 1, 1))
    method = build(alone, [pair], tau=tau)
    trainer = Trainer(method, [pair])

    def gradient(factor):
        return (H * (factor.values - M)).float() if factor is pair.A else torch.zeros(3, 1, 1)

    for step in range(1000):
        trainer.lr = 0.05 * (1 - step / 1000) ** 2
        trainer.optimizer.param_groups[0]["lr"] = trainer.lr
        trainer.step(gradient)
    experts, center = CLOSED_FORM[tau]
    assert pair.A.values.flatten().tolist() == pytest.approx(experts, abs=2e-3)
    if center is not None:
        assert float(theta_of(method, pair.A)) == pytest.approx(center, abs=2e-3)


def theta_of(method, factor):
    return method.state()[f"theta.{factor.name}"].tensor


def test_theta_is_where_its_gradient_is_zero(alone):
    """The mean after every step; of the released form, where the experts stay, the geometric median in the end."""
    pair = made_pair(alone, randn(3, 2, 4).float(), randn(3, 5, 2, seed=1).float())
    method = build(alone, [pair], tau=2.0)
    trainer = Trainer(method, [pair], lr=0.1)
    for _ in range(3):
        trainer.step(lambda factor: torch.ones(factor.parameter.shape))
        for factor in pair.factors:
            torch.testing.assert_close(theta_of(method, factor), factor.values.mean(0))
    released = build(alone, [pair], tau=2.0, prior="released")
    trainer = Trainer(released, [pair], lr=0.0)
    left = []
    for _ in range(60):
        trainer.step(lambda factor: torch.zeros(factor.parameter.shape))
        left.append(float(pair.A.gradient.sum(0).norm()))
    assert left[0] > 1e-2 and left[-1] < 1e-5


def test_tau_zero_touches_nothing(alone):
    pair = made_pair(alone, randn(3, 2, 4).float(), randn(3, 5, 2, seed=1).float())
    method = build(alone, [pair], tau=0.0)
    trainer = Trainer(method, [pair])
    for _ in range(2):
        trainer.step(lambda factor: torch.ones(factor.parameter.shape))
        assert torch.equal(pair.A.gradient, torch.ones(3, 2, 4))
    # but a run that goes on with another tau finds the mean where it should be
    torch.testing.assert_close(theta_of(method, pair.A), pair.A.values.mean(0))


def test_a_fresh_run_may_begin_as_noisy_copies(alone):
    shapes = (3, 8, 40), (3, 60, 8)
    pair = made_pair(alone, *(torch.ones(shape) for shape in shapes))
    build(alone, [pair], tau=1.0).init([pair])
    assert pair.A.parameter.eq(1).all()
    build(alone, [pair], tau=1.0, init_noise=1e-3).init([pair])
    for factor, center in ((pair.A, 40**-0.5), (pair.B, 0.0)):
        spread = factor.values - factor.values.mean(0)
        assert float(spread.std()) == pytest.approx(1e-3 * (2 / 3) ** 0.5, rel=0.1)
        assert float(factor.values.mean(0).abs().max()) == pytest.approx(center, rel=0.1, abs=4e-3)


def test_an_a_that_experts_share_is_tied_already(alone):
    pair = made_pair(alone, randn(2, 4).float(), randn(3, 5, 2).float())
    method = build(alone, [pair], tau=1.0)
    Trainer(method, [pair]).step(lambda factor: torch.zeros(factor.parameter.shape))
    assert not pair.A.gradient.any() and pair.B.gradient.any()
    assert list(method.state()) == [f"theta.{pair.B.name}"]


def test_a_plain_pair_has_no_prior(alone):
    pair = made_pair(alone, randn(2, 4).float(), randn(5, 2).float(), name="layers.0.attention.q")
    method = build(alone, [pair], tau=1.0)
    Trainer(method, [pair]).step(lambda factor: torch.ones(factor.parameter.shape))
    assert torch.equal(pair.A.gradient, torch.ones(2, 4)) and method.state() == {}
