"""BoRA's prior (METHODS section D): its gradients, its closed form, and where it begins."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from made_pairs import Trainer, made_pair, made_run
from test_models import SIZE, logits_of, make_inputs
from test_models import build as build_llava

from mole_mega import config as run_config
from mole_mega.adapters.methods import build_methods
from mole_mega.adapters.methods.bora import prior
from mole_mega.training import parity
from mole_mega.training.optimizer import build_optimizer, set_lr
from mole_mega.training.step import Stepper
from mole_mega.training.trainer import wrap

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


def quadratic(factor):
    """The gradient of the losses of H and M to A; B has none."""
    return (H * (factor.values - M)).float() if factor.name.endswith(".A") else torch.zeros(3, 1, 1)


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_training_ends_where_the_closed_form_says(alone, tau):
    pair = made_pair(alone, torch.tensor([1.0, 2.0, 3.0])[:, None, None], torch.zeros(3, 1, 1))
    method = build(alone, [pair], tau=tau)
    trainer = Trainer(method, [pair])
    for step in range(1000):
        trainer.lr = 0.05 * (1 - step / 1000) ** 2
        trainer.optimizer.param_groups[0]["lr"] = trainer.lr
        trainer.step(quadratic)
    experts, center = CLOSED_FORM[tau]
    assert pair.A.values.flatten().tolist() == pytest.approx(experts, abs=2e-3)
    if center is not None:
        assert float(theta_of(method, pair.A)) == pytest.approx(center, abs=2e-3)


def test_training_with_a_prior_of_1e6_ends_where_one_adapter_of_all_does(alone):
    """The prior pulls half a million times as hard as the data, so the way there takes small steps, and momentum."""
    tau = 1e6
    pair = made_pair(alone, torch.tensor([0.7, 0.8, 0.6])[:, None, None], torch.zeros(3, 1, 1))
    method = build(alone, [pair], tau=tau)
    trainer = Trainer(method, [pair])
    trainer.optimizer = torch.optim.SGD([pair.A.parameter], lr=3.7 / tau, momentum=0.995)
    for _ in range(3000):
        trainer.step(quadratic)
    experts, center = CLOSED_FORM[tau]
    assert float((H * M).sum() / H.sum()) == pytest.approx(center, abs=1e-4)
    assert pair.A.values.flatten().tolist() == pytest.approx(experts, abs=1e-3)
    assert float(theta_of(method, pair.A)) == pytest.approx(center, abs=1e-3)


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


TASKS = ("a", "b")
TASKS_BY_NUMBER = range(len(TASKS))


def task_run(*methods, lr=0.25, **adapter):
    tree = run_config.to_dict(made_run())
    tree["adapter"] |= {
        "num_experts": 2, "rank": 4, "alpha": 6.0, "router_scope": "task", "gate": "none", "balance_weight": 0.0,
        "attention": False, "methods": list(methods),
    } | adapter  # fmt: skip
    tree["train"] |= {"precision": "fp32", "projector": False, "optimizer": "sgd", "clip_grad": 0.0, "lr": lr}
    tree["data"] |= {"sources": [{"name": name, "path": "made"} for name in TASKS], "max_length": 64}
    return run_config.from_dict(tree)


def task_batches(step):
    """A micro-batch of each task, with equally many labelled places."""
    batches = []
    for task, batch in enumerate(parity.batches(SIZE, step, 0, 1)[:2]):
        labelled = (batch.labels >= 0).flatten().cumsum(0).view_as(batch.labels)
        labels = batch.labels.masked_fill(labelled > 10, -100)
        assert (labels >= 0).sum() == 10
        batches.append(replace(batch, labels=labels, domains=torch.full_like(batch.domains, task)))
    return batches


def trained_on(parallel, run, tasks):
    model = wrap(build_llava(parallel, run.adapter, projector=False), run)
    stepper = Stepper(run, model, build_optimizer(model, run.train), parallel, num_domains=2)
    for step in range(3):
        set_lr(stepper.optimizer, step + 1, run.train)
        stepper.train_step([batch for task, batch in enumerate(task_batches(step)) if task in tasks])
    return {f.name: f.values for pair in stepper.pairs for f in pair.factors}


def test_at_tau_zero_each_task_ends_bit_for_bit_where_a_run_of_its_own_does(alone):
    bora = {"name": "bora", "tau": 0.0}
    # of twice as many places the mean has half the gradient, to the bit
    together = trained_on(alone, task_run(bora, lr=0.5), tasks=(0, 1))
    begun = trained_on(alone, task_run(lr=0.0), tasks=(0,))
    for task in (0, 1):
        own = trained_on(alone, task_run(lr=0.25), tasks=(task,))
        for name, values in own.items():
            assert torch.equal(together[name][task], values[task]), name
            assert torch.equal(begun[name][1 - task], values[1 - task]), name
            assert not torch.equal(begun[name][task], values[task]), name
    tied = trained_on(alone, task_run(bora | {"tau": 0.1}, lr=0.5), tasks=(0, 1))
    assert not any(torch.equal(tied[name], values) for name, values in together.items())


def test_a_fresh_task_at_theta_predicts_like_the_one_adapter_of_all(alone):
    run = task_run({"name": "bora", "tau": 1.0, "init_noise": 0.0})
    model, inputs = build_llava(alone, run.adapter), make_inputs()
    stepper = Stepper(run, wrap(model, run), SimpleNamespace(), alone, num_domains=2)
    method, rows = stepper.methods["bora"], len(inputs.tokens)

    def answers(one, task):
        with torch.no_grad():
            return one(**inputs.arguments(), domains=torch.full((rows,), task))[inputs.valid]

    apart = [answers(model, task) for task in TASKS_BY_NUMBER]
    assert not torch.allclose(*apart, rtol=1e-2)
    method.init(stepper.pairs)
    frozen = logits_of(build_llava(alone, None), inputs)[inputs.valid]
    assert all(torch.equal(answers(model, task), frozen) for task in TASKS_BY_NUMBER)
    # theta after training: any; each task's adapter there, and a model of that adapter alone
    single = build_llava(alone, replace(run.adapter, num_experts=1, methods=()))
    own = dict(single.named_parameters())
    with torch.no_grad():
        for factor, (name, parameter) in zip(
            [f for pair in stepper.pairs for f in pair.factors],
            [(name, p) for name, p in own.items() if ".experts.lora" in name],
            strict=True,
        ):
            theta = theta_of(method, factor).normal_(generator=torch.Generator().manual_seed(len(name)), std=0.2)
            factor.parameter.copy_(theta.expand_as(factor.parameter))
            parameter.copy_(theta[None])
    expected = answers(single, 0)
    assert (expected - frozen).norm() > 1e-2 * frozen.norm()
    for task in TASKS_BY_NUMBER:
        torch.testing.assert_close(answers(model, task), expected)


def test_the_published_noise_is_no_exact_zero(alone):
    run = task_run({"name": "bora", "tau": 1.0, "init_noise": 1e-3})
    model, inputs = build_llava(alone, run.adapter), make_inputs()
    build_methods(run, model.lora_pairs(), alone.groups, alone.device)["bora"].init(model.lora_pairs())
    frozen = logits_of(build_llava(alone, None), inputs)
    with torch.no_grad():
        found = model(**inputs.arguments(), domains=torch.zeros(len(inputs.tokens), dtype=torch.int64))
    distance = float((found - frozen)[inputs.valid].norm() / frozen[inputs.valid].norm())
    assert 0 < distance < 1e-2


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
