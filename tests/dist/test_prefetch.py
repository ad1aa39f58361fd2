"""A bank gathered while the block before it computes is the bank that its own block would have gathered: the same
losses, gradients and weights, bit for bit, also where layers are recomputed and over the stages of a pipeline."""

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import commands
import pytest
import torch
from test_layouts import PP_EP, RUN, SIZE

from mole_mega.adapters import mixture
from mole_mega.platform import parallel as platform
from mole_mega.training.parity import make_base, record

WORLD = 4
TOP_2 = replace(RUN, parallel=PP_EP, adapter=replace(RUN.adapter, top_k=2, expert_parallel="weights"))
RUNS = {recompute: replace(TOP_2, train=replace(RUN.train, recompute=recompute)) for recompute in ("none", "full")}


class Watched(mixture.BankOnItsWay):
    """Notes which bank is sent for and which arrives."""

    seen: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, factors, group):
        super().__init__(factors, group)
        self.seen.append(("sent", id(factors[0])))

    def arrive(self):
        self.seen.append(("came", id(self._factors[0])))
        return super().arrive()


def main(arguments):
    """The worker."""
    folder = Path(arguments[0])
    parallel = platform.initialize(PP_EP, seed=0)
    make_base(TOP_2, SIZE, parallel, folder / "base")
    mixture.BankOnItsWay = Watched
    for name, run in RUNS.items():
        run = replace(run, model=replace(run.model, base=str(folder / "base")))
        ahead = record(run, SIZE, parallel)
        check_order(Watched.seen, recomputed=name == "full")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mixture, "prefetch_along", lambda _: None)
            plain = record(run, SIZE, parallel)
        assert all(mine == ("sent", then[1]) for mine, then in zip(Watched.seen[::2], Watched.seen[1::2], strict=True))
        Watched.seen.clear()
        if parallel.is_main:
            assert ahead.keys() == plain.keys() and any(key.startswith("gradient/") for key in ahead)
            assert all(torch.equal(ahead[key], tensor) for key, tensor in plain.items()), name
    platform.shutdown()
    return 0


def check_order(seen, *, recomputed):
    """Two layers a stage: of each pass, the first is sent for and comes, the second is sent for, and then comes."""
    blocks = list(dict.fromkeys(block for _, block in seen))
    assert len(blocks) == 2 and len(seen) % 4 == 0
    passes = [seen[start : start + 4] for start in range(0, len(seen), 4)]
    for first, *rest in passes:
        other = next(block for block in blocks if block != first[1])
        assert [first, *rest] == [("sent", first[1]), ("came", first[1]), ("sent", other), ("came", other)]
    # recomputed layers run from the last one back
    assert {entries[0][1] for entries in passes} == set(blocks if recomputed else blocks[:1])
    seen.clear()


def test_prefetched_banks_change_no_bit(tmp_path):
    assert commands.launch(__name__, [str(tmp_path)], WORLD) == 0
