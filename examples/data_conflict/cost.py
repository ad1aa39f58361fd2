"""How long a training step takes, MoLE's and plain LoRA's: real steps of the product's Trainer, taken in turn.

Run as a program, in a process of its own: `cost.py REQUEST.json`, so that nothing else lies in memory; prints JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import torch

from mole_mega import config
from mole_mega.errors import quiet_libraries


def measure(trees: dict[str, dict], blocks: int, steps: int) -> dict[str, list[float]]:
    """{name: median step seconds of each block}. In a block every run takes `steps` steps, the runs one after another
    step by step, so that whatever else the machine does falls on all of them alike."""
    from mole_mega.platform import parallel as platform
    from mole_mega.training.trainer import Trainer

    torch.set_num_threads(1)
    trainers = {}
    for name, tree in trees.items():
        run = config.from_dict(tree)
        parallel = platform.initialize(run.parallel, run.train.seed)
        trainers[name] = Trainer(run, parallel, sys.stderr)
    medians: dict[str, list[float]] = {name: [] for name in trees}
    step = 0
    for block in range(-1, blocks):  # the first only warms up
        seconds: dict[str, list[float]] = {name: [] for name in trees}
        for _ in range(steps if block >= 0 else 2):
            for name, trainer in trainers.items():
                train = trainer.run.train
                batches = trainer.loader.micro_batches(step, train.global_batch_size, train.micro_batch_size, 0, 1)
                started = time.perf_counter()
                trainer.stepper.train_step(batches)
                seconds[name].append(time.perf_counter() - started)
            step += 1
        if block >= 0:
            for name, values in seconds.items():
                medians[name].append(statistics.median(values))
    return medians


if __name__ == "__main__":
    quiet_libraries()
    request = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps(measure(request["runs"], request["blocks"], request["steps"])))
