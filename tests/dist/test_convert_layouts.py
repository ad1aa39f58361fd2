"""`verify` under tensor, pipeline and expert parallelism: the same proof, and each rank's part of each tensor.

All cases of one world size run in one launch, whose worker is this file.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import commands
import pytest
import torch
import transformers

sys.path.append(str(Path(__file__).parents[1] / "unit"))

from test_convert_import import save_hf
from trained_llava import train

from mole_mega.checkpoint.base import save_base
from mole_mega.checkpoint.trained import build_trained, find_trained
from mole_mega.config import AdapterConfig, ParallelConfig
from mole_mega.convert import verify
from mole_mega.convert.folders import find_counterpart
from mole_mega.convert.hf_export import export_base, export_merged
from mole_mega.convert.hf_import import UNUSED_FILE, import_hf
from mole_mega.convert.mole_folder import export_mole
from mole_mega.convert.source import SOURCE_FILE
from mole_mega.platform import parallel as platform

LAYOUTS = {
    "TP 2": (2, {"tensor": 2}),
    "PP 2": (2, {"pipeline": 2}),
    "EP 2": (2, {"expert": 2}),
    "TP 2 EP 2": (4, {"tensor": 2, "expert": 2}),
}
ADAPTERS = {
    "mole": AdapterConfig(num_experts=4, rank=4, gate="prob"),
    "mole in one layer": AdapterConfig(num_experts=2, rank=4, layers=(1,), gate="none"),
    "mole, a router a linear": AdapterConfig(
        num_experts=4, rank=4, router_scope="linear", top_k=2, expert_parallel="weights"
    ),
    "merged": AdapterConfig(method="lora", rank=4),
}
COMPARED = [
    *((layout, model) for layout in LAYOUTS for model in ("base", "mole")),
    ("PP 2", "mole in one layer"),  # a stage that routes nothing
    ("TP 2", "merged"),
    *((layout, "mole, a router a linear") for layout in ("TP 2", "TP 2 EP 2")),
]
LAYERS = "language_model.decoder.layers."
# what rank 1 loads wrongly -> (layout, model, the tensor)
FAULTS = {
    "another rank's part": ("TP 2", "base", LAYERS + "0.self_attention.linear_proj.weight"),
    "a bit": ("TP 2", "mole", LAYERS + "1.mlp.experts.linear_fc2.weight"),
    "a router's copy": ("EP 2", "mole", LAYERS + "0.mlp.router.bias"),
    "an expert": ("EP 2", "mole", LAYERS + "1.mlp.experts.lora_down_B"),
    "the last stage": ("PP 2", "base", "language_model.output_layer.weight"),
}
SEEN_IN_THE_LAYOUT_ALONE = ("a bit", "a router's copy")


# what an import puts beside the tensors, for the export
CARRIED = (SOURCE_FILE, UNUSED_FILE, "config.json", "generation_config.json")


@dataclass(frozen=True)
class Case:
    """Two folders that are compared under a layout, what rank 1 loads wrongly, and where the layout saves the base."""

    name: str
    layout: dict[str, int]
    checkpoint: str
    hf: str
    fault: str = ""
    save: str = ""
    nproc: int = 2


@torch.no_grad()
def break_part(model, fault: str) -> None:
    part = model.get_parameter(FAULTS[fault][2])
    if fault == "another rank's part":
        part.copy_(part.flip(-1))
    elif fault == "a bit":
        part.view(torch.int32).view(-1)[-1] ^= 1
    else:
        part.view(-1)[-1] += 0.01


def ask(case: Case) -> list[dict]:
    layout = ParallelConfig(**case.layout)
    parallel = platform.initialize(layout, seed=0)
    trained = find_trained(Path(case.checkpoint))
    if case.save:
        carried = sorted(path for path in trained.base.iterdir() if path.name in CARRIED)
        save_base(build_trained(trained, parallel, layout), Path(case.save), carried)

    def build_broken(*args):
        model = build_trained(*args)
        if parallel.rank == 1:
            break_part(model, case.fault)
        return model

    verify.build_trained = build_broken if case.fault else build_trained
    checks = verify.verify(trained, lambda: find_counterpart(trained, Path(case.hf)), parallel, layout)
    everyone = [None] * parallel.world_size
    torch.distributed.all_gather_object(everyone, checks)
    assert case.fault or all(other == checks for other in everyone)
    platform.leave_groups()
    return [asdict(check) for check in checks]


def main(arguments: list[str]) -> int:
    """The worker: the cases of a listing, all of this world size."""
    cases, out = map(Path, arguments)
    transformers.dynamic_module_utils.HF_MODULES_CACHE = str(out.with_name("modules"))
    found = {values["name"]: ask(Case(**values)) for values in json.loads(cases.read_text())}
    if torch.distributed.get_rank() == 0:
        out.write_text(json.dumps(found))
    platform.shutdown()
    return 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory, alone) -> dict[str, tuple[Path, Path]]:
    """{model: (checkpoint, the Hugging Face folder beside it)}; 67 tokens do not divide by 2."""
    folder = tmp_path_factory.mktemp("models")
    hf, base = save_hf(folder / "hf", "odd vocabulary"), folder / "base"
    import_hf(hf, base)
    made = {"base": (base, hf)}
    for name, adapter in ADAPTERS.items():
        trained, _ = train(base, folder / name / "step_1", alone, adapter)
        (export_merged if name == "merged" else export_mole)(trained, folder / name / "out")
        made[name] = trained.step, folder / name / "out"
    return made


def saved_by(folders, layout: str) -> Path:
    """Where a layout saves the base that it has loaded."""
    return folders["base"][0].parent / f"saved by {layout}"


@pytest.fixture(scope="module")
def found(folders, tmp_path_factory) -> dict[str, dict[str, dict]]:
    """{case: {row: check}}."""
    folder = tmp_path_factory.mktemp("cases")
    whole = [
        Case(
            f"{layout}, {model}",
            LAYOUTS[layout][1],
            *map(str, folders[model]),
            save=str(saved_by(folders, layout)) if model == "base" else "",
            nproc=LAYOUTS[layout][0],
        )
        for layout, model in COMPARED
    ]
    broken = [
        Case(fault, LAYOUTS[layout][1], *map(str, folders[model]), fault)
        for fault, (layout, model, _) in FAULTS.items()
    ]
    results = {}
    for nproc in (2, 4):
        path, out = folder / f"{nproc}.json", folder / f"{nproc}_found.json"
        path.write_text(json.dumps([asdict(case) for case in (*whole, *broken) if case.nproc == nproc]))
        assert commands.launch(__name__, [str(path), str(out)], nproc) == 0
        results |= json.loads(out.read_text())
    return {name: {check["what"]: check for check in checks} for name, checks in results.items()}


@pytest.mark.parametrize(("layout", "model"), COMPARED)
def test_a_layout_proves_what_one_process_does(layout, model, found):
    checks = found[f"{layout}, {model}"]
    rows = ["names", "tensors", "layout", "logits", *["experts"] * ("mole" in model)]
    assert [row for row in checks if row not in ("files", "base")] == rows
    assert [check for check in checks.values() if not check["equal"]] == []
    assert f"on {LAYOUTS[layout][0]} ranks" in checks["layout"]["compared"]


def test_every_token_of_every_layer_is_compared(found):
    for layout in LAYOUTS:
        assert found[f"{layout}, mole"]["experts"]["compared"] == "90 tokens x 2 layers = 180"
        assert "x 67" in found[f"{layout}, mole"]["logits"]["compared"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_base_that_a_layout_has_saved_is_the_one_that_it_loaded(layout, found, folders, tmp_path):
    """The same tensors by name, shape, dtype and hash, and an export of the same bytes as it came from."""
    base, hf = folders["base"]
    saved = saved_by(folders, layout)
    assert json.loads((saved / "tensors.json").read_text()) == json.loads((base / "tensors.json").read_text())
    assert {path.name for path in saved.glob("*.distcp")} != {path.name for path in base.glob("*.distcp")}
    export_base(find_trained(saved), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_part_that_one_rank_loads_wrongly_is_named(fault, found):
    checks = found[fault]
    stored = FAULTS[fault][2].replace(".experts.linear_", ".linear_")  # as in a base, which has no experts
    assert not checks["layout"]["equal"]
    assert checks["layout"]["found"] == f"1 differ, first {stored} on rank 1"
    assert checks["names"]["equal"] and checks["tensors"]["equal"]
    assert checks["logits"]["equal"] == (fault in SEEN_IN_THE_LAYOUT_ALONE)
