"""What is trained is exactly what was asked for: said, held by the optimizer, reached by gradients, and moved
(DESIGN 6.6)."""

import io
from functools import partial

import commands
import pytest
import torch

from mole_mega import config
from mole_mega.checkpoint.store import trainable_entries
from mole_mega.errors import CheckFailedError
from mole_mega.models.llava import LLaVA
from mole_mega.training import parity
from mole_mega.training.parity import GRADIENT_TOLERANCE, WEIGHT_TOLERANCE
from mole_mega.training.trainer import Trainer, describe_trainable

CHECK_FAILED = 3


@pytest.fixture
def make_trainer(alone, write_run):
    def make(**sections):
        run = config.load(write_run(**sections))
        return Trainer(run, alone, out=io.StringIO())

    return make


def count(adapter=None, train=None):
    """{group: (numbers, tensors)} by hand, for the tiny base."""
    adapter, train = {"num_experts": 4, "rank": 4} | (adapter or {}), train or {}
    hidden, ffn, key_value, vision, layers = 128, 352, 64, 160, 4
    rank, experts = adapter["rank"], adapter["num_experts"]
    mlps = layers if adapter.get("layers", "all") == "all" else len(adapter["layers"])
    attention = rank * (2 * (hidden + hidden) + 2 * (hidden + key_value)) if adapter.get("attention", True) else 0
    is_mole = adapter.get("method", "mole") == "mole"
    mlp = rank * 3 * (hidden + ffn) * (experts if is_mole else 1)
    groups = {"adapters": (layers * attention + mlps * mlp, layers * (8 if attention else 0) + mlps * 6)}
    if is_mole:
        groups["router"] = mlps * experts * (hidden + 1), mlps * 2
    if train.get("projector", True):
        groups["projector"] = hidden * (vision + 1) + hidden * (hidden + 1), 4
    return groups


ASKED = {
    "everything": {},
    "no projector": {"train": {"projector": False}},
    "no attention": {"adapter": {"attention": False}},
    "some layers": {"adapter": {"layers": [0, 2]}},
    "plain LoRA": {"adapter": {"method": "lora", "rank": 8}},
    "other sizes": {"adapter": {"num_experts": 3, "rank": 5}},
}


@pytest.mark.parametrize("asked", ASKED)
def test_the_trainable_set_that_is_said_is_what_was_asked_for(make_trainer, alone, asked):
    model = make_trainer(**ASKED[asked]).model
    lines = describe_trainable(model, alone)
    expected = [
        f"trainable {group}: {numbers:,} numbers in {tensors} tensors"
        for group, (numbers, tensors) in sorted(count(**ASKED[asked]).items())
    ]
    assert [line for line in lines if not line.startswith("  ")] == expected
    named = sorted(f"{entry.key} {list(entry.global_shape)}" for entry in trainable_entries(model).values())
    assert sorted(name for line in lines if line.startswith("  ") for name in spelt_out(line[2:])) == named


def spelt_out(line):
    """The names of each layer that a line stands for: of `a.layers.{0-1,3}.b` three."""
    before, opening, rest = line.partition("{")
    if not opening:
        return [line]
    layers, _, after = rest.partition("}")
    ends = [[int(end) for end in run.split("-")] for run in layers.split(",")]
    return [f"{before}{layer}{after}" for run in ends for layer in range(run[0], run[-1] + 1)]


def test_the_trainable_set_is_said_whole_under_any_layout(write_run, tmp_path):
    for parallel, nproc in (({"tensor": 2}, 2), ({"pipeline": 2}, 2), ({"expert": 2}, 2)):
        code, text = commands.run([write_run(parallel=parallel, train={"steps": 1})], tmp_path / "log", nproc)
        assert code == 0, text
        for group, (numbers, tensors) in count().items():
            assert f"trainable {group}: {numbers:,} numbers in {tensors} tensors\n" in text
        (tmp_path / "run/checkpoints/latest").unlink()
        (tmp_path / "run/checkpoints/step_1/manifest.json").unlink()


