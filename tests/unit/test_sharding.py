"""Adapters are cut as the placement table says: the parts make the whole, equal in every layout, each saved once."""

import itertools
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from mole_mega.adapters import sharding
from mole_mega.adapters.sharding import PLACEMENTS, Placement

EXPERTS, RANK, IN, OUT, SHARED = 4, 2, 8, 12, 3
SHAPES = {
    "router.row.weight": (EXPERTS, IN),
    "router.weight": (EXPERTS, IN),
    "router.bias": (EXPERTS,),
    "column.A": (RANK, IN),
    "column.B": (OUT, RANK),
    "row.A": (RANK, IN),
    "row.B": (OUT, RANK),
    "experts.column.A": (EXPERTS, RANK, IN),
    "experts.column.B": (EXPERTS, OUT, RANK),
    "experts.row.A": (EXPERTS, RANK, IN),
    "experts.row.B": (EXPERTS, OUT, RANK),
    "router.score_bias": (EXPERTS,),
    "shared.column.B": (SHARED, OUT, RANK),
    "shared.row.B": (SHARED, OUT, RANK),
    "shared.mix": (EXPERTS, SHARED),
    "shared.transform": (EXPERTS, RANK, RANK),
}
# The axes that DESIGN section 2 says are cut: (over expert-parallel, over tensor-parallel ranks)
CUT = {
    "router.row.weight": (None, 1),
    "router.weight": (None, None),
    "router.bias": (None, None),
    "column.A": (None, None),
    "column.B": (None, 0),
    "row.A": (None, 1),
    "row.B": (None, None),
    "experts.column.A": (0, None),
    "experts.column.B": (0, 1),
    "experts.row.A": (0, 2),
    "experts.row.B": (0, None),
    "router.score_bias": (None, None),
    "shared.column.B": (None, 1),
    "shared.row.B": (None, None),
    "shared.mix": (None, None),
    "shared.transform": (None, None),
}
LAYOUTS = [(tp, ep, dp) for tp in (1, 2, 4) for ep in (1, 2, 4) for dp in (ep, 2 * ep)]


@dataclass(frozen=True)
class Group:
    """A process group as far as sharding asks one."""

    my_rank: int
    my_size: int

    def rank(self) -> int:
        return self.my_rank

    def size(self) -> int:
        return self.my_size


def processes(tp: int, ep: int, dp: int):
    """The groups of every process of a layout: expert-parallel ranks are neighbours among the data-parallel ones."""
    for tp_rank, dp_rank in itertools.product(range(tp), range(dp)):
        yield SimpleNamespace(
            tp=Group(tp_rank, tp),
            ep=Group(dp_rank % ep, ep),
            dp_cp=Group(dp_rank, dp),
            expt_dp=Group(dp_rank // ep, dp // ep),
        )


def make(row: str, groups, *, seed: int = 0, name: str | None = None, init=sharding.kaiming_uniform, **kwargs):
    options = {"dtype": torch.float32, "device": torch.device("cpu")} | kwargs
    return sharding.make_parameter(name or row, PLACEMENTS[row], SHAPES[row], init, groups, seed=seed, **options)


@pytest.fixture
def one_process():
    (groups,) = processes(1, 1, 1)
    return groups


def test_every_row_of_the_table_is_tested_and_none_is_made_up():
    assert PLACEMENTS.keys() == SHAPES.keys() == CUT.keys()


@pytest.mark.parametrize("row", PLACEMENTS)
def test_the_table_cuts_the_axes_that_the_design_says(row):
    assert (PLACEMENTS[row].expert_axis, PLACEMENTS[row].tensor_axis) == CUT[row]


@pytest.mark.parametrize("row", PLACEMENTS)
@pytest.mark.parametrize(("tp", "ep", "dp"), LAYOUTS)
def test_the_parts_of_any_layout_put_together_are_what_one_process_makes(row, tp, ep, dp, one_process):
    whole = make(row, one_process)
    seen = torch.zeros(whole.shape, dtype=torch.int)
    expert_axis, tensor_axis = CUT[row]
    for groups in processes(tp, ep, dp):
        window = [slice(None)] * whole.dim()
        for axis, group in ((expert_axis, groups.ep), (tensor_axis, groups.tp)):
            if axis is not None:
                length = whole.shape[axis] // group.size()
                window[axis] = slice(group.rank() * length, (group.rank() + 1) * length)
        part = make(row, groups)
        assert torch.equal(part, whole[tuple(window)])
        seen[tuple(window)] += 1
    assert (seen == seen.flatten()[0]).all() and seen.flatten()[0] > 0  # every number is held equally often


def test_a_part_has_memory_of_its_own():
    """A view would keep the whole tensor alive and let one rank's step write where another's part lies."""
    (groups, *_) = processes(2, 2, 2)
    part = make("experts.column.B", groups)
    assert part.untyped_storage().nbytes() == part.numel() * part.element_size() and part.is_contiguous()


def test_seed_and_name_alone_decide_the_numbers(one_process):
    torch.manual_seed(1)
    first = make("column.A", one_process)
    torch.manual_seed(2)
    assert torch.equal(first, make("column.A", one_process))
    assert not torch.equal(first, make("column.A", one_process, seed=1))
    assert not torch.equal(first, make("column.A", one_process, name="another"))


def test_making_a_parameter_draws_nothing_from_the_global_generator(one_process):
    state = torch.get_rng_state()
    make("column.A", one_process)
    assert torch.equal(state, torch.get_rng_state())


def test_a_bf16_parameter_is_the_fp32_one_rounded(one_process):
    exact, rounded = make("experts.row.A", one_process), make("experts.row.A", one_process, dtype=torch.bfloat16)
    assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, exact.bfloat16())


