"""The compiled kernels equal float64 arithmetic, whatever lies where and however many threads work.

Shape suffixes: N sorted rows, T rows of a wide tensor, I in, O out, E experts, R rank, W wide.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import router_gating_linear
from torch import Tensor

from mole_mega.adapters import bank, cpu_kernels
from mole_mega.adapters.cpu_kernels import CompiledProducts
from mole_mega.adapters.mole import SwiGLU
from mole_mega.adapters.routers import RouterSums, fp32_logits

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
# more than a chunk of 512; none; a block of 32 and one of 32 + 1
COUNTS = [530, 0, 32, 33, 1]
DTYPES = pytest.mark.parametrize("dtype", ROUNDING, ids=["fp32", "bf16"])
SIZES = pytest.mark.parametrize(("width", "rank"), [(16, 2), (130, 6), (300, 32), (514, 66)])
PARTS = pytest.mark.parametrize("parts", [1, 2])
SCATTERED = pytest.mark.parametrize("scattered", [False, True], ids=["in order", "scattered"])


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def randn(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def rows_of(scattered):
    """Which row of 400 wide ones each sorted row is: several are the same one's; None: each its own."""
    return torch.randint(400, (sum(COUNTS),), generator=torch.Generator().manual_seed(1)) if scattered else None


def make(kernels, dtype, scattered):
    row_N = rows_of(scattered)
    num_rows = 400 if scattered else sum(COUNTS)
    return CompiledProducts(kernels(dtype), torch.tensor(COUNTS), row_N), row_N, num_rows


def to_multiply(dtype, num_rows, width, rank, rank_is_inner):
    """(columns of something wider [T, W], a matrix for each expert [E, W, R] whose numbers of one rank, or of one
    column, lie side by side)."""
    M_EWR = randn(len(COUNTS), width, rank, dtype=dtype, seed=1)
    if not rank_is_inner:
        M_EWR = M_EWR.transpose(1, 2).contiguous().transpose(1, 2)
    return randn(num_rows, width + 7, dtype=dtype)[:, 3 : width + 3], M_EWR


def by_expert(tensor_N: Tensor):
    return tensor_N.double().split(COUNTS)


def assert_near(found: Tensor, expected: Tensor):
    assert (found.double() - expected).norm() <= ROUNDING[found.dtype] * expected.norm()


@SCATTERED
@DTYPES
@SIZES
@PARTS
@pytest.mark.parametrize("rank_is_inner", [True, False])
def test_to_rank(kernels, threads, dtype, scattered, width, rank, parts, rank_is_inner):
    products, row_N, num_rows = make(kernels, dtype, scattered)
    x_TI, M_EIR = to_multiply(dtype, num_rows, width, rank, rank_is_inner)
    M_P = [M_EIR, -2 * M_EIR][:parts]
    x_N = x_TI if row_N is None else x_TI[row_N]
    M_EIPR = torch.cat(M_P, dim=2).double()
    expected = torch.cat([x @ M for x, M in zip(by_expert(x_N), M_EIPR, strict=True)])
    assert_near(products.to_rank(x_TI, M_P), expected)


@SCATTERED
@DTYPES
@SIZES
@PARTS
@pytest.mark.parametrize("rank_is_inner", [True, False])
def test_from_rank(kernels, threads, dtype, scattered, width, rank, parts, rank_is_inner):
    products, row_N, num_rows = make(kernels, dtype, scattered)
    z_NR = randn(sum(COUNTS), 3 * rank, dtype=dtype)[:, (3 - parts) * rank :]
    M_ERO = randn(len(COUNTS), rank, width, dtype=dtype, seed=1)
    if rank_is_inner:
        M_ERO = M_ERO.transpose(1, 2).contiguous().transpose(1, 2)
    M_P = [M_ERO, -2 * M_ERO][:parts]
    wide_TO = randn(num_rows, 2 * width, dtype=dtype, seed=2)
    M_EPRO = torch.cat(M_P, dim=1).double()
    rows_NO = torch.cat([z @ M for z, M in zip(by_expert(z_NR), M_EPRO, strict=True)])
    place_N = torch.arange(num_rows) if row_N is None else row_N
    summed = torch.zeros(num_rows, width, dtype=torch.float64).index_add_(0, place_N, rows_NO)
    untouched = wide_TO[:, :width].clone()
    products.add_from_rank_(wide_TO[:, width:], z_NR, M_P)
    assert_near(wide_TO[:, width:], randn(num_rows, 2 * width, dtype=dtype, seed=2)[:, width:].double() + summed)
    assert torch.equal(wide_TO[:, :width], untouched)
    assert_near(products.from_rank(z_NR, M_P, num_rows), summed)


