"""LoRASculpt (METHODS section C): masks that keep exactly what they should, and the conflict regulariser's gradient."""

import pytest
import torch
from made_pairs import Trainer, made_pair, made_run

from mole_mega.adapters.methods import build_methods, check_methods, lorasculpt
from mole_mega.adapters.methods.lorasculpt import LoRASculptOptions, conflict_mask, conflict_parts, density_at
from mole_mega.adapters.pairs import squared_norms
from mole_mega.config import ConfigError


def build(parallel, pairs, **options):
    run = made_run({"name": "lorasculpt", "conflict_weight": 0.0, **options})
    return build_methods(run, pairs, parallel.groups, parallel.device)["lorasculpt"]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def noise(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda factor: torch.randn(factor.parameter.shape, generator=generator)


@pytest.mark.parametrize("experts", [(), (3,)], ids=["plain LoRA", "a bank"])
def test_the_largest_stay_and_exactly_so_many(alone, experts):
    pair = made_pair(alone, randn(*experts, 4, 30), randn(*experts, 20, 4, seed=1))
    trainer = Trainer(build(alone, [pair], density=0.13, prune_step=3), [pair])
    gradient = noise()
    for _ in range(2):
        trainer.step(gradient)
    assert all(factor.parameter.ne(0).all() for factor in pair.factors)
    unpruned = made_pair(alone, pair.A.parameter.data, pair.B.parameter.data)
    before = {f.name: f.parameter.detach().clone() for f in unpruned.factors}
    # a step of learning rate 0 moves nothing
    trainer.optimizer.param_groups[0]["lr"] = 0.0
    trainer.step(gradient)
    for factor in pair.factors:
        values, old = factor.parameter.detach().flatten(-2), before[factor.name].flatten(-2)
        number = int(0.13 * values.shape[-1])
        assert (values != 0).sum(-1).eq(number).all()
        threshold = old.abs().sort(-1, descending=True).values[..., number - 1 : number]
        assert torch.equal(values != 0, old.abs() >= threshold)
        assert torch.equal(values[values != 0], old[values != 0])


def test_of_equal_magnitudes_the_first_stay(alone):
    pair = made_pair(alone, torch.full((2, 8), -1.0), torch.ones(6, 2))
    trainer = Trainer(build(alone, [pair], density=0.4, prune_step=1), [pair], lr=0.0)
    trainer.step(lambda factor: torch.zeros(factor.parameter.shape))
    assert pair.A.parameter.flatten().ne(0).tolist() == [True] * 6 + [False] * 10
    assert pair.B.parameter.flatten().ne(0).tolist() == [True] * 4 + [False] * 8


def test_the_support_stays_and_the_optimizer_forgets_the_rest(alone):
    pair = made_pair(alone, randn(2, 4, 30), randn(2, 20, 4, seed=1))
    trainer = Trainer(build(alone, [pair], density=0.1, prune_step=2), [pair])
    gradient, supports = noise(), []
    for _ in range(6):
        trainer.step(gradient)
        supports.append([f.parameter.ne(0) for f in pair.factors])
    assert all(torch.equal(a, b) for later in supports[2:] for a, b in zip(supports[1], later, strict=True))
    for factor, support in zip(pair.factors, supports[-1], strict=True):
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not trainer.optimizer.state[factor.parameter][moment][~support].any()
            assert trainer.optimizer.state[factor.parameter][moment][support].all()


def test_a_ramp_prunes_a_little_more_each_step_and_never_lets_back_in(alone):
    options = LoRASculptOptions(density=0.1, prune_step=2, ramp_steps=3)
    densities = [density_at(step, options) for step in range(1, 8)]
    assert densities == pytest.approx([1, 0.1 + 0.9 * 0.75**3, 0.1 + 0.9 * 0.5**3, 0.1 + 0.9 * 0.25**3, 0.1, 0.1, 0.1])
    # so long and so fast that what was pruned would be among the largest again
    options = LoRASculptOptions(density=0.1, prune_step=2, ramp_steps=30)
    pair = made_pair(alone, randn(4, 30), randn(20, 4, seed=1))
    trainer = Trainer(build(alone, [pair], density=0.1, prune_step=2, ramp_steps=30), [pair], lr=1.0)
    gradient, supports = noise(), [torch.ones(f.parameter.shape, dtype=torch.bool) for f in pair.factors]
    for step in range(1, 35):
        trainer.step(gradient)
        for factor, support in zip(pair.factors, supports, strict=True):
            now = factor.parameter.ne(0)
            assert now.sum() == int(density_at(step, options) * support.numel()) and not (now & ~support).any()
            support.copy_(now)


def test_an_expert_waits_until_it_has_seen_tokens(alone):
    B = randn(2, 20, 4)
    B[1] = 0
    pair = made_pair(alone, randn(2, 4, 30), B)
    trainer = Trainer(build(alone, [pair], density=0.1, prune_step=1), [pair])

    def only_first(factor):
        return torch.stack([torch.ones(factor.parameter.shape[1:]), torch.zeros(factor.parameter.shape[1:])])

    for _ in range(2):
        trainer.step(only_first)
    assert pair.A.parameter[0].ne(0).sum() == 12 and pair.A.parameter[1].ne(0).all()
    assert trainer.method.metrics()["waiting"] == 1
    assert float(trainer.method.metrics()["density"]) == (12 + 8 + 120 + 80) / 400
    trainer.step(noise())
    assert pair.A.parameter.ne(0).sum((1, 2)).tolist() == [12, 12] and trainer.method.metrics()["waiting"] == 0
    assert float(trainer.method.metrics()["density"]) == 0.1
    support = pair.A.parameter.ne(0)
    trainer.step(noise(1))
    assert torch.equal(pair.A.parameter.ne(0), support)


def test_a_shared_a_is_pruned_when_the_first_expert_has_seen_tokens(alone):
    B = randn(2, 20, 4)
    B[1] = 0
    pair = made_pair(alone, randn(4, 30), B)
    Trainer(build(alone, [pair], density=0.1, prune_step=1), [pair], lr=0.0).step(noise())
    assert pair.A.parameter.ne(0).sum() == 12 and pair.B.parameter.ne(0).sum((1, 2)).tolist() == [8, 0]


def test_an_a_that_experts_share_is_pruned_as_one(alone):
    pair = made_pair(alone, randn(4, 30), randn(2, 20, 4))
    method = build(alone, [pair], density=0.5, prune_step=1)
    Trainer(method, [pair]).step(noise())
    assert pair.A.parameter.ne(0).sum() == 60 and pair.B.parameter.ne(0).sum() == 2 * 40
    assert float(method.metrics()["density"]) == 0.5
    run = made_run({"name": "lorasculpt", "regularise": ["q", "gate"]}, adapter={"share_A": True})
    with pytest.raises(ConfigError, match=r"with adapter.share_A gate have one A for all of them"):
        check_methods(run)


def test_a_regulariser_of_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"conflict_weight 0.001 and regularises nothing; name projections"):
        check_methods(made_run({"name": "lorasculpt", "regularise": []}))
    assert check_methods(made_run({"name": "lorasculpt", "regularise": [], "conflict_weight": 0.0}))


