"""A place that cannot be written to, or is another process's, is told before the work, and looking leaves nothing."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mole_mega import outputs
from mole_mega.errors import ConfigError
from mole_mega.outputs import check_file, check_folder, holding


def refused(check, path):
    with pytest.raises(ConfigError) as caught:
        check(path, "--out")
    return str(caught.value)


def test_what_can_be_written_is_let_by_and_stays_as_it_is(tmp_path):
    (tmp_path / "old").write_text("kept")
    for folder in (tmp_path, tmp_path / "new" / "deeper"):
        check_folder(folder, "--out")
    for file in (tmp_path / "old", tmp_path / "new", Path("here.json")):
        check_file(file, "--json")
    assert [path.name for path in tmp_path.iterdir()] == ["old"] and (tmp_path / "old").read_text() == "kept"


def test_what_cannot_is_named_with_the_setting_and_the_reason(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    in_the_way = f"--out: {file} is a file, not a folder that can be written to"
    assert refused(check_folder, file) == refused(check_folder, file / "run") == in_the_way
    assert refused(check_folder, Path("/proc/x")) == "--out: /proc/x cannot be written to: No such file or directory"
    assert refused(check_file, tmp_path) == f"--out: {tmp_path} is a folder, not a file that can be written"
    assert refused(check_file, tmp_path / "a" / "b") == f"--out: {tmp_path / 'a'} is not a folder"
    assert refused(check_file, Path("/proc/version")).startswith("--out: /proc/version cannot be written")
    assert refused(check_file, Path("/proc/x")) == "--out: /proc cannot be written to: No such file or directory"


HOLD = """
import sys, time
from pathlib import Path
from mole_mega.outputs import holding
with holding(Path(sys.argv[1]), "run_dir"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_one_process_s_until_it_ends_however_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "_RELEASE_SECONDS", 0.2)
    folder = tmp_path / "new" / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        whose = f"run_dir: process {other.pid} on .* is already at work in {folder}"
        with pytest.raises(ConfigError, match=whose), holding(folder, "run_dir"):
            pass
        os.kill(other.pid, signal.SIGKILL)
    for _ in range(2):
        with holding(folder, "run_dir"):
            assert (folder / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_folder_that_stayed_empty_is_taken_away_again_and_one_that_did_not_stays(tmp_path):
    folder = tmp_path / "new" / "run"
    with pytest.raises(ConfigError), holding(folder, "run_dir"):
        raise ConfigError("refused")
    assert list(tmp_path.iterdir()) == []
    with holding(folder, "run_dir"):
        (folder / "metrics.csv").write_text("")
    with holding(folder, "run_dir"):
        pass
    assert [path.name for path in folder.iterdir()] == ["metrics.csv"]
    (tmp_path / "there").mkdir()
    with holding(tmp_path / "there", "run_dir"):
        pass
    assert (tmp_path / "there").is_dir()


def test_a_lock_that_was_removed_while_it_was_waited_for_is_nobodys(tmp_path, monkeypatch):
    take, folder = outputs._take, tmp_path / "run"
    monkeypatch.setattr(outputs, "_RELEASE_SECONDS", 0.2)

    def take_what_is_no_more(lock):
        monkeypatch.setattr(outputs, "_take", take)
        (folder / ".lock").unlink()
        folder.rmdir()
        return take(lock)

    monkeypatch.setattr(outputs, "_take", take_what_is_no_more)
    with holding(folder, "run_dir"), pytest.raises(ConfigError, match="already at work"), holding(folder, "run_dir"):
        pass


def test_without_locks_nothing_is_kept_and_all_goes_on(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with holding(tmp_path, "run_dir"), holding(tmp_path, "run_dir"):
        pass
