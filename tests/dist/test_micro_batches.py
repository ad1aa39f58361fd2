"""What a step computes depends on its global batch alone: not on how it is cut into micro-batches, not on padding, not
on recompute. And the balance loss is the formula's, in value and in gradient (METHODS: LLaVA-MoLE)."""

import collections
from dataclasses import replace

import pytest
import torch
from test_layouts import GATES, RUN, SIZE

from mole_mega.adapters.routers import MoLERouter
from mole_mega.adapters.routing import RouterMemory
from mole_mega.checkpoint.store import trainable_entries
from mole_mega.config import AlarmsConfig
from mole_mega.data.collate import stack
from mole_mega.data.conversation import Example
from mole_mega.monitor.alarms import observe
from mole_mega.training import parity
from mole_mega.training.optimizer import build_optimizer
from mole_mega.training.step import Stepper
from mole_mega.training.trainer import build_model

NUM_SAMPLES = 8
# lr 0: a step leaves the model as it was, so that one model serves many steps
RUN = replace(RUN, train=replace(RUN.train, lr=0.0, weight_decay=0.0, clip_grad=0.0))
ROUTER = "language_model.decoder.layers.{}.mlp.router."


def samples():
    """(example, pixels) of one global batch: different lengths, 0 to 3 images."""
    for batch in parity.batches(SIZE, 0, 0, 1):
        images_B = batch.image_mask.sum(1) // SIZE.vision.num_places
        for row, pixels in enumerate(batch.pixels.split(images_B.tolist())):
            length = int(batch.padding_mask[row].sum())
            domain = "ab"[int(batch.domains[row])]
            yield Example(batch.tokens[row, :length], batch.labels[row, :length], (), domain, str(row)), pixels


def cut(micro_batch_size, pad_to=8):
    everything = list(samples())
    assert len(everything) == NUM_SAMPLES
    batches = []
    for start in range(0, NUM_SAMPLES, micro_batch_size):
        examples, pixels = zip(*everything[start : start + micro_batch_size], strict=True)
        batches.append(stack(examples, pixels, SIZE.image_token_id, SIZE.pad_token_id, {"a": 0, "b": 1}, pad_to))
    return batches


class Model:
    """A model of random weights, ready to be stepped by any run config that builds the same layers."""

    def __init__(self, run, parallel):
        self.run, self.parallel = run, parallel
        self.ddp = build_model(run, SIZE, parallel)
        parity._fill_adapters(trainable_entries(self.ddp), run.adapter.alpha / run.adapter.rank)
        self.stepper = Stepper(run, self.ddp, build_optimizer(self.ddp, run.train), parallel, num_domains=2)

    def parameters(self):
        return {name: p for name, p in self.ddp.module.named_parameters() if p.requires_grad}

    def routers(self):
        return self.ddp.module.routers()

    def step(self, batches):
        """(result of the step, {name: gradient})."""
        self.stepper.backward(batches)
        gradients = {name: p.main_grad.clone() for name, p in self.parameters().items()}
        return self.stepper.apply(), gradients