@pytest.mark.parametrize(
    ("adapter", "asked", "bare"),
    [
        ({"attention": False}, {}, "q, k, v"),
        ({"attention": False}, {"regularise": ["o", "up"]}, "o"),
        ({"method": "lora", "layers": ()}, {"regularise": ["q", "up"]}, "up"),
    ],
)
def test_a_regulariser_of_what_carries_no_lora_is_refused(adapter, asked, bare):
    with pytest.raises(ConfigError, match=f"and regularises {bare}, which carry no LoRA in this run"):
        check_methods(made_run({"name": "lorasculpt", **asked}, adapter=adapter))
    assert check_methods(made_run({"name": "lorasculpt", "conflict_weight": 0.0, **asked}, adapter=adapter))


def test_a_density_that_keeps_nothing_is_refused(alone):
    pair = made_pair(alone, randn(4, 30), randn(20, 4))
    with pytest.raises(ConfigError, match=r"keeps none of the 80 numbers of layers.0.mlp.gate.B.* 0.013 or more"):
        build(alone, [pair], density=0.012)
    assert build(alone, [pair], density=0.0125)


def test_the_number_that_stays_is_that_of_the_density_as_it_is_written(alone):
    pair = made_pair(alone, randn(4, 25), randn(25, 4))
    Trainer(build(alone, [pair], density=0.29, prune_step=1), [pair]).step(noise())
    assert int(0.29 * 100) == 28
    assert pair.A.parameter.ne(0).sum() == pair.B.parameter.ne(0).sum() == 29


@pytest.mark.parametrize(("density", "rank", "expected"), [(0.1, 8, 0.0773), (0.1, 32, 0.275), (0.04, 32, 0.05)])
def test_the_product_of_sparse_factors_is_as_dense_as_the_paper_says(alone, density, rank, expected):
    """1 - (1 - s_A s_B)^r, of supports that are random."""
    assert 1 - (1 - density**2) ** rank == pytest.approx(expected, abs=5e-4)
    shares = []
    for seed in range(10):
        pair = made_pair(alone, randn(rank, 96, seed=seed), randn(96, rank, seed=100 + seed))
        masks = [f.largest(int(density * f.numel()), among=torch.ones(f.parameter.shape).bool()) for f in pair.factors]
        shares.append(float((masks[1].float() @ masks[0].float()).ne(0).float().mean()))
    assert sum(shares) / len(shares) == pytest.approx(expected, rel=0.1)


