"""A dead expert becomes the same copy of a busy one in every layout, in the model, in the optimizer's own copy of the
weights and in a checkpoint; Adam's moments of it start anew, and no other number changes."""

import json
from dataclasses import replace

import commands
import pytest
import reseed_worker
import torch
from safetensors.torch import load_file

from mole_mega import config as run_config
from mole_mega.checkpoint.tensors import StoredTensors
from mole_mega.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, SourceConfig, TrainConfig, validate
from mole_mega.training.parity import layout_name, scaled_down

_RUN, SIZE = scaled_down(
    RunConfig(
        run_dir="unused",
        model=ModelConfig(base=""),
        # lr 0: a step leaves the weights as they are
        train=TrainConfig(steps=1, lr=0.0),
        data=DataConfig(sources=(SourceConfig(name="made", path="made"),)),
    ),
    None,
)
RUN = replace(_RUN, adapter=replace(_RUN.adapter, num_experts=4, z_loss_weight=0.001))
ALONE = ParallelConfig()
# (layout, processes, distributed optimizer, precision)
REFERENCES = [(ALONE, 1, False, "fp32"), (ALONE, 1, False, "bf16")]
LAYOUTS = [
    (ParallelConfig(tensor=2), 2, False, "bf16"),
    (ParallelConfig(expert=2), 2, True, "fp32"),
    (ALONE, 2, True, "bf16"),
    (ParallelConfig(tensor=2, expert=2), 4, False, "fp32"),
    (ParallelConfig(pipeline=2, expert=2), 4, True, "bf16"),
]
every_case = pytest.mark.parametrize(("layout", "world", "distributed", "precision"), REFERENCES + LAYOUTS)
FACTORS = [f"experts.lora_{projection}_{factor}" for projection in ("gate", "up", "down") for factor in "AB"]
RESEEDED = [f"language_model.decoder.layers.{r.layer}.mlp.{name}" for r in reseed_worker.RESEEDS
            for name in (*FACTORS, "router.weight", "router.bias")]  # fmt: skip


def name(layout, world, distributed, precision):
    return f"{layout_name(layout, world)}, {precision}" + ", distributed optimizer" * distributed


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """{case name: (its record, its checkpoint)}; the one-process cases among them."""
    folder = tmp_path_factory.mktemp("reseed")
    (folder / "size.json").write_text(SIZE.to_json())
    trees: dict[int, list] = {}
    for layout, world, distributed, precision in REFERENCES + LAYOUTS:
        case = name(layout, world, distributed, precision)
        train = replace(RUN.train, precision=precision, distributed_optimizer=distributed)
        model = replace(RUN.model, base=str(folder / f"base_{precision}"))
        run = replace(RUN, run_dir=str(folder / case), model=model, train=train, parallel=layout)
        validate(run)
        trees.setdefault(world, []).append({"name": case, "run": run_config.to_dict(run)})
    for world, group in sorted(trees.items()):
        listing = folder / f"cases_{world}.json"
        listing.write_text(json.dumps(group))
        code, text = commands.run([listing], folder / "log", world, module="reseed_worker")
        assert code == 0, text
    return {
        tree["name"]: (load_file(folder / f"{tree['name']}.st"), folder / tree["name"] / "checkpoints/step_1")
        for group in trees.values()
        for tree in group
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_dead_expert_is_a_noisy_copy_and_nothing_else_changes(records, precision):
    record, _ = records[name(ALONE, 1, False, precision)]
    tensors = [key.removeprefix("before/") for key in record if key.startswith("before/")]
    assert set(RESEEDED) < set(tensors)
    for key in tensors:
        before, after = record[f"before/{key}"].float(), record[f"after/{key}"].float()
        if key not in RESEEDED:
            assert torch.equal(after, before), key
            continue
        (reseed,) = [r for r in reseed_worker.RESEEDS if f".layers.{r.layer}." in key]
        others = [expert for expert in range(4) if expert != reseed.dead]
        assert torch.equal(after[others], before[others]), key
        if key.endswith("bias"):
            assert torch.equal(after[reseed.dead], before[reseed.busy])
        else:
            noise = (after[reseed.dead] / before[reseed.busy] - 1) / reseed.noise
            assert abs(float(noise.mean())) < 0.2 and 0.8 < float(noise.std()) < 1.2, key


def test_each_tensor_is_copied_with_noise_of_its_own(records):
    record, _ = records[name(ALONE, 1, False, "fp32")]
    noises = {}
    for key in RESEEDED:
        (reseed,) = [r for r in reseed_worker.RESEEDS if f".layers.{r.layer}." in key]
        if "lora" in key:
            ratio = record[f"after/{key}"][reseed.dead] / record[f"before/{key}"][reseed.busy]
            noises[key] = ratio.flatten()[:20]
    rows = torch.stack(list(noises.values()))
    assert torch.cdist(rows, rows).fill_diagonal_(1.0).min() > 0.05


@every_case
def test_every_layout_copies_the_same_bits_and_keeps_them(records, layout, world, distributed, precision):
    expected, _ = records[name(ALONE, 1, False, precision)]
    measured, _ = records[name(layout, world, distributed, precision)]
    assert measured.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(measured[key], tensor), key
    for key in measured:
        moment, _, tensor = key.partition("/")
        if moment == "later":
            assert torch.equal(measured[key], measured[f"after/{tensor}"]), key


@every_case
def test_adams_moments_of_the_copy_start_anew_and_those_of_no_other(records, layout, world, distributed, precision):
    record, checkpoint = records[name(layout, world, distributed, precision)]
    stored = StoredTensors(checkpoint)
    for key in RESEEDED:
        (reseed,) = [r for r in reseed_worker.RESEEDS if f".layers.{r.layer}." in key]
        assert torch.equal(stored.read(key), record[f"after/{key}"])
        for kind in ("exp_avg", "exp_avg_sq"):
            names = [name for name in stored if name.startswith("optimizer") and name.endswith(key)]
            (found,) = [name for name in names if kind in name.split(".")]
            moments = stored.read(found)
            assert not moments[reseed.dead].any(), key
            assert moments.any(), key
            others = [expert for expert in range(4) if expert != reseed.dead]
            assert moments[others].flatten(1).any(dim=1).all() if moments.ndim > 1 else moments[others].all(), key
