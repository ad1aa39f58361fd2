"""A dead expert becomes the same copy of a busy one in every layout, in the model, in the optimizer's own copy of the
weights and in a checkpoint; Adam's moments of it start anew, and no other number changes."""

import json
from dataclasses import replace

import pytest
import reseed_worker
import torch
from safetensors.torch import load_file
from test_layouts import DP, EP, RUN, SIZE, TP, TP_EP

from mole_mega import config as run_config
from mole_mega.checkpoint.tensors import StoredTensors
from mole_mega.config import ParallelConfig, validate
from mole_mega.platform.launch import launch
from mole_mega.training.parity import layout_name

ALONE = ParallelConfig()
PRECISIONS = ("fp32", "bf16")
LAYOUTS = [(TP, 2, False), (EP, 2, True), (DP, 2, True), (TP_EP, 4, False), (ParallelConfig(pipeline=2, expert=2), 4, True)]  # fmt: skip
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
    for precision in PRECISIONS:
        for layout, world, distributed in [(ALONE, 1, False), *LAYOUTS]:
            case = name(layout, world, distributed, precision)
            # lr 0: a step leaves the weights as they are
            train = replace(RUN.train, lr=0.0, precision=precision, distributed_optimizer=distributed)
            model = replace(RUN.model, base=str(folder / f"base_{precision}"))
            run = replace(RUN, run_dir=str(folder / case), model=model, train=train, parallel=layout)
            validate(run)
            trees.setdefault(world, []).append({"name": case, "run": run_config.to_dict(run)})
    for world, group in sorted(trees.items()):
        listing = folder / f"cases_{world}.json"
        listing.write_text(json.dumps(group))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(__file__.rpartition("/")[0]), prepend=":")
            assert launch("reseed_worker", [str(listing)], world) == 0
    return {
        tree["name"]: (load_file(folder / f"{tree['name']}.st"), folder / tree["name"] / "checkpoints/step_1")
        for group in trees.values()
        for tree in group
    }


@pytest.mark.parametrize("precision", PRECISIONS)
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


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("layout", "world", "distributed"), LAYOUTS)
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


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("layout", "world", "distributed"), [(ALONE, 1, False), *LAYOUTS])
def test_adams_moments_of_the_copy_start_anew_and_those_of_no_other(records, layout, world, distributed, precision):
    record, checkpoint = records[name(layout, world, distributed, precision)]
    stored = StoredTensors(checkpoint)
    for key in RESEEDED:
        (reseed,) = [r for r in reseed_worker.RESEEDS if f".layers.{r.layer}." in key]
        assert torch.equal(stored.read(key), record[f"after/{key}"])
        for kind in ("exp_avg", "exp_avg_sq"):
            (found,) = [entry for entry in stored if entry.startswith("optimizer") and kind in entry.split(".") and entry.endswith(key)]  # fmt: skip
            moments = stored.read(found)
            assert not moments[reseed.dead].any(), key
            assert moments.any(), key
            others = [expert for expert in range(4) if expert != reseed.dead]
            assert moments[others].flatten(1).any(dim=1).all() if moments.ndim > 1 else moments[others].all(), key
