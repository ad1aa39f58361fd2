"""The seam for methods: handles that mean what they say, a config that refuses what does not go, one file a method."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mole_mega import config as run_config
from mole_mega.adapters.methods import METHODS, build_methods, check_methods, shorten_methods
from mole_mega.adapters.methods.base import Method, StateTensor
from mole_mega.adapters.methods.riemannian import solve
from mole_mega.adapters.mixing import paired
from mole_mega.adapters.sharding import Placement
from mole_mega.config import ConfigError, DataConfig, ModelConfig, PositiveInt, RunConfig, SourceConfig, TrainConfig
from mole_mega.models.llava import LLaVA
from mole_mega.training import parity
from mole_mega.training.optimizer import build_optimizer, set_lr
from mole_mega.training.parity import scaled_down
from mole_mega.training.step import Stepper
from mole_mega.training.trainer import build_model

ROOT = Path(__file__).parents[2]

_RUN, SIZE = scaled_down(
    RunConfig(
        run_dir="unused",
        model=ModelConfig(base=""),
        train=TrainConfig(steps=1),
        data=DataConfig(sources=(SourceConfig(name="made", path="made"),)),
    ),
    None,
)


@pytest.fixture(scope="module")
def run(alone, tmp_path_factory):
    base = tmp_path_factory.mktemp("base") / "base"
    run = replace(_RUN, model=ModelConfig(base=str(base)), adapter=replace(_RUN.adapter, num_experts=2, layers=(1,)))
    parity.make_base(run, SIZE, alone, base)
    return run


def with_methods(run, *asked, train=None, **adapter):
    tree = run_config.to_dict(run)
    tree["adapter"] |= {"methods": list(asked)} | adapter
    tree["train"] |= train or {}
    return run_config.from_dict(tree)


# one file, one line, one test, one example


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_one_file_one_test_and_one_example(name):
    assert METHODS[name].__module__ == f"mole_mega.adapters.methods.{name}"
    assert (ROOT / "tests" / "unit" / f"test_method_{name}.py").is_file()
    example = run_config.load(ROOT / "examples" / name / "run.yaml")
    assert name in [tree["name"] for tree in example.adapter.methods]
    assert check_methods(example)
    assert (ROOT / "examples" / name / "README.md").is_file()


@pytest.mark.parametrize("name", METHODS)
def test_nobody_else_knows_a_method(name):
    """Beside its own file, a method's name stands in the registry alone: its line, and its import."""
    words = {path: len(re.findall(rf"\b{name}\b", path.read_text())) for path in (ROOT / "mole_mega").rglob("*.py")}
    registry = ROOT / "mole_mega" / "adapters" / "methods" / "__init__.py"
    found = {path for path, count in words.items() if count}
    assert found - {registry.with_name(f"{name}.py")} == {registry}
    assert words[registry] == 3  # import, key, value


@dataclass(frozen=True, kw_only=True)
class ToyOptions:
    every: PositiveInt = 1


class Toy(Method):
    """Doubles the gradients, halves the weights, and counts."""

    Options = ToyOptions

    def __init__(self, *args):
        super().__init__(*args)
        self.steps = torch.zeros(1)
        self.seen = []

    def before_step(self, pairs, step):
        self.seen += [("before", pair.A.gradient.clone()) for pair in pairs[:1]]

    def after_step(self, pairs, step):
        self.steps += 1
        with torch.no_grad():
            for pair in pairs:
                pair.A.parameter.mul_(0.5)

    def metrics(self):
        return {"steps": self.steps[0].double()}

    def state(self):
        return {"steps": StateTensor(self.steps, Placement())}


def test_a_new_method_needs_nothing_but_its_line(monkeypatch, alone, run):
    plain = parity.record(run, SIZE, alone)
    monkeypatch.setitem(METHODS, "toy", Toy)
    measured = parity.record(with_methods(run, {"name": "toy"}), SIZE, alone)
    assert float(measured["weight/methods.toy.steps"]) == parity.STEPS
    assert [float(measured[f"loss/method/toy/steps_{step}"]) for step in range(3)] == [1, 2, 3]
    name = "weight/language_model.decoder.layers.1.mlp.experts.lora_gate_A"
    assert measured[name].norm() < 0.2 * plain[name].norm()


@dataclass(frozen=True, kw_only=True)
class SpoilerOptions:
    value: float


