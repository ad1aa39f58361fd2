"""A proof is worth what it refuses: wrong records, and runs that are broken on purpose, are not called equal."""

import math
from dataclasses import replace
from types import SimpleNamespace

import commands
import pytest
import torch
from test_layouts import EP, RUN, SIZE, TP

from mole_mega.training import parity
from mole_mega.training.parity import GRADIENT_TOLERANCE, Case, compare


def make_record():
    generator = torch.Generator().manual_seed(0)
    names = [f"{kind}/{tensor}" for kind in ("gradient", "weight") for tensor in ("a", "b", "c")]
    return {name: torch.randn(40, 5, generator=generator) for name in names} | {
        "loss/0": torch.tensor(3.0, dtype=torch.float64)
    }


CASE = Case("made", RUN, 2)


def test_compare_calls_a_record_equal_to_itself():
    result = compare(CASE, make_record(), make_record())
    assert result.equal
    assert (result.loss, result.gradient, result.weight, result.num_tensors) == (0, 0, 0, 3)


@pytest.mark.parametrize(("kind", "share"), [("gradient", 2e-5), ("weight", 2e-4), ("loss", 2e-5)])
def test_compare_sees_a_difference_just_above_the_tolerance_and_none_just_below(kind, share):
    key = {"loss": "loss/0"}.get(kind, f"{kind}/b")
    for factor, equal in ((1, False), (0.4, True)):
        record = make_record()
        record[key] = record[key] * (1 + share * factor)
        result = compare(CASE, make_record(), record)
        assert result.equal is equal
        assert getattr(result, kind) == pytest.approx(share * factor, rel=0.1)


