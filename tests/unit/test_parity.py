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


@pytest.mark.parametrize("number", [1, 2, 3, 8])
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


def test_micro_batches_differ_in_their_sources():
    """Else no layout would meet one in which an expert has no token."""
    _, size = parity.scaled_down(RUN, None)
    assert [batch.domains.tolist() for batch in parity.batches(size, 0, 0, 1)] == [[0, 0], [1, 1], [0, 0], [1, 1]]
    assert [batch.domains.tolist() for batch in parity.batches(size, 0, 1, 2)] == [[1, 1], [1, 1]]
