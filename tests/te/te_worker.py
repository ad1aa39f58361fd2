"""A worker of `mole_mega.training.parity` whose Transformer Engine computes on the CPU (te_cpu_stand_in.py)."""

import te_cpu_stand_in

from mole_mega.training import parity


def main(arguments):
    te_cpu_stand_in.install()
    return parity.main(arguments)
