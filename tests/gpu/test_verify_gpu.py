"""What only a GPU can prove: each part of `mole-mega verify-gpu`, on the GPUs of this machine."""

import json

import pytest
import torch

from mole_mega import verify_gpu
from mole_mega.errors import ExitCode

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch sees none")


@pytest.mark.parametrize("part", verify_gpu.PARTS)
def test_a_part_finds_nothing_that_differs(tmp_path, part):
    out = tmp_path / "verify_gpu.json"
    code = verify_gpu.main(["--parts", part, "--json", str(out), "--debug"])
    rows = json.loads(out.read_text())[part]
    wrong = [row for row in rows if row["status"] in ("differs", "failed")]
    assert not wrong, wrong
    if code == ExitCode.NOTHING_CHECKED:
        pytest.skip("; ".join(row["reason"] for row in rows))
    assert code == ExitCode.DONE