@pytest.mark.parametrize("tensor", ["a", "b", "c"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_compare_calls_no_record_with_nan_equal(tensor, value):
    record = make_record()
    record[f"gradient/{tensor}"][3, 1] = value
    result = compare(CASE, make_record(), record)
    assert not result.equal
    assert result.gradient_tensor == tensor
    assert "DIFFERS: " + tensor in parity.table([result])


def test_compare_refuses_a_record_of_other_tensors():
    record = make_record()
    del record["weight/b"]
    with pytest.raises(ValueError, match="weight/b"):
        compare(CASE, make_record(), record)


def entry(key, offset):
    return SimpleNamespace(key=key, global_shape=(4, 3), global_offset=(offset, 0), local_shape=(2, 3))


def test_parts_are_put_together_and_equal_replicas_kept(alone):
    parts = {"top": torch.zeros(2, 3), "bottom": torch.ones(2, 3), "copy": torch.ones(2, 3)}
    entries = {"top": entry("w", 0), "bottom": entry("w", 2), "copy": entry("w", 2)}
    assert parity._whole(entries, parts, alone)["w"].tolist() == [[0.0] * 3] * 2 + [[1.0] * 3] * 2


@pytest.mark.parametrize("order", [("one", "other", "one_more"), ("other", "one", "one_more")])
def test_replicas_that_differ_become_nan(alone, order):
    parts = {"one": torch.zeros(2, 3), "other": torch.full((2, 3), 1e-7), "one_more": torch.zeros(2, 3)}
    entries = {name: entry("w", 0) for name in order} | {"rest": entry("w", 2)}
    whole = parity._whole(entries, parts | {"rest": torch.zeros(2, 3)}, alone)["w"]
    assert whole[:2].isnan().all()
    assert not whole[2:].isnan().any()


def test_a_part_that_no_rank_holds_is_refused(alone):
    with pytest.raises(ValueError, match="no rank holds a part of w"):
        parity._whole({"top": entry("w", 0)}, {"top": torch.zeros(2, 3)}, alone)


@pytest.fixture(scope="module")
def broken():
    """{mark: (comparison, reference, record)} of runs in which that mark is wrong on every adapter tensor; or what
    broken_worker.py does else."""
    cases = [
        Case(mark, replace(RUN, run_dir=mark, parallel=layout), 2)
        for mark, layout in (("sequence_parallel", TP), ("allreduce", EP), ("tensor_model_parallel", TP))
    ]
    of_two = replace(RUN.adapter, top_k=2, expert_parallel="weights")
    cases.append(Case("gathered", replace(RUN, run_dir="gathered", parallel=EP, adapter=of_two), 2))
    by_task = replace(
        RUN.adapter, router_scope="task", gate="none", num_experts=2, balance_weight=0.0, z_loss_weight=0.0,
        expert_parallel="weights",
    )  # fmt: skip
    by_source = replace(RUN.data, sources=tuple(replace(RUN.data.sources[0], name=name) for name in "ab"))
    task = replace(RUN, run_dir="gathered", parallel=EP, adapter=by_task, data=by_source)
    cases.append(Case("gathered, by task", task, 2))
    sculpt = {"name": "lorasculpt", "density": 1.0, "conflict_weight": 0.5}
    forgetful = [
        (TP, {"name": "riemannian"}), (TP, sculpt),
        (TP, {"name": "bora", "tau": 0.5}), (EP, {"name": "bora", "tau": 0.5}),
    ]  # fmt: skip
    for layout, method in forgetful:
        adapter, train = replace(RUN.adapter, methods=(method,)), replace(RUN.train, weight_decay=0.0)
        name = f"{method['name']} over {'experts' if layout is EP else 'tensors'}"
        cases.append(Case(name, replace(RUN, run_dir="forgets", parallel=layout, adapter=adapter, train=train), 2))
    records = {}

    def launch_broken(module, arguments, nproc):
        return commands.launch("broken_worker" if nproc > 1 else module, arguments, nproc)

    def keep(case, reference, measured):
        records[case.name] = reference, measured
        return compare(case, reference, measured)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "launch_worker", launch_broken)
        patch.setattr(parity, "compare", keep)
        comparisons = parity.verify(cases, SIZE)
    return {c.case.name: (c, *records[c.case.name]) for c in comparisons}


def loss_difference(reference, measured, key="loss/0"):
    return abs(float(measured[key] / reference[key] - 1))


def test_a_forgotten_tensor_parallel_sum_differs_though_the_first_loss_is_equal(broken):
    comparison, reference, measured = broken["sequence_parallel"]
    assert loss_difference(reference, measured) <= GRADIENT_TOLERANCE
    assert not comparison.equal
    # each rank was left with its own part
    assert comparison.gradient == math.inf
    # rows of B that a rank holds alone are whole
    own = "gradient/language_model.decoder.layers.0.mlp.experts.lora_gate_B"
    torch.testing.assert_close(measured[own], reference[own], rtol=1e-4, atol=1e-6)


def test_experts_synced_in_the_wrong_group_differ_though_the_first_loss_is_equal(broken):
    comparison, reference, measured = broken["allreduce"]
    assert loss_difference(reference, measured) <= GRADIENT_TOLERANCE
    assert not comparison.equal
    assert comparison.gradient > 0.1
    assert "experts.lora" in comparison.gradient_tensor


@pytest.mark.parametrize("name", ["gathered", "gathered, by task"])
def test_gathered_experts_whose_gradients_are_not_summed_differ_though_the_first_loss_is_equal(broken, name):
    comparison, reference, measured = broken[name]
    assert loss_difference(reference, measured) <= GRADIENT_TOLERANCE
    assert not comparison.equal
    assert comparison.gradient > 0.1
    assert "experts.lora" in comparison.gradient_tensor


def test_a_norm_that_leaves_out_parts_differs_though_the_gradients_are_equal(broken):
    comparison, reference, measured = broken["tensor_model_parallel"]
    assert comparison.gradient <= GRADIENT_TOLERANCE
    assert not comparison.equal
    assert loss_difference(reference, measured, "loss/grad_norm_0") > 0.01


@pytest.mark.parametrize(
    "case", ["riemannian over tensors", "lorasculpt over tensors", "bora over tensors", "bora over experts"]
)
def test_a_method_that_forgets_a_sum_over_ranks_differs_though_the_gradients_are_equal(broken, case):
    comparison, _, _ = broken[case]
    assert comparison.gradient <= GRADIENT_TOLERANCE
    assert not comparison.equal