@pytest.fixture(scope="module")
def base(alone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "base"
    parity.make_base(RUN, SIZE, alone, folder)
    return folder


@pytest.fixture(scope="module")
def make_model(alone, base):
    made = {}

    def make(recompute="none", **adapter):
        key = (recompute, *sorted(adapter.items()))
        if key not in made:
            run = replace(
                RUN,
                model=replace(RUN.model, base=str(base)),
                adapter=replace(RUN.adapter, **adapter),
                train=replace(RUN.train, recompute=recompute),
            )
            made[key] = Model(run, alone)
        return made[key]

    return make


@pytest.fixture(scope="module")
def reference_steps(make_model):
    return {gate: make_model(gate=gate).step(cut(2)) for gate in GATES}


def assert_same_step(measured, expected):
    (result, gradients), (expected_result, expected_gradients) = measured, expected
    assert result.applied
    assert result.loss == pytest.approx(expected_result.loss, rel=1e-6)
    assert result.grad_norm == pytest.approx(expected_result.grad_norm, rel=1e-5)
    assert (result.places, result.routing.tokens) == (expected_result.places, expected_result.routing.tokens)
    assert result.routing.balance_loss == pytest.approx(expected_result.routing.balance_loss, rel=1e-6)
    assert result.routing.z_loss == pytest.approx(expected_result.routing.z_loss, rel=1e-6)
    assert torch.equal(result.routing.counts_LGE, expected_result.routing.counts_LGE)
    for figure in ("entropy_L", "margin_L", "balance_L", "z_L"):
        expected_L = getattr(expected_result.routing, figure)
        torch.testing.assert_close(getattr(result.routing, figure), expected_L, rtol=1e-5, atol=0)
    for name, expected_gradient in expected_gradients.items():
        difference = (gradients[name] - expected_gradient).norm()
        assert difference <= 1e-5 * expected_gradient.norm(), name


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("micro_batch_size", [1, 4, 8])
def test_a_step_does_not_depend_on_the_micro_batch_size(make_model, reference_steps, gate, micro_batch_size):
    assert_same_step(make_model(gate=gate).step(cut(micro_batch_size)), reference_steps[gate])


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_neither_balance_scope_depends_on_the_micro_batch_size(make_model, scope):
    model = make_model(gate="none", balance_scope=scope)
    assert_same_step(model.step(cut(1)), model.step(cut(8)))


@pytest.mark.parametrize("gate", GATES)
def test_a_step_does_not_depend_on_padding(make_model, reference_steps, gate):
    padded = cut(2, pad_to=128)
    assert all(batch.tokens.shape[1] == 128 for batch in padded)
    assert_same_step(make_model(gate=gate).step(padded), reference_steps[gate])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recompute_counts_each_token_once(make_model, reference_steps, gate, recompute):
    assert_same_step(make_model(recompute, gate=gate).step(cut(2)), reference_steps[gate])


def test_routing_counts_every_valid_place_and_no_other(reference_steps):
    result, _ = reference_steps["prob"]
    lengths = [len(example.tokens) for example, _ in samples()]
    assert result.places == result.routing.tokens == sum(lengths)
    torch.testing.assert_close(result.routing.load_LE.sum(1), torch.ones(SIZE.language.num_layers).double())


class Recount:
    """What each router put out for each micro-batch, to be counted token by token."""

    def __init__(self, model):
        self.chosen = {}  # layer -> [S, B, E] of each micro-batch
        self._hooks = [router.register_forward_hook(self._remember) for router in model.routers()]

    def _remember(self, router, args, output):
        self.chosen.setdefault(router.layer_number - 1, []).append(output[1].unflatten(0, args[0].shape[:2]))

    def tokens(self, batches):
        """{(layer, domain, is an image place, expert): tokens}."""
        for hook in self._hooks:
            hook.remove()
        table = collections.Counter()
        for layer, chosen in self.chosen.items():
            for batch, chosen_SBE in zip(batches, chosen, strict=True):
                for row, place in batch.padding_mask.nonzero().tolist():
                    (expert,) = chosen_SBE[place, row].nonzero().flatten().tolist()
                    table[layer, int(batch.domains[row]), bool(batch.image_mask[row, place]), expert] += 1
        return table


@pytest.mark.parametrize("micro_batch_size", [1, 4])
@pytest.mark.parametrize("gate", GATES)
def test_tokens_by_source_and_modality_are_those_of_a_recount(make_model, gate, micro_batch_size):
    batches = cut(micro_batch_size)
    model = make_model(gate=gate)
    recount = Recount(model)
    routing = model.step(batches)[0].routing
    expected = recount.tokens(batches)
    assert {key[1:3] for key in expected} == {(0, False), (0, True), (1, False), (1, True)}
    found = {
        (layer, group // 2, bool(group % 2), expert): tokens
        for layer, rows in zip(routing.layers, routing.counts_LGE.tolist(), strict=True)
        for group, row in enumerate(rows)
        for expert, tokens in enumerate(row)
        if tokens
    }
    assert found == expected


class Naive:
    """The balance and z losses written down from the formula, with every token of the global batch at hand."""

    def __init__(self, model):
        self.model, self.inputs = model, {}
        self._hooks = [router.register_forward_pre_hook(self._remember, with_kwargs=True) for router in model.routers()]

    def _remember(self, router, args, kwargs):
        hidden = args[0].detach().reshape(-1, SIZE.language.hidden_size)
        padded = (args[1] if len(args) > 1 else kwargs["padding_mask"]).reshape(-1)
        self.inputs.setdefault(router.layer_number - 1, []).append(hidden[~padded])

    def losses(self, scope):
        """(balance, z), differentiable in the routers."""
        for hook in self._hooks:
            hook.remove()
        shares, means, z = [], [], []
        for router in self.model.routers():
            logits = torch.cat(self.inputs[router.layer_number - 1]) @ router.weight.T + router.bias
            probs = logits.softmax(-1)
            chosen = torch.nn.functional.one_hot(probs.argmax(-1), probs.shape[-1]).float()
            shares.append(chosen.mean(0))
            means.append(probs.mean(0))
            z.append(logits.logsumexp(-1).square().mean())
        share, mean = torch.stack(shares), torch.stack(means)
        balance = (share * mean).sum(-1).mean() if scope == "layer" else (share.mean(0) * mean.mean(0)).sum()
        return balance, torch.stack(z).mean()


@pytest.mark.parametrize("most_kept", [0, 150, 10**6], ids=["pairs summed", "some tokens kept", "all kept"])
@pytest.mark.parametrize("scope", ["layer", "model"])
def test_the_balance_and_z_loss_and_their_gradients_are_the_formulas(make_model, scope, most_kept, monkeypatch):
    # gate none: the routers' gradient is that of these losses alone
    model = make_model(gate="none", balance_scope=scope)
    for router in model.routers():
        monkeypatch.setattr(router.sums, "_most_kept", most_kept)
    naive = Naive(model)
    result, gradients = model.step(cut(2))
    balance, z = naive.losses(scope)
    adapter = model.run.adapter
    assert result.routing.balance_loss == pytest.approx(balance.item(), rel=1e-5)
    assert result.routing.z_loss == pytest.approx(z.item(), rel=1e-5)
    routers = [parameter for router in model.routers() for parameter in (router.weight, router.bias)]
    expected = torch.autograd.grad(adapter.balance_weight * balance + adapter.z_loss_weight * z, routers)
    measured = [gradients[ROUTER.format(r.layer_number - 1) + w] for r in model.routers() for w in ("weight", "bias")]
    for ours, theirs in zip(measured, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("gate", GATES)
def test_the_balance_loss_rises_as_routing_is_skewed_and_pulls_it_back(make_model, gate):
    model = make_model(gate=gate, balance_weight=1.0, z_loss_weight=0.0)
    biases = [router.bias for router in model.routers()]
    original = [bias.detach().clone() for bias in biases]
    losses, pulls = [], []
    for skew in (0.0, 1.0, 2.0, 4.0, 20.0):
        with torch.no_grad():
            for bias, value in zip(biases, original, strict=True):
                bias.copy_(value)
                bias[0] += skew
        result, gradients = model.step(cut(2))
        losses.append(result.routing.balance_loss)
        pulls.append(min(float(gradients[ROUTER.format(r.layer_number - 1) + "bias"][0]) for r in model.routers()))
    with torch.no_grad():
        for bias, value in zip(biases, original, strict=True):
            bias.copy_(value)
    assert losses == sorted(losses)
    assert losses[0] < 0.5
    # every token with one expert
    assert losses[-1] == pytest.approx(1.0, rel=1e-3)
    if gate == "none":
        # descent lowers the favoured expert's bias
        assert all(pull > 0 for pull in pulls[1:4])


def test_a_uniform_router_has_a_balance_loss_of_one_over_the_number_of_experts(make_model):
    model = make_model(gate="prob", balance_weight=1.0, z_loss_weight=0.0)
    kept = [(p, p.detach().clone()) for router in model.routers() for p in router.parameters()]
    with torch.no_grad():
        for parameter, _ in kept:
            parameter.zero_()
    result, _ = model.step(cut(2))
    with torch.no_grad():
        for parameter, value in kept:
            parameter.copy_(value)
    assert result.routing.balance_loss == pytest.approx(1 / model.run.adapter.num_experts, rel=1e-6)


def test_without_losses_of_its_own_a_router_learns_from_the_gate_only(make_model):
    learns = {}
    for gate in GATES:
        _, gradients = make_model(gate=gate, balance_weight=0.0, z_loss_weight=0.0).step(cut(2))
        learns[gate] = bool(gradients[ROUTER.format(1) + "weight"].any())
    assert learns == {"none": False, "prob": True, "straight_through": True}


def test_a_bad_step_changes_nothing_and_the_next_good_one_is_as_if_it_had_not_been(make_model, alone, base):
    run = replace(
        RUN,
        model=replace(RUN.model, base=str(base)),
        train=replace(RUN.train, lr=1e-3),
    )
    straight, disturbed = Model(run, alone), Model(run, alone)
    for model in (straight, disturbed):
        for group in model.stepper.optimizer.param_groups:
            group["lr"] = 1e-3
        model.step(cut(2))
    before = {name: p.detach().clone() for name, p in disturbed.parameters().items()}
    bad = cut(2)
    bad[1].pixels[0, 0, 0, 0] = float("nan")
    result, _ = disturbed.step(bad)
    assert not result.applied
    assert result.loss != result.loss
    assert all(torch.equal(p, before[name]) for name, p in disturbed.parameters().items())
    for model in (straight, disturbed):
        result, _ = model.step(cut(4))
        assert result.applied
    after = straight.parameters()
    assert all(torch.equal(p, after[name]) for name, p in disturbed.parameters().items())
    assert not all(torch.equal(p, before[name]) for name, p in disturbed.parameters().items())


def test_evaluation_leaves_no_trace_in_the_routers(make_model, reference_steps):
    model = make_model(gate="prob")
    model.stepper.evaluate(cut(4))
    assert all(not tensor.any() for router in model.routers() for tensor in router.sums.tensors())
    assert all(isinstance(router, MoLERouter) for router in model.routers())
    assert_same_step(model.step(cut(2)), reference_steps["prob"])


def test_a_balance_weight_that_was_raised_pulls_as_if_it_had_been_configured(make_model):
    raised, configured = (make_model(gate="none", z_loss_weight=0.0, balance_weight=weight) for weight in (0.01, 0.03))
    raised.stepper.balance_factor = 3.0
    (result, gradients), (_, expected) = raised.step(cut(2)), configured.step(cut(2))
    raised.stepper.balance_factor = 1.0
    (plain_result, plain) = raised.step(cut(2))
    for router in raised.routers():
        name = ROUTER.format(router.layer) + "weight"
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-5, atol=0)
        torch.testing.assert_close(gradients[name], 3 * plain[name], rtol=1e-4, atol=1e-8)
    # what is logged stays unweighted
    assert result.routing.balance_loss == plain_result.routing.balance_loss


def test_a_collapse_forced_by_a_bias_sets_off_every_alarm_in_that_layer_alone(make_model):
    model = make_model(gate="prob")
    num_experts = model.run.adapter.num_experts
    memory = RouterMemory.empty(SIZE.language.num_layers, num_experts)
    alarms = AlarmsConfig(collapse=0.99 * num_experts, dead_steps=2, entropy_floor=0.1)
    told = []
    for step in (1, 2):
        with torch.no_grad():
            model.routers()[2].bias[1] += 50.0 * (step == 1)
        result, _ = model.step(cut(2))
        memory, found = observe(memory, result.routing, step, alarms, model.run.adapter)
        told += [(alarm.step, alarm.kind, alarm.layer, alarm.expert) for alarm in found]
    with torch.no_grad():
        model.routers()[2].bias[1] -= 50.0
    dead = [(2, "dead_expert", 2, expert) for expert in range(num_experts) if expert != 1]
    assert told == [(1, "collapse", 2, 1), (1, "low_entropy", 2, None), *dead]
