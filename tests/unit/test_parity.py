"""The runs that a proof of layouts makes."""

from dataclasses import replace

import pytest

from mole_mega.config import DataConfig, ModelConfig, RunConfig, SourceConfig, TrainConfig, validate
from mole_mega.training import parity

RUN = RunConfig(
    run_dir="unused",
    model=ModelConfig(base=""),
    train=TrainConfig(steps=1),
    data=DataConfig(sources=(SourceConfig(name="made", path="made"),)),
)


@pytest.mark.parametrize("number", [1, 2, 3, 8, 11])
def test_every_source_has_tokens_whose_expert_gets_a_gradient(alone, tmp_path, number):
    sources = tuple(SourceConfig(name=f"made {e}", path="made") for e in range(number))
    model = ModelConfig(base=str(tmp_path / "base"))
    run, size = parity.scaled_down(replace(RUN, model=model, data=DataConfig(sources=sources)), None)
    adapter = {"router_scope": "task", "gate": "none", "balance_weight": 0.0, "z_loss_weight": 0.0}
    run = replace(run, adapter=replace(run.adapter, num_experts=number, layers=(1,), **adapter))
    validate(run)
    parity.make_base(run, size, alone, tmp_path / "base")
    record = parity.record(run, size, alone)
    gradients = [tensor for key, tensor in record.items() if key.startswith("gradient/") and ".experts." in key]
    assert gradients and all(len(tensor) == number and tensor.flatten(1).any(1).all() for tensor in gradients)


def test_sources_are_mixed_in_micro_batches_and_on_ranks():
    """Micro-batches of one source and of two; and both on each rank: else an expert's tokens would all be its own
    rank's, and an exchange that loses others' would be equal."""
    _, size = parity.scaled_down(RUN, None)
    by_rank = [[set(batch.domains.tolist()) for batch in parity.batches(size, 0, rank, 2)] for rank in (0, 1)]
    for sets in by_rank:
        assert set.union(*sets) == {0, 1}
        assert {len(found) for found in sets} == {1, 2}