def test_the_mask_lies_between_0_and_1_grows_with_the_weight_and_knows_no_scale():
    W = randn(9, 5, dtype=torch.float64)
    W[0, 0] = 0
    M = conflict_mask(W, W.norm(), 1.0)
    assert (M > 0).all() and (M < 1).all()
    assert torch.equal(W.abs().flatten().argsort(), M.flatten().argsort())
    torch.testing.assert_close(M, conflict_mask(3 * W, 3 * W.norm(), 1.0))
    assert float(M[0, 0]) == pytest.approx(0.029, abs=1e-3)  # no weight, and yet not 0


def reference_loss(A, B, W, omega):
    """||M o (B A)||_F element by element, under autograd."""
    share = W.abs() / W.norm()
    M = torch.tanh(omega * (1 / torch.log(share + 1e-15)).abs())
    return torch.norm(M * (B @ A))


@pytest.mark.parametrize("chunk", [4, 1000])
def test_the_conflict_gradient_is_autograds_however_it_is_cut_in_rows(monkeypatch, chunk):
    monkeypatch.setattr(lorasculpt, "_CHUNK_ROWS", chunk)
    W = randn(14, 9, dtype=torch.float64)
    A, B = (randn(*s, seed=2, dtype=torch.float64).requires_grad_() for s in ((3, 9), (14, 3)))
    loss = reference_loss(A, B, W, 0.7)
    expected = torch.autograd.grad(loss, (A, B))
    square, grad_A, grad_B = conflict_parts(A.detach(), B.detach(), [W[:6], W[6:]], W.norm(), 0.7)
    torch.testing.assert_close(square.sqrt(), loss.detach())
    torch.testing.assert_close(grad_A / square.sqrt(), expected[0])
    torch.testing.assert_close(grad_B / square.sqrt(), expected[1])
    # shards: squares add up, and so do the gradients of the factor that each has whole
    parts = [conflict_parts(A.detach(), B.detach()[r], [W[r]], W.norm(), 0.7) for r in (slice(0, 7), slice(7, 14))]
    torch.testing.assert_close(parts[0][0] + parts[1][0], square)
    torch.testing.assert_close(parts[0][1] + parts[1][1], grad_A)
    torch.testing.assert_close(torch.cat([parts[0][2], parts[1][2]]), grad_B)


@pytest.mark.parametrize("experts", [(), (1,), (4,), (16,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_of_the_factors_is_never_whole(experts, dtype):
    """What the regulariser takes at its peak, by torch's own account of its allocations: its results, and no more than
    `_CHUNK_ROWS` rows of W in fp32, W's size and the number of experts whatever they are."""
    A, B, W = randn(*experts, 4, 512), randn(*experts, 2048, 4), randn(2048, 512).to(dtype)
    norm = W.float().norm()
    conflict_parts(A, B, [W], norm, 1.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        conflict_parts(A, B, [W], norm, 1.0)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    taken = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        taken += event.nbytes()
        peak = max(peak, taken)
    results, small = A.nbytes + B.nbytes, 2**14
    assert results < peak <= results + lorasculpt._CHUNK_ROWS * 512 * 4 + small


def test_the_regulariser_is_a_mean_over_pairs_and_experts(alone):
    W = randn(20, 30)
    plain = made_pair(alone, randn(4, 30), randn(20, 4, seed=1), W, name="layers.0.attention.q")
    bank = made_pair(alone, randn(2, 4, 30), randn(2, 20, 4, seed=1), W)
    left_out = made_pair(alone, randn(4, 30), randn(20, 4, seed=1), W, name="layers.0.attention.o")
    pairs = [plain, bank, left_out]
    method = build(alone, pairs, conflict_weight=0.5, regularise=["q", "gate"], density=1.0)
    Trainer(method, pairs, lr=0.0).step(lambda factor: torch.zeros(factor.parameter.shape))
    A, B, A_E, B_E = (f.parameter for p in (plain, bank) for f in p.factors)
    norms = [reference_loss(A, B, W, 1.0)] + [reference_loss(A_E[e], B_E[e], W, 1.0) for e in range(2)]
    loss = 0.5 * sum(norms) / 3
    expected = torch.autograd.grad(loss, (A, B, A_E, B_E))
    for factor, gradient in zip((*plain.factors, *bank.factors), expected, strict=True):
        torch.testing.assert_close(factor.gradient, gradient)
    assert not left_out.A.gradient.any()
    assert float(method.metrics()["conflict"]) == pytest.approx(float(loss.detach()))
    assert float(method.metrics()["density"]) == 1


def test_the_regulariser_has_no_gradient_at_b_zero(alone):
    pair = made_pair(alone, randn(4, 30), torch.zeros(20, 4))
    method = build(alone, [pair], conflict_weight=0.5, regularise=["gate"])
    Trainer(method, [pair]).step(lambda factor: torch.zeros(factor.parameter.shape))
    assert not pair.A.gradient.any() and not pair.B.gradient.any()


def test_the_norm_of_a_whole_factor(alone):
    pair = made_pair(alone, randn(2, 4, 30), randn(2, 20, 4))
    for factor, square in zip(pair.factors, squared_norms(pair.factors), strict=True):
        torch.testing.assert_close(square, factor.values.square().sum((1, 2)))