class Spoiler(Method):
    """Puts a value into the gradient at its second call, and counts what follows."""

    Options = SpoilerOptions

    def __init__(self, *args):
        super().__init__(*args)
        self.before, self.after = [], []

    def before_step(self, pairs, step):
        self.before.append(step.number)
        if len(self.before) == 2:
            pairs[0].B.gradient[..., 0, 0] = self.options.value

    def after_step(self, pairs, step):
        self.after.append(step.number)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_a_step_whose_gradient_a_method_spoils_is_skipped(monkeypatch, alone, run, value):
    """Also where the gradient is finite and its square is not."""
    monkeypatch.setitem(METHODS, "spoiler", Spoiler)
    run = with_methods(run, {"name": "spoiler", "value": 1.0})
    model = build_model(run, SIZE, alone)
    stepper = Stepper(run, model, build_optimizer(model, run.train), alone, num_domains=2)
    # a config holds finite numbers alone
    stepper.methods["spoiler"].options = SpoilerOptions(value=value)
    applied, weights = [], []
    for step in range(3):
        set_lr(stepper.optimizer, step + 1, run.train)
        applied.append(stepper.train_step(parity.batches(SIZE, step, 0, 1)).applied)
        weights.append([p.detach().clone() for p in model.module.parameters() if p.requires_grad])
    assert applied == [True, False, True] and stepper.applied_steps == 2
    assert all(torch.equal(new, old) for new, old in zip(weights[1], weights[0], strict=True))
    assert all(new.isfinite().all() for new in weights[2]) and not torch.equal(weights[2][0], weights[1][0])
    spoiler = stepper.methods["spoiler"]
    assert (spoiler.before, spoiler.after) == ([1, 2, 2], [1, 2])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_released_order_knows_where_the_optimizer_takes_a(alone, run, precision):
    """With Megatron-Core's Adam and its master weights: B's gradient is that of A as the step leaves it."""
    asked = {"name": "riemannian", "order": "released", "delta": 1e-3}
    train = {"clip_grad": 0.0, "precision": precision, "lr": 1e-2, "lora_plus_ratio": 4.0}
    run = with_methods(run, asked, train=train)
    model = build_model(run, SIZE, alone)
    stepper = Stepper(run, model, build_optimizer(model, run.train), alone, num_domains=2)
    method, before = stepper.methods["riemannian"], []

    def watched(pairs, step, inner=method.before_step):
        before[:] = [(p.A.values.double(), p.B.gradient.double().clone()) for p in pairs]
        inner(pairs, step)

    method.before_step = watched
    moved = 0
    for step in range(3):
        set_lr(stepper.optimizer, step + 1, run.train)
        assert stepper.train_step(parity.batches(SIZE, step, 0, 1)).applied
        for pair, (old_A, grad_B) in zip(stepper.pairs, before, strict=True):
            new, old = (solve(A @ A.mT, grad_B.mT, 1e-3).mT for A in (pair.A.values.double(), old_A))
            torch.testing.assert_close(pair.B.gradient.double(), new, rtol=1e-4, atol=1e-5 * float(new.abs().max()))
            moved += not torch.allclose(old, new, rtol=1e-3)
    assert moved


# what is refused


@pytest.mark.parametrize(
    ("asked", "change", "message"),
    [
        ([{"name": "nonsense"}], {}, rf"methods\[0\].name must be one of {', '.join(METHODS)}; got 'nonsense'"),
        ([{"delta": 1}], {}, r"adapter.methods\[0\] must be a mapping of keys with a name"),
        (["riemannian"], {}, r"adapter.methods\[0\] must be a mapping of keys with a name, got 'riemannian'"),
        ([{"name": "riemannian", "detla": 1}], {}, r"config key adapter.methods\[0\].detla; the nearest .*.delta"),
        ([{"name": "riemannian", "delta": 0}], {}, r"adapter.methods\[0\].delta must be above 0, got 0"),
        ([{"name": "riemannian"}] * 2, {}, "adapter.methods has 'riemannian' 2 times"),
        ([{"name": "riemannian"}, {"name": "bora", "tau": 1}], {}, "riemannian reshapes the whole gradient"),
        ([{"name": "bora"}], {}, r"adapter.methods\[0\].tau is missing"),
        ([{"name": "bora", "tau": 1}], {"method": "lora"}, "at least 2 experts, this run has 0"),
        ([{"name": "bora", "tau": 1}], {"num_experts": 1}, "at least 2 experts, this run has 1"),
        ([{"name": "bora", "tau": 1}], {"train": {"weight_decay": 0.1}}, "weight_decay 0.1: that is a second prior"),
        ([{"name": "bora", "tau": 1}, {"name": "lorasculpt", "prune_step": 2}], {}, "lorasculpt takes an expert whose"),
        ([{"name": "lorasculpt", "density": 1.5}], {}, r"density must be in \(0, 1\], got 1.5"),
        ([{"name": "lorasculpt", "prune_step": 9}], {}, "prunes from step 9 over 0 steps on, but train.steps is 3"),
        ([{"name": "lorasculpt", "regularise": ["w"]}], {}, "regularise.0. must be one of q, k, v"),
    ],
)  # fmt: skip
def test_what_does_not_go_is_refused_with_the_reason(asked, change, message):
    with pytest.raises(ConfigError, match=message):
        check_methods(with_methods(_RUN, *asked, **change))


