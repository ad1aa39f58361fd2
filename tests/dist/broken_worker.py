"""A worker of `mole_mega.training.parity` that gives one mark of every adapter tensor a wrong value: the mark that the
case names in its `run_dir`."""

import sys

from mole_mega.adapters import sharding
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


def record(run, size, parallel):
    def place(parameter, placement):
        _place(parameter, placement)
        setattr(parameter, run.run_dir, WRONG[run.run_dir])

    sharding.place = place
    return _record(run, size, parallel)


if __name__ == "__main__":
    parity.record = record
    sys.exit(parity.main())
