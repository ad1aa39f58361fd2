"""Two hosts on this machine, as network namespaces: one is cut off in the middle of a run, and later lost. The other
says so each time, and torchrun's own elasticity goes on from the last checkpoint with the losses of a run that was not
disturbed."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import commands
import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mole_mega import train as train_command

ADDRESSES = ("10.213.77.1", "10.213.77.2")
PORT = 29477
SILENT = "no sign of life from rank "
IN_TIME = 60  # seconds within which the survivors stop
FORGOTTEN = 25  # seconds after which torchrun no longer counts on an agent that is gone


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True).returncode == 0


@pytest.fixture
def hosts():
    """Names of two namespaces that reach each other, each with an address of ADDRESSES on its `veth0`."""
    names = [f"mole{os.getpid()}{letter}" for letter in "ab"]
    if not shutil.which("ip") or not ip("netns", "add", names[0]):
        pytest.skip("network namespaces cannot be made here (they need iproute2 and root)")
    try:
        made = ip("netns", "add", names[1])
        one, other = ("veth0", "netns", names[0]), ("veth0", "netns", names[1])
        made = made and ip("link", "add", *one, "type", "veth", "peer", "name", *other)
        for name, address in zip(names, ADDRESSES, strict=True):
            made = made and ip("-n", name, "addr", "add", f"{address}/24", "dev", "veth0")
            made = made and ip("-n", name, "link", "set", "veth0", "up") and ip("-n", name, "link", "set", "lo", "up")
        if not made:
            pytest.skip("network namespaces cannot be connected here")
        yield names
    finally:
        for name in names:
            kill_all(name)
            ip("netns", "delete", name)


class Agent:
    """torchrun with two processes on one host; what it and they print goes to a log. All are forks of one process that
    has imported everything already (commands.py)."""

    def __init__(self, host: str, address: str, run: Path) -> None:
        self.log = run.with_name(f"{run.stem}_{host}.log")
        self.log.touch()
        self.process = commands._context.Process(target=be_agent, args=(host, address, str(run), str(self.log)))
        self.process.start()

    @property
    def text(self) -> str:
        return self.log.read_text()

    def wait(self, seconds: float) -> int | None:
        """The exit code."""
        self.process.join(seconds)
        return self.process.exitcode

    def wait_for(self, words: str, seconds: float, times: int = 1) -> None:
        deadline = time.monotonic() + seconds
        while self.text.count(words) < times:
            assert time.monotonic() < deadline and self.process.exitcode is None, self.text[-4000:]
            time.sleep(0.2)


def be_agent(host: str, address: str, run: str, log: str) -> None:
    """What `torchrun ... -m mole_mega.train RUN` does on a host, below its command line."""
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.setns(os.open(f"/var/run/netns/{host}", os.O_RDONLY), os.CLONE_NEWNET)
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "veth0"
    # torchrun 2.13 tells the meeting point of the first round only: a host that comes back would wait for it
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    launch = LaunchConfig(
        min_nodes=2, max_nodes=2, nproc_per_node=2, max_restarts=10, run_id=Path(run).stem, start_method="fork",
        rdzv_backend="c10d", rdzv_endpoint=f"{ADDRESSES[0]}:{PORT}",
        # both hosts have this machine's name, by which torchrun would know them
        rdzv_configs={"is_host": str(int(address == ADDRESSES[0]))}, local_addr=address,
    )  # fmt: skip
    elastic_launch(launch, train)(run)


def train(run: str) -> None:
    """One process of the run."""
    code = train_command.main([run])
    if code:
        os._exit(code)


def kill_all(host: str) -> None:
    """Every process of a host, as when its power is cut."""
    pids = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True).stdout.split()
    for pid in pids:
        os.kill(int(pid), signal.SIGKILL)


def losses(run_dir: Path) -> dict[int, float]:
    """The last row of each step."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def names_of_the_lost(agent: Agent) -> list[str]:
    """Of each time that a survivor stopped, the line that says whom it waited for."""
    return [line for line in agent.text.splitlines() if SILENT in line]


def test_a_host_that_is_cut_off_or_lost_is_named_and_the_run_goes_on_when_it_is_back(hosts, make_run, tmp_path):
    sections = {
        "train": {"steps": 40, "hang_seconds": 5, "global_batch_size": 8},
        "checkpoint": {"every": 2},
        "parallel": {"expert": 2},
    }
    straight, disturbed = (make_run(tmp_path, name, **sections) for name in ("straight", "disturbed"))
    agents = [Agent(host, address, straight) for host, address in zip(hosts, ADDRESSES, strict=True)]
    assert [agent.wait(240) for agent in agents] == [0, 0], agents[0].text[-4000:]

    survivor, other = (Agent(host, address, disturbed) for host, address in zip(hosts, ADDRESSES, strict=True))
    survivor.wait_for("step_6", 240)
    # all of its processes live on, and nothing tells the survivor's sockets
    assert ip("-n", hosts[1], "link", "set", "veth0", "down")
    cut = time.monotonic()
    survivor.wait_for(SILENT, IN_TIME)
    assert time.monotonic() - cut < IN_TIME
    assert other.process.exitcode is None
    assert ip("-n", hosts[1], "link", "set", "veth0", "up")
    survivor.wait_for("going on after step", 240)
    told = len(names_of_the_lost(survivor))

    survivor.wait_for("step_30", 240)
    kill_all(hosts[1])
    lost = time.monotonic()
    survivor.wait_for(SILENT, IN_TIME, told + 1)
    assert time.monotonic() - lost < IN_TIME
    time.sleep(max(0.0, lost + FORGOTTEN - time.monotonic()))
    again = Agent(hosts[1], ADDRESSES[1], disturbed)
    assert [survivor.wait(240), again.wait(240)] == [0, 0], survivor.text[-4000:]
    # each time both of the lost host's ranks are named, and it itself
    told_of = [line.partition(SILENT)[2] for line in names_of_the_lost(survivor)]
    assert sum("2 on " in line and "rank 3 on " in line for line in told_of) >= 2, told_of
    assert "did not begin" not in survivor.text
    assert (survivor.text + again.text).count("going on after step") >= 2
    assert losses(tmp_path / "disturbed") == losses(tmp_path / "straight")