def test_a_run_with_its_methods_survives_its_own_dump(tmp_path):
    run = with_methods(_RUN, {"name": "bora", "tau": 1e-3}, {"name": "riemannian"})
    path = tmp_path / "run.yaml"
    path.write_text(run_config.dump(run))
    assert run_config.load(path).adapter == run.adapter
    changed = run_config.load(path, ["adapter.methods.bora.tau=7"])
    assert check_methods(changed)[0][1].tau == 7


def test_a_run_that_is_scaled_down_still_does_all_that_its_methods_do():
    sculpt = {"name": "lorasculpt", "prune_step": 100, "ramp_steps": 50, "density": 0.2}
    run = with_methods(replace(_RUN, train=TrainConfig(steps=1000)), sculpt, {"name": "riemannian"})
    small, _ = scaled_down(run, None)
    (_, options), _ = check_methods(small)
    assert (options.prune_step, options.ramp_steps, options.density) == (2, 1, 0.2)
    assert small.train.steps == parity.STEPS


# handles


@pytest.mark.parametrize("method", ["mole", "lora"])
def test_a_handle_names_what_it_holds(alone, method):
    model = LLaVA(with_methods(_RUN, method=method, layers=[1, 2], num_experts=2), SIZE, alone)
    pairs = model.lora_pairs()
    held = [id(factor.parameter) for pair in pairs for factor in pair.factors]
    trainable = [id(p) for p in model.parameters() if hasattr(p, "placement")]
    routers = [id(p) for router in model.routers() for p in router.parameters()]
    assert len(held) == len(set(held)) and set(held) == set(trainable) - set(routers)
    expected = [(layer, name) for layer in range(4) for name in "qkvo"]
    expected += [(layer, name) for layer in (1, 2) for name in ("gate", "up", "down")]
    assert sorted((pair.layer, pair.projection) for pair in pairs) == sorted(expected)
    assert len({pair.name for pair in pairs}) == len(pairs)
    for pair in pairs:
        is_bank = method == "mole" and pair.projection in ("gate", "up", "down")
        assert pair.experts == (range(2) if is_bank else None) and pair.num_experts == (2 if is_bank else 1)
        assert pair.scale == model.language_model.decoder.layers[0].self_attention.linear_qkv.lora.adapter.scale


