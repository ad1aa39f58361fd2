"""Every layout computes what one process computes: the same loss, gradients, gradient norm and weights (DESIGN 6.1).

All cases of one world size run in one launch. A case is recorded once; each test reads one comparison.
"""

import gc
import json
from dataclasses import replace
from pathlib import Path

import commands
import pytest
import torch

from mole_mega.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, SourceConfig, TrainConfig, validate
from mole_mega.models.llava import LLaVA
from mole_mega.platform import parallel as platform
from mole_mega.training import parity
from mole_mega.training.parity import GRADIENT_TOLERANCE, WEIGHT_TOLERANCE, Case, layout_name, scaled_down

TP, PP, EP, DP = ParallelConfig(tensor=2), ParallelConfig(pipeline=2), ParallelConfig(expert=2), ParallelConfig()
TP_EP, PP_EP, TP_PP = (
    ParallelConfig(tensor=2, expert=2),
    ParallelConfig(pipeline=2, expert=2),
    ParallelConfig(tensor=2, pipeline=2),
)
LAYOUTS = [(TP, 2), (PP, 2), (EP, 2), (DP, 2), (TP_EP, 4), (PP_EP, 4), (TP_PP, 4)]
GATES = ("none", "prob", "straight_through")

_RUN, SIZE = scaled_down(
    RunConfig(
        run_dir="unused",
        model=ModelConfig(base=""),
        train=TrainConfig(steps=1, weight_decay=0.01),
        data=DataConfig(sources=(SourceConfig(name="made", path="made"),)),
    ),
    None,
)
RUN = replace(_RUN, adapter=replace(_RUN.adapter, num_experts=4, z_loss_weight=0.001))


def case(layout, world, adapter=None, train=None, fp8=None):
    adapter, train, fp8 = adapter or {}, train or {}, fp8 or {}
    words = [layout_name(layout, world), *(f"{key}={value}" for key, value in (adapter | train | fp8).items())]
    run = replace(
        RUN,
        parallel=layout,
        adapter=replace(RUN.adapter, **adapter),
        train=replace(RUN.train, **train),
        fp8=replace(RUN.fp8, **fp8),
    )
    validate(run)
    return Case(", ".join(words), run, world)


CASES = [
    *(case(layout, world, {"gate": gate}) for gate in GATES for layout, world in LAYOUTS),
    *(case(layout, world, {"method": "lora"}) for layout, world in LAYOUTS if layout.expert == 1),
    # more ranks than experts' groups: experts cut and copied at once; a data-parallel rank without a single image
    case(EP, 4),
    case(TP, 4),
    case(ParallelConfig(expert=4), 4),
    *(case(layout, world, {"balance_scope": "model"}) for layout, world in [(PP, 2), (EP, 2), (TP_PP, 4)]),
    *(case(layout, world, train={"recompute": "full"}) for layout, world in [(TP, 2), (PP, 2), (PP_EP, 4)]),
    case(TP, 2, {"method": "lora"}, {"recompute": "full"}),
    *(case(layout, world, train={"recompute": "selective"}) for layout, world in [(TP, 2), (PP_EP, 4)]),
    *(case(layout, world, {"layers": (1, 2)}) for layout, world in [(TP, 2), (PP_EP, 4)]),
    # rounded to the same numbers, whichever part of a channel a rank holds
    *(case(layout, world, fp8={"store_base": True}) for layout, world in [(TP, 2), (EP, 2), (TP_PP, 4)]),
    case(TP, 2, {"method": "lora"}, {"recompute": "full"}, {"store_base": True}),
    # a stage without an expert, and one with nothing to train at all; one expert a rank
    case(PP, 2, {"layers": (1,)}),
    case(PP, 2, {"attention": False, "layers": (0, 1)}),
    case(TP_EP, 4, {"num_experts": 2, "router_bias": False}),
    case(TP, 2, {"attention": False}, {"projector": False}),
    # of two ranks that exchange tokens one has images, and before the first exchange nothing else is trained
    case(EP, 2, {"attention": False}),
    # last: Megatron-Core's distributed optimizer is never freed, nor are the threads of the groups that it knows
    *(
        case(layout, world, train={"distributed_optimizer": True})
        for layout, world in [(DP, 2), (EP, 2), (TP_EP, 4), (PP_EP, 4)]
    ),
    case(DP, 2, {"method": "lora"}, {"distributed_optimizer": True}),
]
SLOW_CASE = case(ParallelConfig(tensor=2, pipeline=2, expert=2), 8)


