"""Dropout under tensor parallelism: of an input that all ranks hold alike they drop the same, of one that is cut each
its own, and a recomputed layer drops what its first pass dropped, to the bit in every gradient."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import commands
import pytest
import torch
import torch.distributed as dist
from test_layouts import RUN, SIZE, TP
from test_mixture_layouts import LINEAR, MLPS, NORMED

from mole_mega.adapters import dropout
from mole_mega.platform import parallel as platform
from mole_mega.training.parity import make_base, record

ADAPTERS = {
    "lora": {"method": "lora"},
    "tokens": {},
    "weights": NORMED,
    "a router a linear": LINEAR,
    "whole MLPs": MLPS,
}


def main(arguments):
    """The worker."""
    folder, failures = Path(arguments[0]), []
    parallel = platform.initialize(TP, seed=0)
    make_base(replace(RUN, parallel=TP), SIZE, parallel, folder / "base")
    model = replace(RUN.model, base=str(folder / "base"))
    for name, changes in ADAPTERS.items():
        run = replace(RUN, model=model, parallel=TP, adapter=replace(RUN.adapter, dropout=0.3, **changes))
        found = {}
        for recompute in ("none", "full", "selective"):
            platform.seed_generators(7)
            with pytest.MonkeyPatch.context() as patch:
                seen = watch(patch, parallel.groups.tp)
                found[recompute] = record(replace(run, train=replace(run.train, recompute=recompute)), SIZE, parallel)
            if not (seen["whole, alike"] and seen["cut, each its own"] and len(seen) == 2):
                failures.append((name, recompute, dict(seen)))
        if parallel.is_main:
            plain = found.pop("none")
            for recompute, tensors in found.items():
                assert tensors.keys() == plain.keys() and any(key.startswith("gradient/") for key in plain)
                failures += [(name, recompute, key) for key in plain if not torch.equal(plain[key], tensors[key])]
    assert not failures, failures[:5]
    platform.shutdown()
    return 0


def watch(patch, group):
    """What ranks dropped, counted by kind of input and whether they dropped the same."""
    seen, drop = Counter(), dropout._drop

    def watched(x, probability, generator):
        dropped = drop(x, probability, generator)
        mask = (dropped == 0).detach().to(torch.uint8)
        masks = [torch.empty_like(mask) for _ in range(group.size())]
        dist.all_gather(masks, mask.contiguous(), group=group)
        kind = "whole" if generator == dropout.get_data_parallel_rng_tracker_name() else "cut"
        seen[f"{kind}, {'alike' if torch.equal(*masks) else 'each its own'}"] += 1
        return dropped

    patch.setattr(dropout, "_drop", watched)
    return seen


def test_ranks_drop_what_they_should_and_the_same_again(tmp_path):
    assert commands.launch(__name__, [str(tmp_path)], 2) == 0
