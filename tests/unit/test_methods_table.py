"""examples/methods: every row and every setting tried for it is a run that can start."""

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest
import yaml

from mole_mega.adapters.methods import check_methods
from mole_mega.config import validate

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def table():
    spec = importlib.util.spec_from_file_location("methods_table", EXAMPLES / "methods" / "run.py")
    module = importlib.util.module_from_spec(spec)
    before, known = list(sys.path), set(sys.modules)
    sys.modules["methods_table"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    for name in set(sys.modules) - known:
        if name in ("methods_table", "run", "runs", "evidence", "make_conflict_data", "make_demo_data"):
            del sys.modules[name]


@pytest.mark.parametrize("steps", [6, 600])
def test_every_setting_of_every_row_can_start(table, steps, tmp_path):
    settings = yaml.safe_load((EXAMPLES / "data_conflict" / "settings.yaml").read_text())
    settings["train"] |= {"steps": steps, "router_lr": table.ROUTER_LR}
    rows = table.methods(table.RANK, steps)
    assert len({row.key for row in rows}) == len(rows) >= 12
    args = argparse.Namespace(out=tmp_path)
    for row in rows:
        assert len(row.points) == 4, row.key  # the same budget for each
        entries = [table.as_row(row, point, f"{row.key}-{point}") for point in range(4)]
        jobs = table.make_jobs(entries, [0], settings, args, "test")
        assert len({str(job.settings | {"run_dir": ""}) for job in jobs}) == 4, row.key
        for job in jobs:
            validate(job.run)
            check_methods(job.run)


def test_a_row_that_there_is_not_is_named(table, tmp_path, capsys):
    assert table.main(["--only", "magic", "--out", str(tmp_path)]) == 2
    assert "no row is called magic; there are lora, " in capsys.readouterr().err
