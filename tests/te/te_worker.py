"""A worker of `mole_mega.training.parity` whose Transformer Engine computes on the CPU (te_cpu_stand_in.py)."""

import sys

import te_cpu_stand_in

from mole_mega.training import parity, trainer

if __name__ == "__main__":
    te_cpu_stand_in.install()
    trainer.check_machine = lambda run: None  # it would ask for a GPU
    sys.exit(parity.main())
