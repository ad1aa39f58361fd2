"""With `delayed` scaling a run that is split equals the straight one: the scales, which follow from earlier passes, are
in the checkpoint."""

import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import te_delayed
import torch
import torch.distributed as dist
from test_wiring import RUN, SIZE

from mole_mega.checkpoint.base import write_base
from mole_mega.checkpoint.store import CheckpointStore, RunState
from mole_mega.checkpoint.stream import LazyTensor
from mole_mega.checkpoint.tensors import StoredTensors
from mole_mega.config import DataConfig, Fp8Config, MonitorConfig, SourceConfig
from mole_mega.errors import ExitCode
from mole_mega.models.backend import on_local_backend
from mole_mega.models.llava import LLaVA
from mole_mega.platform.scaling import make_scales, remembers_scales, scale_entries
from mole_mega.training import parity, trainer
from mole_mega.training.optimizer import build_optimizer, set_lr
from mole_mega.training.parity import batches
from mole_mega.training.step import Stepper
from mole_mega.training.trainer import wrap

EXAMPLE_BASE = Path(__file__).parents[2] / "examples" / "tiny_cpu" / "base_hf"
STEPS, SPLIT = 4, 2
DELAYED = replace(RUN, train=replace(RUN.train, precision="fp8", steps=STEPS), fp8=Fp8Config(recipe="delayed"))


class Process:
    """One that trains, and knows what it was told alone."""

    def __init__(self, run, alone):
        te_delayed.forget()
        self.run, self.group = run, alone.groups.tp_dp_cp
        model = LLaVA(run, SIZE, alone)
        generator = torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            if "router.score_bias" not in name:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
        self.model = wrap(model, run)
        self.optimizer = build_optimizer(self.model, run.train)
        self.stepper = Stepper(run, self.model, self.optimizer, alone, num_domains=2)
        self.store = CheckpointStore(run, alone)

    @property
    def decoder(self):
        return self.model.module.language_model.decoder

    def train(self, steps) -> list[float]:
        losses = []
        for step in steps:
            set_lr(self.optimizer, step + 1, self.run.train)
            losses.append(self.stepper.train_step(batches(SIZE, step, 0, 1, 16)).loss)
        return losses

    def validate(self) -> None:
        self.stepper.evaluate(batches(SIZE, 99, 0, 1, 16))

    def save(self):
        state = RunState(step=SPLIT, base_hash="", applied_steps=SPLIT)
        return self.store.save(self.model, self.optimizer, state, scale_entries(self.decoder, self.group))

    def load(self, path, *, with_scales=True) -> None:
        if with_scales:
            make_scales(self.decoder)
        more = scale_entries(self.decoder, self.group)
        self.stepper.applied_steps = self.store.load(path, self.model, self.optimizer, more).applied_steps

    def remembered(self) -> dict[str, torch.Tensor]:
        weights = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
        return weights | {key: entry.data.clone() for key, entry in scale_entries(self.decoder, self.group).items()}


@pytest.fixture(scope="module")
def runs(alone, tmp_path_factory):
    """(what the straight run remembers, a function that ends a split one)."""
    run = replace(DELAYED, run_dir=str(tmp_path_factory.mktemp("run")))
    with te_delayed.rounding():
        straight = Process(run, alone)
        straight.train(range(SPLIT))
        straight.validate()
        path = straight.save()
        losses = straight.train(range(SPLIT, STEPS))

        def split(**how) -> tuple[list[float], dict[str, torch.Tensor]]:
            later = Process(run, alone)
            later.load(path, **how)
            return later.train(range(SPLIT, STEPS)), later.remembered()

        yield (losses, straight.remembered()), split


def test_a_split_run_ends_as_the_straight_one(runs):
    (losses, expected), split = runs
    found_losses, found = split()
    assert found_losses == losses and found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_without_the_scales_it_would_not(runs):
    (losses, _), split = runs
    assert split(with_scales=False)[0] != losses


