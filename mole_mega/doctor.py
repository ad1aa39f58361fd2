"""mole-mega doctor: what this machine has, what each absence switches off, and what to do about it."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import platform
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mole_mega.errors import ConfigError, ExitCode, quiet_libraries, report_errors
from mole_mega.outputs import check_file
from mole_mega.platform import compiler
from mole_mega.platform.recipes import RECIPES

# Everything needs these; how far up is pyproject.toml's to say.
NEEDED = {
    "torch": "2.13", "megatron-core": "0.19", "transformers": "5", "datasets": "4", "safetensors": "0.5", "numpy": "2",
    "pillow": "11", "PyYAML": "6", "tensorboard": "2.19",
}  # fmt: skip
# What only GPU runs use: name, module, package, what its absence switches off, and how to get it.
OPTIONAL = (
    (
        "Transformer Engine", "transformer_engine", "transformer-engine",
        "model.backend transformer_engine: products in FP8, fused attention, context parallelism",
        "pip install --no-build-isolation 'transformer-engine[pytorch]'",
    ),
    (
        "Apex", "apex", "apex", "its fused Adam and norms (torch's are used)",
        "build it: https://github.com/NVIDIA/apex#from-source",
    ),
    (
        "flash attention", "flash_attn", "flash-attn",
        "one of the kernels of Transformer Engine's attention (cuDNN has others)",
        "pip install --no-build-isolation flash-attn",
    ),
)  # fmt: skip
PYTHON = (3, 12)
GIB = 2**30
MIN_SHARED_MEMORY = 1 * GIB  # workers and NCCL within a host
MIN_DISK = 10 * GIB
PORTS = (29500, 29400)  # torchrun's own, and that of examples/cluster
CONNECT_SECONDS = 5.0

Status = Literal["ok", "absent", "bad"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `absent`: what it `switches_off` is off, all else works; `bad`: nothing works. `fix` says
    what to do, empty when all is well."""

    name: str
    status: Status
    found: str
    switches_off: str = ""
    fix: str = ""


def main(argv: list[str]) -> int:
    """Parse, look, print. Returns the exit code: 2 when something is missing that everything needs, or --require."""
    parser = argparse.ArgumentParser(prog="mole-mega doctor", description="What this machine has, and what it lacks.")
    parser.add_argument("--folder", type=Path, default=Path(), help="where runs will be written (default: here)")
    parser.add_argument("--rendezvous", metavar="HOST:PORT", help="also try to reach this address, as a rank would")
    parser.add_argument(
        "--require", action="append", default=[], metavar="NAME",
        help="end with 2 unless this one is there too, such as CUDA; may be given again",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="also write the findings to this file")
    parser.add_argument("--debug", action="store_true", help="show warnings and tracebacks")
    args = parser.parse_args(argv)
    with report_errors(debug=args.debug) as outcome:
        if args.json:
            check_file(args.json, "--json")
        if not args.debug:
            quiet_libraries()
        findings = examine(args.folder, args.rendezvous)
        names = [finding.name for finding in findings]
        if unknown := sorted(set(args.require) - set(names)):
            raise ConfigError(f"--require {unknown[0]!r} is nothing that is looked at; there are {', '.join(names)}")
        print("\n".join(describe(findings)))
        if args.json:
            args.json.write_text(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1) + "\n")
        missing = [f.name for f in findings if f.status == "absent" and f.name in args.require]
        if missing:
            print(f"required, and not here: {', '.join(missing)}")
        if missing or any(finding.status == "bad" for finding in findings):
            outcome.code = ExitCode.INPUT_ERROR
    return outcome.code


def examine(folder: Path, rendezvous: str | None = None) -> list[Finding]:
    """Look at everything. Raises ConfigError when `rendezvous` is no HOST:PORT."""
    findings = [_python(), *(_package(name, least) for name, least in NEEDED.items())]
    findings += [*_accelerator(), *(_optional(*entry) for entry in OPTIONAL)]
    findings += [_compiler(), _disk(folder), _shared_memory(), _interfaces(), *map(_port, PORTS)]
    if rendezvous is not None:
        findings.append(_reach(rendezvous))
    return findings


