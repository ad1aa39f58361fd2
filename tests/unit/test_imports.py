"""Rules of the code that are read from its text: which room may import which, and what nobody may touch."""

import ast
import fnmatch
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "mole_mega"

# DESIGN section 4: what each room may import of the others, lowest first. A folder not named here does not exist.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "wording": set(),
    "config": {"errors"},
    # whether a command can write where it is told to
    "outputs": {"errors"},
    "platform": {"errors", "config"},
    "adapters": {"errors", "config", "platform"},
    "models": {"errors", "config", "platform", "adapters"},
    "data": {"errors", "config", "wording"},
    "monitor": {"errors", "config", "platform", "adapters"},
    # reads files alone: fast, and without torch
    "report": {"errors", "config", "outputs", "wording"},
    "checkpoint": {"errors", "config", "platform", "adapters", "models"},
    # data: an export says how pictures and prompts were prepared in training
    "convert": {"errors", "config", "platform", "adapters", "models", "data", "checkpoint"},
    # arithmetic over the config and the sizes, after the checks of the rooms that build; adapters: the arithmetic by
    # which training chooses what travels and in which form it computes
    "estimate": {"errors", "config", "platform", "adapters", "models", "outputs", "wording"},
    # estimate: a dry run counts as the estimate counts, and training says when it will not fit
    "training": {
        "errors",
        "config",
        "platform",
        "adapters",
        "models",
        "data",
        "monitor",
        "checkpoint",
        "wording",
        "estimate",
    },
    # short trainings, told as a report tells
    "conflict": {"errors", "config", "platform", "data", "report", "checkpoint", "training", "outputs", "wording"},
}
# Every other file at the top of the package is an entry point: it may import all rooms, and no room imports it.


def modules() -> dict[str, Path]:
    """{dotted name below the package: file}."""
    files = sorted(PACKAGE.rglob("*.py"))
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__"): path for path in files}
    return {name.rstrip("."): path for name, path in names.items()}


