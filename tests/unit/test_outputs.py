"""A place that cannot be written to is told before the work, and looking leaves nothing behind."""

from pathlib import Path

import pytest

from mole_mega.errors import ConfigError
from mole_mega.outputs import check_file, check_folder


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
