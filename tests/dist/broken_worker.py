"""A worker of `mole_mega.training.parity` that does one thing wrong, which the case names in its `run_dir`: it gives
one mark of every adapter tensor a wrong value, leaves the gradients of experts that were gathered with who computed
them, or has methods that forget what is summed over ranks."""

import sys

import torch.distributed as dist

from mole_mega.adapters import pairs, sharding
from mole_mega.adapters.methods import METHODS
from mole_mega.training import parity

WRONG = {
    # the gradients of what tensor-parallel ranks hold in full are not summed
    "sequence_parallel": False,
    # the experts' gradients are summed with those of other experts
    "allreduce": True,
    # the gradient's norm leaves out all but one rank's part
    "tensor_model_parallel": False,
}
_place, _record, _reduce_scatter = sharding.place, parity.record, dist.reduce_scatter_single
_USERS = [pairs, *(sys.modules[method.__module__] for method in METHODS.values())]
_reduce_together = pairs.reduce_together


def take_own(output, input, group):
    output.copy_(input.view(group.size(), -1)[group.rank()])


def keep_apart(tensors, *_):
    return list(tensors)


def record(run, size, parallel):
    def place(parameter, placement):
        _place(parameter, placement)
        if run.run_dir in WRONG:
            setattr(parameter, run.run_dir, WRONG[run.run_dir])

    sharding.place = place
    for module in _USERS:
        if hasattr(module, "reduce_together"):
            module.reduce_together = keep_apart if run.run_dir == "forgets" else _reduce_together
    dist.reduce_scatter_single = take_own if run.run_dir == "gathered" else _reduce_scatter
    return _record(run, size, parallel)


def main(arguments):
    parity.record = record
    return parity.main(arguments)
