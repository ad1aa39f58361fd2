"""The benchmarks measure what they say: equal cases compute equal numbers, and the rows and verdicts are right."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"
PROJECTIONS = ("gate", "up", "down")
# relative to a tensor's norm
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


def load(name):
    sys.path.insert(0, str(TOOLS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def bench():
    return load("bench_mole")


@pytest.fixture(scope="module")
def memory():
    return load("bench_memory")


@pytest.fixture(scope="module")
def sizes(bench):
    return bench.Sizes(hidden=32, ffn=48, tokens=24, rank=4)


@pytest.fixture(scope="module")
def make(bench, sizes, alone):
    return lambda case, experts, dtype, **kwargs: bench.Bench(bench.Case(case, experts, dtype), sizes, alone, **kwargs)


def close(found, expected, dtype):
    return float((found - expected).norm()) <= TOLERANCE[dtype] * float(expected.norm())


@torch.no_grad()
def give_factors(to, source):
    """Every expert of `to` gets the factors of the one expert of `source`."""
    for name, factor in to.factors().items():
        factor.copy_(source.factors()[name].expand_as(factor))


@torch.no_grad()
def silence(one):
    """B = 0."""
    for name, factor in one.factors().items():
        if name.endswith(".B"):
            factor.zero_()


@every_dtype
def test_the_cases_read_the_same_input_through_the_same_base(make, dtype):
    first, *others = [
        make(*case, dtype) for case in (("frozen", 1), ("lora", 1), ("mole", 1), ("mole", 4), ("dense", 4))
    ]
    for seed in (None, 7):
        for one in (first, *others):
            if seed is not None:
                one.renew(seed)
        for one in others:
            assert torch.equal(one.x, first.x) and torch.equal(one.grad, first.grad)
    for linear in ("linear_fc1", "linear_fc2"):
        weight = getattr(first.base, linear).weight
        assert weight.abs().sum() > 0 and not weight.requires_grad
        assert all(torch.equal(getattr(one.base, linear).weight, weight) for one in others)


@every_dtype
@pytest.mark.parametrize(
    "case, experts",
    [("lora", 1), ("mole", 1), ("mole", 4), ("top 2", 4), ("top 2", 9), ("MLPs", 4), ("dense", 4)],
)
def test_without_b_every_case_is_the_frozen_mlp(make, case, experts, dtype):
    frozen, other = make("frozen", 1, dtype), make(case, experts, dtype)
    silence(other)
    if case == "dense":  # adds the zeros elsewhere
        assert close(other.run(), frozen.run(), dtype)
    else:
        assert torch.equal(other.run(), frozen.run())


def test_two_whole_mlps_are_another_case_than_two_experts_of_a_linear(make):
    mlps, linears = make("MLPs", 4, "fp32"), make("top 2", 4, "fp32")
    mlps.run(), linears.run()
    of_mlps, of_linears = (one.base.lora_down_A.grad for one in (mlps, linears))
    assert mlps.base.adapter.expert_form == "mlp" and not close(of_mlps, of_linears, "fp32")


@every_dtype
def test_one_expert_is_plain_lora(make, dtype):
    lora, mole = make("lora", 1, dtype), make("mole", 1, dtype)
    give_factors(mole, lora)
    frozen = make("frozen", 1, dtype).run()
    expected = lora.run()
    assert not close(expected, frozen, dtype)  # the factors matter
    assert close(mole.run(), expected, dtype) and close(mole.x.grad, lora.x.grad, dtype)
    for name, factor in mole.factors().items():
        projection, kind = name.split(".")
        of_lora = lora.base.linear_fc2 if projection == "down" else lora.base.linear_fc1
        of_mole = getattr(mole.base, f"lora_{projection}_{kind}").grad
        assert close(of_mole[0], getattr(of_lora, f"lora_{projection}_{kind}").grad, dtype), name
        assert of_mole.shape == factor.shape


@every_dtype
@pytest.mark.parametrize("case", ["mole", "dense"])
def test_many_experts_with_the_same_factors_are_plain_lora(make, case, dtype):
    """Ungated, or weighed by probabilities that sum to 1."""
    lora, other = make("lora", 1, dtype), make(case, 4, dtype, gate="none")
    give_factors(other, lora)
    assert close(other.run(), lora.run(), dtype)
    assert close(other.x.grad, lora.x.grad, dtype)


def test_dense_weighs_experts_as_mole_does_when_one_takes_all(make):
    """A router sure of its choice: dense, which computes every expert, and MoLE, which computes one, agree."""
    mole, dense = make("mole", 4, "fp32"), make("dense", 4, "fp32")
    router = mole.routers[0]
    with torch.no_grad():
        for name, factor in dense.factors().items():
            factor.copy_(mole.factors()[name])
        router.weight.mul_(20)
        dense.layer.router.weight.copy_(router.weight)
        dense.layer.router.bias.copy_(router.bias)
    sure = torch.softmax(dense.layer.router(mole.x), dim=-1).amax(-1) > 1 - 1e-6
    assert sure.sum() > 5
    ours, all_of_them = mole.run()[sure[:, 0]], dense.run()[sure[:, 0]]
    torch.testing.assert_close(ours, all_of_them, rtol=1e-4, atol=1e-4)
    assert (router.sums.counts_E > 0).sum() > 1


@every_dtype
def test_a_run_pays_for_everything_trainable(make, dtype):
    for case, experts in (("lora", 1), ("mole", 4), ("dense", 4)):
        one = make(case, experts, dtype)
        one.run()
        trainable = [parameter for parameter in one.layer.parameters() if parameter.requires_grad]
        assert len(trainable) >= len(PROJECTIONS) * 2
        assert all(parameter.grad is not None for parameter in (*trainable, one.x))
        assert all(router.sums.balance and router.sums.pairs_PX.abs().sum() > 0 for router in one.routers)
        one.renew(1)
        assert all(parameter.grad is None for parameter in (*trainable, one.x))
        assert all(tensor.abs().sum() == 0 for router in one.routers for tensor in router.sums.tensors())


def test_rows_name_their_case_and_hold_two_times(bench, sizes, alone):
    rows = bench.run_cases(bench.CASES, sizes, alone, repeats=2, warmups=0)
    assert [set(row) for row in rows] == [{"case", "experts", "dtype", "ms", "cpu_ms"}] * len(rows)
    named = {(row["case"], row["experts"], row["dtype"]) for row in rows}
    mole = {("mole", experts) for experts in (1, 4, 16, 64)} | {("top 2", experts) for experts in (4, 16, 64)}
    assert named == {
        (*case, dtype) for case in {("frozen", 1), ("lora", 1), ("dense", 16)} | mole for dtype in ("fp32", "bf16")
    }
    assert all(row["ms"] > 0 and row["cpu_ms"] > 0 for row in rows)
    assert json.loads(json.dumps(rows)) == rows
    assert len(bench.table(rows).splitlines()) == 1 + len(rows)


def row(case, experts, dtype, ms):
    return {"case": case, "experts": experts, "dtype": dtype, "ms": ms, "cpu_ms": 2 * ms}


@pytest.mark.parametrize(
    "experts, dtype, ms, missed",
    [
        (16, "fp32", 109, []),
        (16, "fp32", 111, ["lora", "mole"]),
        (64, "fp32", 119, []),
        (64, "fp32", 121, ["lora", "mole"]),
        (16, "bf16", 114, []),
        (16, "bf16", 116, ["lora", "mole"]),
        (64, "bf16", 149, []),
        (16, "bf16", 136, ["lora", "mole", "frozen"]),
        (64, "bf16", 151, ["lora", "mole"]),
    ],
)
def test_the_table_says_which_targets_are_missed(bench, experts, dtype, ms, missed):
    base = [row("frozen", 1, dtype, 100), row("lora", 1, dtype, 100), row("mole", 1, dtype, 100)]
    line = bench.table([*base, row("mole", experts, dtype, ms)]).splitlines()[-1]
    assert [text.split()[3] for text in line.split("   ")[-1].split("; ") if text.startswith("MISSED")] == missed


def test_the_memory_allowed_is_plain_loras_and_what_more_experts_hold(memory):
    rows = [
        {"case": "lora", "experts": 1, "peak_mb": 100.0, "trainable": 1_000_000},
        {"case": "mole", "experts": 4, "peak_mb": 150.0, "trainable": 4_000_000},
    ]
    judged = memory.judge(rows, "fp32")
    assert [one["allowed_mb"] for one in judged] == pytest.approx([100, 105 + 3 * 16])
    assert [one["met"] for one in judged] == [True, True]
    rows[1]["peak_mb"] = 153.1
    assert [one["met"] for one in memory.judge(rows, "fp32")] == [True, False]


def test_a_step_is_measured_in_a_process_of_its_own(memory):
    sizes = memory.Sizes(hidden=32, ffn=48, layers=1, samples=2, length=16, rank=4)
    found = memory.measure("mole", 4, sizes)
    assert set(found) == {"case", "experts", "peak_mb", "process_mb", "trainable"}
    assert found["process_mb"] > found["peak_mb"]
    attention = 4 * (32 + 32) * 4
    projector = 16 * 32 + 32 + 32 * 32 + 32
    experts = 4 * 3 * (32 + 48) * 4
    assert found["trainable"] == attention + projector + experts + 4 * 32 + 4


# what the router board costs


@pytest.fixture(scope="module")
def board():
    return load("bench_board")


def test_the_board_is_measured_against_the_same_step_without_it(board, alone, tmp_path):
    sizes = board.Sizes(layers=1, hidden=32, ffn=48, experts=4, rank=4, samples=4, length=16)
    benches = board.build(sizes, alone, tmp_path)
    for bench in benches.values():
        bench.step(1, board.make_batch(sizes, 1))
    on, off = (benches[case].result for case in ("on", "off"))
    assert (on.loss, on.grad_norm) == (off.loss, off.grad_norm)
    assert on.routing.balance_loss == pytest.approx(off.routing.balance_loss, rel=1e-6)  # summed in another order
    assert on.routing.counts_by_domain().sum((1, 2)).tolist() == [32.0, 16.0, 16.0]
    rows = {case: (tmp_path / case / "metrics.jsonl").read_text() for case in benches}
    assert "load_source" in rows["on"] and "load" not in rows["off"].replace("loss", "")


def test_the_boards_rows_hold_times_and_operations(board, alone):
    sizes = board.Sizes(layers=1, hidden=32, ffn=48, experts=4, rank=4, samples=4, length=16)
    rows = board.measure(sizes, alone, repeats=2, warmups=1)
    assert [row["case"] for row in rows] == ["on", "off", "experts", "pictures"]
    assert all(row["ms"] > 0 and row["cpu_ms"] > 0 for row in rows)
    on, off, *_ = rows
    assert on["own_cpu_ms"] > off["own_cpu_ms"] > 0 and on["operations"] > off["operations"] > 100


def test_the_boards_share_counts_pictures_and_experts_once_in_so_many_steps(board):
    rows = [
        {"case": "on", "ms": 1.0, "cpu_ms": 209.0, "own_cpu_ms": 7.0, "operations": 3},
        {"case": "off", "ms": 1.0, "cpu_ms": 200.0, "own_cpu_ms": 6.0, "operations": 2},
        {"case": "experts", "ms": 1.0, "cpu_ms": 30.0}, {"case": "pictures", "ms": 1.0, "cpu_ms": 70.0},
    ]  # fmt: skip
    assert board.share(rows, 100) == pytest.approx(0.01)
    assert "1.00% of a step: met" in board.table(rows, 100)
    assert "1.50% of a step: MISSED" in board.table(rows, 50)


@pytest.fixture(scope="module")
def expert_parallel():
    return load("bench_expert_parallel")


def test_on_one_process_neither_form_sends_anything(expert_parallel, sizes, alone):
    row = expert_parallel.measure(4, sizes, "fp32", alone, repeats=1)
    assert all(row[f"{form}_{kind}"] == 0 for form in ("tokens", "weights") for kind in ("bytes", "formula"))
    assert row["tokens_ms"] > 0 and row["weights_ms"] > 0
    assert "ahead_ms" not in row
    assert expert_parallel.measure(4, sizes, "fp32", alone, repeats=1, num_layers=2)["ahead_ms"] > 0


def test_the_table_says_where_auto_chose_the_slower_form(expert_parallel):
    def row(auto, tokens_ms, weights_ms):
        of_form = {f"{form}_{kind}": 100.0 for form in ("tokens", "weights") for kind in ("bytes", "formula")}
        return {"experts": 4, "tokens": 64, "auto": auto, "tokens_ms": tokens_ms, "weights_ms": weights_ms} | of_form

    _, right, wrong, last = expert_parallel.table([row("tokens", 1.0, 2.0), row("tokens", 2.0, 1.0)]).splitlines()
    assert right.endswith("tokens   tokens") and wrong.endswith("weights  tokens  SLOWER")
    assert last == "auto chose the faster form in 1 of 2 settings"
    # what a run with several layers does
    head, ahead, _ = expert_parallel.table([row("weights", 1.0, 2.0) | {"ahead_ms": 0.5}]).splitlines()
    assert "ahead ms" in head and ahead.endswith("0.5   weights  weights")
