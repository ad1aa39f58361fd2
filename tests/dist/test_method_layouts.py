"""Every method, alone and together, does under every layout what it does in one process: to the loss, the gradient
norm, the weights and what it remembers, after three steps (DESIGN 6.1)."""

from dataclasses import replace

import pytest
import torch
from test_layouts import DP, EP, PP, PP_EP, RUN, TP, TP_EP, TP_PP, check, record_all

from mole_mega.adapters.methods import check_methods
from mole_mega.config import validate
from mole_mega.training.parity import Case, layout_name

RIEMANNIAN = {"name": "riemannian"}
# every kind of projection; pruned over the last two steps
SCULPT = {
    "name": "lorasculpt", "density": 0.3, "prune_step": 2, "ramp_steps": 1, "conflict_weight": 0.5,
    "regularise": ("q", "v", "o", "gate", "down"),
}  # fmt: skip
BORA = {"name": "bora", "tau": 0.5}
RELEASED = {"name": "bora", "tau": 0.05, "prior": "released"}
# the prior and the masks do not go together
PRIOR, MASKS = (BORA, RIEMANNIAN), (SCULPT, RIEMANNIAN)


def case(layout, world, methods, adapter=None, train=None):
    words = [layout_name(layout, world), "+".join(m["name"] for m in methods)]
    words += [m[key] for m in methods for key in ("prior", "order") if key in m]
    words += [f"{key}={value}" for key, value in ((adapter or {}) | (train or {})).items()]
    run = replace(
        RUN,
        parallel=layout,
        adapter=replace(RUN.adapter, methods=methods, **(adapter or {})),
        train=replace(RUN.train, weight_decay=0.0, **(train or {})),
    )
    validate(run)
    check_methods(run)
    return Case(", ".join(words), run, world)


LORA = {"method": "lora"}
CASES = [
    *(case(layout, 2, methods) for layout in (TP, PP, EP, DP) for methods in (PRIOR, MASKS)),
    *(case(layout, 4, methods) for layout in (TP_EP, PP_EP, TP_PP) for methods in (PRIOR, MASKS)),
    *(case(TP_EP, 4, (method,)) for method in (BORA, SCULPT, RIEMANNIAN)),
    *(case(EP, 2, methods, train={"distributed_optimizer": True}) for methods in (PRIOR, MASKS)),
    case(TP_EP, 4, MASKS, train={"distributed_optimizer": True}),
    case(TP_EP, 4, (RIEMANNIAN | {"order": "released"},), train={"clip_grad": 0.0}),
    # over so many ranks the parts that the optimizer cuts do not begin where tensors do
    case(DP, 4, MASKS, train={"distributed_optimizer": True}),
    # an A that experts share is pruned on all expert-parallel ranks at once
    case(EP, 2, (SCULPT | {"regularise": ("q",)},), {"share_A": True, "expert_parallel": "weights"}),
    case(TP, 2, (SCULPT, RIEMANNIAN), LORA),
    case(TP_PP, 4, (SCULPT, RIEMANNIAN), LORA),
    case(PP_EP, 4, (RELEASED,), train={"lora_plus_ratio": 4.0}),
    case(PP_EP, 4, (RIEMANNIAN,), train={"optimizer": "sgd", "lr": 0.01, "clip_grad": 0.0}),
    case(TP, 2, (), {"scaling": "rslora"}, {"lora_plus_ratio": 4.0}),
]  # fmt: skip


@pytest.fixture(scope="module")
def recorded():
    return record_all(CASES)


@pytest.mark.parametrize("name", [c.name for c in CASES])
def test_methods_under_a_layout_equal_one_process(recorded, name):
    check(recorded[0][name])


def test_each_method_left_its_mark(recorded):
    prior, masks = (recorded[1][case.name] for case in CASES[:2])
    assert float(masks["loss/method/lorasculpt/density_0"]) == 1
    assert float(masks["loss/method/lorasculpt/density_2"]) == pytest.approx(0.3, abs=2e-3)
    assert float(masks["loss/method/lorasculpt/conflict_0"]) > 0 < float(prior["loss/method/bora/prior_0"])
    weight = masks["weight/language_model.decoder.layers.1.mlp.experts.lora_gate_A"]
    mask = masks["weight/methods.lorasculpt.mask.layers.1.mlp.gate.A"]
    assert torch.equal(weight != 0, mask != 0)
    assert (mask.sum((1, 2)) == int(0.3 * mask[0].numel())).all()
    assert prior["weight/methods.bora.theta.layers.1.mlp.gate.A"].shape == weight.shape[1:]