def test_it_is_said_which_prompts_are_trained_on(make_trainer):
    trainer = make_trainer()
    trainer._announce()
    assert "prompts: the base's own template\n" in trainer._out.getvalue()
    trainer.loader.encoder.prompts = "Vicuna v1; why"
    trainer._announce()
    assert "prompts: Vicuna v1; why\n" in trainer._out.getvalue()


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_frozen_is_in_the_optimizer(make_trainer, precision, distributed):
    trainer = make_trainer(train={"precision": precision, "distributed_optimizer": distributed})
    llava = trainer.model.module
    trainable = [p for p in llava.parameters() if p.requires_grad]
    stepped = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert sum(p.numel() for p in stepped) == sum(p.numel() for p in trainable)
    assert sum(p.numel() for p in trainable) == sum(numbers for numbers, _ in count().values())
    if not distributed:
        masters = {id(getattr(p, "main_param", p)) for p in trainable}
        assert {id(p) for p in stepped} == masters
    frozen = [name for name, p in llava.named_parameters() if not p.requires_grad]
    assert not any(part in name for name in frozen for part in ("lora", "router", "vision_projection"))
    assert {name.partition(".")[0] for name in frozen} == {"vision_model", "language_model"}
    # nor in a checkpoint
    names = {name for name, p in llava.named_parameters() if p.requires_grad}
    assert trainable_entries(trainer.model).keys() == names


