"""A worker of `mole_mega.training.parity` that records what a re-seed does: adapters of known weights; a step that
leaves them as they are and gives Adam its moments; the re-seeds; a checkpoint in the case's `run_dir`; and another such
step, which takes the optimizer's own copy of the weights into the model."""

from mole_mega.checkpoint.store import CheckpointStore, RunState, trainable_entries
from mole_mega.training import parity
from mole_mega.training.optimizer import build_optimizer, set_lr
from mole_mega.training.reseed import Reseed, reseed_expert
from mole_mega.training.step import Stepper
from mole_mega.training.trainer import build_model

# layers of both pipeline stages; from and to every expert-parallel rank
RESEEDS = (Reseed(7, 1, dead=3, busy=0, noise=0.1), Reseed(7, 2, dead=0, busy=3, noise=0.1))


def record(run, size, parallel):
    model = build_model(run, size, parallel)
    entries = trainable_entries(model)
    parity._fill_adapters(entries, run.adapter.alpha / run.adapter.rank)
    optimizer = build_optimizer(model, run.train)
    stepper = Stepper(run, model, optimizer, parallel, num_domains=2)
    parameters = dict(model.module.named_parameters())

    def step():
        set_lr(optimizer, 1, run.train)
        assert stepper.train_step(parity.batches(size, 0, parallel.dp_rank, parallel.dp_size)).applied

    def weights(moment):
        tensors = {name: parameters[name].detach() for name in entries}
        return {f"{moment}/{key}": tensor for key, tensor in parity._whole(entries, tensors, parallel).items()}

    step()
    result = weights("before")
    for reseed in RESEEDS:
        reseed_expert(reseed, model, optimizer, parallel.groups, run.train.seed)
    result |= weights("after")
    CheckpointStore(run, parallel).save(model, optimizer, RunState(step=1, base_hash="", applied_steps=1))
    step()
    result |= weights("later")
    return result if parallel.is_main else None


def main(arguments):
    parity.record = record
    return parity.main(arguments)
