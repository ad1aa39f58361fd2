"""A worker of `mole_mega.training.parity` whose Transformer Engine computes on the CPU (te_cpu_stand_in.py)."""

import sys

import te_cpu_stand_in

from mole_mega.training import parity

if __name__ == "__main__":
    te_cpu_stand_in.install()
    sys.exit(parity.main())