def test_the_first_factor_starts_uniform_within_one_over_the_root_of_its_inputs_and_the_second_at_zero(one_process):
    A = make("experts.column.A", one_process).detach()
    bound = IN**-0.5
    assert A.abs().max() <= bound and float(A.std()) == pytest.approx(bound / 3**0.5, rel=0.2)
    assert (make("experts.column.B", one_process, init=sharding.zeros) == 0).all()


# the marks that Megatron-Core reads


@pytest.mark.parametrize("row", PLACEMENTS)
def test_place_sets_the_marks_of_its_row(row, one_process):
    expert_axis, tensor_axis = CUT[row]
    parameter = make(row, one_process)
    assert parameter.placement is PLACEMENTS[row] and parameter.requires_grad
    # held in full by tensor-parallel ranks, each with a part of the gradient: finalize_model_grads must sum it
    assert parameter.sequence_parallel is (tensor_axis is None)
    assert PLACEMENTS[row].partial is (tensor_axis is None)
    # the norm counts every rank's part
    assert parameter.tensor_model_parallel is (tensor_axis is not None)
    assert (parameter.partition_dim, parameter.partition_stride) == (-1 if tensor_axis is None else tensor_axis, 1)
    # experts are summed over the expert-data group, all else over the data-parallel one
    assert parameter.allreduce is (expert_axis is None)


# checkpoint entries


def entries_of(row: str, groups):
    module = torch.nn.Module()
    module.factor = make(row, groups)
    module.base = torch.nn.Parameter(torch.zeros(3))  # not placed: not ours to enter
    module.child = torch.nn.Linear(2, 2)
    return sharding.sharded_adapters(module, "layers.0.", groups)


@pytest.mark.parametrize("row", PLACEMENTS)
@pytest.mark.parametrize(("tp", "ep", "dp"), LAYOUTS)
def test_a_checkpoint_of_any_layout_holds_every_number_exactly_once(row, tp, ep, dp, one_process):
    whole = make(row, one_process)
    saved, replicas = torch.zeros(whole.shape, dtype=torch.int), Counter()
    for groups in processes(tp, ep, dp):
        (entry,) = entries_of(row, groups).values()
        assert (entry.key, entry.global_shape) == ("layers.0.factor", tuple(whole.shape))
        window = tuple(slice(o, o + n) for o, n in zip(entry.global_offset, entry.local_shape, strict=True))
        assert torch.equal(entry.data, whole[window])
        saved[window] += entry.replica_id in (0, (0, 0, 0))
        replicas[(entry.global_offset, entry.replica_id)] += 1
    assert (saved == 1).all()
    assert set(replicas.values()) == {1}  # no two processes call themselves the same copy of the same part


def test_only_placed_parameters_of_the_module_itself_are_entered(one_process):
    assert entries_of("column.A", one_process).keys() == {"layers.0.factor"}


def test_a_placement_is_a_value():
    assert Placement(expert_axis=0) == PLACEMENTS["experts.row.B"] and hash(Placement()) == hash(Placement())
