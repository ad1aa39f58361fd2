"""The bench of methods times every method and form of mixture there is, against the plain step."""

import importlib
import json
from pathlib import Path

from mole_mega.adapters.methods import METHODS


def test_every_method_has_a_row_with_its_ratio(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools")
    bench = importlib.import_module("bench_methods")
    rows = tmp_path / "rows.json"
    tiny = ["--layers", "1", "--hidden", "64", "--tokens", "32", "--repeats", "1"]
    assert bench.main(["--json", str(rows), *tiny]) == 0
    found = {row["case"]: row for row in json.loads(rows.read_text())}
    assert found.keys() == {"plain", *METHODS, "lorasculpt, regulariser", *bench.FORMS}
    assert found["plain"]["ratio"] == 1 and all(row["seconds"] > 0 for row in found.values())