MODULES = modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imported(tree: ast.AST) -> set[str]:
    """Every dotted name that a module imports, at the top or inside a function: `from a.b import c` gives a.b.c."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write the whole name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(module: str) -> str:
    return module.partition(".")[0]


def is_entry_point(module: str) -> bool:
    return "." not in module and module not in MAY_IMPORT and (PACKAGE / f"{module}.py").exists()


def rooms_imported(tree: ast.AST) -> set[str]:
    """Rooms of this package; `from mole_mega import config` counts as config."""
    rooms = {name.split(".")[1] for name in imported(tree) if name.startswith("mole_mega.")}
    return rooms - {"__version__"}


def breaches(module: str, tree: ast.AST) -> set[str]:
    """The rooms that a module imports and may not."""
    if is_entry_point(module):
        return set()
    allowed = MAY_IMPORT[room(module)] | {room(module)}
    return rooms_imported(tree) - allowed


def private_names_of_megatron(tree: ast.AST) -> set[str]:
    """`_names` that a module imports from Megatron-Core, or reads off something it imported from there."""
    from_megatron: dict[str, str] = {}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron"):
            from_megatron |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("megatron"):
                    from_megatron[alias.asname or "megatron"] = alias.name
    for whole in from_megatron.values():
        found |= {whole for part in whole.split(".") if part.startswith("_")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            root: ast.expr = node.value
            while isinstance(root, ast.Attribute | ast.Call):
                root = root.value if isinstance(root, ast.Attribute) else root.func
            if isinstance(root, ast.Name) and root.id in from_megatron:
                found.add(f"{from_megatron[root.id]}...{node.attr}")
    return found


def builders_of(tree: ast.AST, name: str) -> set[str]:
    """The innermost functions in which `name(...)` is called."""

    def visit(node: ast.AST, function: str) -> set[str]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            function = getattr(node, "name", "lambda")
        found = set()
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            found |= {function} if called == name else set()
        return found.union(*(visit(child, function) for child in ast.iter_child_nodes(node)))

    return visit(tree, "the module itself")


def test_every_room_is_in_the_table():
    rooms = {room(name) for name in MODULES if name and not is_entry_point(name)}
    assert rooms == MAY_IMPORT.keys()


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_imports_point_one_way(module):
    assert breaches(module, TREES[module]) == set()


def test_the_package_itself_imports_nothing_of_its_rooms():
    assert rooms_imported(TREES[""]) == set()


def test_the_table_itself_points_one_way():
    below: set[str] = set()
    for name, allowed in MAY_IMPORT.items():
        assert allowed <= below, name
        below.add(name)


@pytest.mark.parametrize("leaf", ["data", "checkpoint", "convert", "monitor"])
def test_the_leaves_never_import_training(leaf):
    importers = {name for name, tree in TREES.items() if room(name) == leaf and "training" in rooms_imported(tree)}
    assert importers == set()


def test_data_never_imports_megatron():
    for name, tree in TREES.items():
        if room(name) == "data":
            assert not {n for n in imported(tree) if room(n) == "megatron"}, name


def test_data_is_looked_at_without_megatron():
    """`mole-mega data preview` is fast since nothing that it imports, however far down, imports Megatron-Core."""
    reached, pending = set(), ["inspect_data"]
    while pending:
        name = pending.pop()
        if name in TREES and name not in reached:
            reached.add(name)
            own = {n.removeprefix("mole_mega.") for n in imported(TREES[name]) if n.startswith("mole_mega.")}
            pending += own | {n.rpartition(".")[0] for n in own}  # `from a.b import c` runs a.b, and c may be a module
    assert {"data.loader", "models.sizes", "data.preview"} <= reached
    assert not {name for name in reached for n in imported(TREES[name]) if room(n) == "megatron"}


def test_the_maths_knows_neither_ranks_nor_megatron():
    # the bank asks the processor and its kernels, and mixtures ask the bank, and which form is the faster
    for module in ("adapters.bank", "adapters.cpu_kernels", "adapters.forms", "adapters.mixing", "platform.compiler",
                   "platform.processor"):  # fmt: skip
        names = imported(TREES[module])
        known = ("mole_mega.platform.processor", "mole_mega.platform.compiler", "mole_mega.adapters.bank",
                 "mole_mega.adapters.cpu_kernels", "mole_mega.adapters.forms")  # fmt: skip
        ours = {n for n in names if n.startswith("mole_mega") and not n.startswith(known)}
        assert not ours | {n for n in names if n.startswith(("megatron", "torch.distributed"))}
        used = {ast.unparse(n) for n in ast.walk(TREES[module]) if isinstance(n, ast.Attribute)}
        assert not {name for name in used if name.startswith("torch.distributed")}


def test_config_knows_neither_torch_nor_megatron():
    for name, tree in TREES.items():
        if room(name) == "config":
            assert not {n for n in imported(tree) if room(n) in ("torch", "megatron", "transformers")}, name


def test_no_module_imports_megatron_training():
    for name, tree in TREES.items():
        assert not {n for n in imported(tree) if n.startswith(("megatron.training", "megatron.legacy"))}, name


def test_a_transformer_config_is_built_in_exactly_one_function():
    builders = {(name, function) for name, tree in TREES.items() for function in builders_of(tree, "TransformerConfig")}
    assert builders == {("models.mcore_config", "_transformer_config")}


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) != "platform"])
def test_only_platform_touches_private_names_of_megatron(module):
    assert private_names_of_megatron(TREES[module]) == set()


# the readers above see what they are for


def test_an_edge_upward_is_seen_wherever_it_is_written():
    for text in (
        "from mole_mega.training.step import Stepper",
        "from mole_mega import training",
        "import mole_mega.training.loss",
        "def f():\n    from mole_mega.training import loss",
        "if TYPE_CHECKING:\n    from mole_mega.training.loss import sum_loss",
    ):
        assert breaches("models.llava", ast.parse(text)) == {"training"}, text
    assert breaches("convert.hf_import", ast.parse("from mole_mega.cli import launch")) == {"cli"}


def test_private_names_are_seen_however_they_are_reached():
    for text in (
        "from megatron.core.tensor_parallel.mappings import _reduce",
        "from megatron.core import parallel_state\nparallel_state._GROUP",
        "from megatron.core import parallel_state as state\nstate.groups()._tp",
        "import megatron.core.utils\nmegatron.core.utils._x",
        "from megatron.core._private import f",
    ):
        assert private_names_of_megatron(ast.parse(text)), text
    assert not private_names_of_megatron(ast.parse("from megatron.core import utils\nself._x = utils.f.__name__"))


def test_a_second_builder_is_seen():
    assert builders_of(ast.parse("def f():\n    g(config.TransformerConfig(a=1))"), "TransformerConfig") == {"f"}
    assert builders_of(ast.parse("x = TransformerConfig()"), "TransformerConfig") == {"the module itself"}


def test_no_folder_of_tests_is_passed_over(pytestconfig):
    """pytest leaves out folders by name, and says nothing: its own list has `dist`."""
    left_out = pytestconfig.getini("norecursedirs")
    folders = {path.parent.name for path in Path(__file__).parents[1].rglob("test_*.py")}
    assert "dist" in folders
    assert not [name for name in folders for pattern in left_out if fnmatch.fnmatch(name, pattern)]