@pytest.mark.parametrize("experts", [2, 4, 8])
def test_a_sum_over_a_tokens_rows_is_rounded_once(kernels, threads, experts):
    """1 + 0.003 is 1 in bf16: added one by one, so would be any number of them."""
    tokens, width = 50, 140
    products = CompiledProducts(
        kernels(torch.bfloat16), torch.full((experts,), tokens), torch.arange(tokens).repeat(experts)
    )
    z_NR = torch.tensor([[0.003, 0]]).bfloat16().expand(tokens * experts, 2).contiguous()
    M_ERO = torch.ones(experts, 2, width, dtype=torch.bfloat16)
    out_TO = torch.ones(tokens, width, dtype=torch.bfloat16)
    products.add_from_rank_(out_TO, z_NR, [M_ERO])
    assert torch.equal(out_TO, (1 + experts * z_NR[:1, :1].float()).bfloat16().expand(tokens, width))


@SCATTERED
@DTYPES
@SIZES
@PARTS
def test_outer(kernels, threads, dtype, scattered, width, rank, parts):
    products, row_N, num_rows = make(kernels, dtype, scattered)
    z_NR = randn(sum(COUNTS), 3 * rank, dtype=dtype)[:, (3 - parts) * rank :]
    wide_TW = randn(num_rows, width + 7, dtype=dtype, seed=2)[:, 3 : width + 3]
    wide_N = wide_TW if row_N is None else wide_TW[row_N]
    expected = torch.stack([z.T @ w for z, w in zip(by_expert(z_NR), by_expert(wide_N), strict=True)])
    found = products.outer(z_NR, wide_TW, parts)
    assert len(found) == parts and all(grad.is_contiguous() and not grad[1].any() for grad in found)
    assert_near(torch.cat(found, dim=1), expected)


@SCATTERED
@DTYPES
@SIZES
@pytest.mark.parametrize("rank_is_inner", [True, False])
def test_to_rank_with_outer(kernels, threads, dtype, scattered, width, rank, rank_is_inner):
    products, row_N, num_rows = make(kernels, dtype, scattered)
    wide_TW, M_EWR = to_multiply(dtype, num_rows, width, rank, rank_is_inner)
    z_NR = randn(sum(COUNTS), 2 * rank, dtype=dtype, seed=2)[:, rank:]
    u_N3R = torch.full((sum(COUNTS), 3 * rank), 7.0, dtype=dtype)
    grad_EWR = products.to_rank_with_outer(wide_TW, M_EWR, z_NR, u_N3R[:, rank : 2 * rank])
    wide_N = by_expert(wide_TW if row_N is None else wide_TW[row_N])
    assert_near(u_N3R[:, rank : 2 * rank], torch.cat([w @ M for w, M in zip(wide_N, M_EWR.double(), strict=True)]))
    assert (u_N3R[:, :rank] == 7).all() and (u_N3R[:, 2 * rank :] == 7).all()
    assert_near(grad_EWR, torch.stack([w.T @ z for w, z in zip(wide_N, by_expert(z_NR), strict=True)]))
    assert not grad_EWR[1].any()


@DTYPES
def test_other_experts_rows_reach_no_result(kernels, threads, dtype):
    """Blocks are filled up with the rows that follow: what is not finite there stays there."""
    counts = [33, 5, 600, 1]
    products = CompiledProducts(kernels(dtype), torch.tensor(counts))
    x_TI, z_NR = randn(sum(counts), 64, dtype=dtype), randn(sum(counts), 16, dtype=dtype, seed=1)
    M_EIR, u_NR = randn(len(counts), 64, 16, dtype=dtype, seed=2), torch.empty_like(z_NR)

    def everything():
        grad_EIR = products.to_rank_with_outer(x_TI, M_EIR, z_NR, u_NR)
        rows = (products.to_rank(x_TI, [M_EIR]), u_NR, products.from_rank(z_NR, [M_EIR.transpose(1, 2)], len(x_TI)))
        by_row = [part for tensor in rows for part in tensor.split(counts)]
        return [*by_row, *grad_EIR, *products.outer(z_NR, x_TI, 1)[0]]

    clean = [tensor.clone() for tensor in everything()]
    last_of_second = sum(counts[:2]) - 1
    x_TI[last_of_second], z_NR[last_of_second] = float("nan"), float("inf")
    for number, (found, expected) in enumerate(zip(everything(), clean, strict=True)):
        expert = number % len(counts)
        assert torch.equal(found, expected) if expert != 1 else not found.isfinite().all()


