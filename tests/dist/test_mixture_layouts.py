"""Mixtures in every layout compute what one process computes, whichever of their experts a token uses (DESIGN 6.1).

Each case covers several options at once; all cases of one world size run in one launch.
"""

from dataclasses import replace

import pytest
import torch
from test_layouts import DP, EP, PP, PP_EP, RUN, TP, TP_EP, TP_PP, check, record_all
from test_layouts import case as case_of

from mole_mega.config import SourceConfig

TOP_2 = {"top_k": 2, "expert_parallel": "weights"}
DENSE = {"gate": "dense", "expert_parallel": "weights"}
NORMED = {**TOP_2, "renormalize": True}
SHARED = {**NORMED, "share_A": True}
# so many experts that tokens are sorted into pairs
MANY = {**TOP_2, "num_experts": 14}

# an expert for each of the two sources that the made samples come from; tokens or weights travel
TASK = {
    "router_scope": "task", "gate": "none", "num_experts": 2, "balance_weight": 0.0, "z_loss_weight": 0.0,
}  # fmt: skip
SOURCES = tuple(SourceConfig(name=name, path="made") for name in "ab")


# BoRA: a prior ties the tasks' experts; a weight decay would be a second one
BORA = {**TASK, "methods": ({"name": "bora", "tau": 0.5},)}
NO_DECAY = {"weight_decay": 0.0}


# LoRAMoE: a router for each linear
LINEAR = {**DENSE, "router_scope": "linear"}


# Octavius: one gate a sample, of its instruction
SAMPLE = {**NORMED, "router_scope": "sample", "balance_weight": 0.0, "z_loss_weight": 0.0}


# MTL-LoRA: B mixed by task
MTL = {**TASK, "share_A": True, "shared_B": 3, "expert_parallel": "weights"}

# SMoRA: each rank an expert; its bias moves, and by enough to choose others
SMORA = {
    **NORMED, "num_experts": 16, "rank": 1, "top_k": 4, "router_score": "sigmoid", "score_bias_rate": 0.05,
    "router_bias": False, "balance_weight": 0.0, "z_loss_weight": 0.0, "router_scope": "linear",
}  # fmt: skip

# MixLoRA: whole MLPs
MLPS = {**NORMED, "expert_form": "mlp"}


def case(*arguments):
    """`test_layouts.case` on two sources."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_layouts.RUN", replace(RUN, data=replace(RUN.data, sources=SOURCES)))
        return case_of(*arguments)


ONE_CHOICE, TWO_CHOICES = case(EP, 2, {**TOP_2, "top_k": 1}), case(TP, 2, NORMED)
CASES = [
    TWO_CHOICES,
    case(PP, 2, MANY),
    case(EP, 2, {**MANY, "rescale_gate": True, "methods": ({"name": "riemannian"},)}),
    case(DP, 2, DENSE),
    case(EP, 2, {**NORMED, "gate": "straight_through"}, {"recompute": "full"}),
    case(TP_EP, 4, SHARED),
    case(PP_EP, 4, {**TOP_2, "gate": "none", "balance_scope": "model"}),
    case(TP_PP, 4, DENSE),
    # experts cut and copied at once
    case(EP, 4, TOP_2),
    case(TP_EP, 4, TASK),
    case(TP, 2, LINEAR),
    case(PP, 2, SAMPLE, {"recompute": "full"}),
    case(TP_EP, 4, SAMPLE),
    case(PP_EP, 4, {**LINEAR, "gate": "prob", "top_k": 2, "balance_scope": "model"}),
    case(TP_EP, 4, MTL, NO_DECAY),
    case(TP, 2, {**MTL, "mix_temperature": 1.0}, NO_DECAY),
    case(PP, 2, MTL, {**NO_DECAY, "recompute": "full"}),
    case(TP, 2, SMORA),
    case(PP_EP, 4, SMORA, {"recompute": "full"}),
    case(TP_EP, 4, {**SMORA, "router_scope": "block"}),
    case(TP_EP, 4, MLPS),
    case(TP_EP, 4, {**MLPS, "share_A": True}),
    case(PP_EP, 4, MLPS, {"recompute": "full"}),
    case(DP, 2, {**MLPS, "num_experts": 14}),
    ONE_CHOICE,
    *(case(layout, world, BORA, NO_DECAY) for layout, world in [(TP, 2), (PP, 2), (EP, 2), (TP_EP, 4), (PP_EP, 4)]),
    *(case(layout, 2, TASK) for layout in (PP, DP)),
    *(case(layout, 2, SHARED) for layout in (PP, EP)),
    case(EP, 2, {**SHARED, "router_scope": "linear"}),
    *(case(layout, 2, LINEAR) for layout in (EP, PP)),
    case(EP, 2, SAMPLE),
    case(TP, 2, MLPS),
    # last: the distributed optimizer is never freed
    *(case(EP, 2, adapter, {"distributed_optimizer": True}) for adapter in (DENSE, SMORA)),
    case(EP, 2, MTL, {**NO_DECAY, "distributed_optimizer": True}),
    case(EP, 2, BORA, NO_DECAY | {"distributed_optimizer": True}),
]


@pytest.fixture(scope="module")
def recorded():
    return record_all(CASES)


@pytest.mark.parametrize("name", [c.name for c in CASES])
def test_layout_equals_one_process(recorded, name):
    check(recorded[0][name])


def test_every_trainable_tensor_had_a_gradient(recorded):
    for name, reference in recorded[1].items():
        gradients = [tensor for key, tensor in reference.items() if key.startswith("gradient/")]
        assert all(tensor.isfinite().all() and tensor.any() for tensor in gradients), name


def test_the_biases_of_scores_moved_by_load_alone(recorded):
    found = 0
    for name, reference in recorded[1].items():
        for key, bias in reference.items():
            if key.endswith("score_bias"):
                assert not key.startswith("gradient/"), name
                steps = bias / SMORA["score_bias_rate"]  # three of -1, 0 or 1
                torch.testing.assert_close(steps, steps.round())
                assert steps.any() and steps.abs().max() <= 3
                found += 1
    assert found


def test_a_tokens_choices_are_counted_each(recorded):
    top_1, top_2 = (recorded[1][c.name]["loss/counts_LGE_0"] for c in (ONE_CHOICE, TWO_CHOICES))
    assert top_1.sum() > 0
    assert torch.equal(top_2.sum(-1), 2 * top_1.sum(-1))
