"""What a path names is told by what it holds, and the model is built of it without rounding."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_convert_import import build_ours, save_hf
from trained_llava import train

from mole_mega.checkpoint import base as bases
from mole_mega.checkpoint.tensors import StoredTensors
from mole_mega.checkpoint.trained import build_trained, find_trained
from mole_mega.config import AdapterConfig, ConfigError, ParallelConfig
from mole_mega.convert.hf_import import import_hf
from mole_mega.convert.peft import export_peft
from mole_mega.convert.peft_import import peft_to_megatron

MOLE = AdapterConfig(num_experts=2, rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory, alone) -> Path:
    folder = tmp_path_factory.mktemp("base")
    import_hf(save_hf(folder / "hf", dtype=torch.bfloat16), folder / "base")
    return folder / "base"


@pytest.fixture(scope="module")
def other_base(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    import_hf(save_hf(folder / "hf", "tied"), folder / "base")
    return folder / "base"


@pytest.fixture(scope="module")
def run(base, alone, tmp_path_factory) -> Path:
    """A run directory with step 2, step 10, and a step 11 that was not written to its end."""
    folder = tmp_path_factory.mktemp("run") / "run"
    for name in ("step_2", "step_10"):
        train(base, folder / "checkpoints" / name, alone, MOLE)
    shutil.copytree(folder / "checkpoints" / "step_10", folder / "checkpoints" / ".step_11.incomplete")
    return folder


@pytest.fixture(scope="module")
def converted(run, base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    export_peft(find_trained(run), folder / "peft")
    peft_to_megatron([folder / "peft" / "expert_1"], base, folder / "start")
    return folder / "start"


# ---- found


def test_a_base_is_one_without_adapters(base):
    trained = find_trained(base)
    assert (trained.base, trained.step, trained.adapter) == (base, None, None)
    assert trained.size == bases.read_size(base)


def test_a_run_directory_is_its_newest_complete_step(run, base):
    trained = find_trained(run)
    assert (trained.base, trained.step, trained.adapter) == (base, run / "checkpoints" / "step_10", MOLE)


def test_no_older_step_stands_in_for_the_one_that_latest_names(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "checkpoints" / "latest").write_text("step_10\n")
    assert find_trained(copy).step == copy / "checkpoints" / "step_10"
    (copy / "checkpoints" / "step_10" / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"step_10 is not a complete checkpoint, yet .*latest names it"):
        find_trained(copy)


def test_a_step_is_itself(run, base):
    step = run / "checkpoints" / "step_2"
    trained = find_trained(step)
    assert (trained.base, trained.step, trained.adapter) == (base, step, MOLE)


def test_converted_adapters_are_found_with_their_base(converted, base):
    trained = find_trained(converted, base)
    assert (trained.base, trained.step) == (base, converted)
    assert (trained.adapter.method, trained.adapter.rank, trained.adapter.alpha) == ("lora", 4, 8.0)
    assert trained.run.train.projector


def test_a_base_that_was_moved_is_found_where_it_is_said_to_be(base, alone, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    trained, _ = train(tmp_path / "base", tmp_path / "step_1", alone, MOLE)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="which is not there; say where it is with --base"):
        find_trained(trained.step)
    again = find_trained(trained.step, tmp_path / "moved")
    assert again.base == tmp_path / "moved" and again.run.model.base == str(tmp_path / "moved")
    assert again.size == trained.size


# ---- refused


def test_another_base_than_the_runs_is_refused(run, other_base):
    with pytest.raises(ConfigError, match="was trained on a base with hash") as caught:
        find_trained(run, other_base)
    assert json.loads((run / "checkpoints" / "step_10" / "state.json").read_text())["base_hash"] in str(caught.value)


def test_a_base_takes_no_other_base(base, other_base):
    with pytest.raises(ConfigError, match="is a base itself"):
        find_trained(base, other_base)


def test_converted_adapters_without_their_base_are_refused(converted):
    with pytest.raises(ConfigError, match="without the base that they are of; say where it is with --base"):
        find_trained(converted)


@pytest.mark.parametrize("kind", ["nowhere", "empty", "no complete step"])
def test_a_path_that_names_nothing_is_refused(kind, run, tmp_path):
    if kind != "nowhere":
        (tmp_path / kind).mkdir()
    if kind == "no complete step":
        left = run / "checkpoints" / ".step_11.incomplete"
        shutil.copytree(left, tmp_path / kind / "checkpoints" / left.name)
    with pytest.raises(ConfigError, match=r"is no base .*, no run with a complete checkpoint and no step") as caught:
        find_trained(tmp_path / kind)
    assert "\n" not in str(caught.value)


# ---- built


def dtypes(model) -> dict[torch.dtype, set[str]]:
    found: dict[torch.dtype, set[str]] = {}
    for name, parameter in model.named_parameters():
        found.setdefault(parameter.dtype, set()).add(name)
    return found


def test_as_stored_a_base_keeps_its_dtypes_and_bits(base, alone):
    model = build_trained(find_trained(base), alone, ParallelConfig(), "stored")
    stored = StoredTensors(base)
    assert dtypes(model).keys() == {torch.bfloat16}
    assert all(torch.equal(parameter, stored.read(name)) for name, parameter in model.named_parameters())
    assert not model.training


def test_as_stored_a_run_rounds_nothing_that_was_trained(base, alone, tmp_path):
    """The projector too, which stands in the base in bf16."""
    trained, ours = train(base, tmp_path / "step_1", alone, MOLE)
    model = build_trained(trained, alone, ParallelConfig(), "stored")
    expected = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert sum(name.startswith("vision_projection.") for name in expected) == 4
    assert dtypes(model) == {
        torch.float32: set(expected),
        torch.bfloat16: {name for name, _ in ours.named_parameters()} - set(expected),
    }
    got = dict(model.named_parameters())
    for name, parameter in expected.items():
        assert torch.equal(got[name], parameter), name
        assert not torch.equal(parameter, parameter.bfloat16().float()), name


def test_a_projector_that_was_not_trained_is_the_bases(base, alone, tmp_path):
    trained, _ = train(base, tmp_path / "step_1", alone, MOLE, projector=False)
    model, stored = build_trained(trained, alone, ParallelConfig(), "stored"), StoredTensors(base)
    projector = {n: p for n, p in model.named_parameters() if n.startswith("vision_projection.")}
    assert len(projector) == 4
    for name, parameter in projector.items():
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, stored.read(name))


@pytest.mark.parametrize(
    ("trained_in", "asked", "expected"),
    [("fp32", None, torch.float32), ("bf16", None, torch.bfloat16), ("bf16", "fp32", torch.float32)],
)
def test_the_precision_is_the_runs_unless_another_is_asked_for(trained_in, asked, expected, base, alone, tmp_path):
    trained, _ = train(base, tmp_path / "step_1", alone, MOLE, precision=trained_in)
    model = build_trained(trained, alone, ParallelConfig(), asked)
    found = dtypes(model)
    assert found.keys() - {torch.float32} == {expected} - {torch.float32}
    assert all(".router." in name for name in found[torch.float32] if expected != torch.float32)


def test_converted_adapters_are_loaded_and_what_they_lack_starts_afresh(converted, base, alone):
    trained = find_trained(converted, base)
    model, stored = build_trained(trained, alone, ParallelConfig(), "stored"), StoredTensors(converted)
    state = dict(model.named_parameters())
    trainable = {name for name, parameter in state.items() if parameter.requires_grad}
    assert trainable == set(stored) and len(trainable) == 2 * 7 * 2 + 4
    assert all(torch.equal(state[name], stored.read(name)) for name in stored)


def test_a_base_is_built_without_adapters(base, alone):
    model = build_trained(find_trained(base), alone, ParallelConfig())
    assert {name for name, _ in model.named_parameters()} == {
        name for name, _ in build_ours(bases.read_size(base), alone).named_parameters()
    }


def test_what_was_trained_with_transformer_engine_is_built_without_it(run, alone):
    """Evaluation, conversion and answers run on any hardware."""
    trained = find_trained(run)
    asked = trained.run
    with_te = replace(
        asked,
        model=replace(asked.model, backend="transformer_engine"),
        train=replace(asked.train, precision="fp8"),
        fp8=replace(asked.fp8, store_base=True),
    )
    weights = dict(build_trained(trained, alone, ParallelConfig(), "bf16").named_parameters())
    built = build_trained(replace(trained, run=with_te), alone, ParallelConfig())
    for name, weight in built.named_parameters():
        assert torch.equal(weight, weights[name]), name
