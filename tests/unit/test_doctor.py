"""The doctor names what is missing, what that switches off, and the fix; only what everything needs is an error."""

import json
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from mole_mega import doctor
from mole_mega.errors import ConfigError


def test_this_machine_can_run_and_everything_missing_has_a_fix(tmp_path, capsys):
    assert (
        doctor.main(["--folder", str(tmp_path / "not" / "there"), "--json", str(tmp_path / "f.json"), "--debug"]) == 0
    )
    findings = json.loads((tmp_path / "f.json").read_text())
    names = [finding["name"] for finding in findings]
    for name in ("Python", "torch", "CUDA", "NCCL", "Transformer Engine", "Apex", "flash attention", "C++ compiler",
                 "disk", "shared memory", "interfaces", "port 29500", "port 29400"):  # fmt: skip
        assert name in names
    assert all(finding["fix"] and finding["switches_off"] for finding in findings if finding["status"] != "ok")
    assert "everything that a CPU run needs is here" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "least"), [("no-such-package", "1"), ("torch", "99.0")])
def test_what_everything_needs_is_an_error(monkeypatch, capsys, name, least):
    monkeypatch.setattr(doctor, "NEEDED", {name: least})
    assert doctor.main(["--debug"]) == 2
    text = capsys.readouterr().out
    assert f"fix: pip install '{name}>={least}'" in text
    assert f"nothing can run without: {name}" in text


def test_no_compiler_is_no_error(monkeypatch):
    monkeypatch.setattr(doctor.compiler, "find_compiler", lambda: None)
    finding = doctor._compiler()
    assert finding.status == "absent" and "bf16 experts" in finding.switches_off and "g++" in finding.fix


def test_versions_are_compared_as_numbers():
    assert doctor._numbers("2.13.0+cpu") == (2, 13, 0)
    assert doctor._numbers("0.9") < doctor._numbers("0.19.2")
    assert doctor._numbers("2.14.0rc1") == (2, 14)


def test_an_optional_package_that_is_broken_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_build.py").write_text("raise OSError('libcudart.so.12: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor._optional("Apex", "broken_build", "broken-build", "something", "rebuild it")
    assert (finding.status, finding.found) == ("absent", "cannot be imported: libcudart.so.12: cannot open")
    assert doctor._optional("Apex", "no_such_build", "no-such-build", "something", "x").found == "not installed"


def test_what_is_required_is_an_error_too(monkeypatch, capsys):
    absent = doctor.Finding("CUDA", "absent", "no device", "GPUs", "get one")
    monkeypatch.setattr(doctor, "_accelerator", lambda: [absent])
    assert doctor.main(["--debug"]) == 0
    assert doctor.main(["--debug", "--require", "torch"]) == 0
    capsys.readouterr()
    assert doctor.main(["--debug", "--require", "torch", "--require", "CUDA"]) == 2
    assert capsys.readouterr().out.endswith("required, and not here: CUDA\n")
    assert doctor.main(["--require", "cuda"]) == 2
    assert "--require 'cuda' is nothing that is looked at; there are Python, torch," in capsys.readouterr().err


def test_a_rendezvous_is_tried():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        server.listen()
        port = server.getsockname()[1]
        assert doctor._reach(f"localhost:{port}").status == "ok"
        assert doctor._port(port).status == "absent"
    finding = doctor._reach(f"localhost:{port}")
    assert (finding.status, finding.found) == ("absent", f"localhost:{port} cannot be reached: Connection refused")
    assert doctor._port(port).status == "ok"
    for wrong in ("localhost", ":29500", "host:port", "host:70000"):
        with pytest.raises(ConfigError, match="is not of the form HOST:PORT"):
            doctor._reach(wrong)


def test_too_little_room_is_told_in_numbers(tmp_path, monkeypatch):
    def usage(path):
        return SimpleNamespace(free=64 * 2**20)

    finding = doctor._shared_memory(tmp_path, usage)
    assert finding.found == f"0.06 GiB free at {tmp_path}, wanted 1 GiB"
    assert "--shm-size" in finding.fix
    assert doctor._shared_memory(Path("/nowhere")).status == "absent"
    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert doctor._disk(tmp_path).status == "absent"


def test_an_interface_that_is_down_is_not_named(tmp_path):
    for name, state in (("eth0", "up"), ("ifb0", "down"), ("lo", "unknown")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "operstate").write_text(f"{state}\n")
    assert [name for name in ("eth0", "ifb0", "lo", "other") if doctor._is_up(name, tmp_path)] == [
        "eth0",
        "lo",
        "other",
    ]


def test_a_gpu_is_told_with_the_fp8_recipes_that_it_takes():
    assert doctor._fp8_recipes((9, 0), "13.0") == "fp8.recipe delayed, tensorwise, blockwise"
    assert doctor._fp8_recipes((8, 9), "12.8") == "fp8.recipe delayed, tensorwise"
    assert doctor._fp8_recipes((8, 0), "13.0") == "no FP8"
