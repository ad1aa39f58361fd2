"""Two hosts on this machine, as network namespaces: one is lost in the middle of a run, the other says so, and
torchrun's own elasticity goes on from the last checkpoint with the losses of a run that was not disturbed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ADDRESSES = ("10.213.77.1", "10.213.77.2")
PORT = 29477
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
    """torchrun with two processes on one host; what it and they print goes to a log."""

    def __init__(self, host: str, address: str, run: Path) -> None:
        self.log = run.with_name(f"{run.stem}_{host}.log")
        launch = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2", "--max-restarts", "3"]
        launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:{PORT}", "--rdzv-id", run.stem]
        # both hosts have this machine's name, by which torchrun would know them
        launch += ["--rdzv-conf", f"is_host={int(address == ADDRESSES[0])}", "--local-addr", address]
        launch += ["-m", "mole_mega.train", str(run)]
        # torchrun 2.13 tells the meeting point of the first round only: a host that comes back would wait for it
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "veth0"}
        environment |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with open(self.log, "ab") as out:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", host, sys.executable, *launch],
                stdout=out, stderr=out, env=environment, start_new_session=True,
            )  # fmt: skip

    @property
    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, words: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while words not in self.text:
            assert time.monotonic() < deadline and self.process.poll() is None, self.text[-4000:]
            time.sleep(0.2)


def kill_all(host: str) -> None:
    """Every process of a host, as when its power is cut."""
    pids = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True).stdout.split()
    for pid in pids:
        os.kill(int(pid), signal.SIGKILL)


def losses(run_dir: Path) -> dict[int, float]:
    """The last row of each step."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def test_a_lost_host_is_named_and_the_run_goes_on_when_it_is_back(hosts, make_run, tmp_path):
    sections = {
        "train": {"steps": 40, "hang_seconds": 5, "global_batch_size": 8},
        "checkpoint": {"every": 2},
        "parallel": {"expert": 2},
    }
    straight, disturbed = (make_run(tmp_path, name, **sections) for name in ("straight", "disturbed"))
    agents = [Agent(host, address, straight) for host, address in zip(hosts, ADDRESSES, strict=True)]
    assert [agent.process.wait(240) for agent in agents] == [0, 0], agents[0].text[-4000:]

    agents = [Agent(host, address, disturbed) for host, address in zip(hosts, ADDRESSES, strict=True)]
    agents[0].wait_for("step_10", 240)
    kill_all(hosts[1])
    lost = time.monotonic()
    agents[0].wait_for("no sign of life from rank ", 60)
    assert time.monotonic() - lost < 60
    # both of the lost host's ranks, wherever it was placed, and none of this one's
    (line, *_) = (line for line in agents[0].text.splitlines() if "no sign of life" in line)
    assert line.count("rank ") >= 2, line
    time.sleep(max(0.0, lost + FORGOTTEN - time.monotonic()))
    again = Agent(hosts[1], ADDRESSES[1], disturbed)
    assert [agents[0].process.wait(240), again.process.wait(240)] == [0, 0], agents[0].text[-4000:]
    assert "going on after step" in agents[0].text + again.text
    assert losses(tmp_path / "disturbed") == losses(tmp_path / "straight")
