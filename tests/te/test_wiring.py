"""The whole LLaVA of Transformer Engine's modules, computed by stand-ins: losses, gradients and weights are those of
the local backend on one process, in every layout. What is proved is our wiring: who gathers a sequence, who adds a
bias, whose output is a pair, which norm a linear holds."""

from dataclasses import replace
from pathlib import Path

import pytest

from mole_mega.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, SourceConfig, TrainConfig, validate
from mole_mega.training import parity
from mole_mega.training.parity import GRADIENT_TOLERANCE, WEIGHT_TOLERANCE, Case, layout_name, scaled_down

_RUN, SIZE = scaled_down(
    RunConfig(
        run_dir="unused", model=ModelConfig(base=""), train=TrainConfig(steps=1, weight_decay=0.01),
        data=DataConfig(sources=(SourceConfig(name="made", path="made"),)),
    ),
    None,
)  # fmt: skip
RUN = replace(
    _RUN, model=replace(_RUN.model, backend="transformer_engine"), adapter=replace(_RUN.adapter, num_experts=4)
)
ONE, TP, EP = ParallelConfig(), ParallelConfig(tensor=2), ParallelConfig(expert=2)
CP, CP_EP = ParallelConfig(context=2), ParallelConfig(context=2, expert=2)


def case(layout: ParallelConfig, world: int, adapter: dict | None = None) -> Case:
    adapter = adapter or {}
    run = replace(RUN, parallel=layout, adapter=replace(RUN.adapter, **adapter))
    validate(run)
    words = (f"{key}={value}" for key, value in adapter.items())
    return Case(", ".join([layout_name(layout, world), *words]), run, world)


CASES = [
    *(case(layout, 1 if layout == ONE else 2) for layout in (ONE, TP, EP)),
    # Transformer Engine's own gathers around plain linears, and norms that linears hold
    case(TP, 2, {"layers": (1, 2), "attention": False}),
    # the sequence over two ranks; experts over them too
    case(CP, 2),
    case(CP_EP, 2),
    # each part of a sequence cut again
    case(ParallelConfig(tensor=2, context=2), 4),
]


@pytest.fixture(scope="module")
def comparisons():
    launch = parity.launch_worker
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
        patch.setattr(parity, "launch_worker", lambda module, arguments, nproc: launch("te_worker", arguments, nproc))
        return {c.case.name: c for c in parity.verify(CASES, SIZE)}


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_transformer_engines_modules_train_as_the_local_ones(comparisons, name):
    comparison = comparisons[name]
    assert comparison.num_tensors > 0
    assert comparison.loss <= GRADIENT_TOLERANCE
    assert comparison.gradient <= GRADIENT_TOLERANCE, comparison.gradient_tensor
    assert comparison.weight <= WEIGHT_TOLERANCE, comparison.weight_tensor
