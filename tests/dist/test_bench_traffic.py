"""What the benchmark of expert parallelism counts on its way is what the formula says (adapters/traffic.py)."""

import json
import sys
from pathlib import Path

import commands
import pytest

from mole_mega.config import ParallelConfig
from mole_mega.platform import parallel as platform

TOOLS = Path(__file__).parents[2] / "tools"


def main(arguments):
    """The worker."""
    sys.path.insert(0, str(TOOLS))
    import bench_expert_parallel as bench

    parallel = platform.initialize(ParallelConfig(expert=2), seed=0)
    sizes = bench.Sizes(hidden=32, ffn=48, tokens=256, rank=4)
    rows = [bench.measure(4, sizes, "fp32", parallel, repeats=1, num_layers=layers) for layers in (1, 2)]
    if parallel.is_main:
        Path(arguments[0]).write_text(json.dumps(rows))
    platform.shutdown()
    return 0


def test_a_pass_of_either_form_sends_what_the_formula_says(tmp_path):
    out = tmp_path / "rows.json"
    assert commands.launch(__name__, [str(out)], 2) == 0
    for row in json.loads(out.read_text()):
        assert row["weights_bytes"] == row["weights_formula"] == 4 * 4 * 4 * 3 * (32 + 48) / 2
        # the router sends about half of the tokens away, each with its weight
        assert row["tokens_formula"] == 4 * 2 * 256 * 32 / 2
        assert row["tokens_bytes"] == pytest.approx(row["tokens_formula"], rel=0.1)
