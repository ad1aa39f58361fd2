"""Alarms sound when a layer's routing is sick, once in a while, and say what is done about it."""

import json
import math
from dataclasses import replace

import pytest
import torch

from mole_mega.adapters.routing import RouterMemory, RoutingSummary
from mole_mega.config import AdapterConfig, AlarmsConfig
from mole_mega.monitor.alarms import observe, progress_note

ADAPTER = AdapterConfig(num_experts=4, balance_weight=0.01)
QUIET = AlarmsConfig(dead_steps=0)
BALANCED = [10, 10, 10, 10]


def routing(*counts_LE, layers=None) -> RoutingSummary:
    """Of these tokens, a row a layer; layers 2, 3, ... of the model."""
    counts_LGE = torch.tensor(counts_LE).double()[:, None]
    zeros_L = torch.zeros(len(counts_LE))
    return RoutingSummary(
        layers=tuple(layers or range(2, 2 + len(counts_LE))), counts_LGE=counts_LGE, balance_L=zeros_L, z_L=zeros_L,
        entropy_L=zeros_L, margin_L=zeros_L, balance_loss=0.0, z_loss=0.0,
    )  # fmt: skip


def watch(steps, alarms, memory=None, first_step=1, adapter=ADAPTER):
    """(memory afterwards, alarms) of one `routing` a step."""
    memory = memory or RouterMemory.empty(*steps[0].counts_LE.shape)
    told = []
    for step, summary in enumerate(steps, start=first_step):
        memory, found = observe(memory, summary, step, alarms, adapter)
        told += found
    return memory, told


def brief(told):
    return [(alarm.step, alarm.kind, alarm.layer, alarm.expert, round(alarm.value, 6)) for alarm in told]


# --- when they sound ---


def test_collapse_sounds_at_its_limit_and_names_the_busiest_expert():
    layers = routing([21, 9, 5, 5], [20, 10, 5, 5], [19, 11, 5, 5], [0, 0, 40, 0])
    _, told = watch([layers], replace(QUIET, collapse=2.0))
    assert brief(told) == [(1, "collapse", 2, 0, 2.1), (1, "collapse", 3, 0, 2.0), (1, "collapse", 5, 2, 4.0)]
    assert told[0].row() == {
        "step": 1, "kind": "collapse", "layer": 2, "expert": 0, "value": pytest.approx(2.1), "limit": 2.0,
        "reaction": "none",
    }  # fmt: skip


def test_an_expert_is_dead_after_so_many_steps_in_a_row_without_a_token():
    steps = [[9, 0, 1, 2], [9, 0, 0, 2], [9, 1, 0, 2], [9, 0, 0, 2], [9, 0, 0, 2]]
    memory, told = watch([routing(counts) for counts in steps], AlarmsConfig(dead_steps=3))
    assert brief(told) == [(4, "dead_expert", 2, 2, 3)]
    assert memory.unused_steps_LE.tolist() == [[0, 2, 4, 0]]
    assert memory.tokens_LE.tolist() == [[45, 1, 1, 10]]


def test_low_entropy_sounds_below_its_floor():
    half = routing([20, 20, 0, 0], BALANCED)
    assert brief(watch([half], replace(QUIET, entropy_floor=0.7))[1]) == [
        (1, "low_entropy", 2, None, pytest.approx(math.log(2), abs=1e-6))
    ]
    assert watch([half], replace(QUIET, entropy_floor=0.69))[1] == []


def test_zero_switches_every_alarm_off():
    assert watch([routing([40, 0, 0, 0])] * 300, QUIET)[1] == []


def test_one_expert_that_has_all_tokens_is_not_sick():
    sharp = AlarmsConfig(collapse=1.0, dead_steps=1, entropy_floor=9.0)
    assert watch([routing([40])] * 3, sharp)[1] == []


def test_what_goes_on_is_told_again_after_a_while_and_by_itself():
    sick, well = routing([40, 0, 0, 0]), routing(BALANCED)
    alarms = replace(QUIET, collapse=3.0, repeat_every=4)
    told = watch([sick, sick, well, sick, sick, sick, sick, sick, sick, sick], alarms)[1]
    assert [alarm.step for alarm in told] == [1, 5, 9]
    # the same layer on another expert is the same alarm, another layer is not
    steps = [routing([40, 0, 0, 0], BALANCED), routing([0, 40, 0, 0], [0, 40, 0, 0])]
    assert brief(watch(steps, alarms)[1]) == [(1, "collapse", 2, 0, 4.0), (2, "collapse", 3, 1, 4.0)]


# --- what is done ---

RAISE = AlarmsConfig(dead_steps=0, collapse=3.0, reaction="raise_balance", repeat_every=1, max_balance_weight=0.05)