@pytest.mark.parametrize(
    ("tokens", "width", "experts"), [(0, 40, 3), (1, 40, 1), (33, 130, 3), (97, 300, 16), (64, 256, 70)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_routers_logits_and_their_gradients(kernels, threads, tokens, width, experts, bias):
    x_TH = randn(tokens, width, dtype=torch.bfloat16)
    weight_EH, grad_TE = (randn(*shape, dtype=torch.float32) for shape in ((experts, width), (tokens, experts)))
    bias_E = randn(experts, dtype=torch.float32, seed=1) if bias else None
    logits_TE = cpu_kernels.router_logits(kernels(torch.bfloat16), x_TH, weight_EH, bias_E)
    assert logits_TE.dtype == torch.float32
    expected_TE = x_TH.double() @ weight_EH.double().T
    assert_near(logits_TE, expected_TE if bias_E is None else expected_TE + bias_E.double())
    for x in (x_TH, randn(tokens, width, dtype=torch.float32)):
        dweight_EH, dx_TH = cpu_kernels.router_gradients(kernels(x.dtype), grad_TE, x, weight_EH)
        assert dweight_EH.dtype == torch.float32 and dx_TH.dtype == x.dtype
        assert_near(dweight_EH, grad_TE.double().T @ x.double())
        assert_near(dx_TH, grad_TE.double() @ weight_EH.double())
        alone_EH, none = cpu_kernels.router_gradients(kernels(x.dtype), grad_TE, x, None)
        assert none is None and torch.equal(alone_EH, dweight_EH)


def few_of(tokens, number, used, dtype):
    """[tokens, number], `used` not 0 in each row but the first, and none in the last column."""
    values_TR, scores_TR = randn(tokens, number, dtype=dtype), randn(tokens, number, dtype=torch.float32, seed=1)
    scores_TR[:, -1] = -100  # nobody's
    values_TR *= torch.zeros(tokens, number).scatter_(1, scores_TR.topk(used).indices, 1).to(dtype)
    values_TR[:1] = 0
    return values_TR


@pytest.mark.parametrize(
    ("tokens", "width", "number", "used"), [(0, 40, 8, 1), (1, 40, 8, 2), (33, 130, 17, 4), (97, 301, 64, 8)]
)
@DTYPES
def test_products_of_few(kernels, threads, dtype, tokens, width, number, used):
    """Of columns of something wider. What nobody uses is not touched: infinity times 0 would be no number."""
    values_TR = few_of(tokens, number + 3, used, dtype)[:, 3:]
    wide_TW, before = (randn(tokens, width + 7, dtype=dtype, seed=s) for s in (2, 3))
    wide_TW, columns = wide_TW[:, 3 : width + 3], slice(3, width + 3)
    M_RO = randn(number, width, dtype=dtype, seed=4)
    expected_TO = before[:, columns].double() + values_TR.double() @ M_RO.double()
    M_RO[-1] = float("inf")
    found = before.clone()
    cpu_kernels.add_few_(kernels(dtype), found[:, columns], values_TR, M_RO)
    assert_near(found[:, columns], expected_TO)
    assert torch.equal(found[:1], before[:1])
    assert torch.equal(found[:, :3], before[:, :3]) and torch.equal(found[:, width + 3 :], before[:, width + 3 :])
    outer_RW = cpu_kernels.outer_few(kernels(dtype), values_TR, wide_TW)
    assert_near(outer_RW, values_TR.double().T @ wide_TW.double())
    as_columns_TR = values_TR.t().contiguous().t()
    assert torch.equal(cpu_kernels.outer_few(kernels(dtype), as_columns_TR, wide_TW), outer_RW)


@pytest.mark.parametrize(
    ("tokens", "width", "experts", "used"), [(0, 40, 8, 2), (1, 40, 8, 2), (33, 130, 17, 4), (97, 301, 64, 8)]
)
@DTYPES
def test_a_routers_gradients_from_few_experts(kernels, threads, dtype, tokens, width, experts, used):
    """They come from those alone: infinity times 0 would be no number."""
    x_TH, grad_TE = randn(tokens, width, dtype=dtype, seed=2), few_of(tokens, experts, used, torch.float32)
    weight_EH = randn(experts, width, dtype=torch.float32, seed=3)
    expected_TH = grad_TE.double() @ weight_EH.double()
    weight_EH[-1] = float("inf")
    dweight_EH, dx_TH = cpu_kernels.router_gradients(kernels(dtype), grad_TE, x_TH, weight_EH)
    assert_near(dweight_EH, grad_TE.double().T @ x_TH.double())
    assert_near(dx_TH, expected_TH)
    alone_EH, none = cpu_kernels.router_gradients(kernels(dtype), grad_TE, x_TH, None)
    assert none is None and torch.equal(alone_EH, dweight_EH)


@pytest.mark.parametrize(("entries", "few"), [(64, True), (65, False)])
def test_a_quarter_of_a_routers_gradient_is_few(kernels, entries, few):
    x_TH, grad_TE = randn(32, 40, dtype=torch.float32), torch.zeros(32, 8)
    grad_TE.view(-1)[:entries] = randn(entries, dtype=torch.float32, seed=1)  # the first rows are full
    weight_EH = randn(8, 40, dtype=torch.float32, seed=2)
    dweight_EH, dx_TH = cpu_kernels.router_gradients(kernels(torch.float32), grad_TE, x_TH, weight_EH)
    assert_near(dweight_EH, grad_TE.double().T @ x_TH.double())
    assert_near(dx_TH, grad_TE.double() @ weight_EH.double())
    weight_EH[0] = float("inf")  # times 0 it is no number
    _, dx_TH = cpu_kernels.router_gradients(kernels(torch.float32), grad_TE, x_TH, weight_EH)
    assert dx_TH[-1].isnan().any() != few


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs", ["x and factors", "factors", "x"])
@DTYPES
def test_logits_are_those_of_megatron_core(kernels, bias, needs, dtype):
    kernels(dtype)
    leaves = (randn(50, 96, dtype=dtype), *(randn(*s, dtype=torch.float32) for s in ((5, 96), (5,))))
    for leaf, name in zip(leaves, ("x", "factors", "factors"), strict=True):
        leaf.requires_grad_(name in needs)
    wanted = [leaf for leaf in leaves[: 3 if bias else 2] if leaf.requires_grad]
    grad_TE = randn(50, 5, dtype=torch.float32, seed=1)

    def step(logits_of):
        logits_TE = logits_of(leaves[0], leaves[1], leaves[2] if bias else None)
        return [logits_TE.detach(), *torch.autograd.grad(logits_TE, wanted, grad_TE)]

    expected = step(lambda *inputs: router_gating_linear(*inputs, torch.float32))
    for found, other in zip(step(fp32_logits), expected, strict=True):
        assert found.dtype == other.dtype
        assert_near(found, other.double())


@pytest.mark.parametrize("experts", [2, 5, 16, 23])
@pytest.mark.parametrize(("tokens", "width"), [(0, 64), (1, 2), (64, 96), (100, 300), (333, 128)])
def test_sums_over_pairs_of_experts(kernels, threads, experts, tokens, width):
    x_TH, probs_TE = randn(tokens, width, dtype=torch.bfloat16), randn(tokens, experts, dtype=torch.float32).softmax(1)
    first_P, second_P = torch.triu_indices(experts, experts, offset=1)
    pairs_PX = randn(len(first_P), width + 1, dtype=torch.float32, seed=1)
    products_TP = (probs_TE[:, first_P] * probs_TE[:, second_P]).bfloat16()
    extended_TX = torch.cat([x_TH.double(), torch.ones(tokens, 1).double()], dim=1)
    expected_PX = pairs_PX.double() + products_TP.double().T @ extended_TX
    cpu_kernels.sum_pairs_(kernels(torch.bfloat16), pairs_PX, x_TH, probs_TE)
    torch.testing.assert_close(pairs_PX.double(), expected_PX, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize(("tokens", "experts"), [(0, 4), (1, 2), (50, 5), (200, 33)])
def test_routing_is_summed_as_torchs_operators_do(kernels, groups, choices, tokens, experts):
    kernels(torch.float32)
    logits_TE = 3 * randn(tokens, experts, dtype=torch.float32)
    probs_TE = logits_TE.softmax(1)
    choice_TK = probs_TE.topk(choices).indices
    valid_T = randn(tokens, dtype=torch.float32, seed=1) > -0.5
    group_T = torch.where(valid_T, torch.arange(tokens) % 3, -1) if groups > 1 else None

    def summed(compiled):
        sums = RouterSums(experts, 8, torch.device("cpu"), balance=False, z=False, num_choices=choices)
        sums.count_groups(groups)
        sums.row += 1  # it is added to
        if compiled:
            cpu_kernels.sum_routing_(kernels(torch.float32), sums.row, logits_TE, probs_TE, choice_TK, valid_T, group_T)
        else:
            sums._sum_routing(logits_TE, probs_TE, choice_TK, valid_T, group_T)
        return sums

    found, expected = summed(compiled=True), summed(compiled=False)
    assert torch.equal(found.counts_GE, expected.counts_GE)
    torch.testing.assert_close(found.row, expected.row, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [2, 30, 64, 300])
def test_weigh_has_the_bits_of_torchs_operators(kernels, rank):
    z_NR, weight_N = randn(33, rank, dtype=torch.bfloat16), randn(33, dtype=torch.float32, seed=1)
    z_NR[3, 0], z_NR[4, 1] = float("nan"), float("inf")
    found = cpu_kernels.weigh(kernels(torch.bfloat16), z_NR, weight_N, 1.7)
    expected = (z_NR * (1.7 * weight_N)[:, None]).to(torch.bfloat16)
    assert found.isnan().sum() == 1 and torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@DTYPES
@pytest.mark.parametrize("rank", [1, 30, 64])
def test_dots_of_rows(kernels, dtype, rank):
    u_NR, z_NR = randn(33, 2 * rank, dtype=dtype)[:, :rank], randn(33, rank, dtype=dtype, seed=1)
    found = cpu_kernels.dot_rows(kernels(dtype), u_NR, z_NR, 1.7)
    torch.testing.assert_close(found.double(), 1.7 * (u_NR.double() * z_NR.double()).sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("number", "experts"), [(1, 1), (1, 7), (2, 7), (7, 7)])
def test_the_largest_of_rows(kernels, number, experts):
    scores_TE = randn(50, experts, dtype=torch.float32).mul_(4).round_()  # some are equal
    expected_TK = scores_TE.sort(dim=1, descending=True, stable=True).indices[:, :number]
    assert torch.equal(cpu_kernels.largest(kernels(torch.float32), scores_TE, number), expected_TK)
    places_TK = cpu_kernels.largest(kernels(torch.float32), torch.full_like(scores_TE, float("nan")), number)
    assert torch.equal(places_TK.sort(dim=1).values, torch.arange(number).expand(50, -1))


@DTYPES
@SCATTERED
def test_threads_change_no_bit(kernels, dtype, scattered):
    """But of what `to_rank_with_outer` writes to u, of which each thread sums a part."""
    products, _, num_rows = make(kernels, dtype, scattered)
    x_TI, z_NR = randn(num_rows, 300, dtype=dtype), randn(sum(COUNTS), 32, dtype=dtype)
    M_EIR = randn(len(COUNTS), 300, 32, dtype=dtype, seed=1)
    weight_EI, grad_TE = (randn(*shape, dtype=torch.float32) for shape in ((6, 300), (num_rows, 6)))

    def sum_pairs(x_TH, probs_TE):
        pairs_PX = torch.zeros(15, 301)
        cpu_kernels.sum_pairs_(kernels(torch.bfloat16), pairs_PX, x_TH, probs_TE)
        return pairs_PX

    def activate():
        fused_N2F, weight_N = z_NR.clone(), torch.full((len(z_NR),), 0.25)
        place_TK = torch.arange(len(z_NR)).view(-1, 2)
        h_NF, mixed_TF = cpu_kernels.swiglu_mixed(kernels(dtype), fused_N2F, weight_N, place_TK)
        gradients = cpu_kernels.swiglu_mixed_backward_(kernels(dtype), h_NF, mixed_TF, fused_N2F, weight_N, place_TK)
        return h_NF, mixed_TF, fused_N2F, *gradients

    def few():
        values_TR, out_TI = few_of(num_rows, 6, 1, dtype), x_TI.clone()
        cpu_kernels.add_few_(kernels(dtype), out_TI, values_TR, weight_EI.to(dtype))
        return out_TI, cpu_kernels.outer_few(kernels(dtype), values_TR, x_TI)

    def everything():
        return (
            *activate(),
            *few(),
            products.to_rank(x_TI, [M_EIR]),
            products.from_rank(z_NR, [M_EIR.transpose(1, 2)], num_rows),
            *products.outer(z_NR, x_TI, 2),
            products.to_rank_with_outer(x_TI, M_EIR, z_NR, torch.empty_like(z_NR)),
            cpu_kernels.router_logits(kernels(torch.bfloat16), x_TI.bfloat16(), weight_EI, None),
            *cpu_kernels.router_gradients(kernels(dtype), grad_TE, x_TI, weight_EI),
            *cpu_kernels.router_gradients(kernels(dtype), few_of(num_rows, 6, 1, torch.float32), x_TI, weight_EI),
            sum_pairs(x_TI.bfloat16(), grad_TE),
        )

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything()
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(alone, everything(), strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@DTYPES
@SCATTERED
def test_another_number_of_rows_compiles_no_other_kernel(kernels, dtype, scattered):
    """oneDNN keeps one for good for each size and leading dimension: some 20 kB."""

    def step(rows):
        row_N = torch.arange(rows).flip(0) if scattered else None
        products = CompiledProducts(kernels(dtype), torch.tensor([rows, 0]), row_N)
        x_TI, z_NR = wide_TW[:rows], rank_TR[:rows]
        z_NR = products.to_rank(x_TI, [M_EIR]) + z_NR
        products.add_from_rank_(x_TI, z_NR, [M_EIR.transpose(1, 2)])
        products.outer(z_NR, x_TI, 1)
        products.to_rank_with_outer(x_TI, M_EIR, z_NR, torch.empty_like(z_NR))
        cpu_kernels.router_logits(kernels(torch.bfloat16), x_TI.bfloat16(), weight_EI, None)
        cpu_kernels.router_gradients(kernels(torch.bfloat16), grad_TE[:rows], x_TI.bfloat16(), weight_EI)
        cpu_kernels.sum_pairs_(kernels(torch.bfloat16), torch.zeros(15, width + 1), x_TI.bfloat16(), grad_TE[:rows])

    width, rank = (66 if scattered else 62), 26  # of no other test
    wide_TW, rank_TR = torch.zeros(4000, width, dtype=dtype), torch.zeros(4000, rank, dtype=dtype)
    M_EIR = torch.zeros(2, width, rank, dtype=dtype)
    weight_EI, grad_TE = torch.zeros(6, width), torch.zeros(4000, 6)
    for rows in (4000, *range(64, 136, 8)):  # every height that blocks are filled up to
        step(rows)
    before = resident()
    for rows in range(30, 4000, 64):
        step(rows)
    assert resident() - before < 1 << 20


def test_what_is_not_finite_stays_so(kernels):
    products = CompiledProducts(kernels(torch.bfloat16), torch.tensor([2]))
    x = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0]], dtype=torch.bfloat16).repeat(1, 8)
    z = products.to_rank(x, [torch.ones(1, 16, 2, dtype=torch.bfloat16)])
    assert z[0].isnan().all() and z[1].isinf().all()


def test_swiglu_has_the_bits_of_torchs_operators(kernels, threads):
    """At every bf16 gate, NaN and infinity too. What is too small to be a normal number may be 0: processors make it so
    where they round to bf16."""
    kernels(torch.bfloat16)
    gate = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(64, 1024)
    up = randn(64, 1024, dtype=torch.bfloat16)
    found = SwiGLU.apply(torch.cat([gate, up], dim=1))
    expected = F.silu(gate) * up
    subnormal = (expected != 0) & (expected.abs() < torch.finfo(torch.bfloat16).tiny * 1.01)
    assert torch.equal(found.nan_to_num(7.0)[~subnormal], expected.nan_to_num(7.0)[~subnormal])
    assert found[subnormal].abs().max() < 1.2e-38 and subnormal.sum() < 1000
    assert found.isnan().any() and found.isinf().any()


def test_gradient_of_swiglu(kernels, threads):
    kernels(torch.bfloat16)
    fused = (3 * randn(50, 2 * 300, dtype=torch.bfloat16)).requires_grad_()
    grad = randn(50, 300, dtype=torch.bfloat16, seed=1)
    (found,) = torch.autograd.grad(SwiGLU.apply(fused), fused, grad)
    assert torch.equal(fused, (3 * randn(50, 2 * 300, dtype=torch.bfloat16)))  # a leaf is the user's
    exact = fused.detach().double().requires_grad_()
    gate, up = exact.chunk(2, dim=1)
    (expected,) = torch.autograd.grad(F.silu(gate) * up, exact, grad.double())
    assert_near(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("leaf", [True, False])
def test_gradient_of_swiglu_wherever_its_input_lies(dtype, leaf):
    """Row after row, column after column, in every second row of another tensor, and in all of one."""
    row_by_row = randn(6, 2 * 40, dtype=dtype)
    exact = row_by_row.double().requires_grad_()
    gate, up = exact.chunk(2, dim=1)
    (expected,) = torch.autograd.grad((F.silu(gate) * up).sum(), exact)
    for place in (
        lambda x: x * 1,
        lambda x: x.t().contiguous().t(),
        lambda x: x.repeat_interleave(2, 0)[::2],
        lambda x: x.view(2, 3, -1).flatten(0, 1),
    ):
        owner = row_by_row.clone().requires_grad_()
        fused = place(owner).detach().requires_grad_() if leaf else place(owner)
        (found,) = torch.autograd.grad(SwiGLU.apply(fused).sum(), fused)
        assert_near(found, expected)
        assert torch.equal(owner, row_by_row)
        assert not found.requires_grad  # else it would hold the graph


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_swiglu_writes_its_gradient_over_its_input_and_others_are_told(dtype):
    x = randn(4, 16, dtype=dtype).requires_grad_()
    fused = 2 * x
    place, gradients = fused.data_ptr(), []
    fused.register_hook(lambda grad: gradients.append((grad.data_ptr(), grad.clone())))
    SwiGLU.apply(fused).sum().backward()
    assert gradients[0][0] == place
    exact = (2 * x).detach().double().requires_grad_()
    (F.silu(exact[:, :8]) * exact[:, 8:]).sum().backward()
    assert_near(gradients[0][1], exact.grad)

    fused = 2 * x
    squared = (fused * fused).sum()  # keeps it for its own gradient
    SwiGLU.apply(fused).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()


MIXED = pytest.mark.parametrize(("choices", "width"), [(1, 16), (2, 300), (5, 129), (3, 7)])


def pairs_of(choices, width, dtype):
    """(gate and up of 40 tokens' pairs in any order, weights that sum to 1 a token, where each token's pairs are)."""
    number = 40 * choices
    place_TK = torch.randperm(number, generator=torch.Generator().manual_seed(3)).view(40, choices)
    weight_N = torch.empty(number)
    weight_N[place_TK] = randn(40, choices, dtype=torch.float32, seed=4).softmax(dim=1)
    return 3 * randn(number, 2 * width, dtype=dtype), weight_N, place_TK


@MIXED
@DTYPES
def test_swiglu_mixed(kernels, threads, dtype, choices, width):
    fused_N2F, weight_N, place_TK = pairs_of(choices, width, dtype)
    h_NF, mixed_TF = cpu_kernels.swiglu_mixed(kernels(dtype), fused_N2F, weight_N, place_TK)
    assert torch.equal(h_NF, F.silu(fused_N2F[:, :width]) * fused_N2F[:, width:])
    gate_NF, up_NF = fused_N2F.double().chunk(2, dim=1)
    exact_TKF, weight_TK1 = (F.silu(gate_NF) * up_NF)[place_TK], weight_N.double()[place_TK][..., None]
    assert_near(mixed_TF, (exact_TKF * weight_TK1).sum(1))


@DTYPES
def test_a_mixture_of_equals_is_one_of_them_bit_for_bit(kernels, threads, dtype):
    fused_N2F, weight_N, place_TK = pairs_of(5, 300, dtype)
    fused_N2F[place_TK] = fused_N2F[:40, None].clone()
    h_NF, mixed_TF = cpu_kernels.swiglu_mixed(kernels(dtype), fused_N2F, weight_N, place_TK)
    assert torch.equal(mixed_TF, h_NF[place_TK[:, 0]])
    dmixed_TF = randn(40, 300, dtype=dtype, seed=2)
    values = (torch.zeros_like(h_NF), dmixed_TF, fused_N2F, weight_N, place_TK)
    _, dweight_N = cpu_kernels.swiglu_mixed_backward_(kernels(dtype), *values)
    assert not dweight_N.any()  # nor does rounding choose between them


@MIXED
@DTYPES
def test_gradient_of_swiglu_mixed(kernels, threads, dtype, choices, width):
    fused_N2F, weight_N, place_TK = pairs_of(choices, width, dtype)
    dh_NF, dmixed_TF = randn(40 * choices, width, dtype=dtype, seed=1), randn(40, width, dtype=dtype, seed=2)
    exact_N2F, exact_weight_N = fused_N2F.double().requires_grad_(), weight_N.double().requires_grad_()
    gate_NF, up_NF = exact_N2F.chunk(2, dim=1)
    exact_NF = F.silu(gate_NF) * up_NF
    first_TF, weight_TK1 = exact_NF[place_TK[:, 0]], exact_weight_N[place_TK][..., None]
    mixed_TF = first_TF + ((exact_NF[place_TK] - first_TF[:, None]) * weight_TK1).sum(1)
    expected_N2F, expected_N = torch.autograd.grad(
        [exact_NF, mixed_TF], [exact_N2F, exact_weight_N], [dh_NF.double(), dmixed_TF.double()]
    )
    values = (dh_NF, dmixed_TF, fused_N2F, weight_N, place_TK)
    dfused_T2F, dweight_N = cpu_kernels.swiglu_mixed_backward_(kernels(dtype), *values)
    assert_near(fused_N2F, expected_N2F)
    assert_near(dfused_T2F, expected_N2F[place_TK].sum(1))
    assert_near(dweight_N, expected_N)


def test_without_kernels_the_layer_says_so_and_goes_on(monkeypatch):
    def refuse(source):
        raise cpu_kernels.compiler.CannotCompileError("no C++ compiler")

    monkeypatch.setattr(cpu_kernels.compiler, "load", refuse)
    cpu_kernels._load.cache_clear()
    cpu_kernels.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no C\\+\\+ compiler"):
            assert cpu_kernels.library(torch.bfloat16) is None
        fused = randn(4, 16, dtype=torch.bfloat16)
        assert torch.equal(SwiGLU.apply(fused), F.silu(fused[:, :8]) * fused[:, 8:])
    finally:
        cpu_kernels._load.cache_clear()
        cpu_kernels.library.cache_clear()


class Square(torch.autograd.Function):
    """A frozen product whose gradient is its own new tensor."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return grad @ weight, None


@pytest.mark.parametrize("experts", [1, 3])
def test_a_shared_inputs_gradient_is_the_sum_that_autograd_makes(experts):
    counts = torch.tensor([9] if experts == 1 else [4, 0, 5])
    x = randn(9, 8, dtype=torch.float64).requires_grad_()
    weight, A, B = (randn(*shape, dtype=torch.float64, seed=s) for s, shape in
                    enumerate([(16, 8), (experts, 4, 8), (experts, 16, 4)], 1))  # fmt: skip
    A.requires_grad_(), B.requires_grad_()

    def step(x, shares):
        h = x.tanh()  # read by others too
        shared, gradient = bank.share_input(h) if shares else (h, None)
        y = bank.add_expert_lora(Square.apply(shared, weight), shared, A, B, counts, 1.7, None, gradient)
        return (y * y).sum() + h.sum()

    for _ in range(2):  # what one backward pass left would show in the next
        found = torch.autograd.grad(step(x, True), [x, A, B])
        expected = torch.autograd.grad(step(x, False), [x, A, B])
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    for reentrant in (True, False):
        recomputed = torch.utils.checkpoint.checkpoint(step, x, True, use_reentrant=reentrant)
        (got,) = torch.autograd.grad(recomputed, [x]) if not reentrant else (None,)
        if reentrant:
            x.grad = None
            recomputed.backward()
            got = x.grad
        torch.testing.assert_close(got, expected[0], rtol=1e-12, atol=1e-12)


def test_a_pass_for_the_factors_alone_leaves_nothing_to_a_later_one():
    shapes, counts = [(9, 8), (16, 8), (1, 4, 8), (1, 16, 4)], torch.tensor([9])
    x, weight, A, B = (randn(*s, dtype=torch.float64, seed=i).requires_grad_() for i, s in enumerate(shapes))
    shared, gradient = bank.share_input(x)
    loss = bank.add_expert_lora(Square.apply(shared, weight), shared, A, B, counts, 1.7, None, gradient).square().sum()
    plain = bank.add_expert_lora(x @ weight.T, x, A, B, counts, 1.7).square().sum()
    torch.autograd.grad(loss, [A, B], retain_graph=True)
    found, expected = torch.autograd.grad(loss, [x]), torch.autograd.grad(plain, [x])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_an_input_without_gradient_is_left_alone():
    x = torch.ones(2, 4)
    assert bank.share_input(x) == (x, None)
    with torch.no_grad():
        assert bank.share_input(x.requires_grad_())[1] is None