def describe(findings: list[Finding]) -> list[str]:
    """For people: a line a finding, and under it what is off and the fix."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:6}  {finding.name:{width}}  {finding.found}")
        if finding.switches_off:
            lines.append(f"{'':8}{'':{width}}    off: {finding.switches_off}")
        if finding.fix:
            lines.append(f"{'':8}{'':{width}}    fix: {finding.fix}")
    bad = [finding.name for finding in findings if finding.status == "bad"]
    absent = [finding.name for finding in findings if finding.status == "absent"]
    lines.append(f"nothing can run without: {', '.join(bad)}" if bad else "everything that a CPU run needs is here")
    if absent:
        lines.append(f"switched off: {', '.join(absent)}")
    return lines


def _python() -> Finding:
    version = platform.python_version()
    if sys.version_info[:2] == PYTHON:
        return Finding("Python", "ok", version)
    wanted = ".".join(map(str, PYTHON))
    return Finding("Python", "bad", version, "everything", f"make PYTHON=/path/to/python{wanted} demo")


def _package(name: str, least: str) -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "bad", "not installed", "everything", f"pip install '{name}>={least}'")
    if _numbers(version) < _numbers(least):
        return Finding(name, "bad", f"{version}, older than {least}", "everything", f"pip install '{name}>={least}'")
    return Finding(name, "ok", version)


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.13.0+cpu gives (2, 13, 0)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _accelerator() -> list[Finding]:
    """NCCL and the CUDA devices, as torch sees them."""
    try:
        import torch
    except ImportError as error:
        return [Finding("CUDA", "bad", f"torch cannot be imported: {error}", "everything", "pip install 'torch>=2.13'")]
    if torch.distributed.is_nccl_available():
        nccl = Finding("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        nccl = Finding("NCCL", "absent", "not in this torch", "runs on several GPUs", "a CUDA build of torch")
    return [nccl, cuda()]


def cuda() -> Finding:
    """The CUDA devices, as torch sees them."""
    import torch

    off = "GPUs: runs go over the CPU and gloo"
    built_for = torch.version.cuda
    if built_for is None:
        fix = "where there is a GPU: install a CUDA build of this torch, as pytorch.org says for its driver"
        return Finding("CUDA", "absent", f"torch {torch.__version__} is a CPU build", off, fix)
    if not torch.cuda.is_available():
        has_driver = shutil.which("nvidia-smi") is not None
        fix = (
            "nvidia-smi says what the driver is; it must serve the CUDA version that torch was built for"
            if has_driver
            else "install NVIDIA's driver, or start the container with --gpus all, where there is a GPU"
        )
        return Finding("CUDA", "absent", f"torch is built for CUDA {built_for}, no device is seen", off, fix)
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = ", ".join(
        f"{device.name} {device.total_memory / GIB:.0f} GiB ({_fp8_recipes((device.major, device.minor), built_for)})"
        for device in devices
    )
    return Finding("CUDA", "ok", f"{built_for}: {names}")


def _fp8_recipes(capability: tuple[int, int], built_for: str) -> str:
    """Which values of fp8.recipe a GPU takes, in words."""
    major, minor = map(int, built_for.split(".")[:2])
    taken = [name for name, recipe in RECIPES.items() if not recipe.why_not(capability, (major, minor))]
    return f"fp8.recipe {', '.join(taken)}" if taken else "no FP8"


def _optional(name: str, module: str, package: str, off: str, fix: str) -> Finding:
    """Something that only GPU runs use: imported, since being installed is not enough."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken build raises whatever it likes
        missing = isinstance(error, ModuleNotFoundError) and error.name == module
        found = "not installed" if missing else f"cannot be imported: {' '.join(str(error).split())[:200]}"
        return Finding(name, "absent", found, off, f"where there is a GPU: {fix}")
    try:
        return Finding(name, "ok", importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "ok", "of an unknown version")