def test_the_balance_weight_is_raised_once_a_step_up_to_its_maximum():
    sick = routing([40, 0, 0, 0], [40, 0, 0, 0], BALANCED)
    memory, told = watch([sick] * 4, RAISE)
    assert [alarm.reaction for alarm in told] == [
        *["balance weight 0.01 -> 0.02"] * 2, *["balance weight 0.02 -> 0.04"] * 2,
        *["balance weight 0.04 -> 0.05"] * 2, *["none"] * 2,
    ]  # fmt: skip
    assert memory.balance_factor == pytest.approx(5.0)


def test_a_balance_weight_above_the_maximum_is_left_alone():
    memory, told = watch([routing([40, 0, 0, 0])], RAISE, adapter=replace(ADAPTER, balance_weight=0.5))
    assert memory.balance_factor == 1.0 and [alarm.reaction for alarm in told] == ["none"]


RESEED = AlarmsConfig(dead_steps=2, reaction="reseed")


def copied(*counts_LE):
    """[(layer, dead expert, the one that it becomes a copy of)] of what is reseeded once these loads went on."""
    _, told = watch([routing(*counts_LE)] * 2, RESEED)
    return [(alarm.layer, alarm.expert, alarm.source) for alarm in told]


def test_dead_experts_become_copies_of_experts_that_are_busy_and_start_anew():
    reseed = replace(RESEED, collapse=1.5)
    memory, told = watch([routing([0, 30, 20, 0])] * 2, reseed)
    assert brief(told) == [
        (1, "collapse", 2, 1, 2.4), (2, "dead_expert", 2, 0, 2), (2, "dead_expert", 2, 3, 2),
    ]  # fmt: skip
    assert [(alarm.source, alarm.reaction) for alarm in told] == [
        (None, "none"), (1, "reseeded from expert 1"), (2, "reseeded from expert 2"),
    ]  # fmt: skip
    # they have to be without tokens for as long again
    assert memory.unused_steps_LE.tolist() == [[0, 0, 0, 0]]


def test_each_dead_expert_of_a_layer_is_a_copy_of_another_one_in_the_order_of_load():
    """Also where the busiest one has nearly all: its half is more than all that the others have."""
    assert copied([0, 3, 90, 0, 5, 0]) == [(2, 0, 2), (2, 3, 4), (2, 5, 1)]
    # layers do not take from one another; of equals the lower number is first
    assert copied([0, 7, 7, 7], [9, 0, 8, 0]) == [(2, 0, 1), (3, 1, 0), (3, 3, 2)]


def test_an_expert_is_copied_twice_only_when_all_others_were_copied_once():
    assert copied([0, 0, 0, 0, 0, 60, 30]) == [(2, 0, 5), (2, 1, 6), (2, 2, 5), (2, 3, 6), (2, 4, 5)]


def test_a_layer_without_a_token_has_nothing_to_copy():
    memory, told = watch([routing([0, 0, 0, 0], BALANCED)] * 2, RESEED)
    assert [(alarm.expert, alarm.reaction, alarm.source) for alarm in told] == [(e, "none", None) for e in range(4)]
    assert memory.unused_steps_LE.tolist() == [[2] * 4, [0] * 4]


# --- what is remembered ---


@pytest.mark.parametrize("reaction", ["none", "raise_balance", "reseed"])
@pytest.mark.parametrize("split", [1, 4, 7])
def test_a_run_split_anywhere_sounds_as_the_straight_one(reaction, split):
    generator = torch.Generator().manual_seed(3)
    steps = [routing(*(torch.rand(2, 4, generator=generator) * 4).int().tolist()) for _ in range(12)]
    alarms = AlarmsConfig(dead_steps=2, collapse=2.0, entropy_floor=1.0, repeat_every=3, reaction=reaction)
    memory, told = watch(steps, alarms)
    assert {alarm.kind for alarm in told} == {"collapse", "dead_expert", "low_entropy"}
    before, early = watch(steps[:split], alarms)
    kept = RouterMemory.from_tree(json.loads(json.dumps(before.to_tree())))
    after, late = watch(steps[split:], alarms, kept, first_step=split + 1)
    assert early + late == told and late
    assert after.to_tree() == memory.to_tree()


def test_a_count_too_large_for_fp32_is_exact_when_it_comes_back():
    memory = replace(RouterMemory.empty(1, 4), tokens_LE=torch.tensor([[2**53 + 1, 2**24 + 1, 0, 7]]))
    memory = RouterMemory.from_tree(json.loads(json.dumps(memory.to_tree())))
    assert watch([routing([1, 2, 3, 4])], QUIET, memory)[0].tokens_LE.tolist() == [[2**53 + 2, 2**24 + 3, 3, 11]]


def test_the_progress_line_says_which_and_how_many():
    _, told = watch([routing(*[[40, 0, 0, 0]] * 5)], RAISE)
    assert progress_note(told[:1]) == ("  ALARM collapse layer 2 expert 0 (4, limit 3): balance weight 0.01 -> 0.02")
    assert progress_note(told).endswith("; and 2 more") and progress_note([]) == ""