def record_all(cases):
    """{case name: comparison}, and {case name: the one-process record}."""
    references = {}
    compare = parity.compare

    def keep(one_case, reference, measured):
        references[one_case.name] = reference
        return compare(one_case, reference, measured)

    def launch(module, arguments, nproc):
        return commands.launch(__name__, arguments, nproc)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "compare", keep)
        patch.setattr(parity, "launch_worker", launch)
        comparisons = parity.verify(cases, SIZE)
    print(parity.table(comparisons))
    return {comparison.case.name: comparison for comparison in comparisons}, references


def main(arguments):
    """parity's worker, which also sees to it that each model goes with its case: one that stays keeps the threads of
    its groups, for which later cases wait."""
    cases = json.loads(Path(arguments[0]).read_text())
    leave_groups, kept = platform.leave_groups, 0

    def leave_and_look():
        nonlocal kept
        leave_groups()
        if not cases:
            return
        case = cases.pop(0)
        kept += case["run"]["train"]["distributed_optimizer"]  # Megatron-Core's holds itself
        living = sum(type(one) is LLaVA for one in gc.get_objects())
        assert living <= kept, f"{living} models live on after {case['name']}, not {kept}"

    platform.leave_groups = leave_and_look
    return parity.main(arguments)


@pytest.fixture(scope="module")
def recorded():
    return record_all(CASES)


def check(comparison):
    assert comparison.loss <= GRADIENT_TOLERANCE
    assert comparison.gradient <= GRADIENT_TOLERANCE, comparison.gradient_tensor
    assert comparison.weight <= WEIGHT_TOLERANCE, comparison.weight_tensor


@pytest.mark.parametrize("name", [c.name for c in CASES])
def test_layout_equals_one_process(recorded, name):
    check(recorded[0][name])


@pytest.mark.slow
def test_eight_processes_equal_one():
    comparisons, _ = record_all([SLOW_CASE])
    check(comparisons[SLOW_CASE.name])


def test_references_hold_a_gradient_for_every_trainable_tensor(recorded):
    comparisons, references = recorded
    attention, experts, router, projector = 8, 6, 2, 4
    for name, comparison in comparisons.items():
        adapter, train = comparison.case.run.adapter, comparison.case.run.train
        mlp = experts + (router if adapter.router_bias else 1) * (adapter.method == "mole")
        num_mlps = SIZE.language.num_layers if adapter.layers == "all" else len(adapter.layers)
        expected = SIZE.language.num_layers * attention * adapter.attention + num_mlps * mlp
        gradients = [tensor for key, tensor in references[name].items() if key.startswith("gradient/")]
        assert len(gradients) == comparison.num_tensors == expected + projector * train.projector, name
        assert all(tensor.isfinite().all() and tensor.any() for tensor in gradients), name


@pytest.mark.parametrize(
    "setting", ["gate=none", "gate=prob", "gate=straight_through", "balance_scope=model", "store_base=True"]
)
def test_a_setting_changes_what_is_computed(recorded, setting):
    default = recorded[1]["EP 4"]  # gate prob, scope layer
    changed = next(reference for name, reference in recorded[1].items() if setting in name)
    key = "gradient/language_model.decoder.layers.0.mlp.router.weight"
    is_equal = torch.equal(default[key], changed[key])
    assert is_equal == (setting == "gate=prob")