def _compiler() -> Finding:
    found = compiler.find_compiler()
    if found is not None:
        return Finding("C++ compiler", "ok", found)
    off = "on the CPU, our own products of bf16 experts and of several experts a token (torch's are used, slower)"
    return Finding("C++ compiler", "absent", "no g++ in PATH", off, "apt-get install g++, or its like")


def _disk(folder: Path) -> Finding:
    there = folder.resolve()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    found = f"{free / GIB:.1f} GiB free at {there}"
    if free < MIN_DISK:
        off = f"checkpoints of large bases: a converted 7B has 14 GB (wanted: {MIN_DISK / GIB:.0f} GiB)"
        return Finding("disk", "absent", found, off, "free some, or name another disk as run_dir and --folder")
    return Finding("disk", "ok", found)


def _shared_memory(path: Path = Path("/dev/shm"), usage: Callable[[Path], object] = shutil.disk_usage) -> Finding:
    off = "NCCL between GPUs of one host, and workers that hand tensors over"
    fix = "docker run --shm-size=8g (or --ipc=host); Kubernetes: an emptyDir of medium Memory at /dev/shm"
    if not path.exists():
        return Finding("shared memory", "absent", f"no {path}", off, fix)
    free = usage(path).free  # type: ignore[attr-defined]
    found = f"{free / GIB:.2f} GiB free at {path}"
    if free < MIN_SHARED_MEMORY:
        return Finding("shared memory", "absent", f"{found}, wanted {MIN_SHARED_MEMORY / GIB:.0f} GiB", off, fix)
    return Finding("shared memory", "ok", found)


def _interfaces() -> Finding:
    """Interfaces that other hosts could come in by; gloo and NCCL take the first unless told."""
    names = [name for _, name in socket.if_nameindex() if _is_up(name)]
    outward = [name for name in names if name != "lo"]
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        fix = f"add a line for {host} to /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        off = "several hosts: others cannot find this one by its name"
        return Finding("interfaces", "absent", f"{', '.join(names)}; {host} has no address", off, fix)
    found = f"{', '.join(names)}; {host} is {address}"
    if not outward:
        return Finding("interfaces", "absent", found, "several hosts", "docker run --network=host, or attach a network")
    if address.startswith("127."):
        fix = f"GLOO_SOCKET_IFNAME={outward[0]} NCCL_SOCKET_IFNAME={outward[0]}, or a line in /etc/hosts"
        off = "several hosts: this one calls itself by an address that means each host itself"
        return Finding("interfaces", "absent", found, off, fix)
    return Finding("interfaces", "ok", found)


def _is_up(interface: str, folder: Path = Path("/sys/class/net")) -> bool:
    """Linux says; where it does not, all are taken to be. The loopback is up though it says "unknown"."""
    state = folder / interface / "operstate"
    return not state.exists() or state.read_text().strip() != "down"


def _port(port: int) -> Finding:
    name = f"port {port}"
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            off = "a rendezvous on this host at that port"
            return Finding(
                name,
                "absent",
                str(error.strerror),
                off,
                "torchrun --master-port with a free one, or PORT for examples/cluster/torchrun.sh",
            )
    return Finding(name, "ok", "free to listen on")


def _reach(address: str) -> Finding:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"--rendezvous {address!r} is not of the form HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        fix = f"is rank 0 started, {host} the right name, and port {port} open between the hosts?"
        why = error.strerror or str(error)
        return Finding("rendezvous", "absent", f"{host}:{port} cannot be reached: {why}", "runs that meet there", fix)
    return Finding("rendezvous", "ok", f"{host}:{port} answers")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