def test_every_frozen_linear_of_the_decoder_has_scales_that_its_passes_set(runs):
    (_, expected), _ = runs
    layers, parts = SIZE.language.num_layers, 4
    scales = {name: tensor for name, tensor in expected.items() if name.endswith(".scale")}
    assert len(scales) == layers * parts * 2
    assert "fp8_scaling.layers.3.mlp.experts.linear_fc2.backward.scale" in scales
    for name, scale in scales.items():
        used = 2 if ".forward." in name else 1  # input and weight; gradient
        assert (scale[:used] != 1).all(), name


def test_maxima_of_a_pass_without_gradients_are_in_the_checkpoint(alone):
    """They are in the next step's scales."""
    with te_delayed.rounding():
        process = Process(DELAYED, alone)
        process.train(range(1))
        process.validate()
        entries = scale_entries(process.decoder, process.group)
        assert all(e.data[0, 0] > 0 for key, e in entries.items() if key.endswith("forward.largest"))


def test_ranks_agree_on_the_maxima_that_are_saved(alone, monkeypatch):
    with te_delayed.rounding():
        process = Process(DELAYED, alone)
        process.train(range(1))
        process.validate()
        mine = {key: entry.data.clone() for key, entry in scale_entries(process.decoder, process.group).items()}

        def with_a_rank_that_saw_twice_as_much(tensor, op, group):
            assert op == dist.ReduceOp.MAX and group is process.group
            tensor.mul_(2)

        monkeypatch.setattr(dist, "all_reduce", with_a_rank_that_saw_twice_as_much)
        for key, entry in scale_entries(process.decoder, process.group).items():
            assert torch.equal(entry.data, mine[key] * (2 if key.endswith(".largest") else 1)), key


def test_only_delayed_scaling_remembers(alone):
    assert remembers_scales(DELAYED) and not remembers_scales(RUN)
    assert not remembers_scales(replace(DELAYED, fp8=Fp8Config(recipe="tensorwise")))
    assert scale_entries(LLaVA(DELAYED, SIZE, alone).language_model.decoder, alone.groups.tp_dp_cp) == {}


def stored(base: Path) -> dict[str, LazyTensor]:
    tensors = StoredTensors(base)
    return {name: LazyTensor(tensors.shape(name), tensors.dtype(name), partial(tensors.read, name)) for name in tensors}


def test_a_run_that_is_started_again_goes_on_with_its_scales(alone, tmp_path, monkeypatch):
    """Through the trainer, its data and its checkpoints."""
    size = replace(SIZE, language=replace(SIZE.language, vocab_size=512))
    parity.make_base(on_local_backend(DELAYED), size, alone, tmp_path / "bare")
    write_base(size, stored(tmp_path / "bare"), tmp_path / "base", EXAMPLE_BASE.glob("*.json"))
    talk = [{"from": "human", "value": "what is this?"}, {"from": "gpt", "value": "a photograph"}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": n, "conversations": talk * (1 + n % 3)} for n in range(9)]))
    monkeypatch.setattr(trainer, "check_machine", lambda run: None)

    def train(name, steps) -> list[float]:
        run = replace(
            DELAYED,
            run_dir=str(tmp_path / name),
            model=replace(DELAYED.model, base=str(tmp_path / "base")),
            data=DataConfig(sources=(SourceConfig(name="made", path=str(tmp_path / "data.json")),), max_length=96),
            train=replace(DELAYED.train, steps=steps, schedule_steps=STEPS, global_batch_size=2, micro_batch_size=2),
            monitor=MonitorConfig(tensorboard=False),
        )
        te_delayed.forget()
        assert trainer.Trainer(run, alone, out=io.StringIO()).train() == ExitCode.DONE
        return [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    with te_delayed.rounding():
        straight = train("straight", STEPS)
        train("split", SPLIT)
        assert train("split", STEPS) == straight