@pytest.mark.parametrize("method", ["mole", "lora"])
def test_the_frozen_rows_of_a_pair_are_those_that_it_adds_to(alone, method):
    model = LLaVA(with_methods(_RUN, method=method, num_experts=2), SIZE, alone)
    layer = model.language_model.decoder.layers[0]
    owners = [layer.self_attention.linear_qkv, layer.self_attention.linear_proj]
    if method == "lora":
        owners += [layer.mlp.linear_fc1, layer.mlp.linear_fc2]
    with torch.no_grad():
        for owner in owners:
            for p in owner.parameters():
                p.zero_()
            for pair in owner.pairs():
                x = torch.ones(1, 1, pair.A.parameter.shape[-1])
                pair.A.parameter[0] = 1.0
                rows = pair.frozen()
                assert sum(map(len, rows)) == len(pair.B.parameter)
                row_of = [(block, row) for block in rows for row in range(len(block))]
                for index in (0, 3, len(row_of) // 2, len(row_of) - 1):
                    pair.B.parameter[index, 0] = 1.0
                    by_lora = owner(x)[0].flatten().nonzero()
                    pair.B.parameter.zero_()
                    block, row = row_of[index]
                    block[row] = 1.0
                    by_base = owner(x)[0].flatten().nonzero()
                    block[row] = 0.0
                    assert by_lora.tolist() == by_base.tolist() and len(by_lora) == 1
                pair.A.parameter.zero_()


def test_the_frozen_rows_of_a_bank_are_those_of_its_mlp(alone):
    experts = LLaVA(with_methods(_RUN, num_experts=2), SIZE, alone).mole_layers()[0].experts
    with torch.no_grad():
        for p in experts.parameters():
            p.normal_(generator=torch.Generator().manual_seed(p.numel()))
        for name, parameter in experts.named_parameters(recurse=False):
            if name.endswith("_B"):
                parameter.zero_()
        W = {pair.projection: torch.cat(list(pair.frozen())) for pair in experts.pairs()}
        x = torch.randn(5, SIZE.language.hidden_size)
        expected = (F.silu(x @ W["gate"].T) * (x @ W["up"].T)) @ W["down"].T
        used_TE = F.one_hot(torch.tensor([0, 1, 0, 0, 1]))
        out = experts(x, paired(used_TE.float(), used_TE.bool(), top_k=1))
    torch.testing.assert_close(out, expected)


class FakeGroup:
    def __init__(self, rank, size):
        self._rank, self._size = rank, size

    def rank(self):
        return self._rank

    def size(self):
        return self._size


def test_a_part_is_cut_as_the_placement_says():
    from mole_mega.adapters.pairs import Factor
    from mole_mega.adapters.sharding import PLACEMENTS, place

    whole = torch.arange(2 * 4 * 6).view(2, 4, 6)
    parts = []
    for rank in range(2):
        parameter = torch.nn.Parameter(torch.zeros(2, 4, 3))
        place(parameter, PLACEMENTS["experts.row.A"])
        factor = Factor("x", parameter, SimpleNamespace(tp=FakeGroup(rank, 2), ep=FakeGroup(0, 3)))
        assert factor.is_cut and factor.numel() == 24 and factor.whole_shape() == (6, 4, 6)
        parts.append(factor.part(whole))
    assert torch.equal(torch.cat(parts, dim=2), whole)


# off is off


@pytest.mark.parametrize(
    "off",
    [
        {"name": "lorasculpt", "density": 1.0, "conflict_weight": 0.0, "prune_step": 1},
        {"name": "bora", "tau": 0.0},
    ],
    ids=lambda tree: tree["name"],
)
def test_switched_off_a_method_is_bit_for_bit_the_plain_run(alone, run, off):
    plain = parity.record(run, SIZE, alone)
    measured = parity.record(with_methods(run, off), SIZE, alone)
    assert not build_methods(run, [], alone.groups, alone.device)
    for key, tensor in plain.items():
        assert torch.equal(measured[key], tensor), key


@pytest.mark.parametrize("name", METHODS)
def test_switched_on_it_is_another_run(alone, run, name):
    plain = parity.record(run, SIZE, alone)
    example = run_config.load(ROOT / "examples" / name / "run.yaml").adapter.methods
    measured = parity.record(shorten_methods(with_methods(run, *example), parity.STEPS), SIZE, alone)
    moved = [key for key, tensor in plain.items() if not torch.equal(measured[key], tensor)]
    assert any(key.startswith("weight/") and "lora_gate_B" in key for key in moved)
    assert not any(key.startswith("gradient/") for key in moved)


# rsLoRA and LoRA+


def test_rslora_divides_by_the_root_of_the_rank(alone, run):
    plain = with_methods(run, alpha=12.0, rank=4)
    stabilised = with_methods(run, alpha=6.0, rank=4, scaling="rslora")
    assert plain.adapter.scale == stabilised.adapter.scale == 3.0
    records = [parity.record(r, SIZE, alone) for r in (plain, stabilised)]
    assert all(torch.equal(records[1][key], tensor) for key, tensor in records[0].items())


def test_lora_plus_moves_b_faster_and_nothing_else(alone, run):
    records = {
        ratio: parity.record(with_methods(run, train={"lora_plus_ratio": ratio, "lr": 1e-4}), SIZE, alone)
        for ratio in (1.0, 16.0)
    }
    names = [key for key in records[1.0] if key.startswith("weight/")]
    for name in names:
        distance = (records[16.0][name] - records[1.0][name]).abs().max()
        # three steps of Adam, of 15 more learning rates in sum 2e-4 of the schedule
        assert (float(distance) > 2e-3) == ("_B" in name and "lora" in name), name
