"""The bench of methods times every method and form of mixture there is, against the plain step."""

import importlib
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from mole_mega.adapters.methods import METHODS


@pytest.fixture
def measured(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools")
    bench = importlib.import_module("bench_methods")

    def measure(*arguments: str) -> dict[str, dict[str, float]]:
        rows = tmp_path / "rows.json"
        tiny = ["--layers", "1", "--hidden", "64", "--tokens", "32", "--repeats", "1"]
        assert bench.main(["--json", str(rows), *tiny, *arguments]) == 0
        return {row["case"]: row for row in json.loads(rows.read_text())}

    return bench, measure


def test_every_method_has_a_row_with_its_ratio(measured):
    bench, measure = measured
    found = measure()
    assert found.keys() == {"plain", *METHODS, "lorasculpt, regulariser", *bench.FORMS}
    assert all(row["seconds"] > 0 for row in found.values())


def test_a_ratio_is_that_to_the_plain_step_right_before(measured, monkeypatch):
    bench, measure = measured
    clock = itertools.accumulate(itertools.chain([0.0], itertools.cycle([3.0, 1.0, 6.0, 1.0])))
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    rows = measure("--case", "top-2")
    assert rows == {
        name: {"case": name, "seconds": 6.0, "ratio": 2.0, "target": target}
        for name, target in (("plain", 1.0), ("top-2", bench.TARGET))
    }
