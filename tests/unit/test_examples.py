"""Run files of examples on the demo's base: each can start as its README says, and writes to a folder of its own."""

import re
from pathlib import Path

import pytest

from mole_mega import config
from mole_mega.models.sizes import SIZES
from mole_mega.training.dry_run import dry_run

ROOT = Path(__file__).parents[2]
RUNS = {
    str(path.relative_to(ROOT)): path
    for path in sorted((ROOT / "examples").glob("*/*.yaml"))
    if "base: ../../demo_out/base\n" in path.read_text()
}
READMES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "examples").glob("*/README.md")))]
LINE = re.compile(r"^mole-mega train (\S+) --nproc (\d+)(.*)$", re.M)


@pytest.mark.parametrize("name", RUNS)
def test_it_can_start_as_its_launch_line_says(name):
    lines = LINE.findall(RUNS[name].with_name("README.md").read_text())
    launched = [(int(processes), overrides.split()) for file, processes, overrides in lines if file == name]
    assert launched
    for processes, overrides in [(1, []), *launched]:
        dry_run(config.load(RUNS[name], overrides), SIZES["tiny"], processes, base=None)


def test_each_writes_to_a_folder_of_its_own():
    folders = [config.load(path).run_dir for path in RUNS.values()]
    assert len(set(folders)) == len(folders) >= 15


@pytest.mark.parametrize("readme", READMES)
def test_what_a_readme_names_of_examples_is_there(readme):
    for named in re.findall(r"\bexamples/[\w./]*\w", (ROOT / readme).read_text()):
        assert (ROOT / named).exists(), named