def test_steps_move_everything_trainable_and_nothing_frozen(make_trainer):
    trainer = make_trainer(adapter={"dropout": 0.0})
    parameters = dict(trainer.model.module.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for step in (1, 2, 3):
        assert trainer._step(step)[1].applied
    moved = {name for name, p in parameters.items() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in parameters.items() if p.requires_grad}
    assert all(p.grad is None for p in parameters.values() if not p.requires_grad)


def detach(what, rank):
    """For `prepare`: cut one part of the model off from its gradient."""
    from mole_mega.adapters import routers
    from mole_mega.adapters.mixture import MixtureExperts
    from mole_mega.models.llava import LLaVA

    if what == "expert factor":
        whole = MixtureExperts._whole_factors

        def cut(self):
            factors = whole(self)
            return factors | {"lora_down_A": factors["lora_down_A"].detach()}

        MixtureExperts._whole_factors = cut
    elif what == "router":
        weigh = routers.gate_weights
        routers.gate_weights = lambda probs, *rest, **options: weigh(probs.detach(), *rest, **options)
    elif what == "projector":
        LLaVA.encode_images = torch.no_grad()(LLaVA.encode_images)


NO_LOSSES = {"balance_weight": 0.0, "z_loss_weight": 0.0}


@pytest.mark.parametrize(
    ("what", "adapter", "name"),
    [
        ("expert factor", {}, "mlp.experts.lora_down_A"),
        ("projector", {}, "vision_projection.encoder.linear_fc1"),
        ("router", NO_LOSSES, "mlp.router.weight"),
        ("router", {"gate": "prob"}, "mlp.router.weight"),
    ],
)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_part_without_gradient_stops_the_run_at_its_first_step(write_run, tmp_path, what, adapter, name, recompute):
    run = write_run(adapter={"rank": 4} | adapter, train={"recompute": recompute, "steps": 2})
    code, text = commands.run([run], tmp_path / "log", prepare=partial(detach, what))
    assert code == CHECK_FAILED, text
    (line,) = (line for line in text.splitlines() if line.startswith("error"))
    assert "no gradient at step 1 for" in line
    assert name in line
    assert "step 2/" not in text
    # and without the cut it runs
    code, text = commands.run([run], tmp_path / "log")
    assert code == 0, text


def test_text_alone_trains_and_leaves_the_projector_where_it_was(write_run, data, tmp_path):
    """A first batch without an image gives the projector no gradient: that is not a fault."""
    sources = [{"name": "text", "path": str(data / "text.json")}]
    code, text = commands.run([write_run(data={"sources": sources}, train={"steps": 1})], tmp_path / "log")
    assert code == 0, text


def test_the_projector_is_proved_at_the_first_step_with_an_image(make_trainer, data, monkeypatch):
    images = {"name": "mixed", "path": str(data / "mixed.json"), "image_folder": str(data / "images")}
    text = {"name": "text", "path": str(data / "text.json")}
    text_only = make_trainer(data={"sources": [images | {"weight": 0}, text]}).loader
    trainer = make_trainer()
    with_images = trainer.loader
    trainer.loader = text_only
    trainer._step(1)
    detach = torch.no_grad()
    monkeypatch.setattr(LLaVA, "encode_images", detach(LLaVA.encode_images))
    trainer._step(2)  # still no image: nothing to prove
    trainer.loader = with_images
    with pytest.raises(CheckFailedError, match="no gradient at step 3 for 4 tensors, first vision_projection"):
        trainer._step(3)
    monkeypatch.undo()
    trainer._step(3)
    assert not trainer._unproved


# --- how the proof that layouts agree measures ----------------------------------------------------------------------


def compare(name, differs_by, hidden=64):
    """The comparison of a record in which gradient `name`, a cancelling sum of norm 1e-3, is off by `differs_by`. The
    router's weight sums the same terms uncancelled: its norm / sqrt(H) is 1."""
    reference = {
        "gradient/mlp.router.bias": torch.tensor([1e-3, 0.0]),
        "gradient/mlp.router.weight": torch.ones(1, hidden),
        "gradient/vision_projection.linear_fc1.bias": torch.tensor([1e-3, 0.0]),
        "gradient/vision_projection.linear_fc1.weight": torch.ones(1, hidden),
        "weight/mlp.router.bias": torch.tensor([1e-3, 0.0]),
        "weight/mlp.router.weight": torch.ones(1, hidden),
        "loss/0": torch.tensor([1.0]),
    }
    measured = {key: tensor.double() for key, tensor in reference.items()}
    measured[name][0] += differs_by
    return parity.compare(parity.Case("made", None, 2), reference, measured)


def test_a_router_biass_gradient_is_measured_by_the_terms_that_cancel_in_it():
    bias = "gradient/mlp.router.bias"
    assert compare(bias, 0.9 * GRADIENT_TOLERANCE).equal
    assert not compare(bias, 1.1 * GRADIENT_TOLERANCE).equal
    # a sum that lacks a part, or counts one twice, is still far from equal
    assert not compare(bias, 1e-3).equal
    # whatever else there is has its own norm, in which 1e-5 of the weight's are a hundredth
    assert not compare("gradient/vision_projection.linear_fc1.bias", 0.9 * GRADIENT_TOLERANCE).equal
    assert not compare("weight/mlp.router.bias", 0.9 * WEIGHT_TOLERANCE).equal


def test_a_mixing_weights_gradient_is_measured_by_the_terms_that_cancel_in_it():
    """Those of <dL/dB, B>: of norm 1 here, where the gradient's own is 1e-3."""
    mix, B = "mlp.experts.lora_up_mix", "mlp.experts.lora_up_B"
    reference = {
        f"gradient/{mix}": torch.tensor([[1e-3, 0.0]]),
        f"gradient/{B}": torch.full((2, 4, 2), 0.5),
        f"weight/{B}": torch.full((2, 4, 2), 0.5),
        f"weight/{mix}": torch.tensor([[1e-3, 0.0]]),
        "loss/0": torch.tensor([1.0]),
    }

    def off_by(kind, difference):
        measured = {key: tensor.double() for key, tensor in reference.items()}
        measured[f"{kind}/{mix}"][0, 0] += difference
        return parity.compare(parity.Case("made", None, 2), reference, measured)

    assert off_by("gradient", 0.9 * GRADIENT_TOLERANCE).equal
    assert not off_by("gradient", 1.1 * GRADIENT_TOLERANCE).equal
    assert not off_by("gradient", 1e-3).equal
    assert not off_by("weight", 0.9 * WEIGHT_TOLERANCE).equal


def test_the_table_of_layouts_says_what_equal_means():
    lines = parity.table([compare("loss/0", 0.0)]).splitlines()
    assert lines[-1].startswith("equal: at most 1e-05 from one process in loss and gradients, 1e-04 in weights")
