"""A worker of `mole_mega.training.parity` that gives one mark of every adapter tensor a wrong value: the mark that the
case names in its `run_dir`; or, of a case that names none, whose methods forget what is summed over ranks."""

import sys

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
_place, _record = sharding.place, parity.record
_USERS = [pairs, *(sys.modules[method.__module__] for method in METHODS.values())]
_reduce_together = pairs.reduce_together


def record(run, size, parallel):
    def place(parameter, placement):
        _place(parameter, placement)
        if run.run_dir in WRONG:
            setattr(parameter, run.run_dir, WRONG[run.run_dir])

    sharding.place = place
    for module in _USERS:
        if hasattr(module, "reduce_together"):
            forgets = run.run_dir == "forgets"
            module.reduce_together = (lambda tensors, *_: list(tensors)) if forgets else _reduce_together
    return _record(run, size, parallel)


if __name__ == "__main__":
    parity.record = record
    sys.exit(parity.main())
