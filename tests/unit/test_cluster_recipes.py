"""The recipes for clusters, as far as they can be looked at without one: run files load, divide and fit, and launchers
name what exists."""

import os
import re
import signal
import subprocess
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from mole_mega import config
from mole_mega.estimate.gpus import GPUS
from mole_mega.estimate.plan import Sample, estimate
from mole_mega.models.mcore_config import check_layout
from mole_mega.models.sizes import SIZES
from mole_mega.train import main as train

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize("name", ["llava15_7b", "llava15_13b"])
def test_a_run_file_loads_divides_and_fits_its_gpus(name):
    run, size = config.load(EXAMPLES / name / "run.yaml"), SIZES[name]
    check_layout(run, size)
    assert (run.adapter.num_experts, run.adapter.rank, run.adapter.alpha, run.adapter.dropout) == (3, 32, 64, 0.05)
    for world_size in (8, 16, 64):
        data = world_size // (run.parallel.tensor * run.parallel.pipeline)
        assert run.train.global_batch_size % (run.train.micro_batch_size * data) == 0
        assert estimate(run, size, world_size, GPUS["h100"], Sample()).fits


@pytest.mark.parametrize("name", ["llava15_7b", "llava15_13b"])
def test_the_figures_of_a_layout_are_the_estimates(name):
    run, size = config.load(EXAMPLES / name / "run.yaml"), SIZES[name]
    rows = re.findall(
        r"^\| (\d+) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|", (EXAMPLES / name / "README.md").read_text(), re.M
    )
    assert [int(gpus) for gpus, *_ in rows] == [8, 16, 64]
    for gpus, layout, *figures in rows:
        one = estimate(run, size, int(gpus), GPUS["h100"], Sample())
        parts = {"tensor": run.parallel.tensor, "pipeline": run.parallel.pipeline, "data": run.parallel.data(int(gpus))}
        assert layout == " x ".join(f"{part} {number}" for part, number in parts.items() if number > 1)
        memory, seconds = one.memory[one.fullest].total / 1e9, one.time.total
        assert figures == [f"{memory:.1f}", f"{seconds:.3g}", f"{round(one.tokens_per_second, -2):,.0f}"]


def test_launchers_parse_and_name_what_exists():
    folder = EXAMPLES / "cluster"
    for script in ("torchrun.sh", "slurm.sbatch"):
        subprocess.run(["bash", "-n", folder / script], check=True)
    assert 'examples/cluster/torchrun.sh "$@"' in (folder / "slurm.sbatch").read_text()
    job = yaml.safe_load((folder / "pytorchjob.yaml").read_text())
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    assert (EXAMPLES.parent / Path(container["command"][-1]).relative_to("/mole_mega")).is_file()


FAKES = {
    "scontrol": 'if [ "$1" = show ]; then echo node0; else echo "$@" > asked; fi',
    "scancel": 'echo "$@" > told',
    "srun": 'echo "$@" > started; sleep 0.5; exit "$CODE"',
}


@pytest.mark.parametrize("code", [0, 2, 4, 75])
@pytest.mark.parametrize("time_is_up", [False, True])
def test_slurm_queues_a_run_again_that_saved_for_its_time_was_up(tmp_path, code, time_is_up):
    for name, text in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node0", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "64"}
    env = os.environ | slurm | {"CODE": str(code), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = subprocess.Popen(["bash", EXAMPLES / "cluster" / "slurm.sbatch", "run.yaml"], cwd=tmp_path, env=env)
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    if time_is_up:
        job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == code
    assert "--cpus-per-task=64" in (tmp_path / "started").read_text()
    assert (tmp_path / "told").exists() == time_is_up
    assert (tmp_path / "asked").exists() == (time_is_up and code == 75)


@pytest.mark.parametrize("name", ["llava15_7b", "llava15_13b"])
def test_a_layout_of_64_ranks_can_be_built(name, capsys):
    arguments = [str(EXAMPLES / name / "run.yaml"), "--dry-run", "--world-size", "64", "--size", name]
    assert train(arguments) == 0
    assert "each held whole by the ranks together" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_an_image_is_of_what_exists_runs_as_nobody_special_and_has_a_budget(name):
    text = (ROOT / "docker" / name).read_text()
    steps = [line.split() for line in text.splitlines() if line and not line.startswith((" ", "#"))]
    copied = [source for step, *words in steps if step == "COPY" for source in words[:-1] if source[0] != "-"]
    assert copied and all((ROOT / source).exists() for source in copied)
    users = [words[0] for step, *words in steps if step == "USER"]
    assert users == ["10001"] and ["ENTRYPOINT", '["mole-mega"]'] in steps
    assert re.search(r"^# .*Budget: at most \d+\.\d GB over the base image", text, re.M)


def test_the_torch_of_nvidias_containers_is_good_enough():
    """They name it as before its release, and pip is to leave it alone."""
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    torch = next(found for found in map(Requirement, asked) if found.name == "torch")
    assert all(torch.specifier.contains(v, prereleases=True) for v in ("2.13.0a0+1b2c3d4", "2.13.0", "2.13.1"))
    assert not any(torch.specifier.contains(v, prereleases=True) for v in ("2.12.1", "2.14.0", "2.14.0a0+1b2c3d4"))
